"""Whether the SAEs themselves still fit: a ruler that broke must not be read as a model that did."""

from collections.abc import Sequence
from typing import Any

import torch

from tracelens.features.health_result import Fit, HealthThresholds, SAEHealth, SiteHealth
from tracelens.features.sae_fit import Ablation, SiteFit, measure_fit
from tracelens.features.sae_processing import processing_of
from tracelens.features.saes import check_saes, normalise_saes
from tracelens.pair import PaddingSide, PrecisionPair
from tracelens.stats import Estimate, bootstrap_weights, percentile_interval


def sae_health(
    pair: "PrecisionPair | tuple[Any, Any]",
    saes: Any,
    prompts: Sequence[Any],
    *,
    thresholds: HealthThresholds | None = None,
    ablation: Ablation = "zero",
    names: tuple[str, str] = ("the reference", "the quantized model"),
    batch_size: int = 32,
    padding_side: PaddingSide | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> SAEHealth:
    """Measures how well the same frozen SAEs fit the reference and the quantized model on the same tokens.

    Both models run once as they are, and twice per SAE: with its reconstruction at the site, and with the site ablated.

    Args:
        pair: a `PrecisionPair`, or (reference, quantized).
        saes: as `normalise_saes` takes them.
        prompts: texts, objects with `.prompt` or token ids, of the kind that the SAEs were trained on: a chat template or a
            narrow topic is itself a reason for a poor fit.
        ablation: what stands for nothing at a site, zeros or the mean activation.
        names: what sentences call the two models.

    Raises `SAEError` for SAEs that do not fit the models or reconstruct another site (transcoders), `PairMismatchError` for
    models that are no pair, `PromptError` for prompts that the models cannot take.
    """
    pair = pair if isinstance(pair, PrecisionPair) else PrecisionPair(*pair)
    saes = normalise_saes(saes)
    check_saes(saes, pair.reference)
    options = {
        "tokenizer": pair.tokenizer,
        "ablation": ablation,
        "batch_size": batch_size,
        "padding_side": padding_side,
    }
    ours = measure_fit(pair.reference, saes, prompts, **options, progress=progress, name="reference")
    theirs = measure_fit(pair.quantized, saes, prompts, **options, progress=progress, name="quantized")
    sites = {
        str(site): _site_health(sae, ours[site], theirs[site], n_resamples, seed, len(prompts))
        for site, sae in saes.items()
    }
    tokens = int(next(iter(ours.values())).reconstruction.n.sum())
    limits = thresholds or HealthThresholds()
    return SAEHealth(sites, limits, names[0], names[1], len(prompts), tokens, ablation)


def fit_of(fit: SiteFit, *, n_prompts: int, n_resamples: int = 1000, seed: int = 0) -> Fit:
    """The sums of one SAE on one model as numbers with intervals."""
    values, draws = _numbers(fit, torch.ones(1, len(fit.nll))), _draws(fit, n_resamples, seed)
    estimates = {name: percentile_interval(values[name].item(), draws[name], n=n_prompts) for name in values}
    return Fit(**estimates, dead=fit.reconstruction.dead(), cross_entropy=fit.cross_entropy())


def _site_health(sae: Any, ours: SiteFit, theirs: SiteFit, n_resamples: int, seed: int, n_prompts: int) -> SiteHealth:
    everything = torch.ones(1, len(ours.nll))
    # The same seed draws the same prompts for both models, which pairs the changes.
    before, after = (_draws(fit, n_resamples, seed) for fit in (ours, theirs))
    value_before, value_after = (_numbers(fit, everything) for fit in (ours, theirs))

    def change(name: str) -> Estimate:
        value = (value_after[name] - value_before[name]).item()
        return percentile_interval(value, after[name] - before[name], n=n_prompts)

    reference, quantized = (
        fit_of(fit, n_prompts=n_prompts, n_resamples=n_resamples, seed=seed) for fit in (ours, theirs)
    )
    return SiteHealth(
        d_sae=int(sae.W_dec.shape[0]),
        processing=processing_of(sae),
        reference=reference,
        quantized=quantized,
        **{f"{name}_change": change(name) for name in ("explained_variance", "cross_entropy_recovered", "l0")},
    )


def _numbers(fit: SiteFit, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    sums = fit.reconstruction.resample(weights)
    names = ("explained_variance", "l0", "cosine", "bias")
    return {name: getattr(sums, name)() for name in names} | {
        "cross_entropy_recovered": fit.cross_entropy_recovered(weights)
    }


def _draws(fit: SiteFit, n_resamples: int, seed: int) -> dict[str, torch.Tensor]:
    return _numbers(fit, bootstrap_weights(len(fit.nll), n_resamples, seed))
