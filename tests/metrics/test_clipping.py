import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tracelens.errors import MetricInputError
from tracelens.metrics.clipping import BITS, ClippingAccumulator
from tracelens.precision.grids import round_to_integers


def magnitudes(n=60, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g).abs() * 10.0 ** torch.randint(-4, 2, (width,), generator=g)
    return torch.where(torch.rand(n, width, generator=g) < 0.4, x, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**16))
def test_is_what_rounding_to_integers_makes_zero(seed):
    x = magnitudes(seed=seed)
    found = ClippingAccumulator(12).update(x, x.amax(1)).finalize()
    for k, bits in enumerate(BITS):
        gone = (x > 0) & (round_to_integers(x, bits) == 0)
        assert found.n_clipped[k].tolist() == gone.sum(0).tolist()


def test_one_range_for_all_tokens():
    x = magnitudes()
    found = ClippingAccumulator(12).update(x, float(x.max())).finalize()
    rounded = round_to_integers(x.reshape(1, -1), 4).view_as(x)
    assert found.n_clipped[BITS.index(4)].tolist() == ((x > 0) & (rounded == 0)).sum(0).tolist()


def test_bits_needed_by_hand():
    # Half a step is peak / (2^bits − 1): 1/3, 1/7, 1/15 of the peak 1.
    x = torch.tensor([[1.0, 0.3, 0.1, 1e-6, 0], [1.0, 0.3, 0.1, 1e-6, 0]])
    found = ClippingAccumulator(5, bits=(2, 4, 3)).update(x, x.amax(1)).finalize()
    assert found.bits == (4, 3, 2)
    needed = found.bits_needed()
    assert needed[:4].tolist() == [2, 3, 4, math.inf]
    assert needed[4].isnan()
    assert found.share[:, 1].tolist() == [0, 0, 1]


def test_split_merge_and_bad_input():
    x = magnitudes()
    whole = ClippingAccumulator(12).update(x, x.amax(1)).finalize()
    parts = [ClippingAccumulator(12).update(part, part.amax(1)) for part in x.split(17)]
    assert torch.equal(parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3]).finalize().n_clipped, whole.n_clipped)
    with pytest.raises(MetricInputError, match="bits are"):
        ClippingAccumulator(3, bits=())
    with pytest.raises(MetricInputError, match="cannot merge clipping"):
        ClippingAccumulator(3).merge(ClippingAccumulator(4))
    with pytest.raises(MetricInputError, match="have 12 features, expected 3"):
        ClippingAccumulator(3).update(x, 1.0)
