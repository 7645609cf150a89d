"""Which step did it? Full precision → bf16 → weights → + activations → + key-value cache, and what each changes of every metric.

All steps are measured in one stream against the same reference, on the same prompts, and resampled together, so that the change of
a step is a paired difference. Attribution goes by turns: what a step adds depends on those before it, and another `order` may share
out differently what they do together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.audit_settings import AuditSettings
from tracelens.auditing.question import Question
from tracelens.auditing.replicates import Replicated
from tracelens.auditing.running import model_name
from tracelens.behaviour.refusal import AnswerTokens
from tracelens.datasets import resolve_dataset
from tracelens.errors import MetricInputError
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import SAEs, check_saes, load_saes, normalise_saes
from tracelens.features.selection import check_prompts
from tracelens.features.survival import REFERENCE, Survival, measure_survival
from tracelens.loading import load
from tracelens.precision import QuantizationConfig, QuantizationType, apply_precision
from tracelens.stats import Estimate, percentile_interval, sign_flip_test
from tracelens.studies.decomposition_result import UNITS, Contribution, Decomposition, Step
from tracelens.studies.step_values import StepValues
from tracelens.studies.steps import STEPS, Compute, step_precisions

Metric = Callable[[Float[Tensor, "prompt d_vocab"]], Float[Tensor, "prompt"]]
"""Logits at the last token of each prompt → a number for each prompt; its mean over the prompts is decomposed."""


def decompose(
    model: Any,
    precision: str | QuantizationType | QuantizationConfig,
    *,
    saes: Any,
    dataset: Any,
    baseline: Any = None,
    metrics: Mapping[str, Metric] | None = None,
    fingerprint: Fingerprint | str | Path | None = None,
    answer_tokens: Mapping[str, AnswerTokens] | None = None,
    tokenizer: Any = None,
    compute: Compute | None = "bf16",
    order: Sequence[str] = STEPS,
    calibration: Sequence[Any] | None = None,
    settings: AuditSettings | None = None,
    **changes: Any,
) -> Decomposition:
    """Runs the reference and one model for each step of the precision, and attributes every metric's change to the steps.

    Args:
        model: the reference: whatever `load` takes.
        precision: such as "int4-g32+a8+kv8"; steps that it does not name are left out.
        saes, dataset, baseline, fingerprint, answer_tokens, tokenizer: as for `Audit`.
        metrics: further ones by name, each from the logits at the prompts' last tokens.
        compute: what kernels compute in where the precision does not say; None for no such step.
        order: in which the steps are taken.
        calibration: prompts on which static scales of activations are found, at each step anew.
        settings, changes: an `AuditSettings`, and single fields of it by name: `progress=True`. Controls are not measured.

    Raises `PrecisionSpecError`, `PromptError` and `SAEError` as an audit does; `MetricInputError` for a metric that does not give one
    finite number per prompt, or has the name of another.
    """
    settings = replace(settings or AuditSettings(), **changes)
    extra = dict(metrics or {})
    if taken := sorted(extra.keys() & UNITS.keys()):
        raise MetricInputError(f"metrics of your own cannot be called {', '.join(taken)}: these are measured already")
    steps = step_precisions(precision, compute=compute, order=order)
    reference = load(model)
    features = load_saes(saes, device=reference.cfg.device) if isinstance(saes, str | Path) else normalise_saes(saes)
    check_saes(features, reference)
    tokenizer = reference.tokenizer if tokenizer is None else tokenizer
    question = Question.of(resolve_dataset(dataset, baseline=baseline), tokenizer, settings.chat, answer_tokens)
    known = Fingerprint.load(fingerprint) if isinstance(fingerprint, str | Path) else fingerprint
    if known is None:
        check_prompts(question.labels, question.texts)  # before the models run
    else:
        known.check(features)
    survival = measure_survival(
        reference,
        {name: partial(apply_precision, reference, step, calibration=calibration) for name, step in steps.items()},
        features,
        question.texts,
        readout=_readout(question, extra),
        tokenizer=tokenizer,
        maxima=known is None,
        n_blocks=settings.n_blocks,
        batch_size=settings.batch_size,
        padding_side=settings.padding_side,
        progress=settings.progress,
    )
    known = known or _fingerprint(survival, question, features, model_name(reference), settings)
    return _attribute(
        StepValues(survival, question, known, list(extra), settings),
        [Step(name, str(step)) for name, step in steps.items()],
        reference=model_name(reference),
        settings={"dataset": question.dataset, "n_prompts": len(question.texts), **asdict(settings)},
        seed=settings.seed,
    )


def _fingerprint(
    survival: Survival, question: Question, saes: SAEs, model: str, settings: AuditSettings
) -> Fingerprint:
    return Fingerprint.from_maxima(
        survival.maxima,
        question.labels,
        ids=question.texts,
        model=model,
        saes=saes,
        min_auroc=settings.min_auroc,
        alpha=settings.alpha,
        seed=settings.seed,
    )


def _readout(question: Question, extra: Mapping[str, Metric]) -> Callable[[Tensor], Tensor]:
    def read(logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, "prompt readout"]:
        columns = [question.readout(logits)]
        for name, metric in extra.items():
            found = metric(logits)
            if tuple(found.shape) != (len(logits),) or not found.isfinite().all():
                raise MetricInputError(
                    f"metric {name!r} gave shape {tuple(found.shape)} for logits of {len(logits)} prompts; expected one "
                    "finite number for each prompt"
                )
            columns.append(found[:, None].to(logits.dtype))
        return torch.cat(columns, 1)

    return read


def _attribute(
    values: StepValues, steps: list[Step], *, reference: str, settings: dict[str, Any], seed: int
) -> Decomposition:
    start = before = values.of(REFERENCE)
    numbers_before = values.per_prompt(REFERENCE)
    contributions: list[Contribution] = []
    for step in steps:
        after, numbers = values.of(step.name), values.per_prompt(step.name)
        for metric, run in after.items():
            p = None
            if metric in numbers:
                differences = numbers[metric] - numbers_before[metric]
                p = sign_flip_test(differences[~differences.isnan()], seed=seed)
            contributions.append(Contribution(metric, step.name, run.estimate, _change(before[metric], run), p))
        before, numbers_before = after, numbers
    return Decomposition(
        reference=reference,
        precision=steps[-1].precision,
        steps=tuple(steps),
        start={metric: run.estimate for metric, run in start.items()},
        contributions=tuple(contributions),
        total={metric: _change(start[metric], run) for metric, run in before.items()},
        settings=settings,
    )


def _change(before: Replicated, after: Replicated) -> Estimate:
    return percentile_interval(after.value - before.value, after.replicates - before.replicates, n=after.n_prompts)
