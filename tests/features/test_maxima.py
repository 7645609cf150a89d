import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tracelens.features.maxima import Maxima, PromptMaxima
from tracelens.metrics.support import SparseActivations
from tracelens.sites import Site


def test_by_hand():
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [2.0, 5.0]])
    maxima = PromptMaxima(3).update(Site(0), features, torch.tensor([2, 0, 2])).finalize()
    assert maxima[Site(0)].dense().tolist() == [[3, 2], [0, 0], [2, 5]]


@pytest.mark.parametrize("sparse", [False, True])
@settings(deadline=None)
@given(seed=st.integers(0, 2**16), n_features=st.integers(1, 30), parts=st.integers(1, 12))
def test_any_split_in_any_order_merged_is_one_pass(sparse, seed, n_features, parts):
    generator = torch.Generator().manual_seed(seed)
    features = (torch.rand(60, n_features, generator=generator) - 0.5).relu()
    prompt = torch.randint(0, 5, (60,), generator=generator)
    form = SparseActivations.of if sparse else torch.clone
    whole = PromptMaxima(5).update(Site(1), form(features), prompt).finalize()[Site(1)].dense()
    split = [PromptMaxima(5), PromptMaxima(5)]
    for i, rows in enumerate(torch.randperm(60, generator=generator).tensor_split(parts)):
        split[i % 2].update(Site(1), form(features[rows]), prompt[rows])
        split[i % 2].finalize()  # does no harm in between
    assert torch.equal(split[0].merge(split[1]).finalize()[Site(1)].dense(), whole)
    for p in range(5):
        expected = features[prompt == p].amax(0) if (prompt == p).any() else torch.zeros(n_features)
        assert torch.equal(whole[p], expected)


def test_a_prompt_in_many_parts_is_held_once():
    maxima = PromptMaxima(1)
    for i in range(1000):
        maxima.update(Site(0), torch.full((1, 50), 1.0 + i), torch.tensor([0]))
    assert sum(len(key) for key, _ in maxima._parts[Site(0)]) <= 100
    assert maxima.finalize()[Site(0)].dense().eq(1000).all()


def test_parts_of_the_maxima():
    dense = torch.tensor([[0.0, 3, 0, 1], [0, 0, 0, 2], [0, 5, 0, 0]])
    maxima = Maxima.of(dense)
    assert (len(maxima), maxima.n_features) == (3, 4)
    assert torch.equal(maxima.prompts([2, 0, 2]).dense(), dense[[2, 0, 2]])
    assert torch.equal(maxima.prompts(torch.tensor([1])).dense(), dense[[1]])
    assert torch.equal(maxima.columns([3, 0]), dense[:, [3, 0]])
    live = list(maxima.live())
    assert torch.equal(torch.cat([features for features, _ in live]), torch.tensor([1, 3]))
    assert torch.equal(torch.cat([values for _, values in live], 1), dense[:, [1, 3]])
    assert list(Maxima.of(torch.zeros(2, 2)).live()) == []


def test_an_empty_side_merges():
    full = PromptMaxima(1).update(Site(0), torch.ones(1, 2), torch.tensor([0]))
    assert torch.equal(PromptMaxima(1).merge(full).finalize()[Site(0)].dense(), torch.ones(1, 2))
    assert list(full.merge(PromptMaxima(1)).finalize()) == [Site(0)]


def test_half_precision_is_kept_in_float32():
    maxima = PromptMaxima(1).update(Site(0), torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([0])).finalize()
    assert maxima[Site(0)].dense().dtype == torch.float32
