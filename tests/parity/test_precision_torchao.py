"""Weights against torchao: FP8 and the microscaling formats bit for bit; integers and NVFP4 but for values in the middle
of two codes, since the library multiplies by the reciprocal of the scale where we divide."""

import pytest
import torch

from tests.precision.matrices import awkward
from tracelens.precision import QuantizationConfig
from tracelens.precision.rounding import round_weight


def ours(matrix, spec):
    return round_weight(matrix, QuantizationConfig.parse(spec))


@pytest.mark.parametrize(("spec", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp8-e5m2", torch.float8_e5m2)])
@pytest.mark.parametrize("option", ["", "-tensor", "-block"])
def test_fp8(spec, dtype, option):
    from torchao.quantization import PerBlock, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor

    matrix = awkward(256, 384)
    granularity = {"": PerRow(), "-tensor": PerTensor(), "-block": PerBlock([128, 128])}[option]
    expected = Float8Tensor.from_hp(matrix, dtype, granularity).dequantize()
    live = slice(None) if option else matrix.any(dim=1)  # the library divides rows of zeros by zero
    assert torch.equal(ours(matrix, spec + option)[live], expected[live])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spec", "element"), [("mxfp4", torch.float4_e2m1fn_x2), ("mxfp8", torch.float8_e4m3fn)])
def test_microscaling(spec, element, dtype):
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    matrix = awkward(160, 256).to(dtype)
    expected = MXTensor.to_mx(matrix, element, 32).dequantize(dtype)
    assert torch.equal(ours(matrix, spec), expected)


def test_nvfp4_is_within_the_rounding_of_a_product():
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    matrix = torch.randn(160, 256, generator=torch.Generator().manual_seed(0))
    scale = per_tensor_amax_to_scale(matrix.abs().max())
    expected = NVFP4Tensor.to_nvfp4(matrix, per_tensor_scale=scale).dequantize(torch.float32)
    different = ~torch.isclose(ours(matrix, "nvfp4"), expected, rtol=1e-6, atol=0)
    assert different.float().mean() < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("side", "share"), [("", 5e-3), ("-asym", 1e-4)])
def test_integers_are_within_the_rounding_of_a_product(bits, side, share):
    """Where the scales are symmetric, the extreme of each negative side is such a value: its code is −2^(bits−1) + ½."""
    from torchao.quantization import quant_primitives as ao

    matrix = awkward(256, 512)
    mapping = ao.MappingType.ASYMMETRIC if side else ao.MappingType.SYMMETRIC
    limits = (torch.int8, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    types = {"scale_dtype": torch.float32, "zero_point_dtype": torch.int32}
    scale, zero = ao.choose_qparams_affine(matrix, mapping, (1, 32), *limits, eps=1e-30, **types)
    codes = ao.quantize_affine(matrix, (1, 32), scale, zero, *limits)
    expected = ao.dequantize_affine(codes, (1, 32), scale, zero, *limits, output_dtype=torch.float32)
    found = ours(matrix, f"int{bits}-g32{side}")
    assert (found != expected).float().mean() < share
    step = scale.repeat_interleave(32, dim=1)
    assert ((found - expected).abs() <= 1.001 * step).all()
