import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.precision.matrices import awkward
from tracelens.precision.floats import E2M1, E4M3, E5M2, power_of_two, round_scaled, round_to_float

DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
FORMATS = [E2M1, E4M3, E5M2]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def values_of(to):
    """All of a format's numbers, from its definition."""
    if to is E2M1:
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    else:
        every = torch.arange(128, dtype=torch.uint8).view(DTYPES[to]).float()
        magnitudes = every[every.isfinite()]
    return torch.cat([-magnitudes.flip(0), magnitudes[1:]])


@pytest.mark.parametrize("to", FORMATS)
def test_what_a_format_holds_stays_and_its_largest_is_the_end(to):
    values = values_of(to)
    assert torch.equal(round_to_float(values, to), values)
    assert values.max() == to.largest
    assert 2**to.largest_exponent <= to.largest < 2 ** (to.largest_exponent + 1)
    beyond = torch.tensor([to.largest * 1.5, -to.largest * 100, 3e38])
    assert round_to_float(beyond, to).tolist() == [to.largest, -to.largest, to.largest]


@pytest.mark.parametrize("to", FORMATS)
def test_between_two_neighbours_the_nearer_and_in_the_middle_the_even_one(to):
    values = values_of(to)
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    assert torch.equal(round_to_float(middle.nextafter(low), to), low)
    assert torch.equal(round_to_float(middle.nextafter(high), to), high)
    even = torch.arange(len(values)) % 2 == len(values) // 2 % 2  # codes count up from zero, which is even
    assert torch.equal(round_to_float(middle, to), torch.where(even[:-1], low, high))


@pytest.mark.parametrize("to", [E4M3, E5M2])
@given(st.lists(FLOATS, min_size=1, max_size=50))
def test_torch_s_own_cast_agrees(to, numbers):
    x = torch.tensor(numbers).clamp(-to.largest, to.largest)
    assert torch.equal(round_to_float(x, to), x.to(DTYPES[to]).float())


@given(st.floats(2**-126, 2**127, width=32))
def test_powers_of_two(number):
    x = torch.tensor([number, -number])
    power = power_of_two(x)
    assert (power <= x.abs()).all()
    assert (x.abs() / power < 2).all()
    assert torch.equal(power.log2().round(), power.log2())
    assert power_of_two(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("to", FORMATS)
def test_a_block_reaches_the_largest_value_of_the_format(to):
    blocks = awkward(12, 128)
    rounded = round_scaled(blocks, to)
    scale = blocks.abs().amax(-1, keepdim=True) / to.largest
    live = scale[:, 0] > 0
    assert live.sum() == 10
    assert not rounded[~live].any()
    codes = (rounded / scale)[live]
    torch.testing.assert_close(codes.abs().amax(-1), torch.full((10,), to.largest))
    torch.testing.assert_close(codes, round_to_float(codes, to), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        round_scaled(rounded, to), rounded, rtol=1e-6, atol=0
    )  # once is enough, but for the scale


def test_more_mantissa_is_closer():
    blocks = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    errors = [(round_scaled(blocks, to) - blocks).norm() for to in (E4M3, E5M2, E2M1)]
    assert errors == sorted(errors)
