"""What a training step costs, from a model's config alone: parameters, bytes by kind, FLOPs.

No rule of thumb is used. The model is built of fake tensors, which have shapes and no values, and goes through a step,
forward and backward, under a ledger that sees every tensor come and go. So any architecture will do.

When you compare with a machine:

- The step is the plain one: the library's model and loss, LoRA by its formula (as PEFT), full rows without padding,
  gradients set to None between steps.
- The optimiser's step adds nothing, as AdamW with `fused=True`. Others make tensors of a weight's size or, on a GPU, of
  all trained weights' size.
- Unseen is what a kernel needs for itself, what an allocator keeps in reserve, and what a GPU's context takes.
- Kernels are the CPU's. Its attention keeps nothing of (tokens, tokens) unless it has dropout; where heads share a key,
  it copies keys and values for each of them, which a GPU's does not.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit._numbers import check_integer, check_list
from lorakit._suggest import check_name
from lorakit._words import short
from lorakit.cost.configs import find_config
from lorakit.cost.fake_step import compute_formulas, quantize, rehearse
from lorakit.layers.config import LoRAConfig
from lorakit.models.coverage import by_kind, unusual
from lorakit.models.inject import put_in, without_adapter

METHODS = {"full": 0, "lora": 0, "lora-8bit": 8, "qlora": 4}  # bits of a frozen linear layer's weight; 0: as they are
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("weights", "adapters", "optimizer", "gradients", "activations", "logits", "temporaries")


def _adam8bit(p: Tensor) -> int:
    """Two states in a byte a value, and a float32 absmax for 256; small tensors stay in float32."""
    return 2 * (p.numel() + 4 * math.ceil(p.numel() / 256)) if p.numel() >= 4096 else 8 * p.numel()


def _adafactor(p: Tensor) -> int:
    """The mean square of each row and each column, of a matrix; and a counter."""
    values = p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel()
    return values * p.element_size() + 4


OPTIMIZERS: dict[str, Callable[[Tensor], int]] = {  # a trained tensor -> bytes of its state
    "adamw": lambda p: 2 * p.nbytes + 4,  # torch's: two states in the parameter's own dtype, and a float32 counter
    "adamw-paged": lambda p: 8 * p.numel(),  # bitsandbytes': in float32; a GPU may move it to the host's memory
    "adamw-8bit": _adam8bit,  # bitsandbytes' (Dettmers et al. 2022, arXiv:2110.02861)
    "adafactor": _adafactor,  # torch's (Shazeer and Stern 2018, arXiv:1804.04235), without momentum
    "sgd-momentum": lambda p: p.nbytes,
    "sgd": lambda p: 0,
}


@dataclass(frozen=True)
class Budget:
    """The costs of one training step. Bytes are the tensors' own; 1 GB is 10^9 bytes."""

    settings: dict[str, Any]  # what was asked for
    parameters: int  # of the model, without adapters; a shared weight counts once
    trained: int
    peak: dict[str, int]  # bytes by kind, at the moment of the step when they are the most together
    moment: str  # when that is: in which pass, and how much of its matrix products is done
    gradient_bytes: int  # after the backward pass; at the peak, few may be there yet
    activation_bytes: int  # what the forward pass keeps for the backward pass, logits included
    checkpoint_bytes: int  # of a file with what was trained
    forward_flops: int  # of matrix products
    backward_flops: int
    left_out: dict[str, int] = field(default_factory=dict)  # kind, such as routers -> its numbers without an adapter
    not_quantised: dict[str, int] = field(default_factory=dict)  # kind, such as experts -> its numbers in `dtype` still

    @property
    def peak_bytes(self) -> int:
        """The most bytes that exist at any moment of a step."""
        return sum(self.peak.values())

    def table(self) -> str:
        """The budget as text."""
        return table([self])

    __str__ = table


def budget(
    model: Any,
    method: str = "lora",
    *,
    rank: int = 16,
    targets: str | Iterable[str] = "all-linear",
    dtype: str | torch.dtype = "float32",
    optimizer: str = "adamw",
    batch_size: int = 8,
    tokens: int | None = None,
    checkpointing: bool = False,
    master_weights: bool = False,
    double_quant: bool = True,
    attention: str | None = None,
    by_layer: Mapping[str, Any] | None = None,
) -> Budget:
    """Counts what one training step of a model needs, without its weights; a 70B model takes seconds.

    Args:
        model: a transformers config, a name such as `"smollm2"` or `"llama-2-70b"`, a folder or file, or a hub id; see
            `lorakit.cost.configs.find_config`.
        method: `"full"`; `"lora"`; `"qlora"`, with all linear layers but the output head in NF4; or `"lora-8bit"`, with
            the same ones in int8.
        rank: of the adapters.
        targets: the layers that get one, as in `lorakit.find_targets`.
        dtype: of all weights that are not quantised: `"float32"`, `"bfloat16"` or `"float16"`. Adapters are float32.
        optimizer: a name in `OPTIMIZERS`.
        batch_size: sequences a step.
        tokens: of each sequence; all have labels. None for 512, or the model's context if that is less.
        checkpointing: whether each block's activations are made again in the backward pass.
        master_weights: whether trained weights below float32 have a float32 copy, for which the states are then: 16
            bytes a parameter under AdamW (Micikevicius et al. 2018, arXiv:1710.03740).
        double_quant: whether NF4's absmax values are stored in bytes.
        attention: transformers' `attn_implementation`, such as `"eager"`; None for its default.
        by_layer: further settings of a `LoRAConfig` by their names: `rank_pattern`, `exclude_modules`,
            `layers_to_transform`, `layers_pattern`.

    Raises:
        ValueError: a setting is unknown or out of range, or the step's shapes depend on values.
    """
    dtype = str(dtype).removeprefix("torch.")
    targets = targets if isinstance(targets, str) or not isinstance(targets, Iterable) else list(targets)
    check_name("a method", method, METHODS)
    check_name("a dtype", dtype, DTYPES)
    check_name("an optimizer", optimizer, OPTIMIZERS)
    check_integer("batch_size", batch_size)
    if method != "full":
        check_integer("rank", rank)
    if not isinstance(attention, str | None):
        raise ValueError(f"expected attention as a name of transformers', or None, got {attention!r}")
    name, config = find_config(model)  # which may have to be made: after what is quick to check
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    tokens = int(min(512, context)) if tokens is None else tokens
    check_integer("tokens", tokens)
    if tokens > context:
        raise ValueError(f"expected at most {context} tokens, the model's context, got {tokens}")

    left, wide = dict[str, int](), dict[str, int]()

    def prepare(network: nn.Module) -> None:
        if METHODS[method]:
            quantize(network, METHODS[method], double_quant)
            wide.update(unusual(by_kind(network, lambda name, key: False)))
        if method != "full":
            put_in(network, LoRAConfig(rank, rank, targets=targets, **(by_layer or {})))  # any scale will do here
            compute_formulas(network)
            left.update(unusual(without_adapter(network), without=["linear layers"]))

    kernel = {"attn_implementation": attention} if attention else {}
    step = rehearse(config, DTYPES[dtype], (batch_size, tokens), prepare, checkpointing, **kernel)
    pairs = [(p, p.float() if master_weights else p) for p in step.trained]
    state = sum(OPTIMIZERS[optimizer](master) + (master.nbytes if master is not p else 0) for p, master in pairs)
    return Budget(
        settings={
            **{"model": name, "method": method, "rank": rank, "targets": targets, "dtype": dtype},
            **{"optimizer": optimizer, "batch_size": batch_size, "tokens": tokens, "checkpointing": checkpointing},
            **{"master_weights": master_weights, "double_quant": double_quant, "attention": attention},
            **(by_layer or {}),
        },
        parameters=step.parameters,
        trained=sum(p.numel() for p in step.trained),
        peak={kind: step.ledger.peak[kind] for kind in KINDS} | {"optimizer": state},
        moment=_moment(step.ledger.peak_flops, step.forward_flops, step.ledger.flops),
        gradient_bytes=step.ledger.now["gradients"],
        activation_bytes=step.kept_bytes,
        checkpoint_bytes=sum(p.nbytes for p in step.trained),
        forward_flops=step.forward_flops,
        backward_flops=step.ledger.flops - step.forward_flops,
        left_out=left,
        not_quantised=wide,
    )


def table(budgets: Sequence[Budget]) -> str:
    """Budgets of one model side by side, as text.

    Raises:
        ValueError: there are none, or something else.
    """
    check_list("budgets", budgets)
    if not len(budgets) or not all(isinstance(each, Budget) for each in budgets):
        raise ValueError(f"expected at least one Budget, got {short(budgets)}")
    first = budgets[0].settings
    extras = [name.replace("_", " ") for name in ("checkpointing", "master_weights") if first[name]]
    size = f"{first['batch_size']} x {first['tokens']} tokens"
    title = ", ".join([first["model"], size, first["dtype"], first["optimizer"], *extras])
    rows: dict[str, list[str]] = {
        "": [b.settings["method"] for b in budgets],
        "parameters": [f"{b.parameters:,}" for b in budgets],
        "trained": [f"{b.trained:,}" for b in budgets],
        "at the peak of a step": [b.moment for b in budgets],
        **{f"  {kind}": [_bytes(b.peak[kind]) for b in budgets] for kind in KINDS},
        "  in all": [_bytes(b.peak_bytes) for b in budgets],
        "kept by the forward pass": [_bytes(b.activation_bytes) for b in budgets],
        "all gradients": [_bytes(b.gradient_bytes) for b in budgets],
        "file of what was trained": [_bytes(b.checkpoint_bytes) for b in budgets],
        "forward pass": [_flops(b.forward_flops) for b in budgets],
        "backward pass": [_flops(b.backward_flops) for b in budgets],
        **_left(budgets, "no adapter", "left_out"),
        **_left(budgets, "not quantised", "not_quantised"),
    }
    return "\n".join([title, *(f"{name:<25}{''.join(f'{v:>17}' for v in row)}".rstrip() for name, row in rows.items())])


def _moment(done: int, forward: int, total: int) -> str:
    backward = done >= forward
    share = (done - forward) / (total - forward) if backward else done / forward
    return f"{'backward' if backward else 'forward'}, {share:.0%}"


def _left(budgets: Sequence[Budget], what: str, field: str) -> dict[str, list[str]]:
    """A row for each kind of weight that some method passes over: its share of the parameters."""
    kinds = dict.fromkeys(kind for b in budgets for kind in getattr(b, field))
    numbers = {kind: [getattr(b, field).get(kind, 0) for b in budgets] for kind in kinds}
    return {
        f"{what}: {kind}": [f"{100 * n / b.parameters:.2g} %" if n else "-" for n, b in zip(row, budgets, strict=True)]
        for kind, row in numbers.items()
    }


def _bytes(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B" if n else "-"


def _flops(n: int) -> str:
    return f"{n / 1e12:.2f} TFLOP" if n >= 1e12 else f"{n / 1e9:.2f} GFLOP"
