import pandas as pd
import pytest
import torch

from tests import handmade
from tests.handmade import FEATURES, OPTIONS, SAFETY, ReadOut
from tests.planted import merged
from tracelens import Audit
from tracelens.errors import SAEError
from tracelens.metrics import FeatureSmearing
from tracelens.studies.smearing import SmearingTrace, groups_of, trace_smearing

PROMPTS = handmade.prompts()
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def reference():
    return handmade.model()


def audit(reference, quantized):
    made = Audit(reference, quantized).load_sae({1: ReadOut()})
    return made.trace_features(PROMPTS, **OPTIONS | {"controls": False})


@pytest.fixture(scope="module")
def fingerprint(reference):
    return audit(reference, reference).fingerprint


def trace(reference, quantized, fingerprint, **options):
    return trace_smearing(
        reference, quantized, {1: ReadOut()}, PROMPTS, fingerprint=fingerprint, min_active=5, chat="never", **options
    )


def activations():
    """What the SAE reads at each token of each prompt."""
    words = [w for texts in PROMPTS.values() for text in texts for w in text.split()]
    return handmade.feature_table()[[handmade.TOKEN[w] for w in words]]


@pytest.fixture(scope="module")
def smeared(reference, fingerprint):
    rows = handmade.directions()
    quantized = merged(merged(reference, rows[4], rows[7], layer=1), rows[0], rows[9], layer=1)
    return quantized, trace(reference, quantized, fingerprint, noise=False)


def test_pairs_are_those_of_the_audit(reference, smeared):
    quantized, found = smeared
    expected = audit(reference, quantized).smeared_pairs
    columns = ["site", "feature_i", "feature_j", "behaviour_i", "behaviour_j", "cos_ref", "cos_quant", "increase"]
    order = ["feature_i", "feature_j"]
    ours, theirs = (table[columns].sort_values(order, ignore_index=True) for table in (found.pairs, expected))
    pd.testing.assert_frame_equal(ours, theirs)
    assert {(4, 7), (0, 9)} <= set(zip(ours["feature_i"], ours["feature_j"], strict=True))


def test_groups_say_what_they_join(reference, smeared):
    quantized, found = smeared
    groups = found.groups
    of = {member: row for row in groups.itertuples() for member in row.members}
    assert of[4] is of[7]
    assert of[0] is of[9]
    assert of[0].joins == "safety and capability"
    assert of[0].behaviours == "refusal"
    assert of[0].n_safety >= 1
    assert groups["n_pairs"].sum() == len(found.pairs)
    assert (groups["size"] == groups["members"].map(len)).all()
    assert groups["size"].is_monotonic_decreasing
    from_report = groups_of(audit(reference, quantized))
    assert sorted(map(tuple, from_report["members"])) == sorted(map(tuple, groups["members"]))


def test_leakage_by_hand(smeared):
    quantized, found = smeared
    r = activations().double()
    q = (quantized.W_E @ handmade.directions().T)[
        [handmade.TOKEN[w] for texts in PROMPTS.values() for text in texts for w in text.split()]
    ]
    q = torch.where(q > 1e-4, q, 0).double()
    safety = torch.arange(FEATURES) < SAFETY
    table = found.leakage.set_index(["model", "class_reference", "class_quantized"])
    masks = {"safety": safety, "capability": ~safety}
    for a, first in masks.items():
        for b, second in masks.items():
            same = first & second
            cross = (r[:, first].sum(1) * q[:, second].sum(1)).sum() - (r * q)[:, same].sum()
            base = (r[:, first].sum(1) * r[:, second].sum(1)).sum() - (r * r)[:, same].sum()
            row = table.loc[("quantized", a, b)]
            assert row["leakage"] == pytest.approx(cross.item(), rel=1e-5)
            assert row["ratio"] == pytest.approx((cross / base).item(), rel=1e-5)
            assert row["low"] - 1e-9 <= row["ratio"] <= row["high"] + 1e-9
    whole = FeatureSmearing().detect_smearing(r.float(), q.float())
    assert table["leakage"].sum() == pytest.approx(whole.leakage, rel=1e-5)


def test_shares_count_features_and_pairs(smeared):
    _, found = smeared
    shares = found.shares.set_index("class")
    members = {m for group in found.groups["members"] for m in group}
    assert shares.loc["safety", "n_smeared"] == len([m for m in members if m < SAFETY])
    assert shares.loc["capability", "n_smeared"] == len([m for m in members if m >= SAFETY])
    between = [
        (i < SAFETY) != (j < SAFETY) for i, j in zip(found.pairs["feature_i"], found.pairs["feature_j"], strict=True)
    ]
    expected = sum(between) / (shares.loc["safety", "n"] * shares.loc["capability", "n"])
    assert shares["pairs_between"].tolist() == pytest.approx([expected] * 2)


def test_identical_models_smear_and_leak_nothing(reference, fingerprint, tmp_path):
    found = trace(reference, reference, fingerprint)
    assert found.pairs.empty
    assert found.groups.empty
    assert (found.leakage["ratio"].dropna() == 1).all()
    assert set(found.leakage["model"]) == {"quantized", "noise"}
    assert (found.shares["n_smeared"] == 0).all()
    again = SmearingTrace.load(found.save(tmp_path / "s.json"))
    for name in ("pairs", "groups", "shares", "leakage"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name), check_dtype=False)
    assert "nothing is smeared" in str(again.plot().to_dict())


def test_round_trip_and_figure(smeared, tmp_path):
    _, found = smeared
    again = SmearingTrace.load(found.save(tmp_path / "s.json"))
    for name in ("pairs", "groups", "shares", "leakage"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))
    figure = again.plot()
    bars = [trace for trace in figure.data if trace.type == "bar"]
    assert sum(len(bar.x) for bar in bars) == min(15, len(found.groups))


def test_a_fingerprint_of_other_saes_is_refused(reference, fingerprint):
    other = ReadOut(handmade.directions().flip(0))
    with pytest.raises(SAEError, match="another SAE"):
        trace_smearing(reference, reference, {1: other}, PROMPTS, fingerprint=fingerprint, chat="never")
