"""Small floats in small groups whose scales are 8-bit floats themselves: MXFP4, MXFP8, NVFP4."""

import torch
from jaxtyping import Float32
from torch import Tensor

from tracelens.precision.floats import E2M1, E4M3, FloatFormat, power_of_two, round_to_float

_SMALLEST = 2.0**-126  # the smallest normal number of float32; E8M0 reaches half of it


def round_mx(groups: Float32[Tensor, "*groups size"], element: FloatFormat) -> Float32[Tensor, "*groups size"]:
    """Groups (of 32) with a power of two as scale: OCP Microscaling Formats v1.0, section 6.3.

    Scale = 2^(floor(log2 absmax) − exponent of the element's largest value), so that what lies between `largest` and the
    next power of two is clipped. Bit for bit torchao's `to_mx` with its default, FLOOR. compressed-tensors doubles the
    scale of groups whose absmax is 1.75 times a power of two and more, and is the same elsewhere.
    """
    scale = power_of_two(groups.abs().amax(-1, keepdim=True)).mul_(2.0**-element.largest_exponent)
    scale = scale.clamp_min_(_SMALLEST)
    return round_to_float(groups / scale, element).mul_(scale)


def nvfp4_scale(matrix: Float32[Tensor, "out in"]) -> Float32[Tensor, ""]:
    """What NVFP4 multiplies the scales of a matrix's groups by, so that the largest becomes the largest of E4M3."""
    scale = E4M3.largest * E2M1.largest / matrix.abs().amax().clamp_min(_SMALLEST)
    return torch.where(scale.isfinite(), scale, torch.ones_like(scale))


def round_nvfp4(
    groups: Float32[Tensor, "*groups size"], tensor_scale: Float32[Tensor, ""]
) -> Float32[Tensor, "*groups size"]:
    """E2M1 in groups (of 16), each with a scale in E4M3 over one float32 scale per matrix (`nvfp4_scale`).

    Bit for bit compressed-tensors' `nvfp4-pack-quantized`, a matrix by itself: where llm-compressor gives the scale of
    the largest to query, key and value (gate and up) together, group scales may round differently.
    """
    local = round_to_float(groups.abs().amax(-1, keepdim=True) / E2M1.largest * tensor_scale, E4M3)
    scale = torch.where(local == 0, 1.0, local) / tensor_scale  # groups too small for E4M3 become zeros
    return round_to_float(groups / scale, E2M1).mul_(scale)
