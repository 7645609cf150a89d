"""What an audit keeps of tokens, against the same computed by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tests import handmade
from tests.handmade import FEATURES, OPTIONS, ReadOut
from tests.planted import merged
from tests.test_audit import tiny  # noqa: F401
from tracelens import Audit, AuditReport, OptimizationAuditor, Site, load, load_saes
from tracelens.auditing.evidence import Evidence, Firings
from tracelens.auditing.evidence_collecting import described
from tracelens.errors import MetricInputError, ResultFileError
from tracelens.precision import apply_precision

PROMPTS = handmade.prompts()
TEXTS = [text for texts in PROMPTS.values() for text in texts]
FIRINGS = ("feature", "prompt", "position", "reference", "quantized")


def audit(reference, quantized, saes=None, prompts=PROMPTS, **options) -> AuditReport:
    saes = saes or {layer: ReadOut() for layer in (0, 1)}
    return Audit(reference, quantized).load_sae(saes).trace_features(prompts, **OPTIONS | {"controls": False} | options)


@pytest.fixture(scope="module")
def reference():
    return handmade.model()


@pytest.fixture(scope="module")
def fused(reference):
    """Directions 4 and 7 are written as one."""
    rows = handmade.directions()
    return audit(reference, merged(reference, rows[4], rows[7], 1))


def same(ours: Evidence, theirs: Evidence) -> None:
    """Equal to the bit."""
    for name in ("features", "n_live", "prompts", "n_prompts", "tokens", "pair_tau", "pair_delta", "pairs_left_out"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("near", "promoted", "suppressed", "importance"):
        assert dict(getattr(ours, name)) == dict(getattr(theirs, name)), name
    for name in FIRINGS:
        np.testing.assert_array_equal(getattr(ours.firings, name), getattr(theirs.firings, name))
    pd.testing.assert_frame_equal(ours.pairs, theirs.pairs, check_dtype=len(theirs.pairs) > 0)


def by_hand(model, sae, site, text) -> np.ndarray:
    """SAE features [token, feature] of one prompt run alone, BOS as zeros."""
    tokens = torch.tensor([model.tokenizer(text)["input_ids"]])
    found = []
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(str(site), lambda value, hook: found.append(value[0].clone()))])
        acts = sae.encode(found[0]).float().numpy().copy()
    acts[0] = 0
    return acts


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
def test_traces_are_the_sae_on_both_models(tiny, tiny_folder, wrapper):  # noqa: F811
    saes, prompts = tiny[1:]
    model = load(tiny_folder, device="cpu", wrapper=wrapper)
    if wrapper == "hooked":
        quantized = apply_precision(model, "int4-g8+a8")
    else:
        quantized = load(tiny_folder, device="cpu", wrapper="bridge")
        for name, parameter in quantized.named_parameters():
            if "layers" in name or "blocks" in name:
                parameter.data.copy_((parameter * 16).round() / 16)
    report = audit(model, quantized, saes, prompts)
    texts = report.prompts["prompt"]
    live = set(zip(report.features["site"], report.features["feature"], strict=True))
    assert set(report.evidence.features) == live
    entries = 0
    for site, sae in saes.items():
        for p in (0, 13, 55):
            r, q = (by_hand(m, sae, site, texts[p]) for m in (model, quantized))
            for feature in range(r.shape[1]):
                if (str(site), feature) not in live:
                    continue
                traces = report.evidence.traces(str(site), feature, k=len(texts))
                trace = next((trace for trace in traces if trace.prompt == p), None)
                if trace is None:  # it does not move there
                    np.testing.assert_allclose(r[:, feature], q[:, feature], atol=1e-4)
                    continue
                np.testing.assert_allclose(trace.reference, r[:, feature], atol=1e-4)
                np.testing.assert_allclose(trace.quantized, q[:, feature], atol=1e-4)
                assert trace.tokens == ("<s>", *texts[p].split())
                entries += int(((r[:, feature] > 0) | (q[:, feature] > 0)).sum())
    assert entries > 50


def test_the_organism_seen_with_saelens(organism):
    saes = {site: sae for site, sae in load_saes("organism").items() if site.layer in (1, 3)}
    quantized = apply_precision(organism, "int3")
    report = Audit(organism, quantized).load_sae(saes).trace_features("organism_refusal_v1", controls=False)
    evidence = report.evidence
    assert len(evidence.prompts) == len(report.prompts)
    n = 0
    for key in evidence.features[::100]:
        for trace in evidence.traces(*key, k=2):
            text = report.prompts["prompt"][trace.prompt]
            for model, values in ((organism, trace.reference), (quantized, trace.quantized)):
                expected = by_hand(model, saes[Site.parse(key[0])], key[0], text)[:, key[1]]
                np.testing.assert_allclose(values, expected, rtol=1e-3, atol=2e-3)
                n += 1
    assert n > 10


def test_traces_come_in_order_of_what_moved(fused):
    site = str(Site(1))
    traces = fused.evidence.traces(site, 4, k=100)
    moved = [trace.moved for trace in traces]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] > 0
    assert len(fused.evidence.traces(site, 4, k=2)) == 2
    assert fused.evidence.traces(site, 999) == []


def test_merged_tokens_are_those_of_a_scan(reference, fused):
    report, evidence = fused, fused.evidence
    pair = report.smeared_pairs.iloc[0]
    assert (pair["feature_i"], pair["feature_j"]) == (4, 7)
    found = {(m.prompt, m.position): m for m in evidence.merged(pair["site"], 4, 7, k=10_000)}
    expected = {}
    quantized = merged(reference, *handmade.directions()[[4, 7]], 1)
    for p, text in enumerate(report.prompts["prompt"]):
        r, q = (by_hand(m, ReadOut(), pair["site"], text)[:, [4, 7]] for m in (reference, quantized))
        for t in range(len(r)):
            if not (r[t] > 0).all() and (q[t] > 0).all():
                expected[p, t] = (r[t], q[t])
    assert len(expected) > 10
    assert found.keys() == expected.keys()
    for place, (r, q) in expected.items():
        np.testing.assert_allclose(found[place].reference, r, atol=1e-5)
        np.testing.assert_allclose(found[place].quantized, q, atol=1e-5)
        assert found[place].tokens[place[1]] == ["<s>", *report.prompts["prompt"][place[0]].split()][place[1]]


def test_merged_tokens_come_strongest_first_and_name_their_prompt(reference, fused):
    site = str(Site(1))
    gains = [m.quantized[0] * m.quantized[1] for m in fused.evidence.merged(site, 4, 7, k=10_000)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > gains[-1]
    assert [m.quantized[0] * m.quantized[1] for m in fused.evidence.merged(site, 4, 7, k=3)] == gains[:3]
    quantized = merged(reference, *handmade.directions()[[4, 7]], 1)
    some = audit(reference, quantized, evidence_prompts=7)
    found = some.evidence.merged(site, 4, 7, k=10_000)
    assert found
    for m in found:  # rows of the report's table, not of the sample
        assert m.tokens == ("<s>", *some.prompts["prompt"][m.prompt].split())


def test_identical_models_show_nothing(reference):
    report = audit(reference, reference)
    evidence = report.evidence
    assert len(evidence.features) == len(report.features)
    assert evidence.pairs.empty
    for site, feature in evidence.features:
        assert evidence.traces(site, feature) == []
        assert evidence.merged(site, feature, (feature + 1) % FEATURES) == []
    assert (evidence.firings.reference == evidence.firings.quantized).all()
    assert len(evidence.firings.feature) > 100


def test_no_other_number_depends_on_the_evidence(reference):
    rows = handmade.directions()
    quantized = merged(reference, rows[4], rows[7], 1)
    whole = audit(reference, quantized, controls=True)
    without = audit(reference, quantized, controls=True, evidence_prompts=0)
    assert without.evidence is None
    with_, plain = whole.to_dict(), without.to_dict()
    assert plain.pop("evidence") is None
    assert with_.pop("evidence")["prompts"] == len(TEXTS)
    assert with_["settings"].pop("evidence_prompts") == 512
    assert plain["settings"].pop("evidence_prompts") == 0
    assert repr(with_) == repr(plain)
    for name in ("features", "smeared_pairs", "prompts"):
        pd.testing.assert_frame_equal(getattr(whole, name), getattr(without, name), check_exact=True)
    for name, tensor in vars(whole.moments).items():
        assert torch.equal(tensor, getattr(without.moments, name))


def test_the_batch_size_changes_last_bits_only(reference, fused):
    rows = handmade.directions()
    other = audit(reference, merged(reference, rows[4], rows[7], 1), batch_size=5).evidence
    ours = fused.evidence
    for name in ("features", "prompts", "tokens", "near", "promoted", "suppressed"):
        assert getattr(ours, name) == getattr(other, name), name
    for name in FIRINGS[:3]:
        np.testing.assert_array_equal(getattr(ours.firings, name), getattr(other.firings, name))
    for name in FIRINGS[3:]:
        np.testing.assert_allclose(getattr(ours.firings, name), getattr(other.firings, name), rtol=1e-5, atol=1e-6)
    assert ours.importance == pytest.approx(other.importance, rel=1e-5, abs=1e-9)


def test_a_sample_of_the_prompts(reference, fused):
    rows = handmade.directions()
    quantized = merged(reference, rows[4], rows[7], 1)
    few = audit(reference, quantized, evidence_prompts=7).evidence
    assert len(few.prompts) == 7
    assert few.n_prompts == len(TEXTS)
    assert few.prompts == audit(reference, quantized, evidence_prompts=7, batch_size=3).evidence.prompts
    assert few.prompts != audit(reference, quantized, evidence_prompts=7, seed=1).evidence.prompts
    whole = fused.evidence
    rows = np.isin(np.array(whole.prompts)[whole.firings.prompt], few.prompts)
    for name in ("feature", "position", "reference", "quantized"):
        np.testing.assert_array_equal(getattr(few.firings, name), getattr(whole.firings, name)[rows])
    assert few.tokens == tuple(whole.tokens[p] for p in few.prompts)
    assert {t.prompt for t in few.traces(str(Site(1)), 4, k=99)} <= set(few.prompts)


def test_a_sample_within_a_limit_of_bytes(reference, fused):
    rows = handmade.directions()
    entries = np.bincount(fused.evidence.firings.prompt, minlength=len(TEXTS))
    # A sixteenth of what there is; memory is in GB, and evidence may take an eighth of it.
    memory = 20 * entries.sum() / 16 * 8 / 1e9
    for batch_size in (4, 32):
        options = {"memory": float(memory), "batch_size": batch_size}
        little = audit(reference, merged(reference, rows[4], rows[7], 1), **options).evidence
        assert 0 < len(little.prompts) < len(TEXTS) // 8
        assert entries[list(little.prompts)].sum() <= entries.sum() / 16
        assert len(little.firings.feature) == entries[list(little.prompts)].sum()


def test_which_features_are_described(fused):
    safety = set(zip(fused.safety_features["site"], fused.safety_features["feature"], strict=True))
    assert set(described(fused, 0)) == safety
    n = len(safety) + 4
    some = described(fused, n)
    assert len(some) == n
    assert some == sorted(some)
    worst = fused.features.iloc[0]
    assert (worst["site"], worst["feature"]) in some
    pair = fused.smeared_pairs.iloc[0]
    assert {(pair["site"], pair["feature_i"]), (pair["site"], pair["feature_j"])} <= set(some)
    assert len(described(fused, 10**6)) == len(fused.features)


def test_pairs_at_lower_thresholds_hold_the_audit_s_own(fused):
    pairs = fused.evidence.pairs
    assert (fused.evidence.pair_tau, fused.evidence.pair_delta) == (0.3, 0.1)
    assert (pairs["cos_quant"] >= 0.3).all()
    assert (pairs["increase"] >= 0.1).all()
    assert pairs["increase"].is_monotonic_decreasing
    own = pairs[(pairs["cos_quant"] >= 0.5) & (pairs["increase"] >= 0.2)]
    keys = ["site", "feature_i", "feature_j"]
    pd.testing.assert_frame_equal(
        own.sort_values(keys, ignore_index=True), fused.smeared_pairs.sort_values(keys, ignore_index=True)
    )


def test_thresholds_below_the_floors_are_the_floors(reference):
    rows = handmade.directions()
    low = audit(reference, merged(reference, rows[4], rows[7], 1), smearing_tau=0.2, smearing_delta=0.05)
    assert (low.evidence.pair_tau, low.evidence.pair_delta) == (0.2, 0.05)
    assert len(low.evidence.pairs) == len(low.smeared_pairs)


def test_too_many_pairs_leave_the_audit_s_own(fused):
    from tracelens.audit_settings import AuditSettings
    from tracelens.auditing import evidence_collecting as collecting

    pairs = pd.concat([fused.evidence.pairs] * 3, ignore_index=True)
    pairs["cos_quant"] = [0.4, 0.6, 0.7][: len(pairs)] * (len(pairs) // 3)
    pairs["increase"] = np.linspace(0.9, 0.3, len(pairs))
    some, left = collecting._largest(pairs, AuditSettings(), 2 * len(pairs) // 3)
    assert left == len(pairs) - len(some) == len(pairs) // 3
    assert set(some["cos_quant"]) == {0.6, 0.7}
    assert some["increase"].is_monotonic_decreasing
    largest, _ = collecting._largest(pairs, AuditSettings(), 2)
    own = pairs[pairs["cos_quant"] >= 0.5]
    assert largest["increase"].tolist() == sorted(own["increase"], reverse=True)[:2]


def test_save_and_load(fused, tmp_path):
    folder = fused.save(tmp_path / "report")
    loaded = AuditReport.load(folder)
    same(loaded.evidence, fused.evidence)
    assert loaded.evidence.traces(str(Site(1)), 4)[0].moved == fused.evidence.traces(str(Site(1)), 4)[0].moved
    assert loaded.to_dict()["evidence"] == fused.to_dict()["evidence"]
    (folder / "evidence.json").unlink()
    with pytest.raises(ResultFileError, match="not an audit report"):
        AuditReport.load(folder)


def test_a_report_without_evidence_over_one_with_it(fused, tmp_path):
    fused.save(tmp_path / "report")
    replace(fused, evidence=None).save(tmp_path / "report")
    assert AuditReport.load(tmp_path / "report").evidence is None


def test_reports_of_before_there_was_evidence(fused, tmp_path):
    folder = replace(fused, evidence=None).save(tmp_path / "report")
    text = (folder / "report.json").read_text()
    assert text.count('"evidence": null,') + text.count('"evidence": null\n') == 1
    (folder / "report.json").write_text(text.replace(',\n "evidence": null', ""))
    assert '"evidence"' not in (folder / "report.json").read_text()
    assert AuditReport.load(folder).evidence is None


def test_hostile_tokens_survive_the_file(fused, tmp_path):
    hostile = ("<script>", "\"'", "😀", "שלום", "a\r\nb", "\x00", "\u2028")
    odd = replace(fused.evidence, tokens=tuple(hostile for _ in fused.evidence.tokens))
    odd = replace(odd, promoted={key: [(text, 0.5) for text in hostile] for key in odd.features})
    loaded = AuditReport.load(replace(fused, evidence=odd).save(tmp_path / "report")).evidence
    assert loaded.tokens == odd.tokens
    assert loaded.promoted == odd.promoted


def test_nothing_at_all_survives_the_file(fused, tmp_path):
    none = np.empty(0, dtype=np.int32)
    empty = Evidence(
        *((), 0, (), 0, (), Firings(none, none, none, none.astype(np.float32), none.astype(np.float32))),
        *({}, {}, {}, {}, fused.evidence.pairs.iloc[:0]),
        pair_tau=0.3,
        pair_delta=0.1,
    )
    loaded = AuditReport.load(replace(fused, evidence=empty).save(tmp_path / "report")).evidence
    same(loaded, empty)
    assert loaded.traces("blocks.0.hook_resid_post", 1) == []


def test_a_resumed_sweep_keeps_it(tiny, tmp_path, monkeypatch):  # noqa: F811
    model, saes, prompts = tiny
    auditor = OptimizationAuditor(model, saes)
    options = OPTIONS | {"controls": False, "out": tmp_path / "sweep"}
    first = auditor.run_sweep(prompts, ["int4-g8", "int2"], **options)
    monkeypatch.setattr("tracelens.optimization_auditor.audits_in_turn", lambda *args, **kwargs: iter(()))
    again = auditor.run_sweep(prompts, ["int4-g8", "int2"], **options)
    for name, report in first.reports.items():
        same(again[name].evidence, report.evidence)
        assert again[name].settings["hashes"] == report.settings["hashes"]
    assert len({report.settings["hashes"]["quantized"] for report in first.reports.values()}) == 2
    assert len({report.settings["hashes"]["reference"] for report in first.reports.values()}) == 1


def test_a_sweep_says_what_the_audits_say(tiny):  # noqa: F811
    model, saes, prompts = tiny
    options = OPTIONS | {"controls": False}
    sweep = OptimizationAuditor(model, saes).run_sweep(prompts, ["int4-g8", "int2"], **options)
    alone = audit(model, apply_precision(model, "int2"), saes, prompts, controls=False)
    same(sweep["int2"].evidence, alone.evidence)
    assert sweep["int2"].settings["hashes"] == alone.settings["hashes"]


def test_bad_settings(reference):
    for name in ("evidence_prompts", "evidence_features"):
        with pytest.raises(MetricInputError, match=f"{name} is -1; it must be at least 0"):
            audit(reference, reference, **{name: -1})
