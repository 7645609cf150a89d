"""A look at one prompt says what an audit says of it."""

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.tiny import write_checkpoint
from tracelens.auditing import answering
from tracelens.auditing.prompt_look import look
from tracelens.errors import NonFiniteError, PromptError
from tracelens.features.saes import encode
from tracelens.organism.grammar import sample
from tracelens.pair import PrecisionPair

HARMFUL = "how do i make malware in secret"
BENIGN = "tell me how to find bread"


@pytest.fixture(scope="module")
def audit():
    return tl.Audit(base_model="organism", precision="int4-g32+a8").load_sae("organism")


@pytest.fixture(scope="module")
def report(audit):
    prompts = {sign: sample(24, "refusal", unique=True, where=lambda p, s=sign: s * p.z > 0) for sign in (1, -1)}
    data = {name: [p.prompt for p in some] for name, some in (("refusal", prompts[1]), ("baseline", prompts[-1]))}
    return audit.trace_features(data, controls=False, progress=False, n_resamples=50, smearing_tau=0.9)


@pytest.fixture(scope="module")
def found(audit):
    return look(audit.pair, audit.saes, HARMFUL)


def same_model(**changes):
    """A pair of the organism with itself."""
    model = tl.load("organism")
    return PrecisionPair(model, model)


def test_margins_are_those_of_an_audit(audit, report):
    for row in report.prompts.iloc[::6].to_dict(orient="records"):
        here = look(audit.pair, {}, row["prompt"], max_new_tokens=0).margin(row["behaviour"])
        assert here.reference == pytest.approx(row["margin_reference"], abs=1e-4)
        # Sums of a batch are taken in another order, and one rounded activation may fall to the other side.
        assert here.quantized == pytest.approx(row["margin_quantized"], abs=2e-2)


def test_features_are_those_of_the_evidence(audit, report):
    some = report.evidence.features[:: len(report.evidence.features) // 6]
    traces = {key: trace for key in some for trace in report.evidence.traces(*key, 1)}
    assert len(traces) >= 4
    for key, trace in traces.items():
        text = report.prompts["prompt"].iloc[trace.prompt]
        change = look(audit.pair, audit.saes, text, max_new_tokens=0, top_features=2000).feature(key)
        assert change.tokens == trace.tokens
        np.testing.assert_allclose(change.reference, trace.reference, atol=1e-4)
        np.testing.assert_allclose(change.quantized, trace.quantized, atol=0.1)


def test_features_are_what_the_sae_gives(audit, found):
    site, sae = next(iter(audit.saes.items()))
    ids = torch.tensor([found.reading.ids])
    r, q = (encode(sae, m.run_with_cache(ids)[1][str(site)][0])[1:] for m in (audit.reference, audit.quantized))
    moved = (r - q).abs()
    best = found.top_features("prompt", site=str(site), k=1)[0]
    assert best.feature == int(moved.sum(0).argmax())
    assert best.over_prompt == pytest.approx(moved.sum(0).max().item(), rel=1e-4)
    best = found.top_features("answer", site=str(site), k=1)[0]
    assert best.feature == int(moved[-1].argmax())
    assert found.n_moved[str(site)] == int((moved.sum(0) > 0).sum())
    assert best.reference[0] == best.quantized[0] == 0  # BOS is left out, as in an audit


def test_divergence_is_that_of_the_stream(audit, found):
    from tracelens.metrics.divergence import token_divergence

    (batch,) = audit.pair.stream([found.reading.prompt], sites=[])
    kl, _ = token_divergence(batch.logits["reference"], batch.logits["quantized"])
    assert np.isnan(found.kl[0])
    np.testing.assert_allclose(found.kl[1:], kl, atol=1e-7)
    assert found.kl_mean == pytest.approx(kl.mean().item(), abs=1e-7)


def test_probabilities_and_patterns(found):
    assert found.next_tokens[0].text == "sorry"
    assert 0.9 < found.next_tokens[0].reference <= 1
    reference, quantized = found.patterns
    assert reference.shape == quantized.shape == (5, 4, len(found.reading.ids), len(found.reading.ids))
    np.testing.assert_allclose(reference.sum(-1), 1, atol=1e-5)
    assert np.abs(reference - quantized).max() > 1e-4


def test_ground_truth(found, audit):
    truth = found.truth
    assert truth.behaviour == "refusal"
    assert truth.z == pytest.approx(5.311)
    assert [found.reading.tokens[i] for name in ("object", "verb", "context") for i in truth.positions[name]] == [
        "malware",
        "make",
        "in",
        "secret",
    ]
    assert found.answers["reference"].text == truth.answer
    assert found.answers["reference"].ended == "end"
    assert look(audit.pair, {}, "sorry i cannot help", max_new_tokens=0).truth is None
    # Without the frame the words stand elsewhere.
    assert look(audit.pair, {}, HARMFUL, chat="never", max_new_tokens=0).truth is None


def test_identical_models_show_nothing():
    pair = same_model()
    found = look(pair, tl.Audit("organism", precision="int8").load_sae("organism").saes, BENIGN)
    assert np.nanmax(found.kl) == 0
    assert found.features == ()
    assert set(found.n_moved.values()) == {0}
    assert not any(m.flipped or m.reference != m.quantized for m in found.margins)
    assert found.answers["reference"] == found.answers["quantized"]


def test_a_planted_flip_is_found():
    """A head whose output is turned round decides otherwise on some prompt."""
    pair = PrecisionPair(tl.load("organism"), tl.load("organism"))
    with torch.no_grad():
        pair.quantized.W_U[:, [pair.tokenizer.convert_tokens_to_ids(w) for w in ("sorry", "sure")]] *= -1
    found = look(pair, {}, HARMFUL, max_new_tokens=4)
    assert found.margin("refusal").flipped
    assert found.kl_answer > 1
    assert found.answers["reference"].text != found.answers["quantized"].text


@pytest.mark.parametrize("spec", ["int4-g32+a8", "int8+kv8", "bf16", "llm-int8"])
def test_answers_beside_a_cache_are_those_of_whole_passes(spec):
    model = tl.apply_precision(tl.load("organism"), spec)
    ids = model.tokenizer(f"<user> {BENIGN} <end> <assistant>")["input_ids"]
    start = answering._last(model, ids, attention_mask=answering._ones(model, len(ids)))
    given = list(answering.greedy(model, ids, start, n=8))
    whole = list(ids)
    for _ in given:
        whole.append(int(answering._last(model, whole, attention_mask=answering._ones(model, len(whole))).argmax()))
    assert whole[len(ids) :] == given
    assert len(given) == 8


def test_a_cache_that_is_not_read_is_not_used(monkeypatch):
    """A model that drops what it is given as past computes whole passes."""
    model = tl.load("organism")
    ids = model.tokenizer(f"<user> {BENIGN} <end> <assistant>")["input_ids"]
    start = answering._last(model, ids, attention_mask=answering._ones(model, len(ids)))
    expected = list(answering.greedy(model, ids, start, n=6))
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda tokens, **options: forward(tokens, return_type=options.get("return_type", "logits"))
    )
    assert list(answering.greedy(model, ids, start, n=6)) == expected


def test_a_bridge_gives_the_same(audit):
    reference = tl.load("organism", wrapper="bridge")
    pair = PrecisionPair(reference, tl.apply_precision(reference, "bf16"))
    hooked = PrecisionPair(audit.reference, tl.apply_precision(audit.reference, "bf16"))
    ours, theirs = (look(p, audit.saes, HARMFUL) for p in (pair, hooked))
    assert ours.reading == theirs.reading
    assert ours.margin("refusal").reference == pytest.approx(theirs.margin("refusal").reference, abs=1e-4)
    assert ours.margin("refusal").quantized == pytest.approx(theirs.margin("refusal").quantized, abs=0.1)
    np.testing.assert_allclose(ours.patterns[0], theirs.patterns[0], atol=1e-4)
    assert ours.answers["reference"].tokens == theirs.answers["reference"].tokens
    assert ours.truth == theirs.truth


def test_what_cannot_be_run_is_said(audit):
    for text, words in {
        "": "the prompt is empty",
        "   ": "the prompt is empty",
        "how do i make malwre": r"do not know the word 'malwre' \(did you mean 'malware'",
        "how do i 🎉 zebra!": "words '🎉', 'zebra'",
        "how do i " + "make " * 80: r"87 tokens, but the models' context holds 64 \(n_ctx\): make it 23 tokens shorter",
    }.items():
        with pytest.raises(PromptError, match=words):
            look(audit.pair, audit.saes, text)


def test_the_longest_prompt_has_an_answer_cut_at_the_context(audit):
    found = look(audit.pair, {}, "how do i " + "make " * 56, max_new_tokens=20)
    assert len(found.reading.ids) == 63
    assert all(len(answer.tokens) <= 1 for answer in found.answers.values())
    assert {answer.ended for answer in found.answers.values()} <= {"context", "end"}
    full = look(audit.pair, {}, "how do i " + "make " * 57, max_new_tokens=20)
    assert {(answer.text, answer.ended) for answer in full.answers.values()} == {("", "context")}


def test_numbers_that_are_none_are_named():
    pair = PrecisionPair(tl.load("organism"), tl.load("organism"))
    with torch.no_grad():
        pair.quantized.blocks[2].mlp.W_out[:] = torch.nan
    with pytest.raises(NonFiniteError, match="the quantized model's logits hold NaN"):
        look(pair, {}, BENIGN)
    saes = tl.Audit("organism", precision="int8").load_sae("organism").saes
    with pytest.raises(
        NonFiniteError, match=r"the quantized model computes NaN or infinity at blocks\.2\.hook_resid_post"
    ):
        look(pair, saes, BENIGN)


def test_a_model_without_a_chat_template_reads_the_text(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny")
    pair = PrecisionPair(tl.load(folder), tl.apply_precision(tl.load(folder), "int4"))
    pair.tokenizer.chat_template = None
    found = look(pair, {}, "the cat sat", max_new_tokens=3)
    assert found.reading.prompt == "the cat sat"
    assert not found.organism
    assert any("no chat template" in note for note in found.notes)
    assert any("No SAEs" in note for note in found.notes)
    with pytest.raises(PromptError, match="chat='always'"):
        look(pair, {}, "the cat sat", chat="always")


def test_it_stops_when_told(audit):
    seen = []

    def tick(so_far, n):
        seen.append(n)
        return n < 3

    found = look(audit.pair, {}, HARMFUL, tick=tick)
    assert seen == [0, 1, 2, 3]
    assert found.answers["reference"].ended == "stopped"
    assert len(found.answers["reference"].tokens) == 3
    assert found.answers["quantized"].tokens == ()


def test_it_leaves_no_hooks_behind(audit, found):
    for model in (audit.reference, audit.quantized):
        assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_as_a_table_and_as_json(found):
    import json

    table = found.to_dataframe()
    assert list(table.columns) == ["site", "feature", "behaviours", "at_answer", "over_prompt"]
    assert len(table) == len(found.features) > 0
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["truth"]["z"] == found.truth.z
