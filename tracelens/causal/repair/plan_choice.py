"""The choice of what to keep: predictions, scores, and sets that fit a budget or reach a target."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.attribution import At, attribute_weights
from tracelens.causal.effects import MIN_DIFFERENCE
from tracelens.causal.matrices import Matrix, restored
from tracelens.causal.matrices import Part as Restored
from tracelens.causal.repair.choosing import at_random, most_gain
from tracelens.causal.repair.halves import Part
from tracelens.causal.repair.plan_measure import is_margin
from tracelens.causal.repair.plan_target import Target, cheapest
from tracelens.causal.repair.plan_units import Unit
from tracelens.causal.repair.runs import Runs
from tracelens.errors import PlanError

BY = ("attribution", "alone", "magnitude", "relative magnitude", "random")
PREDICTED = ("attribution", "alone")
"""Choices that rest on a prediction of what restoring a unit brings."""


@dataclass
class Choice:
    """Units, what they cost, and what speaks for each, on the prompts to choose on."""

    pair: Any
    runs: Runs
    units: list[Unit]
    by_name: dict[str, Matrix]
    choose: Part
    held: Part
    by: str
    gradient: At
    seed: int

    def __post_init__(self) -> None:
        self.start, self.goal = (
            self.runs.plain(name, self.choose.prompts, self.choose.metric) for name in ("quantized", "reference")
        )
        self.costs = [unit.bytes for unit in self.units]
        self._changes = self._predict()
        if "choose" in self._changes:
            d = self.goal - self.start
            gains = (self._changes["choose"] @ d / d.square().sum()).nan_to_num()
            self.units = [replace(unit, gain=float(gain)) for unit, gain in zip(self.units, gains, strict=True)]

    def within(self, budget: int | None) -> list[int]:
        assert budget is not None
        if self.by == "random":
            return at_random(self.costs, budget, self.seed + 10_000)
        return most_gain(self.scores, self.costs, budget)

    def reaching(self, target: Target) -> list[int]:
        if target.kind == "flips" and not is_margin(self.held.metric):
            raise PlanError(
                f"a target of flips needs a margin, whose sign is a decision; the metric is {self.held.metric.name}"
            )
        if target.kind == "recovery" and not ((self.goal - self.start).abs() >= MIN_DIFFERENCE).any():
            return []
        guess = None if "choose" not in self._changes else lambda chosen: self._sum(chosen, "choose")
        return cheapest(target, self.scores, self.costs, self.measured, self.start, self.goal, guess)

    @property
    def scores(self) -> list[float]:
        """How much speaks for each unit."""
        if self.by == "random":
            order = torch.rand(len(self.units), generator=torch.Generator().manual_seed(self.seed)).tolist()
            return [rank * cost for rank, cost in zip(order, self.costs, strict=True)]
        return {
            "magnitude": [unit.error**2 for unit in self.units],
            "relative magnitude": [unit.relative_error**2 for unit in self.units],
        }.get(self.by, [unit.gain for unit in self.units])

    def held_matrices(self, chosen: Sequence[int]) -> list[Matrix]:
        return [self.by_name[name] for i in chosen for name in self.units[i].matrices]

    def measured(self, chosen: Sequence[int]) -> Float64[Tensor, "prompt"]:
        """The metric on the prompts to choose on, with these units restored."""
        with restored(Restored(matrix) for matrix in self.held_matrices(chosen)):
            return self.runs.plain("quantized", self.choose.prompts, self.choose.metric)

    def predicted(self, chosen: Sequence[int], part: str) -> Float64[Tensor, "prompt"] | None:
        """The metric on a part of the prompts as it is predicted; None where nothing was predicted of it."""
        return self._sum(chosen, part) if part in self._changes else None

    def _sum(self, chosen: Sequence[int], part: str) -> Float64[Tensor, "prompt"]:
        changes = self._changes[part]
        start = self.start if part == "choose" else self.runs.plain("quantized", self.held.prompts, self.held.metric)
        return start + changes[list(chosen)].sum(0)

    def _predict(self) -> dict[str, Float64[Tensor, "unit prompt"]]:
        """Part → what restoring each unit is predicted to change of the metric."""
        if not self.units or self.by not in PREDICTED:
            return {}
        if self.by == "attribution":
            return {name: self._attributed(part) for name, part in (("choose", self.choose), ("held", self.held))}
        from tqdm.auto import tqdm

        alone = [
            self.measured([i]) for i in tqdm(range(len(self.units)), desc="restoring", disable=not self.runs.progress)
        ]
        return {"choose": torch.stack(alone) - self.start}

    def _attributed(self, part: Part) -> Float64[Tensor, "unit prompt"]:
        found = attribute_weights(
            self.pair,
            part.prompts,
            metric=part.metric,
            at=self.gradient,
            batch_size=self.runs.batch_size,
            memory_budget=self.runs.memory_budget,
            progress=self.runs.progress,
        )
        row = {name: i for i, name in enumerate(found.names)}
        # Restoring undoes what quantization changed.
        return torch.stack([-found.first_order[[row[name] for name in unit.matrices]].sum(0) for unit in self.units])
