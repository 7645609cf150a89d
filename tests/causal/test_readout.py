"""Metrics: what each gives by hand, and what it says of answers and logits that it cannot read."""

import math
from typing import Any

import pytest
import torch

from tests.causal.made_tokenizers import byte_level, reader
from tests.tiny import TEXTS, tiny_tokenizer
from tracelens.behaviour import OPENERS, AnswerTokens, answer_tokens_for
from tracelens.causal.arms import ArmRunner
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import (
    KL,
    Context,
    Function,
    LogitDifference,
    LogProb,
    Loss,
    Margin,
    Metric,
    as_metric,
    check_baselines,
    checked,
    default_metric,
)
from tracelens.datasets import get_dataset
from tracelens.errors import MetricInputError, PromptError, UnknownNameError
from tracelens.organism import sample

LOGITS = torch.tensor([[0.5, 0.1, 0.1, 0.3], [0.2, 0.2, 0.4, 0.2], [0.1, 0.2, 0.3, 0.4]]).log()


def read(metric: Metric, logits: torch.Tensor = LOGITS, prompt: list[int] | None = None, **runs: Any) -> list[float]:
    """The metric of rows that run prompts 0, 1, 2, unless said otherwise."""
    rows = torch.tensor(list(range(len(logits))) if prompt is None else prompt)
    return metric(logits, Context(rows, runs.__getitem__)).tolist()


def prompts(n: int = 3, **more: Any) -> PromptSet:
    tokens = tuple((1, 2, 3) for _ in range(n))
    given = {"behaviours": ("",) * n} | more
    return PromptSet(texts=("text",) * n, tokens=tokens, groups={"answer": ((2,),) * n}, **given)


# By hand


def test_margin():
    both = AnswerTokens((0, 1), (2,))
    assert read(Margin(both)) == pytest.approx([math.log(6), 0.0, 0.0], abs=1e-6)
    # As odds against the one other token that is listed, whatever the fourth holds.
    kinds = {"refusal": both, "warning": AnswerTokens((3,), (0,))}
    bound = Margin(kinds).bound(prompts(behaviours=("warning", "refusal", "warning")), 4)
    assert read(bound) == pytest.approx([math.log(3 / 5), 0.0, math.log(4)], abs=1e-6)
    assert read(bound, LOGITS[[2, 0]], [2, 1]) == pytest.approx([math.log(4), math.log(6)], abs=1e-6)
    assert read(bound.select([1]), LOGITS[:1]) == pytest.approx([math.log(6)], abs=1e-6)


def test_logit_difference_is_of_each_rows_own_prompt():
    metric = LogitDifference((0, 2, 3), (1, 3, 0)).bound(prompts(), 4)
    assert read(metric) == pytest.approx([math.log(5), math.log(2), math.log(4)], abs=1e-6)
    assert read(metric, LOGITS[[0, 0]], [1, 2]) == pytest.approx([math.log(1 / 3), math.log(3 / 5)], abs=1e-6)
    assert read(metric.select([2, 0]), LOGITS[[2, 0]]) == pytest.approx([math.log(4), math.log(5)], abs=1e-6)
    assert read(metric, LOGITS + 7) == pytest.approx(read(metric), abs=1e-5)


def test_log_probability():
    metric = LogProb((0, 2, 1)).bound(prompts(), 4)
    expected = [math.log(0.5), math.log(0.4), math.log(0.2)]
    for shift in (0.0, 30.0):
        assert read(metric, LOGITS + shift) == pytest.approx(expected, abs=1e-5)
    assert read(metric.select([1]), LOGITS[[1]]) == pytest.approx(expected[1:2], abs=1e-6)


def test_kl_is_from_the_unpatched_run_to_this_one():
    clean = LOGITS[[1, 1, 1]]
    by_hand = [
        sum(p * math.log(p / q) for p, q in zip((0.2, 0.2, 0.4, 0.2), row.exp().tolist(), strict=True))
        for row in LOGITS
    ]
    assert read(KL("clean"), clean=clean + 3) == pytest.approx(by_hand, abs=1e-6)
    assert read(KL("clean"), clean=LOGITS) == [0.0] * 3
    ruled_out = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0]]).log()
    assert read(KL("clean"), ruled_out, clean=ruled_out[[0, 0]]) == pytest.approx([0, 0.5 * math.log(4 / 3)], abs=1e-6)
    assert (KL("clean").name, KL("clean").baselines) == ("KL(clean ‖ run)", ("clean",))


def test_loss_is_that_of_the_next_tokens(tiny_model):
    made = PromptSet.of(TEXTS[:2] + TEXTS[3:], tiny_model, chat="never")
    metric = Loss().bound(made, tiny_model.cfg.d_vocab)
    found = ArmRunner(tiny_model, made, metric, batch_size=2).unpatched()
    for value, ids in zip(found.tolist(), made.tokens, strict=True):
        logits = tiny_model(torch.tensor([ids]))
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids[1:]))
        assert value == pytest.approx(expected.item(), abs=1e-5)
    assert len(metric.select([2, 0]).tokens) == 2
    with pytest.raises(PromptError, match="prompt 0 has one token, so no next token to predict"):
        Loss().bound(PromptSet.of([[1]], tiny_model), 48)


def test_any_function_of_logits(tiny_model):
    made = PromptSet.of(TEXTS, tiny_model, chat="never")
    last = ArmRunner(tiny_model, made, as_metric(lambda logits: logits[:, 5])).unpatched()
    whole = ArmRunner(tiny_model, made, Function(lambda logits: logits[:, -1, 5], whole=True)).unpatched()
    by_hand = [tiny_model(torch.tensor([ids]))[0, -1, 5].item() for ids in made.tokens]
    torch.testing.assert_close(last, torch.tensor(by_hand, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, last, atol=1e-6, rtol=0)


def test_low_precision_logits_are_read_in_float32_and_wide_ones_kept():
    close = torch.tensor([[1000.0, 1001.0, 0.0, 0.0]])
    seen: list[torch.dtype] = []

    def note(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.dtype)
        return logits[:, 0]

    metrics = [LogitDifference((1,), (2,)), LogProb((1,)), Function(note), KL("clean"), Loss(((1, 2),))]
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        for metric in metrics:
            logits = close.to(dtype)
            logits = logits[:, None].expand(1, 2, 4) if isinstance(metric, Loss) else logits
            context = Context(torch.tensor([0]), lambda name, own=logits: own)
            assert metric(logits, context).dtype == expected
        assert seen[-1] == expected
    # 1000 is a bfloat16, and so is 1004; their distance to 0 is not rounded again.
    odd = torch.tensor([[1004.0, -3.015625]], dtype=torch.bfloat16)
    assert read(LogitDifference((0,), (1,)), odd) == [1004.0 + 3.015625]


# Answers as texts


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def test_answers_that_are_single_tokens(tokenizer):
    of = LogitDifference.of(tokenizer, correct=[" Paris", " Rome"], wrong=[" Rome", 7])
    (paris,), (rome,) = (tokenizer(word)["input_ids"] for word in (" Paris", " Rome"))
    assert of == LogitDifference((paris, rome), (rome, 7))
    assert LogProb.of(tokenizer, [" Paris", rome]) == LogProb((paris, rome))


def test_an_answer_of_several_tokens_says_what_would_be_one(tokenizer):
    with pytest.raises(PromptError) as error:
        LogProb.of(tokenizer, [" Rome", "Paris"])
    pieces = ", ".join(repr(tokenizer.decode([i])) for i in tokenizer("Paris")["input_ids"])
    count = len(tokenizer("Paris")["input_ids"])
    assert f"expected answer of prompt 1, 'Paris', is {count} tokens ({pieces}), not a single one" in str(error.value)
    assert "' Paris' is one token: use it if the prompt ends so that the answer begins like this" in str(error.value)
    with pytest.raises(
        PromptError, match=r"wrong answer of prompt 0, ' zebra', is .* use another word, or the id of its first"
    ):
        LogitDifference.of(tokenizer, [" Rome"], [" zebra"])
    with pytest.raises(PromptError, match=r"'', is 0 tokens \(none\)"):
        LogProb.of(tokenizer, [""])
    with pytest.raises(PromptError, match=r"the expected answers are one string; give a list"):
        LogProb.of(tokenizer, " Paris")
    with pytest.raises(PromptError, match=r"correct answer of prompt 0, 'zebra', is unknown to the tokenizer"):
        LogitDifference.of(tiny_tokenizer(), ["zebra"], ["cat"])
    # Words alone, for a tokenizer whose tokens are words.
    assert len(LogProb.of(tiny_tokenizer(), ["cat", " cat"]).answer) == 2


# What cannot be read


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (LogProb((1, 2)), "2 answers for 3 prompts; give one token id for each"),
        (LogProb((1, 2, 4)), "the answer of prompt 2 is token 4; the vocabulary is 0 to 3"),
        (LogitDifference((1, 2, 3), (0, -1, 0)), "the answer of prompt 1 is token -1"),
        (LogitDifference((1, 2, 3), (0, 2, 0)), "the correct and the wrong answer of prompt 1 are the same token, 2"),
        (
            Margin({"refusal": AnswerTokens((0,), (1,))}),
            r"prompt 0 is of behaviour '', for which there are no answer tokens",
        ),
        (Margin({"x": AnswerTokens((0,), (1,))}, ("x", "x")), "2 behaviours for 3 prompts"),
    ],
)
def test_metrics_that_do_not_fit_their_prompts(metric, message):
    with pytest.raises(PromptError, match=message):
        metric.bound(prompts(), 4)


def test_values_that_are_no_numbers():
    context = Context(torch.tensor([4, 7, 9]), lambda name: LOGITS)
    for value, what in ((math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")):
        bad = torch.tensor([0.0, value, 0.0])
        with pytest.raises(MetricInputError, match=f"metric 'odd' is {what} for prompt 7; check its answer tokens"):
            checked(Function(torch.sum, "odd"), bad, LOGITS, context)
    holed = LOGITS.clone()
    holed[0, :2] = -math.inf
    metric = LogProb((0,) * 10)
    with pytest.raises(MetricInputError, match=r"is infinite for prompt 4.*\(0 of them are NaN, 2 infinite\)"):
        checked(metric, metric(holed, context), holed, context)
    for wrong in (LOGITS, LOGITS.mean(), 0.5):
        with pytest.raises(MetricInputError, match=r"it must give one number per row, \[3\]"):
            checked(Function(torch.sum), wrong, LOGITS, context)


def test_metrics_of_what_users_give():
    tokens = AnswerTokens((0,), (1,))
    assert as_metric(tokens) == Margin(tokens)
    assert as_metric({"refusal": tokens}) == Margin({"refusal": tokens})
    assert as_metric(KL()) == KL()

    def entropy(logits):
        return logits[:, 0]

    assert as_metric(entropy).name == "entropy"
    with pytest.raises(
        MetricInputError, match=r"metric is a str; give a Metric \(Margin, LogitDifference, LogProb, KL\)"
    ):
        as_metric("margin")


def test_a_run_that_there_is_none_of(tiny_model):
    check_baselines(KL("clean"), ["clean", "corrupted"])
    check_baselines(LogProb((1,)), [])
    with pytest.raises(
        UnknownNameError, match=r"needs the run 'clean'; the runs of this analysis: reference, quantized"
    ):
        check_baselines(KL("clean"), ["reference", "quantized"])
    made = PromptSet.of(TEXTS, tiny_model, chat="never")
    with pytest.raises(UnknownNameError, match=r"metric 'KL\(reference ‖ run\)' needs the run 'reference'.*: none"):
        ArmRunner(tiny_model, made, KL())


# What is measured where nobody says


def test_the_default_is_the_margin_of_the_behaviours(organism):
    tokenizer = organism.tokenizer
    for kind in ("refusal", "uncertainty", "warning"):
        made = PromptSet.of(sample(4, kind), organism)
        found = ArmRunner(organism, made, default_metric(made, tokenizer)).unpatched()
        own = ArmRunner(organism, made, Margin(answer_tokens_for(tokenizer, kind))).unpatched()
        torch.testing.assert_close(found, own)
    mixed = PromptSet.of(sample(2) + sample(2, "warning"), organism)
    values = ArmRunner(organism, mixed, default_metric(mixed, tokenizer)).unpatched()
    assert values[3].item() == pytest.approx(
        ArmRunner(organism, mixed.select([3]), Margin(answer_tokens_for(tokenizer, "warning"))).unpatched().item(),
        abs=1e-5,
    )
    # Refusal, where nothing is known.
    plain = PromptSet.of(mixed.texts[:2], organism)
    assert default_metric(plain, tokenizer) == Margin({"refusal": answer_tokens_for(tokenizer)}, ("refusal",) * 2)
    every = PromptSet.of(get_dataset("organism_comprehensive_v1"), organism)
    metric = default_metric(every, tokenizer)
    assert isinstance(metric, Margin)
    assert set(metric.behaviours) == set(OPENERS)


def test_the_default_of_capabilities_is_the_answers_log_probability(organism):
    made = PromptSet.of(sample(4, "fact") + sample(4, "ioi"), organism)
    metric = default_metric(made, organism.tokenizer)
    assert isinstance(metric, LogProb)
    words = [organism.tokenizer.decode([token]) for token in metric.answer]
    assert words == [answer.split()[0] for answer in made.answers]
    # It is what a model that knows its facts is sure of.
    assert ArmRunner(organism, made, metric).unpatched().exp().median() > 0.9


def test_prompts_that_no_default_fits(organism):
    mixed = PromptSet.of(sample(1) + sample(1, "fact"), organism)
    with pytest.raises(
        PromptError, match=r"no metric that fits all of these prompts' behaviours, refusal, fact \(there are op"
    ):
        default_metric(mixed, organism.tokenizer)
    own = PromptSet.of({"sycophancy": ["i make bread"]}, organism)
    with pytest.raises(PromptError, match=r"behaviours, sycophancy .*pass metric=\.\.\."):
        default_metric(own, organism.tokenizer)
    with pytest.raises(PromptError, match="there is no tokenizer"):
        default_metric(mixed, None)


def test_default_of_a_model_without_openers():
    made = PromptSet.of(["the cat"], reader(tiny_tokenizer()), chat="never")
    with pytest.raises(PromptError, match="no token for the first word of an answer with refusal"):
        default_metric(made, tiny_tokenizer())
