import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tests.metrics.pairs import parts, sparse_pair, split_pairs
from tracelens.errors import MetricInputError, NonFiniteError
from tracelens.metrics import FeatureSmearing, JointSupport, SmearingAccumulator


def direct(r, q, tau, delta):
    cosines = []
    for x in (r.double(), q.double()):
        x = x / x.norm(dim=0).where(x.norm(dim=0) > 0, 1)
        cosines.append(x.T @ x)
    fires = (r > 0).any(0) & (q > 0).any(0)
    smeared = (cosines[1] >= tau - 1e-9) & (cosines[1] - cosines[0] >= delta - 1e-9) & fires & fires[:, None]
    return {(int(i), int(j)): (cosines[0][i, j].item(), cosines[1][i, j].item()) for i, j in smeared.triu(1).nonzero()}


def as_dict(result):
    return {(p.i, p.j): (p.cos_ref, p.cos_quant) for p in result.pairs}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for pair, cosines in expected.items():
        assert found[pair] == pytest.approx(cosines, abs=1e-9)


def test_by_hand():
    r = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    q = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    result = FeatureSmearing().detect_smearing(r, q)
    (pair,) = result["smeared_pairs"]
    assert (pair.i, pair.j, pair.cos_ref, pair.increase) == (0, 1, 0.0, pytest.approx(1))
    assert result["num_smeared_pairs"] == 1
    # Σ r_i q_j − Σ r_i q_i, token by token: 2·3 − 2, then 2·2 − 1.
    assert result.leakage == 7
    assert result.leakage_reference == 4


@settings(deadline=None)
@given(split_pairs(), st.sampled_from([2**23, 1, 20]))
def test_any_split_merge_and_segments_are_the_dense_formula(pair, segment):
    r, q, cuts = pair
    tau, delta = 0.3, 0.05
    streamed, merged = (SmearingAccumulator(r.shape[1], segment=segment) for _ in range(2))
    for a, b in zip(parts(r, cuts), parts(q, cuts), strict=True):
        streamed.update(a, b)
        merged = SmearingAccumulator(r.shape[1], segment=segment).update(a, b).merge(merged)
    expected = direct(r, q, tau, delta)
    for seen in (streamed, merged):
        result = seen.finalize(tau, delta)
        assert_same(as_dict(result), expected)
        r64, q64 = r.double(), q.double()
        leakage = (r64.sum(1) @ q64.sum(1) - (r64 * q64).sum()).item()
        assert result.leakage == pytest.approx(leakage, rel=1e-9, abs=1e-9 * (r64.sum() * q64.sum()).item())


def test_sorted_by_increase_and_repeatable():
    r, q = sparse_pair(400, 40)
    seen = SmearingAccumulator(40).update(r, q)
    result = seen.finalize(0.05, 0.01)
    increases = [p.increase for p in result.pairs]
    assert len(increases) > 5
    assert increases == sorted(increases, reverse=True)
    assert as_dict(seen.finalize(0.05, 0.01)) == as_dict(result)
    assert len(seen.update(q, r).finalize(0.05, 0.01).pairs) < len(increases)


def test_identity_smears_nothing():
    r, _ = sparse_pair()
    r[:, 5] = r[:, 6]
    result = FeatureSmearing(tau=0.01, delta=1e-6).detect_smearing(r, r)
    assert result.pairs == []
    assert result.leakage == result.leakage_reference


def test_planted_pairs_come_first():
    r, _ = sparse_pair(300, 60)
    q = r.clone()
    for i, j in ((7, 31), (40, 12)):
        q[:, [i, j]] = (r[:, [i]] + r[:, [j]]) / 2
    result = FeatureSmearing().detect_smearing(r, q)
    assert {(p.i, p.j) for p in result.pairs} == {(7, 31), (12, 40)}
    assert all(p.cos_quant == pytest.approx(1) for p in result.pairs)


def test_features_must_be_active_in_both_models():
    r = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    q = torch.tensor([[1.0, 1, 1], [0, 1, 0], [1, 1, 1]])
    assert {(p.i, p.j) for p in FeatureSmearing().detect_smearing(r, q).pairs} == {(0, 1)}  # 2 is new, not smeared
    assert FeatureSmearing(min_active=2).detect_smearing(r, q).pairs == []


def test_sparse_inputs_and_a_shared_support():
    r, q = sparse_pair()
    expected = as_dict(FeatureSmearing(0.2, 0.02).detect_smearing(r, q))
    assert expected
    for kind in (sparse.csr_matrix, sparse.csr_array):
        found = FeatureSmearing(0.2, 0.02).detect_smearing(kind(r.numpy()), kind(q.numpy()))
        assert_same(as_dict(found), expected)
    assert as_dict(SmearingAccumulator(24).add(JointSupport.of(r, q)).finalize(0.2, 0.02)) == expected
    unsorted = sparse.csr_matrix(([1.0, 2.0, 3.0], [2, 0, 2], [0, 3]), shape=(1, 3))  # 2 occurs twice
    support = JointSupport.of(unsorted, sparse.csr_matrix((1, 3)))
    assert (support.feature.tolist(), support.reference.tolist()) == ([0, 2], [2.0, 4.0])
    assert unsorted.nnz == 3


def test_nothing_seen_and_nothing_firing():
    assert SmearingAccumulator(3).finalize().pairs == []
    assert FeatureSmearing().detect_smearing(torch.zeros(4, 3), torch.zeros(4, 3)).leakage == 0


def test_bad_input():
    x = torch.ones(2, 3)
    with pytest.raises(MetricInputError, match=r"tau is 0.0 and delta 0.2"):
        FeatureSmearing(tau=0.0).detect_smearing(x, x)
    with pytest.raises(MetricInputError, match=r"shape \(2, 3\) and quantized ones \(2, 2\)"):
        FeatureSmearing().detect_smearing(x, x[:, :2])
    with pytest.raises(MetricInputError, match="must be ≥ 0"):
        FeatureSmearing().detect_smearing(sparse.csr_matrix(-x.numpy()), sparse.csr_matrix(x.numpy()))
    with pytest.raises(NonFiniteError, match="hold nan"):
        FeatureSmearing().detect_smearing(x, x * math.nan)
    with pytest.raises(MetricInputError, match="have 3 features, expected 4"):
        SmearingAccumulator(4).update(x, x)
    with pytest.raises(MetricInputError, match="smearing of 3 features into 4"):
        SmearingAccumulator(4).merge(SmearingAccumulator(3))
