from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.studies.planted_reports import activations, decoder, noisy_sweep, planted, shuffled
from tracelens.audit_report import Control
from tracelens.auditing.preservation import Shares
from tracelens.errors import MetricInputError, ResultFileError, UnknownNameError
from tracelens.optimization_auditor import SweepResult
from tracelens.stats import Estimate, wilson
from tracelens.studies.survival import SurvivalCurve, survival_curve

N = 40
SAE = decoder(N)


@pytest.fixture(scope="module")
def r():
    return activations(2000, N)


def test_planted_damage_is_counted(r):
    damaged = torch.arange(N) % 4 == 0
    report = planted(r, shuffled(r, damaged), SAE, safety=8)
    curve = survival_curve(SweepResult({"int4": report}))
    whole, safety = curve.of("all").iloc[0], curve.of("safety").iloc[0]
    assert (whole["n"], whole["survived"], whole["blurred"], whole["damaged"]) == (N, 0.75, 0, 0.25)
    assert (safety["n"], safety["survived"], safety["damaged"]) == (8, 0.75, 0.25)
    assert curve.of("capability").iloc[0]["n"] == N - 8
    interval = wilson(10, N)
    assert (whole["damaged_low"], whole["damaged_high"]) == (interval.low, interval.high)


def test_of_identical_models_all_survives(r):
    row = survival_curve(SweepResult({"fp32": planted(r, r.clone(), SAE)})).of("all").iloc[0]
    assert (row["survived"], row["blurred"], row["damaged"], row["median_rho"]) == (1, 0, 0, 1)


def test_survival_falls_with_noise_and_rows_go_from_many_bits_to_few(r):
    sweep = noisy_sweep(r, SAE, {"int2": 6.0, "int8": 0.05, "int4": 1.0})
    rows = survival_curve(sweep).of("all")
    assert rows["precision"].tolist() == ["int8", "int4", "int2"]
    assert rows["survived"].is_monotonic_decreasing
    assert rows["survived"].iloc[0] > 0.95 > 0.5 > rows["survived"].iloc[-1]
    assert np.allclose(rows[["survived", "blurred", "damaged"]].sum(axis=1), 1)


def test_thresholds_and_sets_are_arguments(r):
    sweep = noisy_sweep(r, SAE, {"int4": 1.0})
    strict, lax = (survival_curve(sweep, survived_at=at, damaged_at=at, sets=["all"]) for at in (0.999, 0.1))
    assert strict.table["survived"].item() < lax.table["survived"].item()
    assert (strict.table["blurred"] == 0).all()
    assert (strict.survived_at, lax.survived_at) == (0.999, 0.1)
    with pytest.raises(UnknownNameError, match=r"unknown set of features 'safety'.*Known: all"):
        strict.of("safety")
    with pytest.raises(MetricInputError, match="expected damaged_at ≤ survived_at"):
        survival_curve(sweep, survived_at=0.1)


def shares(survived: float) -> Shares:
    rest = Estimate((1 - survived) / 2, 0.0, 1.0)
    return Shares(Estimate(survived, survived - 0.1, survived + 0.1), rest, rest, rest, rest)


def test_controls_stand_beside_it_at_the_thresholds_they_were_made_at(r):
    report = planted(r, shuffled(r, torch.arange(N) < 20), SAE, safety=10)
    noise = Control("noise", {}, None, shares={"safety": shares(0.2), "capability": shares(0.6)})
    sweep = SweepResult(
        {"int4": replace(report, controls={"noise": noise}, shares={"safety": shares(0.3), "capability": shares(0.7)})}
    )
    curve = survival_curve(sweep)
    assert curve.of("safety")["noise_survived"].item() == 0.2
    assert curve.of("safety")["survived_prompts_low"].item() == pytest.approx(0.2)
    whole = curve.of("all").iloc[0]
    assert whole["noise_survived"] == pytest.approx((10 * 0.2 + 30 * 0.6) / 40)
    assert whole["noise_survived_high"] == pytest.approx((10 * 0.3 + 30 * 0.7) / 40)
    assert np.isnan(whole["permuted_survived"])
    elsewhere = survival_curve(sweep, survived_at=0.8).table
    assert elsewhere[["noise_survived", "survived_prompts_low"]].isna().all(axis=None)


def test_a_report_without_live_features_has_no_shares(r):
    report = planted(r, r.clone(), SAE)
    row = survival_curve(SweepResult({"int4": replace(report, features=report.features[:0])})).of("all").iloc[0]
    assert row["n"] == 0
    assert np.isnan(row[["survived", "damaged", "median_rho"]].to_numpy(float)).all()


def test_saved_and_loaded_it_is_the_same(r, tmp_path):
    curve = survival_curve(noisy_sweep(r, SAE, {"int8": 0.1, "int3": 3.0}))
    loaded = SurvivalCurve.load(curve.save(tmp_path / "curve.json"))
    pd.testing.assert_frame_equal(loaded.table, curve.table)
    assert (loaded.reference, loaded.survived_at, loaded.damaged_at) == (curve.reference, 0.9, 0.5)
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ResultFileError, match=r"not a survival curve that SurvivalCurve\.save wrote"):
        SurvivalCurve.load(tmp_path / "other.json")
