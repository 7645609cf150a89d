"""What rounding to nearest in a quantized format does to a weight: the yardstick for the error of a real quantizer.

A format's rounding is known, its calibration is not. Here each block of a weight gets the scale (and the zero point)
that its extremes ask for, and every value goes to the nearest code.
"""

import re

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tracelens.loading.formats.base import E2M1, Scheme

Weight = Float[Tensor, "d_out d_in"]
Blocks = Float[Tensor, "rows cols size"]

# Quantiles of a normal distribution scaled to [-1, 1] (Dettmers et al., QLoRA, arXiv:2305.14314, appendix E).
NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip
FP4 = tuple(sign * value / 12 for sign in (-1, 1) for value in (0, 0.0625, 2, 3, 4, 6, 8, 12))
"""bitsandbytes' 4-bit floats, which are not E2M1."""
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "e2m1": tuple(value / 6 for value in E2M1)}
FLOATS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
"""Code -> dtype and its largest finite value."""


def roundtrip(weight: Weight, scheme: Scheme) -> Weight:
    """The weight, (out, in) in float32, rounded to nearest in a scheme.

    Integers spread 2^bits levels evenly over a block's range: from its minimum to its maximum (asymmetric), or over
    ±max|w| with zero a level (symmetric). `nf4`, `fp4`, `e2m1`, `e4m3` and `e5m2` divide by the block's max|w|;
    `ternary` is -1, 0, 1 times the mean |w|; `float` is rounding to bfloat16, or nothing from 32 bits on. Any other
    code (GGUF's K- and I-quants) is taken for integers of as many bits in the same blocks. Scales are not rounded.
    """
    if scheme.code.startswith("float"):
        return weight.bfloat16().to(weight.dtype) if scheme.bits < 32 else weight.clone()
    return from_blocks(_rounded(to_blocks(weight, scheme.block), scheme), scheme.block, weight.shape)


def _rounded(blocks: Blocks, scheme: Scheme) -> Blocks:
    code = scheme.code.lower()
    largest = blocks.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    if code in CODEBOOKS:
        return _nearest(blocks / unit, CODEBOOKS[code]) * unit
    if known := next((known for name, known in FLOATS.items() if name in code), None):
        dtype, maximum = known
        return (blocks / unit * maximum).to(dtype).to(blocks.dtype) / maximum * unit
    if code.startswith(("ternary", "tq")):
        mean = blocks.abs().mean(-1, keepdim=True).clamp_min(torch.finfo(blocks.dtype).tiny)
        return (blocks / mean).round().clamp(-1, 1) * mean
    bits = int(found[1]) if (found := re.fullmatch(r"u?int(\d)", code)) else max(1, round(scheme.bits))
    if scheme.symmetric and bits > 1:
        step = 2 * unit / (2**bits - 1)
        return (blocks / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = torch.where(high > low, high - low, 1.0) / (2**bits - 1)
    return ((blocks - low) / step).round() * step + low


def _nearest(values: Blocks, codebook: tuple[float, ...]) -> Blocks:
    levels = torch.tensor(sorted(set(codebook)), dtype=values.dtype, device=values.device)
    return levels[torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2)]


def to_blocks(weight: Weight, block: tuple[int, int] | None) -> Blocks:
    """The values of each block side by side. A ragged last block repeats its last row or column, which moves neither
    its extremes nor, by much, its mean."""
    rows, cols = block or tuple(weight.shape)
    (d_out, d_in), device = weight.shape, weight.device
    if d_out % rows:
        weight = weight[torch.arange(-(-d_out // rows) * rows, device=device).clamp(max=d_out - 1)]
    if d_in % cols:
        weight = weight[:, torch.arange(-(-d_in // cols) * cols, device=device).clamp(max=d_in - 1)]
    return weight.unflatten(1, (-1, cols)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)


def from_blocks(blocks: Blocks, block: tuple[int, int] | None, shape: tuple[int, ...]) -> Weight:
    """The inverse of `to_blocks` for a weight of this shape."""
    rows, cols = block or tuple(shape)
    whole = blocks.unflatten(2, (rows, cols)).transpose(1, 2).flatten(2).flatten(0, 1)
    return whole[: shape[0], : shape[1]]


def two_of_four(weight: Weight) -> bool:
    """Whether at least two of every four neighbours in a row are zero, as sparse tensor cores want it."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all())


def prune(weight: Weight) -> Weight:
    """The weight with the two smallest of every four neighbours in a row set to zero."""
    fours = weight.unflatten(1, (-1, 4))
    kept: Bool[Tensor, "d_out fours four"] = torch.zeros_like(fours, dtype=torch.bool)
    kept.scatter_(-1, fours.abs().topk(2, dim=-1).indices, True)
    return (fours * kept).flatten(1)
