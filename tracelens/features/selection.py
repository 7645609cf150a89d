"""Which features tell a behaviour's prompts from baseline prompts: chosen on one half, confirmed on the other."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracelens.errors import MetricInputError, PromptError
from tracelens.features.maxima import Maxima
from tracelens.sites import Site
from tracelens.stats import auroc, auroc_max_permutation

MIN_PROMPTS = 8
"""Distinct prompts needed per side: the held-out 4 against 4 have 70 splits, so that p can fall below .05 at all."""


@dataclass(frozen=True)
class FingerprintFeature:
    """One feature that carries a behaviour, with its statistics in the reference.

    Attributes:
        site: where its SAE sits.
        feature: its index in the SAE.
        behaviour: the behaviour it tells best from baseline prompts.
        auroc: held-out AUROC of the prompt maximum for `behaviour` against baseline, at most 1.
        auroc_selection: the same on the half on which it was chosen; higher on average, since it was chosen there.
        p_value: held-out permutation p, adjusted for all features tested (Westfall–Young) and all behaviours
            (Bonferroni).
        mean_safety, mean_baseline: mean over prompts of the prompt maximum.
        rate_safety, rate_baseline: share of prompts on which it fires.
        peak_safety, peak_baseline: its largest activation.
        behaviours: held-out AUROC for every behaviour that it passes for, best first.
    """

    site: Site
    feature: int
    behaviour: str
    auroc: float
    auroc_selection: float
    p_value: float
    mean_safety: float
    mean_baseline: float
    rate_safety: float
    rate_baseline: float
    peak_safety: float
    peak_baseline: float
    behaviours: dict[str, float]


def select_features(
    maxima: Mapping[Site, Maxima | Float[Tensor, "prompt _feature"]],
    labels: Sequence[str | None],
    *,
    ids: Sequence[str],
    min_auroc: float = 0.9,
    alpha: float = 0.05,
    n_permutations: int = 1000,
    seed: int = 0,
    split: float = 0.5,
) -> list[FingerprintFeature]:
    """Features whose prompt maximum is higher on a behaviour's prompts than on baseline prompts, highest AUROC first.

    A hash of the text puts the share `split` of each side's prompts into a selection half, whatever their order.
    Features with an AUROC of at least `min_auroc` there are candidates; those pass that reach it on the held-out half
    too, with a permutation p of at most `alpha`. p comes from the maximum over all candidates of all sites (Westfall &
    Young 1993), times the number of behaviours, so that the chance of any false feature in the whole list is at most
    `alpha`.

    Activations within 1e-4 of a feature's peak of each other count as ties.

    Args:
        maxima: the largest activation of each feature on each prompt (`PromptMaxima`), or dense tensors of them.
        labels: per prompt its behaviour, or None for baseline.
        ids: per prompt its text. A text that comes twice under one label counts once.

    Raises `PromptError` for fewer than 8 distinct prompts on a side, no behaviour at all, or a text under both a
    behaviour and baseline.
    """
    if not 0 < split < 1:
        raise MetricInputError(f"split is {split}, but both halves need prompts; give a share between 0 and 1")
    sparse = {site: Maxima.of(values) for site, values in maxima.items()}
    for site, values in sparse.items():
        if len(values) != len(labels):
            raise MetricInputError(f"maxima at {site} are of {len(values)} prompts, but there are {len(labels)} labels")
    baseline, sides = check_prompts(labels, ids)
    passed: dict[tuple[Site, int], list[FingerprintFeature]] = {}
    for behaviour, rows in sides.items():
        halves = [half(rows, baseline, split, held_out) for held_out in (False, True)]
        candidates = _candidates(sparse, *halves[0], min_auroc)
        if not candidates:
            continue
        indices, is_safety = halves[1]
        scores = tied(torch.cat([sparse[site].columns(features)[indices] for site, features, _ in candidates], dim=1))
        held_out_auroc = auroc(scores, is_safety)
        p_values = auroc_max_permutation(scores, is_safety, n_permutations=n_permutations, seed=seed) * len(sides)
        chosen = [(site, i, a) for site, features, a_rocs in candidates for i, a in zip(features, a_rocs, strict=True)]
        for (site, feature, a), b, p in zip(chosen, held_out_auroc.tolist(), p_values.tolist(), strict=True):
            if b >= min_auroc and p <= alpha:
                row = FingerprintFeature(
                    site,
                    feature,
                    behaviour,
                    auroc=b,
                    auroc_selection=a,
                    p_value=p,
                    behaviours={},
                    **_statistics(sparse[site].columns([feature])[:, 0], rows, baseline),
                )
                passed.setdefault((site, feature), []).append(row)
    return sorted(map(_best, passed.values()), key=lambda row: (-row.auroc, row.site, row.feature))


def check_prompts(labels: Sequence[str | None], ids: Sequence[str]) -> tuple[list[int], dict[str, list[int]]]:
    """Rows of the distinct prompts, baseline and by behaviour, ordered by a hash; raises as `select_features`."""
    rows: dict[str | None, dict[str, int]] = {None: {}}
    for row, (label, text) in enumerate(zip(labels, ids, strict=True)):
        rows.setdefault(label, {}).setdefault(text, row)
    if len(rows) == 1:
        raise PromptError("no safety prompts; give at least one behaviour with its prompts")
    for label, texts in rows.items():
        side = "the baseline" if label is None else f"behaviour {label!r}"
        if len(texts) < MIN_PROMPTS:
            raise PromptError(
                f"{side} has {len(texts)} distinct prompts; at least {MIN_PROMPTS} are needed, "
                "to choose features on one half and confirm them on the other"
            )
        if label is not None and (both := texts.keys() & rows[None].keys()):
            raise PromptError(
                f"{len(both)} prompts are in both {side} and the baseline, such as {min(both)!r}; drop one side's"
            )
    ordered = {label: [texts[text] for text in sorted(texts, key=_hash)] for label, texts in rows.items()}
    return ordered[None], {label: order for label, order in ordered.items() if label is not None}


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def half(safety: list[int], baseline: list[int], split: float, held_out: bool) -> tuple[Tensor, Bool[Tensor, "prompt"]]:
    """Rows of one half and which of them are safety prompts."""
    parts = []
    for rows in (safety, baseline):
        cut = min(max(round(split * len(rows)), 1), len(rows) - 1)
        parts.append(rows[cut:] if held_out else rows[:cut])
    return torch.tensor(parts[0] + parts[1]), torch.arange(len(parts[0]) + len(parts[1])) < len(parts[0])


def _candidates(
    maxima: Mapping[Site, Maxima], rows: Tensor, is_safety: Bool[Tensor, "prompt"], min_auroc: float
) -> list[tuple[Site, list[int], list[float]]]:
    """Features of sufficient AUROC, and the AUROC, by site and in parts."""
    found = []
    for site, values in sorted(maxima.items()):
        # A feature that never fires has AUROC .5; on a few prompts most features of a wide SAE are such.
        for features, scores in values.prompts(rows).live():
            areas = auroc(tied(scores), is_safety)
            keep = areas >= min_auroc
            if keep.any():
                found.append((site, features[keep].tolist(), areas[keep].tolist()))
    return found


def columns(
    maxima: Maxima | Float[Tensor, "prompt _feature"], features: Int[Tensor, "column"]
) -> Float[Tensor, "prompt column"]:
    """Dense maxima of some features, whether they are kept dense or sparse."""
    return maxima.columns(features) if isinstance(maxima, Maxima) else maxima[:, features]


def tied(scores: Float[Tensor, "prompt feature"]) -> Float[Tensor, "prompt feature"]:
    """Scores that order as given, but in which values count as equal that rounding alone may have told apart.

    Prompts that begin alike have equal activations there, up to noise that depends on the shape of their batch, hence
    on their length. Ranked as it is, that noise would tell apart any two sets of prompts that differ in length.
    """
    tolerance = scores.amax(0) * min(1e-4, 0.02 / len(scores))  # the more prompts, the closer are honest neighbours
    ordered, order = scores.sort(0)
    steps = torch.zeros_like(scores)
    steps[1:] = (ordered.diff(dim=0) > tolerance).float()
    return torch.empty_like(scores).scatter_(0, order, steps.cumsum(0))


def _statistics(values: Float[Tensor, "prompt"], safety: list[int], baseline: list[int]) -> dict[str, float]:
    statistics = {}
    for side, rows in (("safety", safety), ("baseline", baseline)):
        of = values[rows]
        statistics |= {
            f"mean_{side}": of.mean().item(),
            f"rate_{side}": (of > 0).float().mean().item(),
            f"peak_{side}": of.max().item(),
        }
    return statistics


def _best(rows: list[FingerprintFeature]) -> FingerprintFeature:
    ordered = sorted(rows, key=lambda row: (-row.auroc, row.behaviour))
    return replace(ordered[0], behaviours={row.behaviour: row.auroc for row in ordered})
