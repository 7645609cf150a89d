"""Are important circuits more robust? Importance in the reference against drift in the quantized model."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.ablation import importance as measure_importance
from tracelens.causal.ablation_result import Importance
from tracelens.causal.component_drift import Drift, component_drift
from tracelens.causal.components import Features
from tracelens.causal.fragility_result import Association, Fragility
from tracelens.causal.places import Place
from tracelens.causal.prompts import PromptSet, Spans
from tracelens.causal.rank_correlation import RankCorrelation, covariates, rank_correlation
from tracelens.chat import Chat
from tracelens.errors import PromptError, UnknownNameError
from tracelens.pair import PrecisionPair
from tracelens.precision.apply import apply_precision
from tracelens.precision.config import QuantizationConfig
from tracelens.precision.controls import matched_noise
from tracelens.stats import Estimate, benjamini_hochberg, bootstrap_weights, percentile_interval

MIN_DRIFT = 1e-6
"""Components that all drift less than this differ by rounding: there is nothing to correlate."""


def fragility(
    reference: Any,
    quantized: Any,
    prompts: Any,
    *,
    importance: Importance | None = None,
    components: Sequence[str | Place] = ("head", "mlp"),
    metric: Any = None,
    method: str = "mean",
    reference_prompts: Any = None,
    saes: Any = None,
    features: Features | None = None,
    layers: Iterable[int] | None = None,
    n_noise: int = 5,
    n_resamples: int = 1000,
    n_permutations: int = 10_000,
    spans: Spans | None = None,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> Fragility:
    """The scatter of importance against drift, and its rank correlation, in each quantized model.

    The points are the components of this one model, which are all there are: the permutation p asks whether they would line up
    so by chance, the interval what other prompts would have shown, and neither speaks of other models. A correlation is not
    yet robustness: both quantities follow a component's norm (a small one drifts relatively more and matters less) and its
    layer (drift piles up), which `partial` controls for; and any perturbation of the weights may give it, which
    matched noise shows. What drifts little may be what is easily rounded, and not what training protected.

    Args:
        quantized: name → quantized model, `PrecisionPair` with the reference, or precision ("int4-g32"), which is simulated
            when its turn comes; or a list of precisions.
        importance: measured before, on the same prompts; the options up to `layers` are then those of its components.
        components, metric, method, reference_prompts, saes, features, layers: as for `importance`.
        n_noise: seeds of matched noise of the quantization error's size per tensor; 0 leaves it out. It is on weights alone: of
            a model that rounds activations too (fp16, "+a8") it is no full match.
        n_resamples, n_permutations: of the bootstrap over prompts and the permutations over components.

    Raises as `tracelens.causal.ablation.importance`, `component_drift` and `matched_noise`; `PromptError` if `importance` is
    of other prompts.
    """
    tokenizer = getattr(reference, "tokenizer", None) if tokenizer is None else tokenizer
    prompt_set = PromptSet.of(prompts, reference, tokenizer=tokenizer, spans=spans, chat=chat)
    models = _named(quantized)
    if importance is None:
        importance = measure_importance(
            reference,
            prompt_set,
            components=components,
            metric=metric,
            method=method,
            reference_prompts=reference_prompts,
            saes=saes,
            features=features,
            layers=layers,
            chat=chat,
            tokenizer=tokenizer,
            batch_size=batch_size,
            memory_budget=memory_budget,
            progress=progress,
            seed=seed,
        )
    elif importance.prompts != prompt_set.texts:
        raise PromptError(
            f"importance was measured on other prompts ({len(importance.prompts)}) than these ({len(prompt_set)}); give the same"
        )
    drifts: dict[str, Drift] = {}
    noise: dict[str, tuple[Drift, ...]] = {}
    rounding: set[str] = set()
    options: dict[str, Any] = {"components": importance.components, "saes": saes, "batch_size": batch_size}
    for label, given in models.items():
        pair = _pair(reference, given, tokenizer)
        precision = getattr(pair.quantized, "precision", None)  # a checkpoint that was loaded has none
        rounding |= {label} if precision is not None and precision.rounds_activations else set()
        drifts[label] = component_drift(pair, prompt_set, label=label, progress=progress, **options)
        noise[label] = tuple(
            component_drift(other, prompt_set, label=f"noise of {label}", progress=progress, **options)
            for other in _noisy(pair, n_noise, seed)
        )
    options = {"n_resamples": n_resamples, "n_permutations": n_permutations, "seed": seed}
    found = associate(importance, drifts, noise, rounding=rounding, **options)
    return Fragility(importance, drifts, noise, found, {"n_noise": n_noise, **options})


def associate(
    importance: Importance,
    drifts: Mapping[str, Drift],
    noise: Mapping[str, Sequence[Drift]] | None = None,
    *,
    rounding: Collection[str] = (),
    n_resamples: int = 1000,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> tuple[Association, ...]:
    """The associations of what was measured already; `fragility` says what they are. `rounding`: labels of models that round
    activations.
    """
    weights = bootstrap_weights(importance.change.shape[1], n_resamples, seed)
    size = importance.change.abs()
    found = []
    for label, drift in drifts.items():
        for kind in dict.fromkeys(importance.kinds):
            rows = torch.tensor([i for i, other in enumerate(importance.kinds) if other == kind])
            layer = torch.tensor([importance.components[i].site.layer for i in rows.tolist()])
            x = _resampled(size[rows], weights)
            options: dict[str, Any] = {"n_permutations": n_permutations, "seed": seed}

            def correlate(other: Drift, rows: Tensor = rows, x: Any = x, **more: Any) -> RankCorrelation:
                y, replicates = _resampled(other.relative[rows], weights)
                # Zero is no small drift: what is equal up to rounding has no order.
                y = y if bool((y.nan_to_num(0) > MIN_DRIFT).any()) else torch.full_like(y, torch.nan)
                return rank_correlation(x[0], y, x[1], replicates, **more)

            own = correlate(drift, **options)
            partial = correlate(drift, given=covariates(drift.norm[rows], layer), **options)
            control, versus = _against(
                own, [correlate(other, n_permutations=1) for other in (noise or {}).get(label, ())], seed
            )
            found.append(
                Association(
                    label=label,
                    kind=kind,
                    n_components=len(rows),
                    correlation=own.estimate,
                    p_value=own.p_value,
                    p_adjusted=float("nan"),
                    detectable=own.detectable,
                    partial=partial.estimate,
                    partial_p=partial.p_value,
                    partial_detectable=partial.detectable,
                    noise=control,
                    versus_noise=versus,
                    rounds_activations=label in rounding,
                )
            )
    known = [i for i, each in enumerate(found) if each.p_value == each.p_value]
    adjusted = benjamini_hochberg(torch.tensor([found[i].p_value for i in known], dtype=torch.float64))
    for i, p in zip(known, adjusted.tolist(), strict=True):
        found[i] = replace(found[i], p_adjusted=p)
    return tuple(found)


def _resampled(
    values: Float64[Tensor, "component prompt"], weights: Float64[Tensor, "resample prompt"]
) -> tuple[Float64[Tensor, "component"], Float64[Tensor, "resample component"]]:
    """Mean over the prompts where a component is known, of all prompts and of each resample."""
    known = values.isfinite()
    filled, counts = values.where(known, 0), known.double()
    return filled.sum(1) / counts.sum(1), (weights @ filled.T) / (weights @ counts.T)


def _against(
    own: RankCorrelation, controls: Sequence[RankCorrelation], seed: int
) -> tuple[Estimate | None, Estimate | None]:
    """Mean correlation of the controls, and by how much the own one is above it.

    The own one is a single draw, so each resample is compared with one control, drawn at random: what they differ in among
    themselves is in the interval.
    """
    controls = [control for control in controls if control.estimate.value == control.estimate.value]
    if not controls:
        return None, None
    value = sum(control.estimate.value for control in controls) / len(controls)
    drawn = torch.stack([control.replicates for control in controls])
    which = torch.randint(len(controls), drawn.shape[1:], generator=torch.Generator().manual_seed(seed))
    replicates = drawn.gather(0, which[None])[0]
    return (
        percentile_interval(value, replicates, n=controls[0].n),
        percentile_interval(own.estimate.value - value, own.replicates - replicates, n=controls[0].n),
    )


def _named(quantized: Any) -> dict[str, Any]:
    if isinstance(quantized, Mapping):
        models = {str(label): model for label, model in quantized.items()}
    elif isinstance(quantized, Sequence) and not isinstance(quantized, str):
        models = {str(spec): spec for spec in quantized}
    else:
        models = {str(quantized) if isinstance(quantized, str) else "quantized": quantized}
    if not models:
        raise UnknownNameError("quantized names no model; give {name: model} or precisions such as ['int4-g32']")
    return models


def _pair(reference: Any, given: Any, tokenizer: Any) -> PrecisionPair:
    if isinstance(given, PrecisionPair):
        return given
    if isinstance(given, str | QuantizationConfig):
        given = apply_precision(reference, given)
    return PrecisionPair(reference, given, tokenizer=tokenizer)


def _noisy(pair: PrecisionPair, n_noise: int, seed: int) -> Iterator[PrecisionPair]:
    """One at a time: a model's worth of noise each."""
    for i in range(n_noise):
        yield PrecisionPair(
            pair.reference, matched_noise(pair.reference, pair.quantized, seed + i), tokenizer=pair.tokenizer
        )
