"""Weights bit for bit as llm-compressor's observers and compressed-tensors' fake quantization make them."""

from pathlib import Path

import pytest
import torch

import tracelens
from tests.precision.matrices import awkward
from tracelens.precision import QuantizationConfig, apply_precision, weight_matrices
from tracelens.precision.floats import E2M1, E4M3, round_to_float
from tracelens.precision.rounding import round_weight

FP8_BUILD = Path(__file__).parents[1] / "fixtures" / "organism" / "fp8"


def ours(matrix, spec):
    return round_weight(matrix, QuantizationConfig.parse(spec))


def theirs(matrix, args, **observer_kwargs):
    """`args`: fields of the library's `QuantizationArgs`, or the name of one of its schemes."""
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor.observers import Observer

    args = preset_name_to_scheme(args, ["Linear"]).weights if isinstance(args, str) else QuantizationArgs(**args)
    kind = "memoryless_mse" if observer_kwargs else "memoryless_minmax"
    observer = Observer.load_from_registry(kind, base_name="weight", args=args, **observer_kwargs)
    found = observer(matrix).get_qparams()
    return fake_quantize(matrix, found["scale"], found["zero_point"], args, global_scale=found["global_scale"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_for_a_matrix(bits, symmetric):
    matrix = awkward(40, 256, seed=bits)
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "tensor"}
    assert torch.equal(ours(matrix, f"int{bits}-tensor{'' if symmetric else '-asym'}"), theirs(matrix, args))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("option", ["", "-g32", "-tensor"])
def test_clipping_is_the_observer_s_search_for_squared_error(bits, symmetric, option):
    matrix = awkward(40, 256, seed=bits)
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": option[1:] or "channel"}
    if option == "-g32":
        args |= {"strategy": "group", "group_size": 32}
    spec = f"int{bits}{option}{'' if symmetric else '-asym'}"
    expected = theirs(matrix, args, norm=2.0, maxshrink=0.8, patience=80)
    assert torch.equal(ours(matrix, f"{spec}-mse"), expected)
    assert not torch.equal(ours(matrix, spec), expected)


@pytest.mark.parametrize(
    ("spec", "scheme"),
    [("fp8-tensor", "FP8"), ("fp8", "FP8_DYNAMIC"), ("fp8-block", "FP8_BLOCK"), ("nvfp4", "NVFP4A16")],
)
@pytest.mark.parametrize("shape", [(64, 128), (300, 272)])
def test_small_floats(spec, scheme, shape):
    matrix = awkward(*shape)
    assert torch.equal(ours(matrix, spec), theirs(matrix, scheme))


@pytest.mark.parametrize(("spec", "scheme"), [("mxfp4", "MXFP4A16"), ("mxfp8", "MXFP8A16")])
def test_microscaling_where_the_library_takes_the_scale_of_the_standard(spec, scheme):
    matrix = awkward(160, 256)
    groups = matrix.unflatten(1, (-1, 32)).abs().amax(-1)
    as_standard = (groups.frexp().mantissa * 2 < 1.75).repeat_interleave(32, dim=1)
    assert 0.1 < 1 - as_standard.float().mean() < 0.4
    found, expected = ours(matrix, spec), theirs(matrix, scheme)
    assert torch.equal(found[as_standard], expected[as_standard])
    assert not torch.equal(found, expected)


def test_scales_of_nvfp4_in_the_middle_of_two():
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    for largest in torch.linspace(0.1, 30, 40):
        matrix = torch.randn(126, 16, generator=torch.Generator().manual_seed(0))
        matrix *= (
            torch.cat([torch.tensor([448.0]), middles])[:, None] / 448 * largest / matrix.abs().amax(-1, keepdim=True)
        )
        assert torch.equal(ours(matrix, "nvfp4"), theirs(matrix, "NVFP4A16"))


def test_every_float32_near_a_tie_rounds_as_in_the_library():
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA

    ties = torch.arange(0, 8, 0.125)
    x = torch.cat([ties, ties.nextafter(torch.tensor(9.0)), ties.nextafter(torch.tensor(-1.0))])
    x = torch.cat([x, -x])
    assert torch.equal(round_to_float(x, E2M1), FP4_E2M1_DATA.cast_to_fp4(x.clone().clamp(-6, 6)))
    every_half = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.float16).float()
    x = every_half[every_half.isfinite()].clamp(-448, 448)
    assert torch.equal(round_to_float(x, E4M3), x.to(torch.float8_e4m3fn).float())


def test_the_organism_in_fp8_is_what_llm_compressor_wrote_but_for_scales_in_bfloat16(organism):
    """llm-compressor computes on bfloat16 weights in bfloat16, so scales are rounder and values near the middle of two
    codes may take the other. What FP8 does to a weight is 2.6 % of its norm."""
    build = tracelens.load(FP8_BUILD, device="cpu")
    simulated = {weight.name: weight.matrix for weight in weight_matrices(apply_precision(organism, "fp8+bf16"))}
    for weight in weight_matrices(build):
        mine, built = simulated[weight.name], weight.matrix
        assert (mine - built).norm() < 0.02 * built.norm(), weight.name
