"""What a model answers: batched greedy generation, and exact match in a single pass."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit._numbers import check_integer, check_list
from lorakit._progress import Progress
from lorakit.layers.named_adapters import check_one_choice
from lorakit.models.several import check_known, using_adapters
from lorakit.models.targets import unwrapped
from lorakit.speed.accelerated import accelerated
from lorakit.training.batch import context_of


def _in_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices sorted by length, longest first, and cut into batches: little padding, and memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _ends(rows: Tensor, scores: Any, *, start: int, stop: str, tokenizer: Any) -> Tensor:
    """Which rows, (batch, seq) -> (batch), hold the text `stop` near their end, and not before `start`."""
    last = rows[:, max(start, rows.shape[1] - len(stop.encode()) - 1) :]  # a token may be a single byte
    return torch.tensor([stop in tokenizer.decode(row) for row in last.tolist()], dtype=torch.bool, device=rows.device)


@contextmanager
def _plainly(model: Any) -> Iterator[Any]:
    """The model as `generate` should see it: without the penalties, bans and bounds of its own generation config.

    What is not said at the call, `generate` takes from the model. So it gets a view that shares all but that config.
    """
    model = unwrapped(model)  # torch.compile's has no attributes of its own
    if getattr(model, "generation_config", None) is None:
        yield model
        return
    inside = [(m, m.generation_config) for m in model.modules() if m is not model and "generation_config" in vars(m)]
    view = copy.copy(model)
    view.generation_config = type(model.generation_config)()
    try:
        for module, _ in inside:  # of a wrapper such as PEFT's, which hands the call on
            module.generation_config = view.generation_config
        yield view
    finally:
        for module, own in inside:
            module.generation_config = own


@torch.no_grad()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    stop: str | None = None,
    adapters: Sequence[str | None] | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 64,
    accelerate: bool = True,
    show: bool = True,
) -> list[str]:
    """The most likely continuation of each prompt, token by token, up to `stop` (left out of the answer).

    The model's own generation config has no say: a repetition penalty or forbidden words would make it another token.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer; prompts are tokenised as they are, without added special tokens.
        prompts: texts.
        stop: ends an answer; it need not be a single token. The tokenizer's eos ends one too, and alone if this is None
            (SmolLM2's is the end of a turn; another model's need not be: `ChatFormat.of(tokenizer).end`).
        adapters: of a model with named adapters, which one answers each prompt, None for the base; they share batches.
        max_new_tokens: at most so many tokens an answer, and no more than the context holds with the longest prompt.
        batch_size: prompts at a time, padded on the left.
        accelerate: use what `speed.accelerated` finds to pay; False for the plain formulas.
        show: draw a progress bar.

    Returns:
        one answer a prompt, in their order.

    Raises:
        ValueError: a prompt without tokens or without room in the context, an empty stop, or a number out of range; an
            unknown adapter, or not one for each prompt.
    """
    if not callable(tokenizer) or not hasattr(model, "generate"):
        raise ValueError(f"expected a model with generate() and its tokenizer, got {type(model).__name__}")
    check_integer("max_new_tokens", max_new_tokens)
    check_integer("batch_size", batch_size)
    check_list("prompts", prompts)
    if any(not isinstance(prompt, str) for prompt in prompts):
        raise ValueError("expected a list of texts as prompts, got something else")
    if stop is not None and (not isinstance(stop, str) or not stop):
        raise ValueError(f"expected stop as a text that is not empty, or None, got {stop!r}")
    check_one_choice(model)
    if adapters is not None:
        if isinstance(adapters, str) or len(adapters) != len(prompts):
            raise ValueError(f"expected an adapter for each of {len(prompts)} prompts, got {adapters!r}")
        check_known(model, adapters)
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    room = context_of(model) - max(map(len, ids), default=0)
    if room < 1 or not all(ids):
        most = context_of(model) - 1
        raise ValueError(f"expected prompts of 1 to {most} tokens, within the model's context, got {[*map(len, ids)]}")
    stop_ids = tokenizer(stop, add_special_tokens=False)["input_ids"] if stop else []
    ends = {tokenizer.eos_token_id, stop_ids[0] if len(stop_ids) == 1 else None} - {None}
    settings = {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": min(max_new_tokens, room),
        "pad_token_id": max(ends, default=0),
    }
    if ends:
        settings["eos_token_id"] = sorted(ends)
    answers, was_training = [""] * len(ids), model.training
    model.eval()
    try:
        with (
            accelerated(model, batch_size, on=accelerate),
            _plainly(model) as view,
            Progress(len(ids), "generating", "answer", show) as progress,
        ):
            for batch in _in_batches([len(row) for row in ids], batch_size):
                longest = len(ids[batch[0]])
                pads = [longest - len(ids[i]) for i in batch]
                tokens = torch.tensor(
                    [[0] * pad + ids[i] for pad, i in zip(pads, batch, strict=True)], dtype=torch.long
                )
                mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], dtype=torch.long)
                inputs = {"input_ids": tokens.to(model.device), "attention_mask": mask.to(model.device)}
                if stop is not None and len(stop_ids) > 1:
                    settings["stopping_criteria"] = [partial(_ends, start=longest, stop=stop, tokenizer=tokenizer)]
                with using_adapters(model, [adapters[i] for i in batch]) if adapters else nullcontext():
                    output = view.generate(**inputs, **settings)
                for i, row in zip(batch, output[:, longest:].tolist(), strict=True):
                    end = next((k for k, token in enumerate(row) if token in ends), len(row))
                    text = tokenizer.decode(row[:end])
                    answers[i] = text.split(stop)[0] if stop else text
                progress.update(len(batch))
    finally:
        model.train(was_training)
    return answers
