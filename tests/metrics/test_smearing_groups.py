import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.metrics.pairs import parts, sparse_pair, split_pairs
from tracelens.errors import MetricInputError
from tracelens.metrics import FeatureSmearing, SmearedPair
from tracelens.metrics.leakage import ClassLeakage
from tracelens.metrics.smearing_groups import smeared_groups


def pair(i, j, increase=0.5):
    return SmearedPair(i, j, 0.1, 0.1 + increase)


def test_groups_by_hand():
    groups = smeared_groups([pair(1, 2), pair(2, 9, 0.7), pair(30, 4, 0.6), pair(5, 6, 0.8)])
    assert [g.members for g in groups] == [(1, 2, 9), (5, 6), (4, 30)]
    assert (groups[0].size, groups[0].n_pairs) == (3, 2)
    assert groups[0].density == pytest.approx(2 / 3)
    assert groups[0].mean_increase == pytest.approx(0.6)
    assert groups[0].max_increase == pytest.approx(0.7)
    assert groups[1].density == 1
    assert groups[1].to_dict()["members"] == [5, 6]
    assert smeared_groups([]) == []


@settings(deadline=None)
@given(st.sets(st.tuples(st.integers(0, 25), st.integers(26, 40)), min_size=1, max_size=40))
def test_groups_are_the_closure_of_the_pairs(ends):
    groups = smeared_groups(pair(i, j) for i, j in ends)
    of = {member: k for k, group in enumerate(groups) for member in group.members}
    assert len(of) == sum(g.size for g in groups)  # nobody is in two
    assert set(of) == {k for edge in ends for k in edge}
    assert all(of[i] == of[j] for i, j in ends)
    assert sum(g.n_pairs for g in groups) == len(ends)
    for group in groups:  # linked by its own pairs
        reached, new = set(), {group.members[0]}
        while new:
            reached |= new
            new = {b for i, j in ends for a, b in ((i, j), (j, i)) if a in reached} - reached
        assert reached == set(group.members)


def classes(n):
    mask = torch.arange(n) % 3 == 0
    return torch.stack([mask, ~mask])


def test_leakage_by_hand():
    r = torch.tensor([[1.0, 0, 2], [0, 3, 0]])
    q = torch.tensor([[1.0, 1, 0], [2, 3, 1]])
    masks = torch.tensor([[True, False, False], [False, True, True]])
    found = ClassLeakage(masks).update(r, q).finalize()
    # Token 0: r has 1 | 2, q has 1 | 1; token 1: r has 0 | 3, q has 2 | 4. Off the diagonal: 1·1 within 0, 3·3 within 1 go.
    assert found.cross[0].tolist() == [[0, 1], [2 + 6, 2 + 12 - 9]]
    assert found.reference[0].tolist() == [[0, 2], [2, 0]]
    ratio = found.ratio()[0]
    assert ratio[0, 1] == 0.5
    assert ratio[0, 0].isnan()


@settings(deadline=None)
@given(split_pairs())
def test_leakage_of_the_classes_adds_up_and_any_split_is_the_same(data):
    r, q, cuts = data
    masks = classes(r.shape[1])
    whole = ClassLeakage(masks).update(r, q).finalize()
    total = FeatureSmearing().detect_smearing(r, q)
    scale = (r.double().sum() * q.double().sum()).item() + (r.double().sum() ** 2).item()
    assert whole.cross.sum().item() == pytest.approx(total.leakage, rel=1e-9, abs=1e-9 * scale)
    assert whole.reference.sum().item() == pytest.approx(total.leakage_reference, rel=1e-9, abs=1e-9 * scale)
    i, j = masks[0].double(), masks[1].double()
    direct = torch.einsum("ti,tj,i,j->", r.double(), q.double(), i, j).item()
    assert whole.cross[0, 0, 1].item() == pytest.approx(direct, rel=1e-9, abs=1e-9 * scale)
    merged = ClassLeakage(masks)
    for a, b in zip(parts(r, cuts), parts(q, cuts), strict=True):
        merged = ClassLeakage(masks).update(a, b).merge(merged)
    torch.testing.assert_close(merged.finalize().cross, whole.cross, rtol=1e-9, atol=1e-9 * scale)


def test_leakage_of_blocks_resamples_and_identity_leaks_nothing_new():
    r, q = sparse_pair()
    block = torch.arange(len(r)) % 4
    masks = classes(24)
    by_block = ClassLeakage(masks, 4).update(r, q, block).finalize()
    whole = ClassLeakage(masks).update(r, q).finalize()
    torch.testing.assert_close(by_block.ratio(torch.ones(1, 4)), whole.ratio())
    only = ClassLeakage(masks).update(r[block == 2], q[block == 2]).finalize()
    torch.testing.assert_close(by_block.ratio(torch.tensor([[0.0, 0, 1, 0]])), only.ratio())
    assert ClassLeakage(masks).update(r, r).finalize().ratio().eq(1).all()


def test_a_feature_in_no_class_counts_for_nothing():
    r, q = sparse_pair()
    masks = torch.zeros(2, 24, dtype=torch.bool)
    masks[0, 3:7] = masks[1, 9:15] = True
    some = [*range(3, 7), *range(9, 15)]
    expected = ClassLeakage(masks[:, some]).update(r[:, some], q[:, some]).finalize()
    torch.testing.assert_close(ClassLeakage(masks).update(r, q).finalize().cross, expected.cross)


def test_bad_leakage():
    with pytest.raises(MetricInputError, match="feature 1 is in two classes"):
        ClassLeakage(torch.tensor([[True, True], [False, True]]))
    with pytest.raises(MetricInputError, match="have 3 features, expected 24"):
        ClassLeakage(classes(24)).update(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(MetricInputError, match="cannot merge leakage"):
        ClassLeakage(classes(24)).merge(ClassLeakage(classes(12)))
