"""Rounding to floats of 8 and 4 bits, by arithmetic, so that it works where torch has no such dtype."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """A small float without infinities."""

    mantissa: int
    """Stored bits of the fraction."""
    smallest_exponent: int
    """Of a normal number; subnormal ones have its spacing."""
    largest: float
    """The largest magnitude; what lies beyond is clipped to it."""

    @property
    def largest_exponent(self) -> int:
        """That of `largest`: floor(log2)."""
        return int(self.largest).bit_length() - 1


E2M1 = FloatFormat(mantissa=1, smallest_exponent=0, largest=6.0)
E4M3 = FloatFormat(mantissa=3, smallest_exponent=-6, largest=448.0)
E5M2 = FloatFormat(mantissa=2, smallest_exponent=-14, largest=57344.0)


def power_of_two(x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The largest power of two not above |x|; 0 for what is below the normal range of float32."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def round_to_float(x: Float32[Tensor, "*shape"], to: FloatFormat) -> Float32[Tensor, "*shape"]:
    """`x` rounded to the nearest value of a format, ties to the even mantissa, clipped at its largest."""
    x = x.clamp(-to.largest, to.largest)
    spacing = power_of_two(x).clamp_min_(2.0**to.smallest_exponent).mul_(2.0**-to.mantissa)
    return x.div_(spacing).round_().mul_(spacing)


def round_scaled(blocks: Float32[Tensor, "*blocks size"], to: FloatFormat) -> Float32[Tensor, "*blocks size"]:
    """Each block divided by its scale, rounded to a format, and multiplied again: scale = absmax / largest, in float32.

    Bit for bit compressed-tensors' float quantization (E4M3) and torchao's `Float8Tensor` (E4M3, E5M2) of float32
    weights. Both compute the scales of bf16 weights in bf16, where they are rounder than these.
    """
    scale = blocks.abs().amax(-1, keepdim=True) / to.largest
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return round_to_float(blocks / scale, to).mul_(scale)
