"""Restoring activations: what can be put back, what it costs, how it is ranked, and what it brings."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tracelens.causal.ablation import importance
from tracelens.causal.arms import OtherRun, evaluating
from tracelens.causal.components import Features, components_of, name_of
from tracelens.causal.memory import site_bytes
from tracelens.causal.places import PATTERNS, Place, Where, n_units
from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.repair.halves import Part
from tracelens.causal.repair.runs import Gradient, Name, Runs, activation_gradients, check_gradient
from tracelens.causal.rerun import Rerunner
from tracelens.errors import UnknownNameError
from tracelens.features.sae_encode import encode
from tracelens.sites import HOOKS, Site

ORDERS = ("importance", "drift", "importance×drift", "attribution", "attribution size", "magnitude", "alone", "random")
"""What activations can be ranked by."""


def repair_places(
    model: Any, components: Sequence[str | Place], at: Sequence[Where], features: Features | None, saes: Any
) -> tuple[Place, ...]:
    """Places of kinds of components, of whole sites by name ("resid_post"), or as given, at each group of `at`."""
    sites = [name for name in components if isinstance(name, str) and name in HOOKS]
    rest = [name for name in components if name not in sites]
    found: list[Place] = [place for place in rest if isinstance(place, Place)]
    kinds = [name for name in rest if not isinstance(name, Place)]
    for where in at:
        if kinds:
            found += components_of(model, kinds, features=features, saes=saes, where=where)
        found += [Place(Site(layer, name), where) for name in sites for layer in range(model.cfg.n_layers)]
    if any(place.site.name in PATTERNS for place in found):
        raise UnknownNameError(
            f"attention patterns have no bytes by token and are not restored here; use one of "
            f"{', '.join(name for name in HOOKS if name not in PATTERNS)}"
        )
    return tuple(dict.fromkeys(found))


@dataclass
class ActivationRepair:
    """Reference activations in the quantized run.

    Attributes:
        places: the components.
        runs: the pair, and how it is run.
        choose: the prompts that components are ranked on.
        gradient: where attribution takes it.
    """

    places: tuple[Place, ...]
    runs: Runs
    choose: Part
    gradient: Gradient = "reference"
    seed: int = 0

    bytes_note = "reference activations in 16 bits, for each token of a prompt"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name_of(p) + ("" if p.where is None else f" at {p.where}") for p in self.places)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(place.site.layer for place in self.places)

    def bytes(self, prompts: PromptSet) -> Float64[Tensor, "component"]:
        """Bytes of reference activations by token of a prompt: 2 for each number, times the share of tokens restored."""
        cfg = self.runs.pair.reference.cfg
        total = sum(map(len, prompts.tokens))
        shares = {
            where: sum(len(prompts.positions(i, where)) for i in range(len(prompts))) / total
            for where in {place.where for place in self.places}
        }
        return torch.tensor([2.0 * _width(cfg, p) * shares[p.where] for p in self.places], dtype=torch.float64)

    def scores(self, by: str) -> Float64[Tensor, "component"]:
        """How much speaks for each component: the largest is restored first."""
        if by == "drift":
            return self._moved["relative"]
        if by == "magnitude":
            return self._moved["absolute"]
        if by == "importance":
            return self._importance
        if by == "importance×drift":
            return self._importance * self._moved["relative"]
        if by == "attribution":
            return self._attribution
        if by == "attribution size":
            return self._attribution.abs()
        if by == "alone":
            gains = self.measure([(i,) for i in range(len(self.places))], self.choose) - self._start
            return _slope(gains, self._goal - self._start)
        raise UnknownNameError.of("order of activations", by, ORDERS)

    def measure(self, states: Sequence[Sequence[int]], part: Part) -> Float64[Tensor, "state prompt"]:
        """The metric with each set of components restored."""
        arms = [tuple(self.places[i] for i in state) for state in states]
        runner = self.runs.runner("quantized", part.prompts, part.metric)
        return runner.run(arms, OtherRun(Rerunner(self.runs.pair.reference)), "restoring activations")[1]

    @cached_property
    def _start(self) -> Float64[Tensor, "prompt"]:
        return self.runs.plain("quantized", self.choose.prompts, self.choose.metric)

    @cached_property
    def _goal(self) -> Float64[Tensor, "prompt"]:
        return self.runs.plain("reference", self.choose.prompts, self.choose.metric)

    @cached_property
    def _importance(self) -> Float64[Tensor, "component"]:
        found = importance(
            self.runs.pair.reference,
            self.choose.prompts,
            components=self.places,
            metric=self.choose.metric,
            saes=self.runs.saes,
            tokenizer=self.runs.pair.tokenizer,
            batch_size=self.runs.batch_size,
            memory_budget=self.runs.memory_budget,
            progress=self.runs.progress,
            seed=self.seed,
        )
        return found.change.abs().mean(1).double()

    @cached_property
    def _moved(self) -> dict[str, Float64[Tensor, "component"]]:
        """‖a_ref − a_quant‖ of each component over its positions, BOS left out as in `component_drift`, and the same over
        ‖a_ref‖; means over prompts that have them.
        """
        nowhere = ((),) * len(self.choose.prompts)
        bos = self.choose.prompts.frame.get("bos", nowhere)
        sums = {name: torch.zeros(len(self.places), len(self.choose.prompts)) for name in ("absolute", "relative")}
        seen = torch.zeros(len(self.places), len(self.choose.prompts), dtype=torch.bool)
        for batch in self.choose.prompts.batches(self.runs.batch_size):
            ours, theirs = (self._values(name, batch) for name in ("reference", "quantized"))
            for i, place, row, prompt, where in self._cells(batch):
                where = [position for position in where if position not in bos[prompt]]
                if not where:
                    continue
                a, b = (self._read(values, place, row, where) for values in (ours, theirs))
                off, size = (a - b).norm(), a.norm()
                sums["absolute"][i, prompt] = off
                sums["relative"][i, prompt] = off / size if size > 0 else float(off > 0)
                seen[i, prompt] = True
        n = seen.sum(1).clamp(min=1)
        return {name: total.double().sum(1) / n for name, total in sums.items()}

    @cached_property
    def _attribution(self) -> Float64[Tensor, "component"]:
        """First-order recovery: Σ d (∇m · (a_ref − a_quant)) / Σ d²."""
        check_gradient(self.runs.pair, self.choose.metric, self.gradient)
        first = torch.zeros(len(self.places), len(self.choose.prompts), dtype=torch.float64)
        ends: tuple[Name, ...] = ("reference", "quantized")
        taken = ends if self.gradient == "both" else (self.gradient,)
        sites = self._sites
        self.runs.runner("reference", self.choose.prompts, self.choose.metric)
        for batch in self.choose.prompts.batches(self.runs.batch_size):
            values = {name: self._values(name, batch) for name in ends}
            slopes = [activation_gradients(self.runs, name, batch, self.choose.metric, sites)[1] for name in taken]
            slope = {site: torch.stack([s[site] for s in slopes]).mean(0) for site in sites}
            for i, place, row, prompt, where in self._cells(batch):
                a, b = (self._read(values[name], place, row, where) for name in ends)
                g = self._read(slope, place, row, where, gradient=True)
                first[i, prompt] = (g.double() * (a - b).double()).sum()
        return _slope(first, self._goal - self._start)

    @property
    def _sites(self) -> list[Site]:
        return list(dict.fromkeys(place.site for place in self.places))

    def _values(self, name: Name, batch: Batch) -> dict[Site, Tensor]:
        model = getattr(self.runs.pair, name)
        stop = min(max(site.layer for site in self._sites) + 1, int(model.cfg.n_layers))
        with torch.no_grad(), evaluating(model):
            return Rerunner(model).run(batch.tokens, keep=self._sites, stop=stop)[1]

    def _cells(self, batch: Batch):
        """Of every component in every prompt of a batch: (its index, it, row, prompt, positions), where it has any."""
        for row, prompt in enumerate(batch.prompt.tolist()):
            for i, place in enumerate(self.places):
                if where := self.choose.prompts.positions(prompt, place.where):
                    yield i, place, row, prompt, list(where)

    def _read(
        self, values: dict[Site, Tensor], place: Place, row: int, where: list[int], *, gradient: bool = False
    ) -> Float[Tensor, "..."]:
        """What a component holds; of a feature its activations, or what the metric gains along its decoder row."""
        value = values[place.site][row]
        if place.feature is not None:
            assert self.runs.saes is not None
            sae = self.runs.saes[place.site]
            if gradient:
                return value[where].flatten(1) @ sae.W_dec[place.feature].to(value)
            with torch.no_grad():
                return encode(sae, value[where])[:, place.feature]
        return value[where] if place.unit is None else value[where, place.unit]


def _slope(gains: Float64[Tensor, "component prompt"], d: Float64[Tensor, "prompt"]) -> Float64[Tensor, "component"]:
    """Σ n d / Σ d²; 0 where the models agree on every prompt."""
    total = d.square().sum()
    return (gains * d).sum(1) / total if total > 0 else torch.zeros(len(gains), dtype=torch.float64)


def _width(cfg: Any, place: Place) -> float:
    """Numbers by token."""
    if place.feature is not None:
        return 1.0
    whole = site_bytes(cfg, place.site, 1) / cfg.dtype.itemsize
    return whole if place.unit is None else whole / n_units(cfg, place.site)
