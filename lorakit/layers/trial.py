"""Is a layer what it looks like? A few numbers through it say so, where its class does not.

`out_features` and `in_features` are also had by routers that return a tuple, by layers that are not linear, and by
quantised ones that pass no gradient on. And a layer may compute with something else than its `weight`: with one that
is derived anew at each call, as under weight normalisation, or scaled, as in eight bits.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit._random import seeded
from lorakit._words import one_line
from lorakit.layers.bases import FLOATS, has_float_weight, is_known, storage_of, stores_transposed, weight_of

ROUNDED = 0.1  # of the norm: a layer may round its inputs to a byte, and be linear to that
SAME = {8: 1e-4, 4: 1e-4, 2: 0.05}  # of the norm, by bytes a value: so near is the answer of the weight itself
DERIVED = "expected a layer that computes with its weight as it is, not derived from others or scaled"


def check_linear(layer: nn.Module, d_out: int, d_in: int) -> None:
    """Refuses a layer that is not linear, (rows, d_in) -> (rows, d_out), or that passes no gradient on.

    Raises:
        ValueError: says what it does instead.
    """
    if is_known(layer):
        return
    kind, y, g, why = type(layer).__name__, None, None, ""
    with _undisturbed(layer), torch.enable_grad():
        one, two = _rows(d_in, 0.0), _rows(d_in, 1.0)
        inputs = torch.cat([0 * one, one, two, one + two])
        for dtype in _dtypes(layer):
            x = inputs.to(_device(layer), dtype).requires_grad_(True)
            try:
                y = layer(x)
                break
            except Exception as error:
                why = one_line(error)
        if isinstance(y, Tensor):
            with contextlib.suppress(RuntimeError):
                (g,) = torch.autograd.grad(y.sum(), x)
    if y is None:
        raise ValueError(f"expected a linear layer, got {kind}, which does not answer rows of numbers: {why}")
    if not isinstance(y, Tensor) or y.shape != (len(inputs), d_out):
        what = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"expected a linear layer, got {kind}, which returns {what} for {len(inputs)} rows")
    if g is None:
        raise ValueError(f"expected a linear layer, got {kind}, which passes no gradient on to its input")
    if _has_values(y):
        nothing, first, second, both = y.detach().double().chunk(4)
        slope = (g[2:4] * x[2:4]).double().sum(1) - (first - nothing).sum(1)
        if not slope.abs().sum() <= ROUNDED * (first - nothing).abs().sum():
            raise ValueError(f"expected a linear layer, got {kind}, whose gradient is not that of its answer")
        if not (first + second - both - nothing).norm() <= ROUNDED * (both - nothing).norm():
            raise ValueError(
                f"expected a linear layer, got {kind}, whose output for a sum is not the sum of its outputs"
            )


def check_weight(layer: nn.Module, W: Float[Tensor, "d_out d_in"]) -> None:
    """Refuses a layer that does not answer as its weight does.

    Raises:
        ValueError: it computes with something else.
    """
    if is_known(layer) or isinstance(layer, nn.Embedding):  # `check_embedding` has seen it
        return
    with _undisturbed(layer), torch.no_grad():
        x = _rows(W.shape[1], 0.5).to(W.device, _dtypes(layer)[0])
        try:
            expected = x.double() @ W.double().T
            error = (layer(x) - layer(0 * x)).double() - expected
            same = not _has_values(W) or bool(error.norm() <= SAME[x.element_size()] * expected.norm())
        except Exception:
            same = False
    if not same:
        raise ValueError(f"{DERIVED}, got {type(layer).__name__}: make it a plain layer first")


def check_embedding(layer: nn.Module) -> None:
    """Refuses a layer that does not answer token ids with rows of its weight, times its `embed_scale` if it has one.

    Raises:
        ValueError: says what it does instead.
    """
    if not isinstance(layer, nn.Embedding) or not has_float_weight(layer):
        raise ValueError(f"expected an embedding of plain numbers, got {storage_of(layer)}")
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        raise ValueError(f"expected an embedding without max_norm, scale_grad_by_freq and sparse, got {layer}")
    if type(layer) is nn.Embedding:
        return
    with _undisturbed(layer), torch.no_grad():
        ids = torch.arange(min(4, layer.num_embeddings), dtype=torch.long, device=layer.weight.device)[None]
        rows = weight_of(layer)[ids] * row_scale(layer)
        try:
            same = not _has_values(rows) or torch.allclose(layer(ids), rows.to(layer.weight.dtype), rtol=1e-2)
        except Exception:  # it is called otherwise
            same = False
    if not same:
        raise ValueError(f"expected an embedding, got {type(layer).__name__}, which does more than look its rows up")


def row_scale(embedding: nn.Module) -> Tensor | float:
    """What an embedding multiplies its rows with, as Gemma's and BART's do."""
    return getattr(embedding, "embed_scale", 1.0)


def plus(layer: nn.Module, delta: Float[Tensor, "d_out d_in"]) -> nn.Module:
    """A copy of a linear layer with `weight + delta`, summed in delta's dtype and rounded once to the weight's.

    Raises:
        ValueError: it computes with something else than its weight.
    """
    change = delta.T if stores_transposed(layer) else delta
    return with_weight(layer, weight_of(layer).detach().to(delta.dtype) + change)


def with_weight(layer: nn.Module, stored: Tensor) -> nn.Module:
    """A copy of a linear layer or an embedding with another weight, as it stores it, rounded to its weight's dtype.

    Raises:
        ValueError: it computes with something else than its weight.
    """
    if "weight" not in layer._parameters:
        raise ValueError(f"{DERIVED}, got {type(layer).__name__}: make it a plain layer first")
    W = weight_of(layer)
    new = copy.deepcopy(layer, {id(W): W})  # a copy of all but the weight
    total = stored.detach().to(W.dtype)
    try:
        new.weight = nn.Parameter(total, requires_grad=False)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"expected a weight that can be replaced, got that of {type(layer).__name__}: {error}"
        ) from error
    check_weight(new, total)
    return new


def _rows(d_in: int, shift: float) -> Tensor:
    """Two rows of numbers between -1 and 1."""
    return torch.sin(torch.arange(2 * d_in, dtype=torch.float32, device="cpu") * 1.7 + shift).view(2, d_in)


def _dtypes(layer: nn.Module) -> list[torch.dtype]:
    """Those in which a layer may want its input: that of its numbers, if they can be computed in."""
    known = [p.dtype for p in layer.parameters() if p.dtype in FLOATS]
    return known[:1] or [torch.float32, torch.bfloat16, torch.float16]


def _device(layer: nn.Module) -> torch.device:
    like = next(layer.parameters(), next(layer.buffers(), None))
    return torch.device("cpu") if like is None else like.device


def _has_values(x: Tensor) -> bool:
    """False for a tensor that only has a shape."""
    return not x.is_meta and type(x) in (Tensor, nn.Parameter)


@contextmanager
def _undisturbed(layer: nn.Module) -> Iterator[None]:
    """While it is open, a layer answers as after training; afterwards nothing of it has changed."""
    modes = [(module, module.training) for module in layer.modules()]
    grads = [(p, p.requires_grad) for p in layer.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    try:
        layer.eval().requires_grad_(False)
        with warnings.catch_warnings(), seeded(), torch.inference_mode(False):
            warnings.simplefilter("ignore")
            with torch.autocast(_device(layer).type, enabled=False):
                yield
    finally:
        for module, training in modes:
            module.training = training
        for p, grad in grads:
            p.requires_grad_(grad)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
