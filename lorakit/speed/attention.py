"""Attention over short sequences on a CPU as a few plain products, which keeps nothing of (seq, seq) for the backward.

torch's blocked kernel multiplies small matrices one by one, which is slow where each product has a cost of its own: in
bfloat16, and in float32 through oneDNN. Its plain kernel keeps all weights and copies keys for every head of a group.
Here the heads that share a key are rows of one product, and the weights are made again in the backward pass:

    P = softmax(s Q K')        O = P V
    dV = P' dO        dS = P * (dO V' - rowsum(P * dO V'))        dQ = s dS K        dK = s dS' Q
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lorakit.layers import shortcuts
from lorakit.speed.cpu import matmul_precision
from lorakit.speed.decision import Decision

MAX_TOKENS = 256  # up to this length it is faster than the blocked kernel; beyond, (seq, seq) matters


@contextmanager
def attention(model: nn.Module) -> Iterator[Decision]:
    """While it is open, `short_attention` answers calls of torch's attention over at most `MAX_TOKENS`, if it pays.

    It pays on a CPU in half precision, and in float32 where oneDNN multiplies: open this inside of what decides that.

    Yields:
        what was decided.
    """
    like = next(model.parameters())
    if like.device.type != "cpu":
        yield Decision(False, "for a CPU only")
    elif like.dtype not in (torch.bfloat16, torch.float16) and matmul_precision() != "medium":
        yield Decision(False, "torch's own is as fast in float32 without oneDNN")
    else:
        with _ShortAttention():
            yield Decision(True, f"up to {MAX_TOKENS} tokens a text")


def short_attention(
    q: Float[Tensor, "batch heads seq d"],
    k: Float[Tensor, "batch groups keys d"],
    v: Float[Tensor, "batch groups keys d_v"],
    hidden: Bool[Tensor, "#batch #heads #seq keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads seq d_v"]:
    """Computes `scaled_dot_product_attention(q, k, v)` in float32, rounded once; heads // groups heads share a key.

    Args:
        q: queries.
        k: keys.
        v: values.
        hidden: True where a query must not see a key; every query must see one. None hides nothing.
        scale: s, 1 / sqrt(d) if None.
    """
    y = _Attention.apply(q, k, v, hidden, q.shape[-1] ** -0.5 if scale is None else scale)
    return y.view(*q.shape[:-1], v.shape[-1])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, hidden, scale):
        P = _weights(q, k, hidden, scale)
        ctx.save_for_backward(q, k, v, hidden)
        ctx.scale = scale
        return (P @ v.to(P.dtype)).to(q.dtype)  # (batch, groups, heads / groups * seq, d_v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dO):
        q, k, v, hidden = ctx.saved_tensors
        P = _weights(q, k, hidden, ctx.scale)
        dO = dO.reshape(*P.shape[:-1], v.shape[-1]).to(P.dtype)
        dV = P.mT @ dO
        dP = dO @ v.to(P.dtype).mT
        dS = dP.sub_((P * dP).sum(-1, keepdim=True)).mul_(P).mul_(ctx.scale)
        dQ = (dS @ k.to(P.dtype)).view(q.shape)
        dK = dS.mT @ _rows(q, k).to(P.dtype)
        return dQ.to(q.dtype), dK.to(k.dtype), dV.to(v.dtype), None, None


def _rows(q: Tensor, k: Tensor) -> Tensor:
    """Queries as (batch, groups, heads / groups * seq, d): all those that meet the same keys."""
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])


def _weights(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """P, (batch, groups, heads / groups * seq, keys), in float32 or wider."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    S = (_rows(q, k).to(dtype) @ k.to(dtype).mT).mul_(scale)
    if hidden is not None:
        S.view(*q.shape[:-1], k.shape[-2]).masked_fill_(hidden, float("-inf"))
    return S.softmax(-1)


class _ShortAttention(TorchFunctionMode):
    """While it is open, calls of torch's attention that `short_attention` can answer are answered by it."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        attends = function is F.scaled_dot_product_attention
        if attends and shortcuts.allowed() and not shortcuts.may_be_recomputed():
            return _attend(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's `scaled_dot_product_attention`: by `short_attention`, or by itself where that has other rules."""
    seq, keys = query.shape[-2], key.shape[-2]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if max(seq, keys) > MAX_TOKENS or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    hidden = torch.ones(seq, keys, dtype=torch.bool).triu_(1)[None, None] if is_causal else None
    if attn_mask is not None and attn_mask.dtype == torch.bool and attn_mask.ndim == 4:
        hidden = ~attn_mask
    usual = query.ndim == 4 and query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled("cpu")
    usual = usual and not shortcuts.is_transformed()
    usual = usual and key.shape[:2] == value.shape[:2] and (enable_gqa or query.shape[1] == key.shape[1])
    masked = (attn_mask is None or (hidden is not None and not is_causal)) and (not is_causal or seq == keys)
    blind = attn_mask is not None and hidden is not None and hidden.all(-1).any()  # a query that must not see any key
    if dropout_p or not usual or not masked or blind:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    return short_attention(query, key, value, hidden, scale)
