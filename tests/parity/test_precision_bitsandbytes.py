"""Weights bit for bit against bitsandbytes on the CPU, and against what transformers wrote with it."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional

import tracelens
from tests.precision.matrices import awkward
from tracelens.precision import QuantizationConfig, apply_precision, weight_matrices
from tracelens.precision.codebooks import dynamic_codes
from tracelens.precision.rounding import round_weight

NF4_BUILD = Path(__file__).parents[1] / "fixtures" / "organism" / "nf4"


def ours(matrix, spec):
    return round_weight(matrix, QuantizationConfig.parse(spec))


def four_bit(matrix, spec):
    kind, *options = spec.split("-")
    size = next((int(option[1:]) for option in options if option[0] == "g"), 64)
    packed, state = functional.quantize_4bit(
        matrix.clone(), blocksize=size, quant_type=kind, compress_statistics="dq" in options
    )
    return functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", ["", "-dq"])
@pytest.mark.parametrize("spec", ["nf4", "fp4", "nf4-g32", "fp4-g128", "nf4-g4096"])
def test_four_bits_bit_for_bit(spec, double_quant, dtype):
    matrix = awkward(257, 384).to(dtype)
    expected = four_bit(matrix, spec + double_quant)
    assert expected.dtype is dtype
    assert torch.equal(ours(matrix, spec + double_quant), expected)


@pytest.mark.parametrize("shape", [(7, 50), (3, 33), (1, 20), (129, 65), (64, 1)])
@pytest.mark.parametrize("spec", ["nf4", "nf4-dq", "fp4-g128-dq"])
def test_blocks_run_on_over_rows_and_the_last_is_short(shape, spec):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(matrix, spec), four_bit(matrix, spec))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_in_the_middle_of_two_codes(kind):
    """In whole blocks, which the library multiplies by the reciprocal, and in a last one, where it divides."""
    for largest in range(12, 1200, 12):
        steps = torch.arange(-largest, largest + 1, largest // 12) / 2.0
        row = torch.cat([steps, torch.tensor([largest, 0.3]), torch.zeros(37), steps, torch.tensor([largest])])[None]
        assert row.shape[1] > 64
        assert torch.equal(ours(row, kind), four_bit(row, kind)), largest


def test_double_quantization_of_many_scales():
    matrix = torch.randn(1024, 1088, generator=torch.Generator().manual_seed(1))  # 17408 blocks of 64, 68 of 256
    assert torch.equal(ours(matrix, "nf4-dq"), four_bit(matrix, "nf4-dq"))
    assert not torch.equal(ours(matrix, "nf4-dq"), ours(matrix, "nf4"))


def test_equal_blocks_keep_their_scale():
    matrix = torch.linspace(-1, 1, 64).repeat(8, 4)
    assert torch.equal(ours(matrix, "nf4-dq"), four_bit(matrix, "nf4-dq"))
    assert torch.equal(ours(matrix, "nf4-dq"), ours(matrix, "nf4"))


def test_the_dynamic_data_type():
    assert torch.equal(dynamic_codes(), functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_llm_int8_bit_for_bit(dtype):
    matrix = awkward(200, 300).to(dtype)
    layer = bitsandbytes.nn.Int8Params(matrix.clone(), requires_grad=False).to("cpu")
    expected = functional.int8_vectorwise_dequant(layer.CB, layer.SCB).to(dtype)
    assert torch.equal(ours(matrix, "llm-int8"), expected)
    assert torch.equal(ours(matrix, "llm-int8-weights"), expected)


def test_the_organism_in_nf4_is_what_transformers_and_bitsandbytes_wrote(organism):
    """Held in bfloat16, as the build was: every parameter, rounded or not."""
    build = tracelens.load(NF4_BUILD, device="cpu")
    simulated = dict(apply_precision(organism, "nf4-dq+bf16").named_parameters())
    for name, parameter in build.named_parameters():
        assert torch.equal(simulated[name], parameter), name
    wrong = dict(apply_precision(organism, "nf4+bf16").named_parameters())
    assert all(not torch.equal(wrong[weight.name], weight.parameter) for weight in weight_matrices(build))
