"""The checks of lesson 03's exercises: masks, lengths, accumulation, packing, an adapter that acts, a project."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit._optional import need, quiet
from lorakit.course.checks.exercise import Case, exercise, in_parts
from lorakit.course.checks.grading import as_tensor, ask, random_matrix, require, same
from lorakit.layers.lora import LoRALinear
from lorakit.training.batch import IGNORE, Example, collate

TEXTS = [  # prompt, completion, length, pad_id; every completion ends with 2, the end token
    ([11, 2, 12, 13], [21, 2, 22, 2], 10, 2),
    ([11, 12, 13], [21, 22, 2], 9, 0),
    ([5, 7], [9, 0, 8, 2], 6, 0),
]
DRAWS = [(200, 0.05), (64, 0.0), (50, 0.1), (333, 0.02)]  # how many texts, and which share of them may be cut
BATCHES: list[
    list[list[tuple[int, int]]]
] = [  # micro-batches, each with the length of the prompt and of the completion of its texts
    [[(3, 2), (1, 6)], [(2, 1)], [(0, 5), (4, 3), (5, 4)]],
    [[(0, 9)], [(6, 1), (5, 2)]],
]
PACKS: list[list[tuple[list[int], list[int]]]] = [  # texts that share a row: prompt and completion
    [([5, 6], [7, 2]), ([], [8, 9, 2]), ([3], [4, 2])],
    [([], [4, 5, 2]), ([], [6, 2])],
]
UNUSED = "a trained adapter of an unused layer"
STATES = [  # an adapter, the size of B, alpha, in training mode, whether it acts, and why
    ("a trained adapter", 1.0, 4.0, False, True, "logits differ once it is off: `with model.disable_adapter():`"),
    ("a fresh adapter", 0.0, 4.0, False, False, "B is zero, and without it every logit stays the same"),
    ("a trained adapter, alpha = 0", 1.0, 0.0, False, False, "B is not zero, but the scale is: compare logits"),
    ("an adapter after one step", 1e-5, 4.0, False, True, "it acts, if weakly: is there a tolerance that hides it?"),
    ("a fresh adapter, in training mode", 0.0, 4.0, True, False, "dropout makes the difference: call model.eval()"),
    (UNUSED, 1.0, 4.0, False, False, "no logit passes through it: compare logits"),
]
FIELDS = ("trained", "seconds", "gradient_bytes", "optimizer_bytes", "first_loss", "final_loss")
EXAMPLES = [Example([1, k, *x, 2], [IGNORE] * 2 + [*x, 2]) for k in range(3, 11) for x in [[k] * (2 + k % 2)]]


@exercise(
    "right: the completion and its end are counted, nothing else is, also where pad_id is the end token",
    "input_ids, attention_mask, labels",
)
def check_mask() -> Iterator[Case]:
    """Checks `mask(prompt_ids, completion_ids, length, pad_id) -> (input_ids, attention_mask, labels)`."""
    for prompt, reply, length, pad in TEXTS:
        text, n, gap = prompt + reply, len(prompt), length - len(prompt + reply)
        padded, none, rest = text + [pad] * gap, [IGNORE] * n, [IGNORE] * gap
        ids = {
            "is padded on the left: generation wants that, training pads on the right": [pad] * gap + text,
            "is not padded to `length`": text,
        }
        seen = {
            "is 1 on the padding: only the text is seen": [1] * length,
            "goes by value: a token of the text may equal pad_id, go by position": [int(t != pad) for t in padded],
            "is 0 on the prompt: it has no labels, but it is read": [0] * n + [1] * len(reply) + [0] * gap,
        }
        want, by_value = none + reply + rest, [IGNORE if t == pad else t for t in padded]
        labels = {
            "is shifted: the model does that itself, label i is token i": [*want[1:], IGNORE],
            "goes by value: what equals pad_id may be the end, which is then never learned": none + by_value[n:],
            "counts the prompt: its labels are -100": text + rest,
            "counts prompt and padding: their labels are -100": padded,
            "counts the padding: its labels are -100": none + padded[n:],
            "counts the prompt, and goes by value: -100 belongs to places": by_value,
            "counts the prompt instead of the completion": prompt + [IGNORE] * (length - n),
            "leaves out the end token, so nobody learns to stop": none + reply[:-1] + [IGNORE, *rest],
        }
        three = (padded, ids), ([1] * len(text) + [0] * gap, seen), (want, labels)
        on = f"prompt {prompt}, completion {reply}, length {length}, pad_id {pad}"
        yield Case(on, (prompt, reply, length, pad), *in_parts(*three))


@exercise("right: the places that nobody fills, of all places in the batches", "the share")
def check_padding_share() -> Iterator[Case]:
    """Checks `padding_share(lengths, batch_size) -> share`: the padding among all places of padded batches."""
    for lengths, size in ([3, 5, 4, 8], 2), ([7, 7, 7], 3), ([1, 9, 2, 3, 6], 2), ([4, 1, 1, 1, 10], 8):
        batches = _batches(lengths, size)
        places, text = _places(lengths, size), sum(lengths)
        means = [1 - sum(batch) / (len(batch) * max(batch)) for batch in batches]
        wrong = {
            "is the share of text: padding is what is left": text / places,
            "pads all batches to one length: each is as long as its own longest text": 1
            - text / (len(lengths) * max(lengths)),
            "is the mean of the batches' shares: a long batch has more places": sum(means) / len(means),
            "compares the padding with the text: divide by all places": (places - text) / text,
            "gives the last batch more rows than it has": 1 - text / sum(size * max(batch) for batch in batches),
            "sorts first: take the texts in the given order": 1 - text / _places(sorted(lengths), size),
        }
        yield Case(f"lengths {lengths}, batch_size {size}", (lengths, size), 1 - text / places, wrong)


@exercise("right: long enough, a multiple of 8, and what it costs in labels", "max_length, lost")
def check_choose_length() -> Iterator[Case]:
    """Checks `choose_length(lengths, most_cut) -> (max_length, lost)`: a multiple of 8, and what it cuts off."""
    for seed, (count, most) in enumerate(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(10, 60, (count,), generator=generator).tolist()
        noise = torch.randn(count, generator=generator, dtype=torch.float32)
        replies = (20 * noise.exp()).int().add(1).tolist()
        lengths = [*zip(prompts, replies, strict=True), (400, 12)]  # the last prompt alone may be too long
        totals, labels = [p + c for p, c in lengths], sum(c for _, c in lengths)
        least, of_replies, of_prompts = (
            sorted(each)[len(each) - 1 - int(most * len(each))] for each in (totals, [*replies, 12], [*prompts, 400])
        )
        want = -8 * (-least // 8)
        chosen = {
            "is that of the longest text: a share of the texts may be cut": -8 * (-max(totals) // 8),
            "is no multiple of 8: round up": least,
            "is rounded down, so more texts are cut than may be: round up": least // 8 * 8,
            "counts completions alone: the prompt stands before them in the same row": -8 * (-of_replies // 8),
            "counts prompts alone: the completion follows in the same row": -8 * (-of_prompts // 8),
        }
        over = [(c, max(p + c - want, 0)) for p, c in lengths]
        lost = sum(min(c, cut) for c, cut in over)
        missed = {
            "is the share of the texts that are cut": sum(cut > 0 for _, cut in over) / len(lengths),
            "is a share of all tokens: prompts have no labels": lost / sum(totals),
            "counts tokens of prompts: of a text with a long prompt no more is lost than its completion": (
                sum(cut for _, cut in over) / labels
            ),
            "counts whole completions: what fits before max_length is kept": sum(c for c, cut in over if cut) / labels,
            "is a number of tokens: divide by that of all completions": lost,
        }
        on = f"{len(lengths)} texts, of which a share of {most:g} may be cut"
        yield Case(on, (lengths, most), *in_parts((want, chosen), (lost / labels, missed)))


@exercise("", "the loss, the gradient")
def _accumulated() -> Iterator[Case]:
    """What all micro-batches give together, and what they give with other weights."""
    for sizes in BATCHES:
        model, batches = _Bigrams(), [_batch(texts) for texts in sizes]
        pairs = []
        for batch in batches:
            loss = model(**batch).loss
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
            pairs.append((loss.detach(), gradient))
        model.with_gradient.clear()
        labels = [(batch["labels"][:, 1:] != IGNORE).sum().item() for batch in batches]

        def mixed(weights: list, total: float, pairs: list = pairs) -> tuple:
            return tuple(sum(w * each[i] for w, each in zip(weights, pairs, strict=True)) / total for i in (0, 1))

        by_hand: dict[str, list[int]] = {
            "is the mean of the batches' means: a batch of few labels counts as much as any": [1] * len(batches),
            "weighs batches by their texts: the loss is one of tokens": [len(texts) for texts in sizes],
            "weighs batches by all tokens, with prompts and padding": [b["labels"].numel() for b in batches],
            "counts labels that nothing predicts: a row's first token has no token before it": [
                int((batch["labels"] != IGNORE).sum()) for batch in batches
            ],
        }
        wrong = {hint: mixed(weights, sum(weights)) for hint, weights in by_hand.items()}
        wrong |= {"is the sum of the batches' means": mixed([1] * len(batches), 1)}
        wrong |= {"is the sum over the tokens: divide by their number": mixed(labels, 1)}
        on = f"micro-batches with {', '.join(map(str, labels))} labels"
        yield Case(on, (model, batches), mixed(labels, sum(labels)), wrong)


def check_accumulate(accumulate: Any) -> None:
    """Checks `accumulate(model, batches) -> loss`: the loss and the gradient of one large batch, out of small ones."""
    for case in _accumulated.cases():
        given: list[_Bigrams] = []
        loss = ask(_watched(accumulate, lambda model, _, given=given: given.append(model)), *case.inputs, on=case.on)
        gradients = [p.grad for p in given[-1].parameters() if p.grad is not None]
        require(len(gradients) == 2, case.on, "no gradient has arrived in p.grad: call backward(), and leave it there")
        early = all(given[-1].with_gradient[1:])
        require(early, case.on, "every batch is kept in memory up to one backward(): call it batch by batch")
        _accumulated.judge((loss, torch.cat([g.flatten() for g in gradients])), case)
    print("right: the same loss and gradient as one large batch, a batch at a time")


@exercise("right: each text as if it were alone in its row", "input_ids, position_ids, labels, visible")
def check_pack_row() -> Iterator[Case]:
    """Checks `pack_row(texts) -> (input_ids, position_ids, labels, visible)`: texts share a row and nothing else."""
    for texts in PACKS:
        given = [(prompt + reply, [IGNORE] * len(prompt) + reply) for prompt, reply in texts]
        ids, raw = ([token for text in given for token in text[i]] for i in (0, 1))
        places = [place for text, _ in given for place in range(len(text))]
        owner = torch.tensor([i for i, (text, _) in enumerate(given) for _ in text], dtype=torch.long)
        block, causal = owner[:, None] == owner, torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        want = [IGNORE if place == 0 else label for place, label in zip(places, raw, strict=True)]
        ends = [place == 0 for place in places[1:]] + [True]
        positions = {
            "go on from text to text: each begins at 0": list(range(len(ids))),
            "begin at 1: the first position is 0": [place + 1 for place in places],
        }
        labels = {
            "count the first token of a text: it would be learned from the end of the text before": raw,
            "leave out the last token of a text: that is its end": [
                IGNORE if end else label for end, label in zip(ends, raw, strict=True)
            ],
            "are shifted: the model does that itself, label i is token i": [*want[1:], IGNORE],
        }
        visible = {
            "shows a text those before it: both tokens must be of one text": causal,
            "shows what is still to come: token i sees j <= i": block,
            "is turned round: row i is what token i sees": (block & causal).T,
            "is True where nothing is seen": ~(block & causal),
        }
        three = (places, positions), (want, labels), (block & causal, visible)
        yield Case(
            f"texts of {', '.join(str(len(text)) for text, _ in given)} tokens", (given,), *in_parts((ids, {}), *three)
        )


def check_is_active(is_active: Any) -> None:
    """Checks `is_active(model, ids) -> bool`: whether the logits with the adapter are others than without it."""
    ids, given = torch.tensor([[1, 5, 7, 2], [3, 3, 9, 10]], dtype=torch.long), []
    for on, size, alpha, training, want, why in STATES:
        model = _Adapted(size, alpha, used=on != UNUSED).train(training)
        got = _truth(ask(_watched(is_active, lambda model, _: given.append(model)), model, ids, on=on), on)
        require(got == want, on, f"should be {want}: {why}")
        mode = "eval" if training else "training"
        require(given[-1].training == training, on, f"the model is left in {mode} mode, and came in the other")
        require(given[-1].layer.scale == model.layer.scale, on, "the adapter is left switched off: use `with`")
        require(not given[-1].recorded, on, "the passes were recorded for a backward: use torch.no_grad()")
    print("right: fresh, weak, scaled to nothing, in either mode; and the model is left as it was")


def check_compare(compare: Any) -> None:
    """Checks `compare(make_model, examples) -> {"LoRA": record, "full": record}`: the bookkeeping of two trainings."""
    on, made = "a Llama of two layers", []

    def make_model() -> nn.Module:
        model = _small_llama()
        made.append((model, list(model.parameters())))
        return model

    rows = _rows(ask(compare, make_model, EXAMPLES, on=on), on)
    adapter = _adapter(made, on)
    base = made[0][1]
    total, own = (sum(p.numel() for p in tensors) for tensors in (base, adapter))
    for arm, case in zip(rows, _books.cases(total, own, base[0].numel(), len(base), len(adapter)), strict=True):
        row, here = rows[arm], f"{on}, {arm}"
        _books.judge((row["trained"], row["gradient_bytes"], row["optimizer_bytes"]), case)
        falls = f"the loss went from {row['first_loss']:.4g} to {row['final_loss']:.4g}: it should fall"
        require(bool(row["final_loss"] < row["first_loss"]), here, falls)
        require(bool(row["seconds"] > 0), here, "seconds should be more than 0")
    a, b = (rows[arm]["first_loss"] for arm in rows)
    require(same(a, b), on, f"first losses are {a:.4g} and {b:.4g}: same base, same data, B = 0, so they should agree")
    again = _rows(ask(_watched(compare, lambda *_: torch.manual_seed(1)), make_model, EXAMPLES, on=on), on)
    a, b = (each["LoRA"]["final_loss"] for each in (rows, again))
    hint = "A is random, so set the seed before get_peft_model"
    require(same(a, b), f"{on}, LoRA", f"of two calls one ends at {a:.6g} and one at {b:.6g}: {hint}")
    print("right: each arm from the same base, LoRA's base untouched, every byte accounted for")


@exercise("", "trained, gradient_bytes, optimizer_bytes")
def _books(
    total: int = 4272, own: int = 928, shared: int = 384, layers: int = 20, adapters: int = 28
) -> Iterator[Case]:
    """What a record has of `total` numbers in so many tensors, `shared` of them with the head, `own` of the adapter."""
    for arm, n, whole, tensors in (("LoRA", own, own + total, adapters), ("full", total, total, layers)):
        trained = {"counts what is frozen: ask for requires_grad": whole, "is that of the base": total}
        trained |= {"counts a shared weight twice": total + shared, "is that of the adapter": own}
        gradient = {"is a number of values: a float32 takes four bytes": n, "counts frozen parameters": 4 * whole}
        gradient |= {"is 0: measure before zero_grad takes the gradients away": 0, "has 8 bytes a number": 8 * n}
        moments = {"has one moment: AdamW keeps two for each number": 4 * n, "counts frozen parameters": 8 * whole}
        moments |= {"is a number of values: a float32 takes four bytes": 2 * n, "has the gradients as well": 12 * n}
        moments["has AdamW's step counters as well: take exp_avg and exp_avg_sq"] = 8 * n + 4 * tensors
        row = (n, trained), (4 * n, gradient), (8 * n, moments)
        yield Case(f"a Llama of two layers, {arm}", (), *in_parts(*row))


def _rows(record: Any, on: str) -> dict[str, dict[str, Tensor]]:
    """The two records as numbers."""
    require(isinstance(record, dict), on, f"expected a dict of two records, got {type(record).__name__}")
    rows = {arm: record.get(arm) for arm in ("LoRA", "full")}
    for arm, row in rows.items():
        require(isinstance(row, dict), on, f"expected a record, a dict, under {arm!r}, got {type(row).__name__}")
        rows[arm] = {name: as_tensor(row.get(name), f"{on}, {arm}", name) for name in FIELDS}
        odd = ", ".join(name for name, value in rows[arm].items() if value.ndim or not value.isfinite())
        require(not odd, f"{on}, {arm}", f"expected a finite number for {odd}")
    return rows


def _adapter(made: list, on: str) -> list[nn.Parameter]:
    """The parameters of the adapter, once every model is seen to be trained as its arm says."""
    require(bool(made), on, "make_model was never called: it gives each arm a base of its own")
    require(len(made) > 1, on, "one model was made and trained twice: full fine-tuning began where LoRA ended")
    base, full = list(_small_llama().parameters()), 0
    adapters: list[nn.Parameter] = []
    for model, old in made:
        moved = sum(
            not same(p.detach().cpu().double(), q.detach().double(), 0.0) for p, q in zip(old, base, strict=True)
        )
        new = [p for p in model.parameters() if all(p is not q for q in old)]
        require(not (new and moved), on, f"under LoRA {moved} tensors of the base changed: only the adapter may train")
        adapters, full = new or adapters, full if new else max(full, moved)
    require(bool(adapters), on, "no model has an adapter: give one to get_peft_model, and leave the adapter in it")
    require(full == len(base), on, f"full fine-tuning moved {full} of the model's {len(base)} tensors: it trains all")
    return adapters


class _Adapted(nn.Module):
    """A model with dropout of its own and one adapter, which is switched off as in PEFT's models."""

    def __init__(self, size: float, alpha: float, used: bool):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.embed = nn.Embedding(11, 8, dtype=torch.float32).requires_grad_(False)
            self.layer = LoRALinear(nn.Linear(8, 11, dtype=torch.float32), 2, alpha, dropout=0.5)
        for seed, p in enumerate(self.parameters()):
            p.data = random_matrix(*p.shape, seed=seed)
        self.layer.B.data *= size
        self.used, self.dropout, self.recorded = used, nn.Dropout(0.5), False

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        self.recorded |= torch.is_grad_enabled()
        layer = self.layer if self.used else self.layer.base
        return SimpleNamespace(logits=layer(self.dropout(self.embed(input_ids))))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        scale, self.layer.scale = self.layer.scale, 0.0
        yield
        self.layer.scale = scale


class _Bigrams(nn.Module):
    """A language model that looks at one token alone, called as those of transformers are."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        for seed, p in enumerate(self.parameters()):
            p.data = random_matrix(*p.shape, seed=seed)
        self.with_gradient: list[bool] = []

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        self.with_gradient.append(self.head.weight.grad is not None)
        logits = self.head(self.embed(input_ids))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        return SimpleNamespace(loss=loss, logits=logits)


def _batch(sizes: list) -> dict[str, Tensor]:
    """Texts with prompts and completions of these lengths, as a batch."""
    rows = [(prompt, [(3 * i + prompt + reply) % 11 for i in range(prompt + reply)]) for prompt, reply in sizes]
    return collate([Example(ids, [IGNORE] * prompt + ids[prompt:]) for prompt, ids in rows])


def _small_llama() -> nn.Module:
    """A Llama of some thousand parameters with a tied head; every call makes the same."""
    transformers = need("transformers")
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**sizes, **heads)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    return [lengths[i : i + size] for i in range(0, len(lengths), size)]


def _places(lengths: list[int], size: int) -> int:
    return sum(len(batch) * max(batch) for batch in _batches(lengths, size))


def _truth(answer: Any, on: str) -> bool:
    value = answer.item() if getattr(answer, "shape", None) == () else answer
    require(isinstance(value, bool), on, f"expected True or False, got {type(answer).__name__}")
    return value


def _watched(function: Any, note: Callable[..., Any]) -> Any:
    """The same function, if it is one, but `note` is called before with what it is given."""

    @wraps(function, updated=())
    def call(*inputs: Any) -> Any:
        note(*inputs)
        return function(*inputs)

    return call if callable(function) else function
