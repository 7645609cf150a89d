import pytest
import torch

from tracelens.auditing.preservation import SHARES, Thresholds, bootstrap_cpfr, bootstrap_shares, classes_of
from tracelens.metrics.cpfr import fidelity
from tracelens.metrics.drift import correlation
from tracelens.metrics.moments import MomentAccumulator
from tracelens.metrics.muting import muting_rate
from tracelens.metrics.survival import survival_class
from tracelens.stats import bootstrap_weights

AT = Thresholds(0.9, 0.5, 0.8)
PROMPTS, TOKENS, FEATURES = 20, 10, 40
WEIGHTS = bootstrap_weights(PROMPTS, 300, seed=0)


@pytest.fixture(scope="module")
def moments():
    generator = torch.Generator().manual_seed(0)
    shape = (PROMPTS * TOKENS, FEATURES)
    r = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3)
    noise = torch.linspace(0, 2, FEATURES) * torch.randn(shape, generator=generator)
    q = (r + noise * (r > 0)).clamp(min=0)
    q[:, 30] = 0  # muted
    r[:, 31] = 0  # never fires
    block = torch.arange(PROMPTS).repeat_interleave(TOKENS)
    return MomentAccumulator(FEATURES, PROMPTS).update(r, q, block).finalize()


def test_classes_are_those_of_the_metrics(moments):
    total = moments.total()
    survived, blurred, damaged, degraded, muted = classes_of(total, AT)[:, 0]
    names = survival_class(correlation(total)[0].numpy(), 0.9, 0.5)
    for name, row in (("survived", survived), ("blurred", blurred), ("damaged", damaged)):
        assert (row == 1).tolist() == (names == name).tolist()
    assert names[31] == ""
    assert survived[31].isnan()
    assert (degraded == 1).tolist() == (fidelity(total)[0] < 0.8).tolist()
    assert muted[30] == 1
    assert (muted == 1).tolist() == (muting_rate(total)[0] >= 0.9).tolist()


def test_shares_are_means_over_the_set_and_lie_in_their_intervals(moments):
    sets = {"low": torch.arange(FEATURES) < 25, "all": torch.ones(FEATURES, dtype=torch.bool)}
    shares = bootstrap_shares(moments, sets, WEIGHTS, PROMPTS, AT)
    for name, mask in sets.items():
        values = classes_of(moments.total(), AT)[:, 0, mask].nanmean(1)
        found = [shares[name][share] for share in SHARES]
        assert [run.value for run in found] == pytest.approx(values.tolist())
        assert sum(run.value for run in found[:3]) == pytest.approx(1)
        for run in found:
            assert 0 <= run.estimate.low <= run.value + 1e-9
            assert run.value - 1e-9 <= run.estimate.high <= 1


def test_an_empty_set_has_no_shares(moments):
    empty = {"none": torch.zeros(FEATURES, dtype=torch.bool)}
    run = bootstrap_shares(moments, empty, WEIGHTS, PROMPTS, AT)["none"]["survived"]
    assert run.value != run.value


def test_each_threshold_belongs_to_the_class_above_it():
    """Muting .9 is muted; a correlation that equals a threshold has reached it."""
    r = torch.zeros(40, 1)
    r[:10] = 1
    q = r.clone()
    q[1:10] = 0
    m = MomentAccumulator(1, 1).update(r, q).finalize()
    assert muting_rate(m).item() == pytest.approx(0.9)
    assert classes_of(m, Thresholds(0.9, 0.5, 0.8, muted_at=muting_rate(m).item()))[4].item() == 1
    rho = correlation(m).item()
    assert classes_of(m, Thresholds(0.9, rho, 0.8))[:3, 0, 0].tolist() == [0, 1, 0]
    assert classes_of(m, Thresholds(rho, 0.1, 0.8))[:3, 0, 0].tolist() == [1, 0, 0]


def test_replicates_of_shares_lie_about_what_was_measured(moments):
    """Features cross thresholds more easily in a resample, which holds fewer prompts; that shift is taken out."""
    every = {"all": torch.ones(FEATURES, dtype=torch.bool)}
    shares = bootstrap_shares(moments, every, WEIGHTS, PROMPTS, AT)["all"]
    for name in ("survived", "degraded"):  # far from 0 and 1, where replicates end
        assert shares[name].replicates.mean().item() == pytest.approx(shares[name].value, abs=1e-9), name
        assert shares[name].replicates.std() > 0, name


def test_what_a_resample_never_fires_is_left_out_of_its_cpfr():
    r = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    q = r * torch.tensor([0.5, 1.0])
    m = MomentAccumulator(2, 3).update(r, q, torch.arange(3)).finalize()
    weights = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
    found = bootstrap_cpfr(m, {"both": torch.ones(2, dtype=torch.bool)}, weights, 3)["both"]
    assert found.replicates.tolist() == pytest.approx([0.5, 1.0, 0.75])
