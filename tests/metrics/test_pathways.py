import torch

from tests.metrics.pairs import sparse_pair
from tracelens.metrics import MomentAccumulator
from tracelens.metrics.pathways import equally_active, novel_features


def test_novel_features_by_hand():
    r = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 0, 1]])
    q = torch.tensor([[1.0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    moments = MomentAccumulator(4).update(r, q).finalize()
    assert novel_features(moments, min_active=1).tolist() == [True, False, True, False]
    assert novel_features(moments, min_active=2).tolist() == [True, False, False, False]
    assert novel_features(moments, 0.3, min_active=2).tolist() == [True, True, False, False]


def test_identical_models_have_none():
    r, _ = sparse_pair()
    assert not novel_features(MomentAccumulator(24).update(r, r).finalize(), 1e-9, 1).any()


def test_controls_are_of_the_same_site_as_active_and_drawn_once():
    n = torch.tensor([100.0, 10, 105, 11, 9, 95, 0, 500], dtype=torch.float64)
    site = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
    pool = torch.ones(8, dtype=torch.bool)
    for seed in range(5):
        drawn = equally_active(torch.tensor([0, 1]), pool, n, site, neighbours=2, seed=seed).tolist()
        assert drawn[0] in (2, 5)
        assert drawn[1] in (3, 4)
    assert equally_active(torch.tensor([7]), pool, n, site).tolist() == []
    few = torch.zeros(8, dtype=torch.bool)
    few[2] = True
    assert equally_active(torch.tensor([0, 5]), few, n, site).tolist() == [2]
