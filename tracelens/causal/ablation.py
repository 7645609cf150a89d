"""Importance: how much a metric moves when a component is taken away."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.ablation_result import Importance
from tracelens.causal.ablation_values import (
    Method,
    Resample,
    Zero,
    bos_lengths,
    draw_donors,
    mean_over,
)
from tracelens.causal.arms import ArmRunner, Source, evaluating
from tracelens.causal.components import Features, arm_of, components_of
from tracelens.causal.placebo import Placebo
from tracelens.causal.places import Arm, Place, Where
from tracelens.causal.prompts import PromptSet, Spans
from tracelens.causal.readout import as_metric, default_metric
from tracelens.causal.rerun import Rerunner
from tracelens.chat import Chat
from tracelens.errors import UnknownNameError
from tracelens.features.sae_encode import encode
from tracelens.features.saes import check_saes, normalise_saes
from tracelens.pair import stream_aligned
from tracelens.sites import Site


@torch.no_grad()
def importance(
    model: Any,
    prompts: Any,
    *,
    components: Sequence[str | Place] = ("head", "mlp"),
    metric: Any = None,
    method: str = "mean",
    reference_prompts: Any = None,
    per_position: bool = False,
    saes: Any = None,
    features: Features | None = None,
    layers: Iterable[int] | None = None,
    where: Where = None,
    n_draws: int = 3,
    placebo: bool = False,
    spans: Spans | None = None,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> Importance:
    """The change of a metric when each component alone is ablated, prompt by prompt. Importance is its mean size |Δ metric|.

    BOS is left alone, and left out of means and donors. What an ablation does not show: components that stand in for one
    another (backup behaviour, the Hydra effect of McGrath et al., 2307.15771) each look unimportant, since later layers
    make up for the one that is missing; and a component that matters to other prompts matters nothing to these.

    Args:
        components: kinds ("head", "mlp", "attn", "layer": its attention and MLP together, "feature") or places.
        metric: what `as_metric` takes; None is `default_metric`.
        method: "mean" over `reference_prompts`; "zero", which takes a model where it has never been; "resample": the value
            on another prompt, averaged over `n_draws` donors, whose noise makes |Δ| larger than it is.
        reference_prompts: the set of the mean, or of donors; None is `prompts` themselves.
        per_position: the mean at each position, counted from the start, for prompts that are alike position by position;
            otherwise over all tokens.
        saes, features: for components that are features: the SAE's error and the other features are kept as they are.
        layers: of whole kinds; all by default.
        where: ablate at these positions only.
        placebo: run each component once more, displaced as far as its ablation displaces it, but in a random direction
            (`tracelens.causal.placebo`).

    Raises `UnknownNameError` for components, positions or a method that do not exist, `SAEError` for SAEs that do not fit,
    `PromptError` as `PromptSet.of`, and for sets that a mean or a donor cannot be taken from; `MemoryBudgetError`.
    """
    if method not in get_args(Method):
        raise UnknownNameError.of("method of ablation", method, get_args(Method))
    if n_draws < 1:
        raise UnknownNameError(f"n_draws is {n_draws}; it must be at least 1")
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if saes is not None:
        saes = normalise_saes(saes)
        check_saes(saes, model)
    places = components_of(model, components, features=features, saes=saes, layers=layers, where=where)
    prompt_set = PromptSet.of(prompts, model, tokenizer=tokenizer, spans=spans, chat=chat)
    reference = (
        prompt_set
        if reference_prompts is None
        else PromptSet.of(reference_prompts, model, tokenizer=tokenizer, chat=chat)
    )
    job = ArmRunner(
        target=model,
        prompts=prompt_set,
        metric=default_metric(prompt_set, tokenizer) if metric is None else as_metric(metric),
        saes=saes,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
    arms = [arm_of(place) for place in places]
    spared = bos_lengths(prompt_set, tokenizer)
    with evaluating(model):
        sources = _sources(
            job, arms, method, spared, reference, bos_lengths(reference, tokenizer), per_position, n_draws, seed
        )
        plain, change = _changes(job, arms, sources, f"{method} ablation")
        placebos = _placebos(job, arms, sources, seed) if placebo else None
    return Importance(
        components=places,
        method=method,
        metric=job.metric.name,
        unit=job.metric.unit,
        plain=plain,
        change=change,
        placebo=placebos,
        prompts=prompt_set.texts,
        settings={
            "n_reference_prompts": len(reference),
            "per_position": per_position,
            "n_draws": len(sources),
            "where": where,
            "seed": seed,
        },
    )


def active_features(
    model: Any,
    saes: Any,
    prompts: Any,
    *,
    min_active: int = 1,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[Site, list[int]]:
    """Features of each SAE that fire on at least `min_active` tokens of the prompts, BOS aside."""
    saes = normalise_saes(saes)
    check_saes(saes, model)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    tokens = PromptSet.of(prompts, model, tokenizer=tokenizer, chat=chat).tokens
    counts: dict[Site, Tensor] = {}
    stream = stream_aligned(
        {"model": model},
        tokens,
        sites=saes,
        tokenizer=tokenizer,
        batch_size=batch_size,
        logits=False,
        progress=progress,
    )
    for batch in stream:
        for site, sae in saes.items():
            fires = (encode(sae, batch.activations["model"][site]) > 0).sum(0).cpu()
            counts[site] = counts.get(site, torch.zeros_like(fires)) + fires
    return {site: (count >= min_active).nonzero().squeeze(1).tolist() for site, count in counts.items()}


def _sources(
    job: ArmRunner,
    arms: Sequence[Arm],
    method: str,
    spared: Sequence[int],
    reference: PromptSet,
    reference_spared: Sequence[int],
    per_position: bool,
    n_draws: int,
    seed: int,
) -> list[Source]:
    """One source for each run of all arms."""
    if method == "zero":
        return [Zero(spared)]
    runner = Rerunner(job.target)
    if method == "resample":
        rng = np.random.default_rng(seed)
        return [
            Resample(spared, runner, reference, reference_spared, draw_donors(job.prompts, reference, rng))
            for _ in range(n_draws)
        ]
    places = [place for arm in arms for place in arm]
    return [
        mean_over(
            runner,
            job.prompts,
            spared,
            [place.site for place in places],
            reference=reference,
            reference_spared=reference_spared,
            saes=job.saes,
            feature_sites=[place.site for place in places if place.kind == "feature"],
            per_position=per_position,
            batch_size=job.batch_size,
        )
    ]


def _placebos(
    job: ArmRunner, arms: Sequence[Arm], sources: Sequence[Source], seed: int
) -> Float64[Tensor, "component prompt"]:
    """Changes under random displacements; features step as far as when ablated, but along random directions."""
    random = [Placebo(source, "displacement", seed + i) for i, source in enumerate(sources)]
    featured = torch.tensor([any(place.feature is not None for place in arm) for arm in arms])
    found = torch.full((len(arms), len(job.prompts)), torch.nan, dtype=torch.float64)
    for with_features in featured.unique().tolist():
        chosen = (featured == with_features).nonzero().squeeze(1)
        runs = []
        for source, one in zip(sources, random, strict=True):
            runner = replace(job, saes=one.saes(job.saes))
            moved = one.arms([arms[i] for i in chosen.tolist()], job.target)
            runs.append(_changes(runner, moved, [source if with_features else one], "placebo")[1])
        found[chosen] = torch.stack(runs).mean(0)
    return found


def _changes(
    job: ArmRunner, arms: Sequence[Arm], sources: Sequence[Source], what: str
) -> tuple[Float64[Tensor, "prompt"], Float64[Tensor, "component prompt"]]:
    """The metric as it is, and what each arm adds to it, averaged over the sources."""
    runs = [job.run(arms, source, what) for source in sources]
    plain = runs[0][0]
    return plain, torch.stack([patched - own for own, patched in runs]).mean(0)
