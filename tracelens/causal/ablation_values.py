"""What a component is replaced by when it is ablated: nothing, its mean, or what it is on another prompt.

The beginning-of-sequence token is spared: at it a component is as it was, and means and donors leave it out, as
`stream_aligned` does. In a causal model what stands there is the same for every prompt, so that a mean over prompts or
another prompt's value would change nothing at it, while its norm, which can be far larger than that of the others, would
spoil the mean of the rest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.causal.arms import Values
from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.rerun import Rerunner
from tracelens.errors import PromptError
from tracelens.features.sae_encode import encode
from tracelens.sites import Site

Method = Literal["mean", "zero", "resample"]


def bos_lengths(prompts: PromptSet, tokenizer: Any) -> tuple[int, ...]:
    """How many BOS tokens each prompt begins with; 0 where the tokenizer is None or has none.

    Raises `PromptError` for a prompt that is nothing else.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    found = []
    for index, ids in enumerate(prompts.tokens):
        count = next((i for i, token in enumerate(ids) if bos is None or token != bos), len(ids))
        if count == len(ids):
            raise PromptError(f"prompt {index} is empty (no token besides BOS); drop it")
        found.append(count)
    return tuple(found)


@dataclass(frozen=True)
class Zero:
    """Nothing. Far from anything the model was trained on: later layers see a residual stream that never occurs, so an
    effect may be that of the strangeness, above all where a component's mean is large.
    """

    spared: Sequence[int]
    """Leading tokens of each prompt that are left alone."""

    def values(self, batch: Batch, sites: Sequence[Site], target: Values) -> Values:
        return {site: _spare(torch.zeros_like(target[site]), target[site], batch, self.spared) for site in sites}

    def features(
        self, batch: Batch, site: Site, features: Sequence[int], own: Float[Tensor, "prompt pos feature"]
    ) -> Float[Tensor, "prompt pos feature"]:
        return _spare(torch.zeros_like(own), own, batch, self.spared)


@dataclass(frozen=True)
class Mean:
    """The mean over a set of prompts: of all their tokens, or position by position (counted from a prompt's start).

    What remains of the component is what it always writes; what is lost is what it says of this prompt.
    """

    spared: Sequence[int]
    means: Mapping[Site, Float[Tensor, "pos *unit width"]]
    """By site, with one position if the mean is over all tokens."""
    feature_means: Mapping[Site, Float[Tensor, "pos feature"]]
    """By site, of all features of its SAE."""
    per_position: bool = False

    def values(self, batch: Batch, sites: Sequence[Site], target: Values) -> Values:
        return {
            site: _spare(self._at(self.means[site], target[site]), target[site], batch, self.spared) for site in sites
        }

    def features(
        self, batch: Batch, site: Site, features: Sequence[int], own: Float[Tensor, "prompt pos feature"]
    ) -> Float[Tensor, "prompt pos feature"]:
        mean = self.feature_means[site][:, list(features)]
        return _spare(self._at(mean, own), own, batch, self.spared)

    def _at(self, mean: Tensor, own: Tensor) -> Tensor:
        rows = mean[: own.shape[1]] if self.per_position else mean
        return rows.to(own).expand_as(own).clone()


def mean_over(
    runner: Rerunner,
    prompts: PromptSet,
    spared: Sequence[int],
    sites: Iterable[Site],
    *,
    reference: PromptSet,
    reference_spared: Sequence[int],
    saes: Mapping[Site, Any] | None = None,
    feature_sites: Iterable[Site] = (),
    per_position: bool = False,
    batch_size: int = 32,
) -> Mean:
    """Means over `reference`, one pass of the model; for ablating `prompts`.

    Raises `PromptError` if, position by position, a prompt is longer than all of `reference`.
    """
    sites, feature_sites = list(dict.fromkeys(sites)), list(dict.fromkeys(feature_sites))
    longest = max(map(len, reference.tokens)) if per_position else 1
    counts = torch.zeros(longest, dtype=torch.float64)
    sums: dict[Site, Tensor] = {}
    feature_sums: dict[Site, Tensor] = {}
    stop = min(max((site.layer for site in [*sites, *feature_sites]), default=0) + 1, runner.n_layers)
    for batch in reference.batches(batch_size):
        kept = runner.run(batch.tokens, keep=[*sites, *feature_sites], stop=stop)[1]
        starts = torch.tensor([reference_spared[i] for i in batch.prompt.tolist()])
        counted = torch.arange(batch.tokens.shape[1]) >= starts[:, None]
        counts += _over(counted.double(), per_position, longest)
        for site in sites:
            _add(sums, site, kept[site], counted, per_position, longest)
        for site in feature_sites:
            assert saes is not None
            acts = encode(saes[site], kept[site].flatten(0, 1)).unflatten(0, kept[site].shape[:2])
            _add(feature_sums, site, acts, counted, per_position, longest)
    if per_position:
        for index, (ids, start) in enumerate(zip(prompts.tokens, spared, strict=True)):
            missing = [p for p in range(start, len(ids)) if p >= longest or counts[p] == 0]
            if missing:
                raise PromptError(
                    f"prompt {index} has a token at position {missing[0]}, where no prompt of the mean's set has one (the longest "
                    f"has {longest} tokens); give longer reference_prompts, or per_position=False"
                )

    def mean(total: Tensor) -> Tensor:
        return total / counts.clamp(min=1).to(total).view(-1, *[1] * (total.dim() - 1))

    return Mean(
        spared,
        {site: mean(total) for site, total in sums.items()},
        {site: mean(total) for site, total in feature_sums.items()},
        per_position,
    )


def _add(
    sums: dict[Site, Tensor], site: Site, values: Tensor, counted: Tensor, by_position: bool, longest: int
) -> None:
    mask = counted.to(values.device).view(*counted.shape, *[1] * (values.dim() - 2))
    total = _over(values.double() * mask, by_position, longest)
    sums[site] = sums[site] + total if site in sums else total


def _over(
    values: Float[Tensor, "prompt pos *rest"], by_position: bool, longest: int
) -> Float[Tensor, "position *rest"]:
    if not by_position:
        return values.sum((0, 1))[None]
    total = values.new_zeros(longest, *values.shape[2:])
    total[: values.shape[1]] = values.sum(0)
    return total


@dataclass
class Resample:
    """What the component is on another prompt, its donor: each prompt's, as `donors` says, token for token from the end.

    A donor that is shorter is gone through again from its end. A single donor says as much about itself as about the
    component: average over several draws.
    """

    spared: Sequence[int]
    runner: Rerunner
    reference: PromptSet
    reference_spared: Sequence[int]
    donors: Sequence[int]
    """Of each prompt, its index in `reference`."""

    def values(self, batch: Batch, sites: Sequence[Site], target: Values) -> Values:
        new = {site: torch.empty_like(target[site]) for site in sites}
        stop = min(max((site.layer for site in sites), default=0) + 1, self.runner.n_layers)
        chosen = [self.donors[i] for i in batch.prompt.tolist()]
        lengths = [len(self.reference.tokens[donor]) for donor in chosen]
        from_end = torch.arange(batch.tokens.shape[1] - 1, -1, -1)
        for length in dict.fromkeys(lengths):
            rows = torch.tensor([row for row, other in enumerate(lengths) if other == length])
            donors = [chosen[row] for row in rows.tolist()]
            tokens = torch.tensor([self.reference.tokens[donor] for donor in donors])
            kept = self.runner.run(tokens, keep=sites, stop=stop)[1]
            content = length - torch.tensor([self.reference_spared[donor] for donor in donors])[:, None]
            taken = length - 1 - from_end % content
            for site in sites:
                at = torch.arange(len(rows))[:, None].to(kept[site].device), taken.to(kept[site].device)
                new[site][rows.to(new[site].device)] = kept[site][at].to(new[site])
        return {site: _spare(new[site], target[site], batch, self.spared) for site in sites}


def draw_donors(prompts: PromptSet, reference: PromptSet, rng: np.random.Generator) -> list[int]:
    """A donor for each prompt: another one, of the same length where there is such a one, and else of the nearest length.

    Raises `PromptError` if `reference` has no other prompt.
    """
    lengths = np.array([len(ids) for ids in reference.tokens])
    donors = []
    for index, ids in enumerate(prompts.tokens):
        others = np.array([other != ids for other in reference.tokens])
        if not others.any():
            raise PromptError(
                f"prompt {index} has no donor to be resampled from: all {len(reference)} reference prompts are the same as it; "
                "give reference_prompts, or method='mean'"
            )
        distance = np.where(others, np.abs(lengths - len(ids)), np.iinfo(np.int64).max)
        donors.append(int(rng.choice(np.flatnonzero(distance == distance.min()))))
    return donors


def _spare(new: Tensor, own: Tensor, batch: Batch, spared: Sequence[int]) -> Tensor:
    """The new values, but the target's own at the leading tokens that are spared."""
    for row, prompt in enumerate(batch.prompt.tolist()):
        if spared[prompt]:
            new[row, : spared[prompt]] = own[row, : spared[prompt]]
    return new
