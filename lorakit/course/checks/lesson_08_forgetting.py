"""The checks of lesson 08's exercises: forgetting at equal success, intruders, a step's FLOPs, a ratio of rates."""

from collections.abc import Iterator
from statistics import fmean

import torch

from lorakit.course.checks.exercise import Case, exercise, in_parts
from lorakit.course.checks.grading import random_matrix

PATHS = [  # share of the new, loss on the old, look by look; the share that is asked for
    ([0.0, 0.25, 0.5, 1.0], [0.0, 0.4, 1.0, 1.6], 0.75),
    ([0.0, 0.5, 0.25, 0.75, 1.0], [0.1, 0.6, 0.9, 1.1, 1.4], 0.4),
    ([0.0, 0.125, 0.875, 0.75, 1.0], [0.0, 0.3, 0.9, 1.2, 1.3], 0.875),
]
WIDTHS = [(40, 30, 6, 0.5), (30, 40, 8, 0.6), (25, 25, 5, 0.3)]  # d_out, d_in, k, epsilon
LAYERS = [(64, 48, 4, 10), (576, 576, 16, 512), (1536, 576, 1, 7)]  # d_out, d_in, rank, tokens
SWEEPS = [  # (rate, loss of each seed): LoRA's, full fine-tuning's
    ({1e-3: (0.5, 0.9), 2e-3: (0.4, 0.6), 4e-3: (0.2, 1.4)}, {1e-4: (0.7, 0.7), 2e-4: (0.3, 0.5), 4e-4: (0.6, 0.6)}),
    ({1e-3: (0.5, 0.5), 2e-3: (0.4, 0.6), 4e-3: (0.4, 0.3)}, {1e-4: (0.7, 0.6), 2e-4: (0.2, 0.5), 4e-4: (0.1, 0.9)}),
    ({5e-4: (0.8, 0.6), 1e-3: (0.4, 0.5), 2e-3: (0.3, 0.9)}, {1e-4: (0.2, 0.3), 2e-4: (0.1, 0.7), 4e-4: (0.6, 0.5)}),
]


@exercise("right: methods are compared where they know equally much", "the loss")
def check_at_equal_success() -> Iterator[Case]:
    """Checks `at_equal_success(new, old, share) -> loss`: the loss on the old when the new is first known that well."""
    for new, old, share in PATHS:
        at = next(i for i, known in enumerate(new) if known >= share)
        part = (share - new[at - 1]) / (new[at] - new[at - 1])
        last = max(i for i, known in enumerate(new) if known < share)
        again = (share - new[last]) / (new[last + 1] - new[last])
        wrong = {
            "is the one at the end: a longer training forgets more, whatever the method": old[-1],
            "is the one at the next look: between two looks go along a straight line": old[at],
            "is the one at the look before: the share was not reached yet": old[at - 1],
            "is the one when the share was last passed: the first time is asked for": old[last]
            + again * (old[last + 1] - old[last]),
        }
        on = f"new {new}, old {old}, share {share}"
        yield Case(on, (new, old, share), old[at - 1] + part * (old[at] - old[at - 1]), wrong)


@exercise("right: like none of the vectors that were there", "the count")
def check_intruders() -> Iterator[Case]:
    """Checks `intruders(W, delta, k, epsilon) -> count`: how many of the first k vectors are like none before."""
    for i, (d_out, d_in, k, epsilon) in enumerate(WIDTHS):
        n = min(d_out, d_in)
        U, V = (torch.linalg.qr(random_matrix(d, n, seed=10 * i + j)).Q for j, d in enumerate((d_out, d_in)))
        W = (U * 1.3 ** -torch.arange(n, dtype=torch.float32)) @ V.T
        mixed = U @ random_matrix(n, 3, seed=10 * i + 2)
        delta = 2 * mixed / mixed.norm(dim=0) @ V[:, 2:5].T - 4 * U[:, :1] @ V[:, :1].T
        delta += 3 * U[:, k + 1 : k + 2] @ V[:, k + 1 : k + 2].T  # a small direction of W that becomes a large one
        before, after, alone = (torch.linalg.svd(M, full_matrices=False) for M in (W, W + delta, delta))
        cosines = after.U[:, :k].T @ before.U
        size = cosines.abs()
        right = int((size.amax(1) < epsilon).sum())
        wrong = {
            "compares right singular vectors: the paper's are the left ones": int(
                ((after.Vh[:k] @ before.Vh.T).abs().amax(1) < epsilon).sum()
            ),
            "takes cosines with their sign: a singular vector may point either way": int(
                (cosines.amax(1) < epsilon).sum()
            ),
            "compares with the first k vectors of W only: it has more": int((size[:, :k].amax(1) < epsilon).sum()),
            "counts the ones that are like some vector: intruders are the others": k - right,
            "is about the update alone: the vectors are those of W + delta": int(
                ((alone.U[:, :k].T @ before.U).abs().amax(1) < epsilon).sum()
            ),
        }
        on = f"a weight of {d_out} x {d_in}, its first {k} vectors, epsilon {epsilon}"
        yield Case(on, (W, delta, k, epsilon), right, wrong)


@exercise("right: two products of three, and the adapter's own", "full, lora")
def check_step_flops() -> Iterator[Case]:
    """Checks `step_flops(d_out, d_in, rank, tokens) -> full, lora`: a layer's FLOPs, forward and backward."""
    for d_out, d_in, rank, tokens in LAYERS:
        product, small = 2 * tokens * d_out * d_in, 2 * tokens * rank * (d_out + d_in)
        halved = "counts a multiplication and an addition as one: they are two FLOPs"
        right, wrong = in_parts(
            (3 * product, {halved: 3 * product // 2, "is the forward pass alone: backward has two products": product}),
            (
                2 * product + 3 * small,
                {
                    halved: (2 * product + 3 * small) // 2,
                    "lacks the adapter's own products": 2 * product,
                    "has the adapter's forward pass only: A and B have gradients": 2 * product + small,
                    "has the gradient of the frozen weight: nobody needs it": 3 * product + 3 * small,
                    "lacks the gradient of the input: the layers below need it": product + 3 * small,
                },
            ),
        )
        yield Case(f"{d_out} x {d_in}, rank {rank}, {tokens} tokens", (d_out, d_in, rank, tokens), right, wrong)


@exercise("right: a ratio, and whether both sweeps were long enough", "ratio, inside")
def check_rate_ratio() -> Iterator[Case]:
    """Checks `rate_ratio(lora, full) -> ratio, inside`: of the best rates, and whether neither lies at an edge."""
    for sweeps in SWEEPS:
        runs = [[(lr, seed, loss) for lr, row in each.items() for seed, loss in enumerate(row)] for each in sweeps]
        means = [{lr: fmean(losses) for lr, losses in each.items()} for each in sweeps]
        best = [min(each, key=each.__getitem__) for each in means]
        lucky = [min(own, key=lambda run: run[2])[0] for own in runs]
        worst = [max(each, key=each.__getitem__) for each in means]
        within = [min(each) < lr < max(each) for each, lr in zip(sweeps, best, strict=True)]
        right, wrong = in_parts(
            (
                best[0] / best[1],
                {
                    "is of the best single runs: take the mean over seeds first": lucky[0] / lucky[1],
                    "is full fine-tuning's over LoRA's": best[1] / best[0],
                    "is of the highest losses: lower is better": worst[0] / worst[1],
                },
            ),
            (
                all(within),
                {
                    "looks at LoRA's sweep only": within[0],
                    "looks at full fine-tuning's sweep only": within[1],
                },
            ),
        )
        yield Case(f"rates {list(sweeps[0])} and {list(sweeps[1])}", tuple(runs), right, wrong)
