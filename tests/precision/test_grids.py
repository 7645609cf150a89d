import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.precision.matrices import awkward
from tracelens.precision.grids import round_to_dtype, round_to_integers, round_vectorwise


def test_symmetric_rounding_by_hand():
    # 2 bits: scale = 3 / 1.5 = 2, codes -2 … 1, so 3 is clipped to 2 and -3 → code -1.5 rounds to -2.
    row = torch.tensor([3.0, -3.0, 0.9, 1.1, 0.0])
    assert round_to_integers(row, 2).tolist() == [2.0, -4.0, 0.0, 2.0, 0.0]


def test_asymmetric_rounding_by_hand():
    # 2 bits over 0 … 3: scale 1, zero point -2; a range without 0 is widened to hold it.
    assert round_to_integers(torch.tensor([1.0, 2.4, 3.0]), 2, symmetric=False).tolist() == [1.0, 2.0, 3.0]


def test_each_row_has_its_own_scale():
    rows = torch.randn(4, 16)
    scaled = rows * torch.tensor([1.0, 4.0, 0.25, 1024.0])[:, None]
    ratio = round_to_integers(scaled, 4) / round_to_integers(rows, 4)
    assert torch.equal(ratio.nan_to_num(nan=0).amax(1), torch.tensor([1.0, 4.0, 0.25, 1024.0]))


@pytest.mark.parametrize("clipping", ["absmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_stay_zeros(symmetric, clipping):
    zeros = torch.zeros(2, 8)
    assert torch.equal(round_to_integers(zeros, 4, symmetric=symmetric, clipping=clipping), zeros)
    assert torch.equal(round_vectorwise(zeros), zeros)


@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**31))
def test_rounding_keeps_to_the_grid(bits, symmetric, seed):
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    rounded = round_to_integers(values, bits, symmetric=symmetric)
    assert rounded.shape == values.shape
    for row, other in zip(values, rounded, strict=True):
        assert len(other.unique()) <= 2**bits
        span = 2 * row.abs().max() if symmetric else row.max().clamp(min=0) - row.min().clamp(max=0)
        # At most half a step, and at the ends half a step more: clipping if symmetric, the rounded zero point if not.
        assert (row - other).abs().max() <= 1.001 * span / (2**bits - 1)


def test_more_bits_are_closer():
    values = torch.randn(8, 64)
    errors = [(round_to_integers(values, bits) - values).norm().item() for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def test_the_dtype_is_kept():
    assert round_to_integers(torch.randn(2, 8).bfloat16(), 8).dtype is torch.bfloat16
    assert round_to_dtype(torch.randn(3), torch.bfloat16).dtype is torch.float32
    assert round_to_dtype(torch.tensor([1 + 2**-9]), torch.bfloat16).item() == 1.0


def squared_error(values, rounded):
    return (rounded.double() - values.double()).square().sum(-1)


class TestClipping:
    @given(st.integers(2, 8), st.booleans(), st.integers(0, 2**31))
    def test_no_row_has_a_larger_squared_error_than_without(self, bits, symmetric, seed):
        values = awkward(8, 48, seed)
        plain = squared_error(values, round_to_integers(values, bits, symmetric=symmetric))
        clipped = squared_error(values, round_to_integers(values, bits, symmetric=symmetric, clipping="mse"))
        assert (clipped <= plain * (1 + 1e-5)).all()

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_it_is_the_least_of_eighty_ranges(self, symmetric):
        values = torch.randn(6, 200, generator=torch.Generator().manual_seed(3))
        found = squared_error(values, round_to_integers(values, 3, symmetric=symmetric, clipping="mse"))
        lowest, highest, errors = -4, 3, []
        for percent in range(21, 101):
            low, high = values.amin(-1, keepdim=True) * percent / 100, values.amax(-1, keepdim=True) * percent / 100
            scale = torch.maximum(-low, high) / 3.5 if symmetric else (high - low) / 7
            zero = 0 if symmetric else (lowest - low / scale).clamp(lowest, highest).round()
            codes = (values / scale + zero).clamp(lowest, highest).round()
            errors.append(squared_error(values, (codes - zero) * scale))
        torch.testing.assert_close(found, torch.stack(errors).amin(0))

    def test_an_outlier_is_given_up_for_the_many(self):
        row = torch.linspace(-1, 1, 999).tolist()
        rounded = round_to_integers(torch.tensor([[*row, 3.0]]), 3, clipping="mse")
        assert rounded[0, -1] < 2
        assert round_to_integers(torch.tensor([[*row, 3.0]]), 3)[0, -1] > 2.5

    def test_eight_bits_of_a_flat_row_are_left_alone(self):
        row = torch.linspace(-1, 1, 4000)[None]
        assert torch.equal(round_to_integers(row, 8, clipping="mse"), round_to_integers(row, 8))


class TestVectorwise:
    def test_by_hand(self):
        # absmax 127 → step 1, and ties go to the even integer.
        row = torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5, 0.25]])
        torch.testing.assert_close(round_vectorwise(row), torch.tensor([[127.0, -127.0, 0.0, 2.0, -2.0, 0.0]]))

    @given(st.integers(0, 2**31))
    def test_255_levels_within_half_a_step(self, seed):
        values = awkward(6, 200, seed)
        rounded = round_vectorwise(values)
        step = values.abs().amax(-1, keepdim=True) / 127
        assert ((rounded - values).abs() <= step * 0.5 + values.abs() * 2**-10 + 1e-7).all()
        torch.testing.assert_close(rounded, (rounded / step.clamp_min(1e-9)).round() * step, rtol=1e-3, atol=1e-7)
        assert torch.equal(round_vectorwise(-values), -rounded)
