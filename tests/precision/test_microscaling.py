import pytest
import torch

from tests.precision.matrices import awkward
from tracelens.precision.floats import E2M1, E4M3, power_of_two, round_to_float
from tracelens.precision.microscaling import nvfp4_scale, round_mx, round_nvfp4


def groups(size, seed=0):
    return awkward(40, 256, seed).unflatten(1, (-1, size))


def test_a_group_of_mxfp4_by_hand():
    # absmax 7 → scale 2^(2 - 2) = 1: 7 is clipped to 6, 2.5 is a tie that goes to the even mantissa.
    assert round_mx(torch.tensor([[7.0, -5.1, 2.5, 3.5, 0.2, 0.3, 0.0]]), E2M1).tolist() == [
        [6.0, -6.0, 2.0, 4.0, 0.0, 0.5, 0.0]
    ]
    # absmax 0.1 = 1.6 · 2^-4 → scale 2^-6.
    assert round_mx(torch.tensor([[0.1, 0.03]]), E2M1).tolist() == [[6 / 64, 2 / 64]]


@pytest.mark.parametrize("element", [E2M1, E4M3])
def test_scales_are_powers_of_two_that_use_the_range(element):
    values = groups(32)
    rounded = round_mx(values, element)
    scale = power_of_two(values.abs().amax(-1, keepdim=True)) * 2.0**-element.largest_exponent
    live = scale[..., 0] > 0
    codes = (rounded / scale)[live]
    assert torch.equal(codes, round_to_float(codes, element))
    assert (codes.abs().amax(-1) >= 2**element.largest_exponent).all()
    assert not rounded[~live].any()


@pytest.mark.parametrize("element", [E2M1, E4M3])
def test_twice_is_once(element):
    rounded = round_mx(groups(32), element)
    assert torch.equal(round_mx(rounded, element), rounded)


@pytest.mark.parametrize("element", [E2M1, E4M3])
def test_scaling_by_a_power_of_two_scales_the_result(element):
    values = groups(32)
    for factor in (2.0**-20, 0.5, 2.0**30):
        assert torch.equal(round_mx(values * factor, element), round_mx(values, element) * factor)


def test_a_group_of_nvfp4_by_hand():
    # The tensor's absmax 2688 = 448 · 6 has scale 1; a group's absmax 6.3 / 6 = 1.05 is 1 in E4M3 (neighbour 1.125).
    values = torch.tensor([[2688.0, 1344.0], [6.3, -1.2]])
    scale = nvfp4_scale(values)
    assert scale.item() == 1.0
    assert round_nvfp4(values, scale).tolist() == [[2688.0, 1344.0], [6.0, -1.0]]


def test_nvfp4_codes_and_scales_are_what_the_format_holds():
    values = groups(16)
    scale = nvfp4_scale(values.flatten(1))
    rounded = round_nvfp4(values, scale)
    local = round_to_float(values.abs().amax(-1, keepdim=True) / 6 * scale, E4M3)
    assert local.max() == 448
    live = local[..., 0] > 0
    codes = (rounded * scale / local)[live]
    torch.testing.assert_close(codes, round_to_float(codes, E2M1), rtol=1e-5, atol=1e-5)
    assert max(len(group.unique()) for group in rounded.flatten(0, 1)) <= 15


def test_nvfp4_of_nothing_is_nothing():
    zeros = torch.zeros(2, 4, 16)
    assert torch.equal(round_nvfp4(zeros, nvfp4_scale(zeros.flatten(1))), zeros)


def test_the_scale_of_the_tensor_saves_small_weights():
    """Without it, scales of E4M3 end at 2^-9: weights of this size would all be zero."""
    values = groups(16) * 1e-8
    rounded = round_nvfp4(values, nvfp4_scale(values.flatten(1)))
    torch.testing.assert_close(rounded * 1e8, round_nvfp4(groups(16), nvfp4_scale(groups(16).flatten(1))))
