"""NF4: sixteen numbers from the quantiles of a normal distribution, and a linear layer that is stored in them.

A weight is cut into blocks of 64 values. Each block is divided by its largest magnitude, absmax, and each value becomes
the nearest of sixteen numbers: half a byte. Double quantisation stores the absmax values in a byte each, in the same
manner. (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, sections 2 and 3.)

Codes and absmax are bit for bit those of bitsandbytes 0.50 on a CPU, whose order of operations is followed.
"""

import math
from collections.abc import Sequence
from functools import cache
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from torch import Tensor, nn

from lorakit._numbers import is_number

BLOCK_SIZE, ABSMAX_BLOCK_SIZE = 64, 256  # values of a weight that share an absmax; absmax values that share theirs
OFFSET = 0.9677083  # the outermost quantile: 1 - (1/32 + 1/30) / 2, rounded as in QLoRA's code
TINY = 1e-38  # what a block of zeros is divided by
GRID = 65_535  # bytes are looked up after rounding to 2 / GRID
CHUNK = 1 << 20  # values that are worked on at a time, so that little is needed besides the result


def nf4_codebook() -> Float32[Tensor, "16"]:
    """NF4's numbers in ascending order: normal quantiles at even steps of probability, the largest scaled to 1.

    Eight steps lie above zero and seven below it, so that zero is exact and no code is spent on it twice.
    """
    above, below = (
        torch.special.ndtri(torch.linspace(OFFSET, 0.5, steps + 1, dtype=torch.float32).double()).float()
        for steps in (8, 7)
    )  # from the largest quantile down to zero
    codebook = torch.cat([-below[:-1], above.flip(0)])
    return codebook / codebook.max()


def byte_codebook() -> Float32[Tensor, "256"]:
    """The numbers of double quantisation, ascending: seven decades, each with twice as many values as the one below.

    Source: Dettmers 2015, 8-Bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middle = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middle, -middle]
    return torch.cat(values).sort().values


NF4 = tuple(nf4_codebook().tolist())
FP4 = tuple(sign * v / 12 + 0.0 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))  # floats of 1 + 2 + 1 bits


class ByteAbsmax(NamedTuple):
    """Absmax values after double quantisation: byte_codebook[codes] * scales + offset."""

    codes: UInt8[Tensor, " n_blocks"]
    scales: Float32[Tensor, " n_scales"]
    offset: Float32[Tensor, ""]


def quantize(
    x: Shaped[Tensor, "*shape"], codebook: tuple[float, ...] = NF4, block_size: int = BLOCK_SIZE
) -> tuple[UInt8[Tensor, " n_bytes"], Float32[Tensor, " n_blocks"]]:
    """Rounds a tensor to a codebook, block by block along its flattened values.

    Args:
        x: finite values, seen with float32's precision.
        codebook: at most sixteen numbers in [-1, 1], in any order.
        block_size: values that share an absmax, even. The last block may have fewer.

    Returns:
        codes, two to a byte, the first in its high half; and each block's absmax.

    Raises:
        ValueError: x holds no floating-point values, NaN or infinity; or a setting is out of range.
    """
    if not x.is_floating_point() or not x.numel():
        raise ValueError(f"expected floating-point values, got {x.dtype} of shape {tuple(x.shape)}")
    if not isinstance(block_size, Integral) or block_size < 2 or block_size % 2:
        raise ValueError(f"expected an even block size, got {block_size!r}")
    numbers = isinstance(codebook, Sequence) and all(is_number(c) and math.isfinite(c) for c in codebook)
    if not numbers or not 2 <= len(codebook) <= 16:
        raise ValueError(f"expected a codebook of 2 to 16 numbers, got {codebook!r}")
    ascending, order = torch.tensor(codebook, dtype=torch.float32, device=x.device).sort(stable=True)
    middles = ((ascending[1:] + ascending[:-1]) / 2).tolist()
    in_order, order = bool((order.diff() > 0).all()), order.to(torch.uint8)
    parts = []
    for part in x.detach().reshape(-1).split(_chunk(block_size, 8)):  # its steps need more room
        scaled, absmax = _scaled(part.float(), block_size)
        if not absmax.isfinite().all():
            raise ValueError("expected finite values, got NaN or infinity")
        if rest := len(part) % block_size:  # here bitsandbytes divides
            absmax[-1].clamp_(min=TINY)
            scaled[-rest:] = (part[-rest:].float() / absmax[-1]).clamp_(-1, 1)
        scaled = nn.functional.pad(scaled, (0, len(scaled) % 2))
        codes = torch.zeros(len(scaled), dtype=torch.uint8, device=x.device)
        for middle in middles:  # how many lie below a value; in so short a list, faster than to search it
            codes += scaled > middle
        codes = codes if in_order else order.index_select(0, codes.int())
        parts.append((codes[::2] << 4 | codes[1::2], absmax))
    codes, absmax = map(torch.cat, zip(*parts, strict=True))
    return codes, absmax


def dequantize(
    codes: UInt8[Tensor, " n_bytes"],
    absmax: Float32[Tensor, " n_blocks"],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    codebook: tuple[float, ...] = NF4,
    block_size: int = BLOCK_SIZE,
) -> Float[Tensor, "*shape"]:
    """Undoes `quantize`: codebook[code] * absmax, a float32 product that is rounded once to `dtype`."""
    n, chunk, table = math.prod(shape), _chunk(block_size), _pairs(codebook, codes.device)
    out = torch.empty(2 * len(codes), dtype=dtype, device=codes.device)
    scratch = out if dtype == torch.float32 else torch.empty_like(out[:chunk], dtype=torch.float32)
    parts = zip(out.split(chunk), codes.split(chunk // 2), absmax.split(chunk // block_size), strict=True)
    for target, part, scales in parts:
        values = target if scratch is out else scratch[: len(target)]
        rows = math.gcd(len(part), 64)  # torch looks them up in parallel, row by row, two values at a time
        pairs = values.view(table.dtype).view(rows, -1)
        torch.gather(table.expand(rows, 256), 1, part.view(rows, -1).long(), out=pairs)
        whole = len(values) // block_size
        values[: whole * block_size].view(whole, block_size).mul_(scales[:whole, None])
        values[whole * block_size :] *= scales[-1]  # the last block, if it is shorter
        if scratch is not out:
            target.copy_(values)
    return out[:n].view(shape)


def quantize_absmax(absmax: Float32[Tensor, " n_blocks"]) -> ByteAbsmax:
    """Double quantisation: what exceeds the mean, in blocks of 256, as the nearest of the 256 numbers.

    bitsandbytes finds that number in a table of 65,536 entries, so values are first rounded to its steps: without that,
    1 in 1,000 bytes comes out as the neighbour's.
    """
    offset = absmax.mean()
    scaled, scales = _scaled(absmax - offset, ABSMAX_BLOCK_SIZE)
    codebook = byte_codebook().to(absmax.device)
    steps = ((scaled + 1) * (GRID / 2) + 0.5).long().double()
    codes = torch.bucketize((steps * (2 / GRID) - 1).float(), (codebook[1:] + codebook[:-1]) / 2)
    empty = (scales == 0).repeat_interleave(ABSMAX_BLOCK_SIZE)[: len(codes)]
    return ByteAbsmax(codes.masked_fill(empty, 0).to(torch.uint8), scales, offset)


def dequantize_absmax(absmax: ByteAbsmax) -> Float32[Tensor, " n_blocks"]:
    """Undoes `quantize_absmax`."""
    codes, scales, offset = absmax
    values = _bytes(codes.device).index_select(0, codes.int())
    return values.mul_(scales.repeat_interleave(ABSMAX_BLOCK_SIZE)[: len(codes)]).add_(offset)


def _scaled(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Values times the reciprocal of their block's absmax, and the absmax values."""
    blocks = nn.functional.pad(x, (0, -len(x) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).clamp_(-1, 1)
    return scaled.flatten()[: len(x)], absmax


def _chunk(block_size: int, parts: int = 1) -> int:
    return max(CHUNK // parts // block_size, 1) * block_size


@cache
def _pairs(codebook: tuple[float, ...], device: torch.device) -> Tensor:
    """The two float32 values of every byte as one element of eight bytes, (256)."""
    values = torch.zeros(16, dtype=torch.float32, device=device)
    values[: len(codebook)] = torch.tensor(codebook, dtype=torch.float32)
    byte = torch.arange(256, dtype=torch.long, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1).view(torch.int64).view(-1)


@cache
def _bytes(device: torch.device) -> Tensor:
    return byte_codebook().to(device)
