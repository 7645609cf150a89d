import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.precision.matrices import awkward
from tracelens.precision.codebooks import FP4, NF4, dynamic_codes, round_to_codebook

CODEBOOKS = pytest.mark.parametrize("codebook", [NF4, FP4], ids=["nf4", "fp4"])


@CODEBOOKS
def test_a_block_by_hand(codebook):
    levels = torch.tensor(sorted(codebook))
    block = (levels * 2.5)[None]
    assert torch.equal(round_to_codebook(block, codebook, 32), block)
    middle = (levels[5] + levels[6]) / 2
    values = torch.tensor([[1.0, middle, middle.nextafter(torch.tensor(0.0))]])
    assert torch.equal(round_to_codebook(values, codebook, 32)[0], torch.stack([levels[-1], levels[5], levels[6]]))


def test_the_tables():
    assert len(NF4) == 16
    assert list(NF4) == sorted(NF4)
    assert len(FP4) == 16
    assert len(set(FP4)) == 15
    assert {abs(value * 12) for value in FP4} == {0, 0.0625, 2, 3, 4, 6, 8, 12}
    for table in (NF4, FP4):
        assert (min(table), max(table)) == (-1, 1)
        assert 0 in table
    codes = dynamic_codes()
    assert len(codes) == len(codes.unique()) == 256
    assert 0 in codes
    assert codes.max() == 1
    assert codes.abs()[codes != 0].min() > 5e-7


@CODEBOOKS
@given(st.sampled_from([32, 64, 128]), st.integers(1, 30), st.integers(1, 200), st.integers(0, 2**31))
def test_every_value_is_the_nearest_level_of_its_block(codebook, block, out, width, seed):
    matrix = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    rounded = round_to_codebook(matrix, codebook, block)
    assert rounded.shape == matrix.shape
    for part, other in zip(matrix.flatten().split(block), rounded.flatten().split(block), strict=True):
        levels = torch.tensor(codebook) * part.abs().max()
        nearest = (part[:, None] - levels).abs().amin(-1)
        torch.testing.assert_close((part - other).abs(), nearest, rtol=1e-5, atol=1e-6)
        assert len(other.unique()) <= 16


@CODEBOOKS
def test_twice_is_once(codebook):
    rounded = round_to_codebook(awkward(33, 130), codebook, 64)
    assert torch.equal(round_to_codebook(rounded, codebook, 64), rounded)


def test_double_quantization_moves_scales_by_little():
    matrix = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    plain, double = (round_to_codebook(matrix, NF4, 64, double_quant=flag) for flag in (False, True))
    ratio = (double / plain).unflatten(1, (-1, 64))
    scales = ratio.nanmedian(-1, keepdim=True).values
    torch.testing.assert_close(ratio.nan_to_num(1.0), scales.expand_as(ratio).where(~ratio.isnan(), 1.0))
    assert 0 < (scales - 1).abs().mean() < 0.01
    assert (scales - 1).abs().max() < 0.05
    more = (double - matrix).norm() / (plain - matrix).norm()
    assert 0.999 < more < 1.005


def test_zeros_stay_zeros_and_double_quantized_ones_too():
    zeros = torch.zeros(3, 100)
    for double in (False, True):
        assert torch.equal(round_to_codebook(zeros, NF4, 64, double_quant=double), zeros)


def test_nf4_beats_fp4_and_integers_on_gaussians():
    from tracelens.precision.grids import round_to_integers

    matrix = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [(round_to_codebook(matrix, codebook, 64) - matrix).norm() for codebook in (NF4, FP4)]
    integers = (round_to_integers(matrix.unflatten(1, (-1, 64)), 4).flatten(1) - matrix).norm()
    assert errors[0] < integers
    assert errors[0] < errors[1]
