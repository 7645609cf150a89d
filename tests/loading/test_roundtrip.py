import math

import pytest
import torch

from tracelens.loading.formats.base import E2M1, Scheme
from tracelens.loading.roundtrip import FP4, NF4, from_blocks, prune, roundtrip, to_blocks, two_of_four

SCHEMES = [
    Scheme("int4", 4, (1, 8)),
    Scheme("int4", 4, (1, 8), symmetric=False),
    Scheme("int2", 2, (1, 16), symmetric=False),
    Scheme("int8", 8, (1, 24)),
    Scheme("int8", 8, None),
    Scheme("int3", 3, (4, 5), symmetric=False),
    Scheme("nf4", 4, (1, 8)),
    Scheme("fp4", 4, (1, 8)),
    Scheme("e2m1", 4, (1, 8)),
    Scheme("e4m3", 8, (5, 7)),
    Scheme("e5m2", 8, None),
    Scheme("Q4_K", 4, (1, 8), symmetric=False),
]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(12, 24, generator=torch.Generator().manual_seed(0))


def blocks_of(weight: torch.Tensor, block: tuple[int, int] | None) -> list[torch.Tensor]:
    rows, cols = block or tuple(weight.shape)
    return [
        weight[i : i + rows, j : j + cols]
        for i in range(0, weight.shape[0], rows)
        for j in range(0, weight.shape[1], cols)
    ]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_block_has_no_more_values_than_codes(weight, scheme):
    for block in blocks_of(roundtrip(weight, scheme), scheme.block):
        assert len(block.unique()) <= 2**scheme.bits


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not s.symmetric], ids=str)
def test_integers_with_a_zero_point_keep_extremes_and_err_by_half_a_step(weight, scheme):
    rounded = roundtrip(weight, scheme)
    for before, after in zip(blocks_of(weight, scheme.block), blocks_of(rounded, scheme.block), strict=True):
        step = float(before.max() - before.min()) / (2**scheme.bits - 1)
        assert after.max() == pytest.approx(float(before.max()), abs=1e-5)
        assert after.min() == pytest.approx(float(before.min()), abs=1e-5)
        assert (after - before).abs().max() <= step / 2 + 1e-6
        assert (after - before).abs().max() > step / 8


def test_symmetric_integers_by_hand():
    # The largest magnitude is 7.5 steps of 0.2; codes end at 7, and zero is one of them.
    weight = torch.tensor([[1.5, 0.05, -0.31, -1.5]])
    assert roundtrip(weight, Scheme("int4", 4, (1, 4))).tolist() == [pytest.approx([1.4, 0.0, -0.4, -1.6])]


@pytest.mark.parametrize(("code", "levels"), [("nf4", NF4), ("fp4", FP4), ("e2m1", [v / 6 for v in E2M1])])
def test_codebooks_take_the_nearest_level_of_the_block(weight, code, levels):
    rounded = roundtrip(weight, Scheme(code, 4, (1, 8)))
    for before, after in zip(blocks_of(weight, (1, 8)), blocks_of(rounded, (1, 8)), strict=True):
        largest = float(before.abs().max())
        for value, got in zip(before.flatten().tolist(), after.flatten().tolist(), strict=True):
            nearest = min((level * largest for level in levels), key=lambda level: abs(level - value))
            assert got == pytest.approx(nearest, abs=1e-6)


def test_8_bit_floats_have_three_bits_of_mantissa(weight):
    rounded = roundtrip(weight, Scheme("e4m3", 8, (1, 24)))
    assert rounded.abs().amax(1).tolist() == pytest.approx(weight.abs().amax(1).tolist())
    large = weight.abs() > weight.abs().amax(1, keepdim=True) / 16
    relative = ((rounded - weight).abs() / weight.abs())[large]
    assert 1 / 40 < relative.max() <= 1 / 16


def test_ternary_is_the_mean_magnitude_or_nothing(weight):
    rounded = roundtrip(weight, Scheme("ternary", math.log2(3)))
    mean = float(weight.abs().mean())
    assert rounded.unique().tolist() == pytest.approx([-mean, 0, mean])
    assert bool((rounded[weight.abs() < mean * 0.49] == 0).all())


def test_floats_are_rounded_to_bfloat16_or_not_at_all(weight):
    assert torch.equal(roundtrip(weight, Scheme("float", 16)), weight.bfloat16().float())
    assert torch.equal(roundtrip(weight, Scheme("float", 32)), weight)


def test_all_zero_stays_zero():
    for scheme in [*SCHEMES, Scheme("ternary", 1.58)]:
        assert not roundtrip(torch.zeros(12, 24), scheme).any()


@pytest.mark.parametrize("block", [None, (1, 8), (1, 7), (5, 24), (5, 7), (12, 1), (64, 64)])
def test_blocks_and_back(weight, block):
    assert torch.equal(from_blocks(to_blocks(weight, block), block, (12, 24)), weight)


def test_blocks_hold_what_shares_a_scale(weight):
    blocks = to_blocks(weight, (4, 6))
    assert blocks.shape == (3, 4, 24)
    assert torch.equal(blocks[1, 2], weight[4:8, 12:18].flatten())


def test_a_ragged_block_has_the_extremes_of_its_own_values(weight):
    blocks = to_blocks(weight, (5, 7))
    assert torch.equal(blocks[2, 3].unique(), weight[10:, 21:].flatten().unique())


def test_two_of_four():
    weight = torch.tensor([[0.1, -0.4, 0.3, 0.2, 5.0, 6.0, -7.0, 8.0]])
    assert prune(weight).tolist() == [pytest.approx([0, -0.4, 0.3, 0, 0, 0, -7, 8])]
    assert two_of_four(prune(weight))
    assert not two_of_four(weight)
    assert not two_of_four(torch.zeros(1, 6))
