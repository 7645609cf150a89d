import math

import pytest
import torch

from tracelens.errors import MetricInputError, PromptError
from tracelens.features.saes import load_saes
from tracelens.optimization_auditor import OptimizationAuditor
from tracelens.organism import sample
from tracelens.precision import apply_precision
from tracelens.precision.weights import weight_matrices
from tracelens.studies.feature_damage import feature_damage
from tracelens.studies.pruning import _kl, match_pruning, perplexity


@pytest.fixture(scope="module")
def prompts():
    found = [p.prompt for p in sample(40, behaviour="refusal", seed=5)]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def report(organism, prompts):
    return OptimizationAuditor(organism, load_saes("organism")).run_sweep(
        {"refusal": prompts[:20]}, ["int2-g32"], baseline_prompts=prompts[20:], controls=False, min_active=3
    )["int2-g32"]


def test_perplexity_is_that_of_the_report(organism, report):
    texts = report.prompts["prompt"].tolist()
    assert perplexity(organism, texts) == pytest.approx(report.divergence.perplexity_reference.value)
    quantized = apply_precision(organism, "int2-g32")
    assert perplexity(quantized, texts, batch_size=7) == pytest.approx(report.divergence.perplexity_quantized.value)
    assert _kl(organism, quantized, texts) == pytest.approx(report.divergence.kl.value)


@pytest.mark.parametrize("by", ["perplexity", "kl"])
def test_what_was_found_has_the_cost_of_the_quantized_model(organism, report, by):
    matched = match_pruning(organism, report, by=by)
    divergence = report.divergence
    target = (divergence.perplexity_quantized if by == "perplexity" else divergence.kl).value
    assert matched.target == target
    assert abs(matched.found - target) <= 0.1 * (target - matched.reference)
    pruned = apply_precision(organism, str(matched.config))
    texts = report.prompts["prompt"].tolist()
    value = perplexity(pruned, texts) if by == "perplexity" else _kl(organism, pruned, texts)
    assert value == pytest.approx(matched.found)
    zero = torch.cat([(w.matrix == 0).flatten() for w in weight_matrices(pruned)]).float().mean().item()
    assert zero == pytest.approx(matched.sparsity, abs=0.001)
    assert matched.to_dataframe()["sparsity"].is_monotonic_increasing


def test_pruning_finds_itself(organism, prompts):
    target = _kl(organism, apply_precision(organism, "pruned-s25"), prompts)
    matched = match_pruning(organism, target, prompts, by="kl", tolerance=0.02)
    assert matched.found == pytest.approx(target, rel=0.021)
    assert matched.reference == 0 == matched.tried[0.0]


def test_costs_that_pruning_cannot_have_are_named(organism, prompts):
    reference = perplexity(organism, prompts)
    with pytest.raises(
        MetricInputError, match=r"no pruning is as good as that\. Compare a lower precision, or match by='kl'"
    ):
        match_pruning(organism, 0.99 * reference, prompts)
    with pytest.raises(MetricInputError, match=r"no pruning is as good as that\. Compare a lower precision$"):
        match_pruning(organism, 0.0, prompts, by="kl")
    with pytest.raises(MetricInputError, match=r"pruning up to 95% of the weights reaches a kl of .* compare a higher"):
        match_pruning(organism, 1e6, prompts[:5], by="kl")
    with pytest.raises(MetricInputError, match=r"no sparsity has a kl within .* give a larger tolerance"):
        match_pruning(organism, 0.0123456789, prompts[:3], by="kl", tolerance=1e-9)
    with pytest.raises(MetricInputError, match=r"needs prompts=\[\.\.\.\]"):
        match_pruning(organism, 5.0)
    with pytest.raises(PromptError, match="there are no prompts"):
        match_pruning(organism, 5.0, [])


def test_the_whole_study_in_one_call(organism, prompts):
    site, sae = list(load_saes("organism").items())[2]
    study = feature_damage(
        organism,
        {site: sae},
        {"refusal": prompts[:20]},
        ["int6", "int3", "int2-g32"],
        matched=["int2-g32"],
        by="kl",
        baseline=prompts[20:],
        controls=False,
        min_active=3,
        n_resamples=100,
    )
    assert study.curve.of("all")["precision"].tolist() == ["int6", "int3", "int2-g32"]
    assert study.curve.of("all")["survived"].is_monotonic_decreasing
    assert [o.label_b for o in study.overlaps] == [
        f"{study.pruning['int2-g32'].sparsity:.0%} pruned",
        "noise like INT2-g32",
    ]
    for overlap in study.overlaps:
        assert overlap.sets.n_a == round(study.curve.of("all")["damaged"].iloc[-1] * overlap.sets.n)
        assert overlap.jaccard.value > overlap.sets.chance
    assert [p.label for p in study.predictions] == ["INT6", "INT3", "INT2-g32"]
    assert len(study.prediction_table()) == len(study.forecasts.table) == 3
    assert not math.isnan(study.predictions[-1].auc.value)
    assert len(study.plot().data) > 5
