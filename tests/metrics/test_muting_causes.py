import pytest
import torch

from tests.metrics.pairs import parts, sparse_pair
from tracelens.errors import MetricInputError, NonFiniteError
from tracelens.metrics import ActivationMuting
from tracelens.metrics.muting_causes import CauseAccumulator, MutingCauses


def test_by_hand():
    r = torch.tensor([[1.0, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 2]])
    before = torch.tensor([[1.0, 0, 0], [0, 3, 1], [1, 0, 0], [1, 0, 2]])
    q = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]])
    found = CauseAccumulator(3).update(r, before, q).finalize()
    assert found.n_ref.tolist() == [4, 2, 1]
    assert found.n_moved.tolist() == [1, 1, 0]
    assert found.n_clipped.tolist() == [2, 1, 1]
    assert found.rate.tolist() == [0.75, 1, 1]
    assert found.clipped_share.tolist() == pytest.approx([2 / 3, 0.5, 1])
    assert found.muted() == [1, 2]
    assert found.muted(0.7, min_active=2) == [1, 0]


def test_causes_add_up_to_what_is_muted():
    r, q = sparse_pair(500)
    generator = torch.Generator().manual_seed(5)
    before = torch.where(torch.rand(q.shape, generator=generator) < 0.5, r, q)
    found = CauseAccumulator(24).update(r, before, q).finalize()
    torch.testing.assert_close(found.rate, ActivationMuting().detect_muting(r, q).rates, equal_nan=True)
    assert torch.equal(found.n_muted, ((r > 0) & (q == 0)).sum(0))
    assert (found.n_clipped > 0).any()


def test_nothing_is_clipped_where_nothing_is_rounded_and_nothing_muted_in_identical_models():
    r, q = sparse_pair()
    assert CauseAccumulator(24).update(r, q, q).finalize().n_clipped.sum() == 0
    assert CauseAccumulator(24).update(r, r, r).finalize().n_muted.sum() == 0


def test_any_split_and_merge():
    r, q = sparse_pair()
    before, cuts = r.clone(), [7, 7, 120]
    whole = CauseAccumulator(24).update(r, before, q).finalize()
    merged = CauseAccumulator(24)
    for chunk in zip(*(parts(x, cuts) for x in (r, before, q)), strict=True):
        merged = CauseAccumulator(24).update(*chunk).merge(merged)
    for name in ("n_ref", "n_moved", "n_clipped"):
        assert torch.equal(getattr(merged.finalize(), name), getattr(whole, name))


def test_bad_input():
    x = torch.ones(2, 3)
    with pytest.raises(MetricInputError, match=r"before the rounding have shape \(2, 2\)"):
        CauseAccumulator(3).update(x, x[:, :2], x)
    with pytest.raises(NonFiniteError, match="before the rounding hold NaN"):
        CauseAccumulator(3).update(x, x * torch.nan, x)
    with pytest.raises(MetricInputError, match="have 3 features, expected 4"):
        CauseAccumulator(4).update(x, x, x)
    with pytest.raises(MetricInputError, match="causes of 3 features into 4"):
        CauseAccumulator(4).merge(CauseAccumulator(3))
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(MetricInputError, match="more firings are muted"):
        MutingCauses(one, one, one)
