"""Rounding to number grids: pure tensor maths."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

_STEPS = 80
_GRID = 100
Range = tuple[Float[Tensor, "*rows 1"], Float[Tensor, "*rows 1"]]


def round_to_integers(
    values: Float[Tensor, "*rows width"],
    bits: int,
    *,
    symmetric: bool = True,
    clipping: Literal["absmax", "mse"] = "absmax",
) -> Float[Tensor, "*rows width"]:
    """`values` rounded to the nearest point of an integer grid, one grid per row (the last axis), in the dtype of
    `values`.

    Codes are −2^(bits−1) … 2^(bits−1)−1. Symmetric: scale = absmax / ((2^bits − 1)/2), zero point 0, so the largest
    positive value is clipped by half a step. Asymmetric: the range from min to max, 0 included, with an integer zero
    point. Bit for bit what compressed-tensors computes (`calculate_qparams`, `fake_quantize`) in float32; torchao has the
    same scales and multiplies by their reciprocals, so that values in the middle of two codes may take the other.

    `clipping="mse"`: each row's range is the one of min, max times 1, .99, …, .21 whose rounding has the least squared
    error, the widest of equals, and so never more than without. This is the search of GPTQ's code (Frantar et al., arXiv
    2210.17323) with the exponent 2 in place of 2.4, which leaves some rows with a larger squared error than they had;
    bit for bit llm-compressor's `memoryless_mse` observer on a CPU with norm 2, maxshrink .8 and a patience of 80.
    """
    x = values.to(torch.promote_types(values.dtype, torch.float32))
    low, high = x.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if clipping == "mse":
        low, high = _least_squares(x, (low, high), bits, symmetric)
    return _round_within(x, (low, high), bits, symmetric).to(values.dtype)


def _round_within(
    x: Float[Tensor, "*rows width"], limits: Range, bits: int, symmetric: bool
) -> Float[Tensor, "*rows width"]:
    (low, high), lowest, highest = limits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = torch.maximum(-low, high) / ((highest - lowest) / 2) if symmetric else (high - low) / (highest - lowest)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a row of zeros stays one
    zero = 0 if symmetric else (lowest - low / scale).clamp(lowest, highest).round()
    codes = (x / scale).add_(zero).clamp_(lowest, highest).round_()
    return codes.sub_(zero).mul_(scale)


def _least_squares(x: Float[Tensor, "*rows width"], limits: Range, bits: int, symmetric: bool) -> Range:
    """The limits shrunk, row by row, by the factor with the least squared error."""
    low, high = limits
    best = torch.full_like(low, torch.inf)
    factor = torch.ones_like(low)
    for step in range(_STEPS):
        shrunk = 1 - step / _GRID
        rounded = _round_within(x, (low * shrunk, high * shrunk), bits, symmetric)
        error = rounded.sub_(x).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        factor = factor.masked_fill(better, shrunk)
    return low * factor, high * factor


def round_vectorwise(values: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """`values`, float32, as LLM.int8() stores weights: rounded to float16, then to the integers −127 … 127 times
    absmax / 127, row by row (Dettmers et al., arXiv 2208.07339, section 3.1).

    Bit for bit bitsandbytes' `Int8Params` and `int8_vectorwise_dequant` on a CPU: it too goes through float16 whatever
    the dtype. Magnitudes above 65504 become infinite, and their rows NaN.
    """
    x = values.half().float()
    largest = x.abs().amax(-1, keepdim=True)
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    # Not / 127: the library multiplies by this reciprocal, in this order.
    return (x * (127.0 / largest)).round_().mul_(largest).mul_(7.874015718698502e-3)


def round_to_dtype(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """`values` rounded to what `dtype` can hold, in their own dtype."""
    return values.to(dtype).to(values.dtype)
