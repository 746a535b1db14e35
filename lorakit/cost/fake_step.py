"""A training step without its values: a model of fake tensors goes forward and backward once, under a ledger.

Fake tensors have shapes, dtypes and storages, and no memory: a model of any size goes through its real code.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit._optional import need, quiet
from lorakit._words import one_line
from lorakit.cost.ledger import Ledger, aten
from lorakit.layers.bases import linear_shape
from lorakit.layers.fused import frozen_linear
from lorakit.layers.lora import LoRALinear
from lorakit.layers.nf4 import ABSMAX_BLOCK_SIZE, BLOCK_SIZE
from lorakit.models.inject import adapters, count, replace
from lorakit.models.targets import find_targets


def compute_formulas(model: nn.Module) -> None:
    """Lets every LoRALinear compute its formula in plain operations, as most code does."""
    for layer in adapters(model).values():
        if isinstance(layer, LoRALinear):
            vars(layer)["forward"] = layer.formula


class Stored(nn.Module):
    """Stands for a frozen linear layer in 4 or 8 bits: buffers of the right sizes, and a weight made at each use.

    Args:
        linear: the layer.
        bits: 4 for NF4, with an absmax for each block of values; 8 for int8, with a scale for each row.
        double_quant: whether NF4's absmax values are stored in bytes.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Module, bits: int, double_quant: bool):
        super().__init__()
        self.out_features, self.in_features = linear_shape(linear)
        n, self.bias = self.out_features * self.in_features, getattr(linear, "bias", None)
        blocks = math.ceil(n / BLOCK_SIZE)
        if bits == 8:
            sizes = {"codes": (n, torch.int8), "scales": (self.out_features, torch.float32)}
        elif double_quant:
            sizes = {"codes": (math.ceil(n / 2), torch.uint8), "absmax": (blocks, torch.uint8)}
            sizes |= {"scales": (math.ceil(blocks / ABSMAX_BLOCK_SIZE), torch.float32), "offset": (1, torch.float32)}
        else:
            sizes = {"codes": (math.ceil(n / 2), torch.uint8), "absmax": (blocks, torch.float32)}
        for name, (size, dtype) in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype))

    def frozen_weight(self, dtype: torch.dtype) -> Tensor:
        """A tensor of the weight's shape, (d_out, d_in)."""
        return torch.empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Values that mean nothing, of the layer's shape."""
        return frozen_linear(x, partial(self.frozen_weight, x.dtype), self.bias)


@dataclass(frozen=True)
class Rehearsal:
    """What a step came to."""

    parameters: int  # of the plain model
    trained: list[Tensor]  # fake
    ledger: Ledger  # of weights, adapters, gradients, activations, logits and temporaries
    kept_bytes: int  # that the forward pass left for the backward pass
    forward_flops: int


def rehearse(
    config: Any,
    dtype: torch.dtype,
    shape: tuple[int, int],
    prepare: Callable[[nn.Module], object],
    checkpointing: bool = False,
    **settings: Any,
) -> Rehearsal:
    """Takes a model from its config through one forward and backward pass.

    Args:
        config: of a causal language model.
        dtype: of its weights.
        shape: (sequences, tokens of each); all have labels, and none is padding.
        prepare: changes the model before the step: quantises, adapts, freezes.
        checkpointing: whether each block's activations are made again in the backward pass.
        settings: for the model, such as `attn_implementation`.

    Raises:
        ValueError: what the model does depends on values, or its code does not run on layers without them.
    """
    try:
        return _rehearse(config, dtype, shape, prepare, checkpointing, settings)
    except (RuntimeError, AttributeError, TypeError, LookupError, ArithmeticError, AssertionError) as error:
        # out of the model's code, which a fake model or an impossible config confuses
        kind, what = config.model_type, " ".join(str(error).split())
        raise ValueError(f"expected shapes that follow from the config, got {kind!r} in {dtype}: {what}") from error


def _rehearse(
    config: Any,
    dtype: torch.dtype,
    shape: tuple[int, int],
    prepare: Callable[[nn.Module], object],
    checkpointing: bool,
    settings: dict[str, Any],
) -> Rehearsal:
    with _fake():
        try:
            model = need("transformers").AutoModelForCausalLM.from_config(config, dtype=dtype, **settings).train()
        except (ValueError, ImportError) as error:  # an attention that it does not have, or not here
            raise ValueError(f"expected a model that transformers makes so, got: {one_line(error)}") from error
        model.config.use_cache = False
        parameters, plain = count(model).total, set(model.parameters())
        prepare(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        vocabulary = config.get_text_config().vocab_size
        ledger = Ledger(lambda new: "logits" if new.ndim > 1 and new.shape[-1] == vocabulary else "temporaries")
        for buffer in model.buffers():
            ledger.add(buffer, "weights")
        for parameter in model.parameters():
            ledger.add(parameter, "weights" if parameter in plain else "adapters")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, "gradients"))
        resident, ids = ledger.now.total(), torch.zeros(shape, dtype=torch.long)
        with ledger:
            loss = model(input_ids=ids, labels=ids).loss
            ledger.move_all("temporaries", "activations")
            kept_bytes, forward_flops = ledger.now.total() - resident, ledger.flops
            loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        return Rehearsal(parameters, trained, ledger, kept_bytes, forward_flops)


def quantize(model: nn.Module, bits: int, double_quant: bool = True) -> None:
    """Replaces all linear layers but the output head by `Stored`."""
    for layer in [model.get_submodule(name) for name in find_targets(model)]:
        replace(model, {layer: Stored(layer, bits, double_quant)})


@contextmanager
def _fake() -> Iterator[None]:
    """All that is made inside is fake. Rows are taken for one text each, which a look at their positions would show."""
    look = mock.patch("transformers.masking_utils.find_packed_sequence_indices", _see_one_text, create=True)
    with quiet(), look, FakeTensorMode(), _Experts(), torch.device("cpu"), torch.enable_grad():
        yield


class _Experts(TorchDispatchMode):
    """Gives experts' products their shapes in any dtype: torch has them for bfloat16 alone, its CPU kernel all."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket is not aten._grouped_mm or args[0].dtype == torch.bfloat16:
            return func(*args, **kwargs)
        a, b, offs = args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"]
        if a.ndim == b.ndim == 2:  # the experts' gradient: (d_in, tokens) times (tokens, d_out), by groups of tokens
            return a.new_empty(len(offs), a.shape[0], b.shape[1])
        return a.new_empty(*a.shape[:-1], b.shape[-1])  # (tokens, d_in) times (experts, d_in, d_out)


def _see_one_text(position_ids: Tensor) -> None:
    """Stands for what decides from values whether attention needs a mask."""
