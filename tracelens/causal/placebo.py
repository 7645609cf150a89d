"""Placebos: random activations where a patch puts meaningful ones, so that moving something at all is told from moving it right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.causal.arms import Source, Values
from tracelens.causal.places import PATTERNS, Arm, Place
from tracelens.causal.prompts import Batch
from tracelens.errors import UnknownNameError
from tracelens.features.sae_encode import encode
from tracelens.sites import HOOKS, Site

PlaceboKind = Literal["displacement", "activation"]
MASKED = -1e30
"""Attention scores below it are masked."""


@dataclass(frozen=True)
class Placebo:
    """A source of random values as large as those of another.

    With t what the target holds and s what `source` would put in its place, for each prompt and position (and each head,
    where the site has heads):

    - "displacement": t + ‖s − t‖ u, with u a random unit vector: as far from the target's own value as the patch goes, in
      no particular direction. Across precisions s is close to t, and this is the fair comparison.
    - "activation": ‖s‖ u: as large as what is put in.

    Where a row is not a free vector:

    - attention patterns and scores: u lies in the keys that the query sees and, for patterns, sums to 0, so that rows still
      sum to 1 (a weight may fall below 0). "activation" shuffles s over these keys.
    - neurons: one number has no direction. Each neuron's displacement, its sign drawn, goes to another neuron (all are
      shifted by one random count), which the placebo's arm then replaces (`arms`).
    - features: the step of a feature goes along a random direction instead of its decoder row, equally far (`saes`); for
      both kinds.
    - single cells of a pattern: what falls on a cell of such a row, which is less than the patch moves it.

    Noise depends on `seed`, prompt and site only, not on batches or devices.

    Attributes:
        by_feature: sites at which arms replace features.
    """

    source: Source
    kind: str = "displacement"
    seed: int = 0
    by_feature: frozenset[Site] = frozenset()

    def __post_init__(self) -> None:
        if self.kind not in get_args(PlaceboKind):
            raise UnknownNameError.of("placebo", self.kind, get_args(PlaceboKind))

    def values(self, batch: Batch, sites: Sequence[Site], target: Values) -> Values:
        """Random values at `sites`: see the class."""
        new = self.source.values(batch, sites, target)
        return {
            site: new[site] if site in self.by_feature else self._at(site, batch, new[site].to(own), own)
            for site, own in target.items()
        }

    def arms(self, arms: Sequence[Arm], model: Any) -> list[Arm]:
        """The arms, with each neuron exchanged for the one that has its displacement."""

        def moved(place: Place) -> Place:
            if place.kind != "neuron":
                return place
            width = model.cfg.d_mlp
            return Place(place.site, place.where, (place.unit + self._shift(place.site, width)) % width)  # pyright: ignore[reportOptionalOperand]

        return [tuple(moved(place) for place in arm) for arm in arms]

    def saes(self, saes: Mapping[Site, Any] | None) -> dict[Site, Any] | None:
        """The SAEs, writing each feature along a random direction."""
        return None if saes is None else {site: _Astray(sae, self._generator(site)) for site, sae in saes.items()}

    def _at(self, site: Site, batch: Batch, new: Tensor, own: Tensor) -> Tensor:
        noise = torch.stack([self._noise(site, prompt, own.shape[1:]) for prompt in batch.prompt.tolist()])
        noise, wide, base = noise.to(own.device), new.float(), own.float()
        if site.name in PATTERNS:
            made = self._pattern(site, wide, base, noise)
        elif site.name in ("mlp_pre", "mlp_post"):
            sign = noise.sign()
            shift = self._shift(site, own.shape[-1])
            moves = (wide - base if self.kind == "displacement" else wide).roll(shift, -1) * sign
            made = base + moves if self.kind == "displacement" else moves
        else:
            unit = noise / noise.norm(dim=-1, keepdim=True)
            made = (
                base + (wide - base).norm(dim=-1, keepdim=True) * unit
                if self.kind == "displacement"
                else wide.norm(dim=-1, keepdim=True) * unit
            )
        return made.to(own)

    def _pattern(self, site: Site, new: Tensor, own: Tensor, noise: Tensor) -> Tensor:
        scores = site.name == "attn_scores"
        seen = (new > MASKED) & (own > MASKED) if scores else (new > 0) | (own > 0)
        if self.kind == "activation":
            return _shuffled(new, seen, noise)
        count = seen.sum(-1, keepdim=True)
        noise = noise.where(seen, 0)
        if not scores:
            noise = (noise - noise.sum(-1, keepdim=True) / count.clamp(min=1)).where(seen, 0)
        unit = noise / noise.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        # A query that sees one key alone cannot be moved.
        unit = unit.where((count > 1) | torch.tensor(scores, device=unit.device), 0)
        far = (new - own).where(seen, 0).norm(dim=-1, keepdim=True)
        return torch.where(seen, own + far * unit, own)

    def _noise(self, site: Site, prompt: int, shape: Sequence[int]) -> Float[Tensor, "..."]:
        return torch.randn(*shape, generator=self._generator(site, prompt))

    def _shift(self, site: Site, width: int) -> int:
        return int(torch.randint(1, max(2, width), (), generator=self._generator(site)))

    def _generator(self, site: Site, *more: int) -> torch.Generator:
        """On the CPU, so that it draws the same everywhere."""
        words = [self.seed % 2**32, site.layer, list(HOOKS).index(site.name), *more]
        return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


class _Astray:
    """An SAE that reads as another, and writes along random directions of its decoder rows' norms."""

    def __init__(self, sae: Any, generator: torch.Generator) -> None:
        self._sae = sae
        noise = torch.randn(sae.W_dec.shape, generator=generator).to(sae.W_dec)
        self.W_dec = noise / noise.norm(dim=-1, keepdim=True) * sae.W_dec.detach().norm(dim=-1, keepdim=True)

    def encode(self, x: Tensor) -> Tensor:
        return encode(self._sae, x)


def _shuffled(values: Tensor, seen: Tensor, noise: Tensor) -> Tensor:
    """Values of the cells that are seen, in another order along the last axis; the rest as it is."""
    order = noise.masked_fill(~seen, torch.inf).argsort(-1)
    place = seen.float().argsort(dim=-1, descending=True, stable=True)
    return values.clone().scatter_(-1, place, values.gather(-1, order)).where(seen, values)
