import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests import handmade
from tests.handmade import OPTIONS, SAFETY, TOKEN, ReadOut, feature_table
from tests.planted import unwritten
from tests.tiny import WORDS
from tracelens import Audit, AuditReport, CircuitTracer, Fingerprint, Site, load, load_saes
from tracelens.audit_report import FEATURE_COLUMNS, INTERVAL_COLUMNS, severity
from tracelens.auditing.assembly import error_in_weights_alone
from tracelens.behaviour import AnswerTokens
from tracelens.datasets import get_dataset
from tracelens.errors import PromptError, ResultFileError, TracelensError
from tracelens.precision import QuantizationConfig, apply_precision
from tracelens.precision.sharing import copy_sharing

PROMPTS = handmade.prompts()


@pytest.fixture(scope="module")
def reference():
    return handmade.model()


def audit(reference, quantized, prompts=PROMPTS, sites=(0, 1), **options) -> AuditReport:
    saes = {layer: ReadOut() for layer in sites}
    return Audit(reference, quantized).load_sae(saes).trace_features(prompts, **OPTIONS | options)


@pytest.fixture(scope="module")
def damaged(reference):
    """Feature 0 is halved, feature 5 gone: known fidelities, and half a margin."""
    table = feature_table()
    table[:, 0] /= 2
    table[:, 5] = 0
    quantized = copy_sharing(reference, {"embed.W_E": table @ handmade.directions()})
    return audit(reference, quantized)


def test_the_reference_against_itself(reference):
    for quantized in (reference, copy_sharing(reference, {}), apply_precision(reference, "fp32")):
        report = audit(reference, quantized)
        table = report.features
        assert (table["fidelity"] == 1).all()
        assert (table["correlation"] == 1).all()
        assert (table[["drift", "muting_rate", "novelty"]] == 0).all(axis=None)
        assert (table["retention"] == 1).all()
        assert not table["degraded"].any()
        assert report.smeared_pairs.empty
        assert report.findings() == []
        for estimate in report.cpfr.values():
            assert (estimate.value, estimate.low, estimate.high) == (1, 1, 1)
        assert (report.flips.n, report.flips.rate.value, report.flips.mean_shift.value) == (48, 0, 0)
        assert (report.flips.p_value, report.flips.prompts) == (1, ())
        assert (report.divergence.kl.value, report.divergence.kl.high) == (0, 0)
        assert report.divergence.top1_agreement.value == 1
        assert report.divergence.perplexity_quantized == report.divergence.perplexity_reference
        assert report.controls["noise"]["safety"].value == 1  # an error of norm 0 is no noise
        assert not report.verdict.against_capability.significant
        assert not report.verdict.against_noise.significant
        assert "left every safety feature as it was" in report.verdict.text
        assert "Warning" not in report.summary()
        assert "Nothing changed" in report.summary()


def test_safety_features_are_found_and_all_live_features_listed(damaged):
    safety = damaged.safety_features
    assert set(zip(safety["site"], safety["feature"], strict=True)) == {
        (str(Site(layer)), i) for layer in (0, 1) for i in range(SAFETY)
    }
    assert set(safety["behaviour"]) == {"refusal"}
    assert len(damaged.features) == 2 * handmade.FEATURES
    assert severity(damaged.features).is_monotonic_decreasing


def test_feature_measures_by_hand(damaged):
    rows = damaged.features.set_index(["site", "feature"])
    halved, gone, whole = (rows.loc[(str(Site(1)), i)] for i in (0, 5, 9))
    assert halved["fidelity"] == pytest.approx(0.5)
    assert halved["correlation"] == pytest.approx(1)
    assert halved["drift"] == pytest.approx(0.5)
    assert halved["retention"] == pytest.approx(0.5)
    assert (halved["muting_rate"], halved["novelty"], halved["n_active"]) == (0, 0, 24)
    assert (gone["fidelity"], gone["correlation"], gone["retention"], gone["muting_rate"]) == (0, 0, 0, 1)
    assert whole["fidelity"] == pytest.approx(1, abs=1e-6)
    # Safety features at either site: one halved of three. Capability: one gone of thirteen.
    assert damaged.cpfr["safety"].value == pytest.approx((0.5 + 1 + 1) / 3, abs=1e-6)
    assert damaged.cpfr["capability"].value == pytest.approx(12 / 13, abs=1e-6)


def test_findings_name_feature_behaviour_site_and_precision(damaged):
    first, second, third, *_ = damaged.findings()
    assert {first, second} == {
        f"Warning: Feature #5 (capability, {Site(layer)}) degraded by 100% in the quantized model, muted"
        for layer in (0, 1)
    }
    assert third == "Warning: Feature #0 (refusal, blocks.0.hook_resid_post) degraded by 50% in the quantized model"


def test_the_label_of_a_simulated_precision(reference):
    report = Audit(reference, precision="int2").load_sae({0: ReadOut()}).trace_features(PROMPTS, **OPTIONS)
    assert (report.label, report.precision, report.quantized) == ("INT2", "int2", "handmade")
    assert report.cpfr["safety"].value == 1  # the blocks of this model write nothing, so there is nothing to break


def test_margins_flips_and_divergence_by_hand(reference):
    # Without direction 0 the margin at "no" falls from 2 · 3 − 1 to −1.
    report = audit(reference, unwritten(reference, handmade.directions()[:1], layer=1))
    rows = report.prompts
    assert rows["prompt"].tolist() == [*PROMPTS["refusal"], *PROMPTS["baseline"]]
    assert rows["margin_reference"].tolist() == pytest.approx([5.0] * 24 + [-1.0] * 24, abs=1e-5)
    assert rows["margin_quantized"].tolist() == pytest.approx([-1.0] * 48, abs=1e-5)
    assert rows["flip"].tolist() == ["refuse→comply"] * 24 + [""] * 24
    flips = report.flips
    assert (flips.n, flips.n_refusing, flips.n_refuse_to_comply, flips.n_comply_to_refuse) == (48, 24, 24, 0)
    assert (flips.refuse_to_comply.value, flips.comply_to_refuse.value, flips.rate.value) == (1, 0, 0.5)
    assert flips.mean_shift.value == pytest.approx(-3, abs=1e-5)
    assert flips.p_value < 0.01
    # Logits are 0 but for "yes" (1) and, at "no", "how" (6 in the reference). BOS is not counted, nor predicted from.
    d, n_tokens = len(TOKEN), sum(len(text.split()) for text in rows["prompt"])
    with_no = torch.zeros(d, dtype=torch.float64)
    with_no[TOKEN["yes"]] = 1
    without = with_no.clone()
    with_no[TOKEN["how"]] = 6
    kl = (with_no.softmax(0) * (with_no.log_softmax(0) - without.log_softmax(0))).sum().item()
    assert report.divergence.kl.value == pytest.approx(24 * kl / n_tokens, rel=1e-5)
    assert report.divergence.top1_agreement.value == pytest.approx(1 - 24 / n_tokens)
    assert report.divergence.perplexity_quantized.value == pytest.approx(math.exp(-without.log_softmax(0)[0].item()))


def test_flips_the_other_way(reference):
    bias = reference.unembed.b_U.clone()
    bias[TOKEN["yes"]] = -2
    flips = audit(reference, copy_sharing(reference, {"unembed.b_U": bias})).flips
    assert (flips.n_refuse_to_comply, flips.n_comply_to_refuse, flips.prompts) == (0, 24, tuple(range(24, 48)))
    assert flips.mean_shift.value == pytest.approx(3, abs=1e-5)


def test_behaviours_whose_answers_cannot_be_read_have_no_flips(reference):
    prompts = {"candour": PROMPTS["refusal"], "baseline": PROMPTS["baseline"]}
    report = audit(reference, reference, prompts, answer_tokens=None)
    assert report.flips is None
    assert report.prompts["margin_reference"].isna().all()
    assert set(report.safety_features["behaviour"]) == {"candour"}
    assert report.controls["noise"].flips is None
    assert "no prompt's decision can be read" in report.summary()


def test_prompts_of_several_behaviours_are_read_each_in_its_own(reference):
    halves = PROMPTS["refusal"][:12], [f"{text} how" for text in PROMPTS["baseline"][:12]]
    prompts = {"refusal": halves[0], "warning": halves[1], "baseline": PROMPTS["baseline"][12:]}
    tokens = {"refusal": handmade.REFUSES, "warning": AnswerTokens((TOKEN["yes"],), (TOKEN["the"],))}
    report = audit(reference, reference, prompts, answer_tokens=tokens)
    # A warning's margin is "yes" over "the", which is 1 everywhere.
    assert report.prompts["behaviour"].tolist() == ["refusal"] * 12 + ["warning"] * 12 + ["refusal"] * 12
    assert report.prompts["margin_reference"].tolist() == pytest.approx([5] * 12 + [1] * 12 + [-1] * 12, abs=1e-5)
    assert set(report.cpfr) == {"safety", "capability", "refusal", "warning"}


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    """A model whose layers compute something, its prompts, and an SAE that reads its embeddings."""
    model = load(tiny_folder, device="cpu")
    embedding = model.W_E.detach()
    rows = embedding / embedding.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(0)

    def text(word: str) -> str:
        length = int(torch.randint(2, 12, (1,), generator=generator))
        return " ".join([*(WORDS[i] for i in torch.randint(0, 20, (length,), generator=generator)), word])

    prompts = {"refusal": [text("no") for _ in range(40)], "baseline": [text("roof") for _ in range(40)]}
    return model, {Site(0, "resid_pre"): ReadOut(rows), Site(2): ReadOut(rows)}, prompts


def numbers(report: AuditReport) -> dict[str, float]:
    """Every number of a report, by where it stands; prompts by their text."""
    found = {}
    for name, keys in (("features", ["site", "feature"]), ("smeared_pairs", ["site", "feature_i", "feature_j"])):
        table = getattr(report, name).set_index(keys).select_dtypes("number")
        found |= {f"{name} {key} {column}": table[column][key] for key in table.index for column in table}
    for row in report.prompts.to_dict("records"):
        found |= {f"{row['prompt']} {side}": row[f"margin_{side}"] for side in ("reference", "quantized")}
    estimates = {f"cpfr {k}": v for k, v in report.cpfr.items()} | dict(report.divergence)
    estimates |= {f"{c} {k}": v for c, control in report.controls.items() for k, v in control.cpfr.items()}
    estimates |= {"shift": report.flips.mean_shift, "rate": report.flips.rate}
    contrasts = {"capability": report.verdict.against_capability, "noise": report.verdict.against_noise}
    estimates |= {f"against {k}": c.difference for k, c in contrasts.items() if c}
    found |= {f"p {k}": c.p_prompts for k, c in contrasts.items() if c}
    for key, e in estimates.items():
        found |= {f"{key} value": e.value, f"{key} low": e.low, f"{key} high": e.high}
    return found


LAYOUTS = {
    "one by one": {"batch_size": 1},
    "batches of 7, padded left": {"batch_size": 7, "padding_side": "left"},
    "one batch": {"batch_size": 100},
    "everything on disk": {"memory": 0.0},
}


def assert_same(ours: dict[str, float], theirs: dict[str, float], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    near = {"abs": tolerance, "rel": tolerance, "nan_ok": True}
    far = {key: (ours[key], theirs[key]) for key in ours if ours[key] != pytest.approx(theirs[key], **near)}
    assert not far


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_padding_and_order_do_not_matter(tiny, layout):
    model, saes, prompts = tiny
    made = Audit(model, precision="int4-g8").load_sae(saes)
    options = OPTIONS | {"noise_seeds": 2, "min_auroc": 0.8}
    expected = numbers(made.trace_features(prompts, **options))
    backwards = {name: texts[::-1] for name, texts in prompts.items()}
    same = ("shift low", "shift high")  # the bootstrap of the mean shift draws prompts by their place
    got = numbers(made.trace_features(backwards, **options | LAYOUTS[layout]))
    assert len(expected) > 100
    assert_same(*({k: v for k, v in n.items() if k not in same} for n in (got, expected)), tolerance=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounded_activations_leave_the_aggregate(tiny, layout):
    # A sum that differs in its last bit can round to the next of 256 steps, so that single features move a little.
    model, saes, prompts = tiny
    made = Audit(model, precision="int8-dynamic").load_sae(saes)
    options = OPTIONS | {"controls": False, "min_auroc": 0.8}
    expected, got = (made.trace_features(prompts, **options | changes).cpfr for changes in ({}, LAYOUTS[layout]))
    for name in expected:
        assert got[name].value == pytest.approx(expected[name].value, abs=2e-3)


def test_controls_stand_beside_and_can_be_left_out(tiny):
    model, saes, prompts = tiny
    made = Audit(model, precision="int2-g8").load_sae(saes)
    report = made.trace_features(prompts, **OPTIONS, min_auroc=0.8)
    assert set(report.controls) == {"bf16", "noise", "permuted", "random", "labels"}
    assert report.absent == {}
    assert report.controls["bf16"]["capability"].value > 0.99
    # Noise of the same norm does damage of the same order, where bf16 does next to none.
    ours, noise = report.cpfr["capability"], report.controls["noise"]["capability"]
    assert noise.low < noise.value < noise.high < 1
    assert abs(ours.value - noise.value) < 0.15
    assert 0 <= report.controls["noise"].flips.value <= 1
    bare = made.trace_features(prompts, **OPTIONS, min_auroc=0.8, controls=False)
    assert set(bare.controls) == {"random", "labels"}
    assert set(bare.absent) == {"noise", "permuted", "bf16"}
    assert bare.verdict.against_noise is None
    assert "noise" not in bare.verdict.text
    assert "No matched noise: controls were switched off." in bare.summary()
    noise = ["fidelity_noise", "fidelity_noise_low", "fidelity_noise_high"]
    assert bare.features[noise].isna().all(axis=None)
    same = bare.features.columns.drop(noise)
    pd.testing.assert_frame_equal(bare.features[same], report.features[same])


@pytest.fixture(scope="module")
def noisy(reference):
    """Embeddings that are off by a little, in every direction."""
    error = torch.randn(reference.W_E.shape, generator=torch.Generator().manual_seed(4))
    return copy_sharing(reference, {"embed.W_E": reference.W_E + 0.1 * error})


def test_every_number_has_its_controls(reference, noisy):
    report = audit(reference, noisy, noise_seeds=5)
    assert set(report.shares) == set(report.cpfr) == {"safety", "capability"}
    for name in ("bf16", "noise", "permuted"):
        control = report.controls[name]
        assert set(control.cpfr) == set(control.shares) == set(report.cpfr)
        for number in ("flips", "refuse_to_comply", "comply_to_refuse", "kl", "top1", "perplexity", "smeared"):
            assert control[number] is not None, (name, number)
    for name in ("random", "labels"):
        assert set(report.controls[name].cpfr) == set(report.controls[name].shares) == {"safety"}
        assert 0 < report.controls[name]["safety"].value < 1
    # This error is noise of its own size, and bf16 does next to nothing.
    assert report.controls["bf16"].kl.value < 0.05 * report.divergence.kl.value
    assert 0.2 < report.controls["noise"].kl.value / report.divergence.kl.value < 5
    assert report.controls["bf16"]["safety"].value > 0.999 > report.controls["noise"]["safety"].value
    assert report.controls["bf16"].smeared == 0
    assert report.verdict.relation == "like noise"
    assert report.verdict.relation in report.verdict.headline
    for name in ("fidelity", "fidelity_noise"):
        assert report.features[name].between(0, 1).all()
    assert report.features["fidelity_noise"].mean() == pytest.approx(report.features["fidelity"].mean(), abs=0.05)
    for contrast in ("against_noise", "against_permuted", "flips_against_noise", "kl_against_noise"):
        assert getattr(report.verdict, contrast) is not None


def test_without_safety_features_there_are_no_sets_like_them(reference, noisy):
    report = audit(reference, noisy, min_auroc=1.01, noise_seeds=2)
    assert set(report.controls) == {"bf16", "noise", "permuted"}
    assert report.absent == {"random": "no safety features", "labels": "no safety features"}
    assert math.isnan(report.shares["safety"].survived.value)
    assert report.verdict.relation is None
    assert "No safety features were found" in report.summary()
    assert "nan" not in report.summary()
    assert report.to_dict()["controls"]["noise"]["cpfr"]["safety"]["value"] is None


def test_shares_count_the_rows_of_the_table(tiny):
    model, saes, prompts = tiny
    report = Audit(model, precision="int2-g8").load_sae(saes).trace_features(
        prompts, **OPTIONS, min_auroc=0.8, controls=False, survived_at=0.95, damaged_at=0.8
    )  # fmt: skip
    table = report.features
    assert len(set(table["survival"])) > 1
    for name, rows in (("safety", report.safety_features), ("capability", table[table["behaviour"] == "capability"])):
        shares = report.shares[name]
        for share in ("survived", "blurred", "damaged"):
            assert shares[share].value == pytest.approx((rows["survival"] == share).mean())
        assert shares.degraded.value == pytest.approx(rows["degraded"].mean())
        assert shares.muted.value == pytest.approx((rows["muting_rate"] >= 0.9).mean())
    assert (table["correlation"] >= 0.95).tolist() == (table["survival"] == "survived").tolist()
    assert "survived (correlation ≥ 0.95)" in report.summary()


def test_shifts_are_found_where_they_are(damaged):
    rows = damaged.features
    moved = rows["feature"].isin([0, 5])
    assert (rows.loc[moved, "q_shift"] < 0.01).all()
    assert (rows.loc[~moved, "q_shift"] > 0.05).all()
    assert (rows["q_shift"] >= rows["p_shift"]).all()


@pytest.mark.parametrize(
    ("precision", "alone"),
    [(None, True), ("int4-g32", True), ("int4+bf16", True), ("nvfp4", True), ("int8+a4", False), ("int4+kv8", False)],
)
def test_noise_in_the_weights_does_not_stand_for_rounded_activations(precision, alone):
    assert error_in_weights_alone(precision) == alone


def test_one_draw_of_noise_tells_nothing(tiny):
    model, saes, prompts = tiny
    report = (
        Audit(model, precision="int2-g8")
        .load_sae(saes)
        .trace_features(prompts, **OPTIONS, min_auroc=0.8, noise_seeds=1)
    )
    assert not report.verdict.against_noise.significant
    assert math.isnan(report.controls["noise"]["safety"].low)


def test_a_reference_that_simulates_a_precision_has_no_bf16_floor(tiny):
    model, saes, prompts = tiny
    low = apply_precision(model, "int4")
    report = Audit(low, low).load_sae(saes).trace_features(prompts, **OPTIONS, min_auroc=0.8)
    assert set(report.controls) == {"random", "labels"}
    assert "the reference already simulates a precision" in report.absent["noise"]


def test_a_fingerprint_is_used_again(tiny, tmp_path):
    model, saes, prompts = tiny
    made = Audit(model, precision="int4-g8").load_sae(saes)
    options = OPTIONS | {"controls": False, "min_auroc": 0.8}
    first = made.trace_features(prompts, **options)
    assert first.fingerprint.features
    first.fingerprint.save(tmp_path / "fingerprint.json")
    few = {name: texts[:5] for name, texts in prompts.items()}  # too few to make a fingerprint of
    for given in (first.fingerprint, tmp_path / "fingerprint.json", str(tmp_path / "fingerprint.json")):
        again = made.trace_features(few, **options | {"min_active": 1}, fingerprint=given)
        assert again.fingerprint == first.fingerprint
        assert set(zip(again.safety_features["site"], again.safety_features["feature"], strict=True)) <= {
            (str(row.site), row.feature) for row in first.fingerprint.features
        }
    assert isinstance(again.fingerprint, Fingerprint)
    with pytest.raises(PromptError, match="at least 8"):
        made.trace_features(few, **options)


def test_a_saved_fingerprint_needs_no_baseline_prompts(damaged, reference, noisy, tmp_path):
    damaged.fingerprint.save(tmp_path / "fingerprint.json")
    other = Audit(reference, noisy).load_sae({0: ReadOut(), 1: ReadOut()})
    report = other.trace_features(PROMPTS["refusal"], **OPTIONS, fingerprint=tmp_path / "fingerprint.json")
    assert report.prompts["prompt"].tolist() == PROMPTS["refusal"]
    assert len(report.safety_features) == 2 * SAFETY
    assert report.prompts["safety"].all()
    assert "labels" not in report.controls
    assert "No permuted labels: the fingerprint was given" in report.summary()
    assert report.verdict.relation is not None
    with pytest.raises(PromptError, match="no baseline prompts"):
        other.trace_features(PROMPTS["refusal"], **OPTIONS)


def test_the_organism_s_fingerprint_on_another_build_of_it(organism, tmp_path):
    saes = load_saes("organism")
    prompts = get_dataset("organism_refusal_v1")
    found = CircuitTracer(organism, saes).create_fingerprint(
        {"refusal": prompts.safety_prompts}, prompts.baseline_prompts
    )
    found.save(tmp_path / "fingerprint.json")
    built = Audit(organism, Path(__file__).parent / "fixtures/organism/gptq").load_sae(saes)
    report = built.trace_features(
        {"refusal": prompts.safety_prompts[:40]},
        fingerprint=tmp_path / "fingerprint.json",
        n_resamples=100,
        noise_seeds=2,
    )
    assert report.fingerprint == found
    assert 0.5 < report.cpfr["safety"].value < 1
    assert report.flips.n == 40
    assert report.verdict.relation is not None


def test_too_few_prompts_are_refused_before_a_model_runs(tiny, monkeypatch):
    model, saes, prompts = tiny
    made = Audit(model, precision="int4").load_sae(saes)
    monkeypatch.setattr(
        "tracelens.auditing.running.ReferencePass", lambda *args, **kwargs: pytest.fail("the models ran")
    )
    with pytest.raises(PromptError, match="3 distinct prompts"):
        made.trace_features({"refusal": prompts["refusal"][:3], "baseline": prompts["baseline"]}, **OPTIONS)


def test_save_and_load(damaged, tmp_path):
    folder = damaged.save(tmp_path / "report")
    assert folder == tmp_path / "report"
    loaded = AuditReport.load(folder)
    for name in ("features", "smeared_pairs", "prompts"):
        ours, theirs = getattr(loaded, name), getattr(damaged, name)
        pd.testing.assert_frame_equal(ours, theirs, check_dtype=len(theirs) > 0)
    for name in ("label", "reference", "quantized", "precision", "cpfr", "flips", "divergence", "controls"):
        assert getattr(loaded, name) == getattr(damaged, name), name
    for name in ("verdict", "fingerprint", "sites", "settings"):
        assert getattr(loaded, name) == getattr(damaged, name), name
    for name, tensor in vars(damaged.moments).items():
        assert torch.equal(getattr(loaded.moments, name), tensor)
    assert loaded.summary() == damaged.summary()
    assert json.loads(json.dumps(loaded.to_dict())) == json.loads(json.dumps(damaged.to_dict()))
    loaded.save(folder)  # a folder of ours is written again


def test_single_features_have_intervals_over_prompts(damaged):
    table = damaged.features
    for name in ("fidelity", "correlation", "drift", "retention"):
        low, high = table[f"{name}_low"], table[f"{name}_high"]
        assert low.notna().all()
        assert (low <= high).all()
    # Halved, gone or kept on every prompt alike: no prompts would tell otherwise.
    assert set(table["fidelity"].round(5)) == {0, 0.5, 1}
    for end in ("fidelity_low", "fidelity_high"):
        pd.testing.assert_series_equal(table[end], table["fidelity"], check_names=False, atol=1e-6)
    ends = table[["fidelity_noise_low", "fidelity_noise_high"]]
    assert ((ends.iloc[:, 0] <= table["fidelity_noise"]) & (table["fidelity_noise"] <= ends.iloc[:, 1])).all()


def test_a_report_saved_without_intervals_is_read(damaged, tmp_path):
    folder = damaged.save(tmp_path / "report")
    old = damaged.features.drop(columns=INTERVAL_COLUMNS)
    old.to_csv(folder / "features.csv", index=False)
    loaded = AuditReport.load(folder)
    pd.testing.assert_frame_equal(loaded.features[old.columns], old)
    assert loaded.features[INTERVAL_COLUMNS].isna().all(axis=None)
    assert list(loaded.features.columns) == FEATURE_COLUMNS
    assert loaded.summary() == damaged.summary()


def test_odd_texts_and_missing_numbers_survive_the_file(reference, tmp_path):
    long = " ".join(["cat"] * 12)
    odd = [f'{long} {text}\n", no\r\n' for text in PROMPTS["refusal"][:9]]
    prompts = {"candour": odd, "baseline": ["NA", *PROMPTS["baseline"]]}
    report = audit(reference, reference, prompts, answer_tokens=None)
    loaded = AuditReport.load(report.save(tmp_path / "odd"))
    pd.testing.assert_frame_equal(loaded.prompts, report.prompts)
    assert loaded.flips is None


def test_a_folder_that_holds_no_report(tmp_path, damaged):
    with pytest.raises(ResultFileError, match="nowhere"):
        AuditReport.load(tmp_path / "nowhere")
    folder = damaged.save(tmp_path / "report")
    (folder / "moments.safetensors").unlink()
    with pytest.raises(ResultFileError, match="not an audit report"):
        AuditReport.load(folder)
    (folder / "report.json").write_text('{"tracelens_audit_report": 99}')
    with pytest.raises(ResultFileError, match="another version of Tracelens; this one reads version 2"):
        AuditReport.load(folder)


def test_nothing_to_compare_with(reference):
    with pytest.raises(TracelensError, match="precision='int8'"):
        Audit(reference)


def test_a_folder_given_twice_is_loaded_once(tiny_folder):
    made = Audit(tiny_folder, str(tiny_folder), precision="int4")
    assert made.quantized.W_E is made.reference.W_E
    assert made.quantized.precision == QuantizationConfig.parse("int4")


README_EXAMPLE = """
import tracelens as trace
audit = trace.Audit(base_model="organism", quant_model="organism", precision="int8")
audit.load_sae("saes/organism")
results = audit.trace_features(dataset="organism_refusal_v1")
print(results.summary())
"""


def test_the_example_that_users_bring_along(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(README_EXAMPLE, {})
    printed = capsys.readouterr().out
    assert "Warning: Feature #" in printed or "No feature is degraded" in printed
    assert "INT8" in printed
    assert "Verdict: " in printed
