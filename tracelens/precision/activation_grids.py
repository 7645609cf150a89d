"""Rounding of activations: pure tensor maths, one scale for each row or one for everything."""

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.precision.config import ActivationFormat

_BITS = {"int8": 8, "int4": 4}
E4M3_MAX = 448.0
"""Largest number of FP8 E4M3."""


def scale_of(largest: Float[Tensor, "*any"], format: ActivationFormat) -> Float[Tensor, "*any"]:
    """The step that fits magnitudes up to `largest` ≥ 0 into the format; 1 where `largest` is 0.

    Integers: largest / ((2^bits − 1)/2), so that the largest positive value is clipped by half a step; FP8: largest / 448.
    Both as compressed-tensors has it (`calculate_qparams`, symmetric). vLLM's kernel for int8 per token takes largest / 127,
    a step that is wider by 0.4 %. With largest / 127.5 the largest entry of a row lies between two codes, and if it is
    negative the last bit of the product it comes from decides which (−127 or −128).
    """
    half_range = (2 ** _BITS[format] - 1) / 2 if format in _BITS else E4M3_MAX
    scale = largest / half_range
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def round_at(x: Float[Tensor, "*shape"], scale: Float[Tensor, "..."], format: ActivationFormat) -> Float[Tensor, "..."]:
    """`x` on the format's grid times `scale`, ties to even; what lies beyond the grid becomes its end."""
    if format in _BITS:
        top = 2 ** (_BITS[format] - 1)
        return (x / scale).clamp_(-top, top - 1).round_().mul_(scale)
    codes = (x / scale).clamp_(-E4M3_MAX, E4M3_MAX)
    return codes.to(torch.float8_e4m3fn).to(codes.dtype).mul_(scale)


def round_rows(x: Float[Tensor, "row width"], format: ActivationFormat) -> Float[Tensor, "row width"]:
    """Every row at the scale of its own largest magnitude: dynamic rounding per token. In float32 or wider, given back in
    the dtype of `x`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return round_at(wide, scale_of(wide.abs().amax(-1, keepdim=True), format), format).to(x.dtype)


def round_fixed(
    x: Float[Tensor, "row width"], format: ActivationFormat, largest: Float[Tensor, ""]
) -> Float[Tensor, "row width"]:
    """All of `x` at the one scale that fits magnitudes up to `largest`: static rounding per tensor."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return round_at(wide, scale_of(largest.to(wide), format), format).to(x.dtype)


def round_beside_outliers(x: Float[Tensor, "row width"], threshold: float) -> Float[Tensor, "row width"]:
    """LLM.int8() (arXiv 2208.07339): entries of magnitude `threshold` and above stay as they are, the others become int8
    at the scale absmax / 127 of what is left of their row. A threshold of 0 knows no outliers, as in bitsandbytes.

    bitsandbytes sees float16, and so do the threshold and the rounding here. It takes a column out for every token of a
    call once one token has an outlier there, so that a token's result depends on the others of its batch; here each row
    decides for itself, which is what bitsandbytes does for a call of one token (every step of a generation).
    """
    half = x.to(torch.float16)
    outlier = half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    rest = half.float().masked_fill(outlier, 0)
    largest = rest.abs().amax(-1, keepdim=True)
    codes = torch.where(largest == 0, 0, rest * (127 / largest)).round_()
    return torch.where(outlier, x, (codes * (largest / 127)).to(x.dtype))
