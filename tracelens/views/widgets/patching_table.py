"""What a sweep of patching shows: its table with the chosen measure in place of the effect, over all prompts or for one."""

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.effects import differing
from tracelens.views.escaping import visible
from tracelens.views.numbers import NOTHING
from tracelens.views.patching_map import RANKED
from tracelens.views.patching_panels import directions
from tracelens.views.patching_words import hover, prompt_hover, where_of
from tracelens.views.widgets.patching_choice import Entry

if TYPE_CHECKING:
    import pandas as pd

    from tracelens.causal.patching_result import PatchingResult

Measure = Literal["effect", "closed", "change", "versus placebo"]
Test = Literal["placebo", "0"]
LEVEL = 0.05
"""Adjusted p below which a replacement is marked."""
DEFINITIONS: dict[str, str] = {
    "effect": "Σ n·d / Σ d² over prompts: d is what separates the two runs, n how far the patched one moved; 0 as before, 1 all the way",
    "closed": "share of the squared gap that is gone, 1 − Σ (d − n)² / Σ d²: 1 only if every prompt arrives, below 0 if it widens",
    "change": "mean of n · sign(d), in the metric's units: how far a prompt moves towards the other run",
    "versus placebo": "effect less that of random activations of the same size in the same place, prompts paired",
    "ratio of means": "Σ n / Σ d: the usual normalised effect where all d have one sign",
    "placebo": "the effect of random activations of the same size in the same place",
    "p": "two-sided sign-flip p over prompts against 0, or the placebo; adjusted over all replacements (Benjamini & Hochberg)",
}
_ENDS = ("", "_low", "_high")


class Shown:
    """One result's numbers, ready to be drawn.

    Attributes:
        table: the result's table, with "versus placebo" and its interval where it has a placebo.
    """

    def __init__(self, result: "PatchingResult") -> None:
        self.result = result
        self.table: Any = result.table.copy()
        if result.placebo is not None:
            # n is linear in the patched run, so this is effect − placebo, with the interval of the paired difference.
            beside = less_placebo(result)
            for end in _ENDS:
                self.table[f"versus placebo{end}"] = beside.table[f"effect{end}"]
        self.table["hover"] = [hover(row, result) for row in self.table.to_dict("records")]

    @property
    def measures(self) -> list[Measure]:
        found: list[Measure] = ["effect", "closed", "change"]
        return [*found, "versus placebo"] if self.result.placebo is not None else found

    @property
    def tests(self) -> list[Test]:
        return ["placebo", "0"] if self.result.placebo is not None else ["0"]

    @cached_property
    def usable(self) -> list[bool]:
        """Prompts whose two runs differ."""
        return differing(self.result.start, self.result.goal, self.result.min_difference).tolist()

    def p(self, test: Test) -> Any:
        """Adjusted p of each arm."""
        return self.table["p_versus_placebo_adjusted" if test == "placebo" else "p_adjusted"]

    def of(self, entry: Entry, measure: Measure, test: Test, *, hide: bool = False) -> "pd.DataFrame":
        """The entry's rows over all prompts: the measure as "effect", and "marked" where told apart; others blank if `hide`."""
        table = self.table.copy(deep=False)
        for end in _ENDS:
            table[f"effect{end}"] = self.table[f"{measure}{end}"]
        table["marked"] = self.p(test) < LEVEL
        if measure != "effect":
            table = table.drop(columns=[name for name in table if name.startswith("placebo_effect")])
        if hide:
            for end in _ENDS:
                table[f"effect{end}"] = table[f"effect{end}"].where(table["marked"])
        return table.iloc[list(entry.arms)].reset_index(names="arm")

    def of_prompt(self, entry: Entry, measure: Measure, prompt: int) -> "pd.DataFrame":
        """The same for one prompt alone, which has no interval and no test; only what replaced something in it."""
        table = self.table.copy(deep=False)
        nan = float("nan")
        table["effect"] = self.prompt_values(measure, prompt).numpy()
        table["effect_low"] = table["effect_high"] = nan
        table["marked"] = False
        table["hover"] = prompt_hover(self.result, prompt)
        table = table.drop(columns=[name for name in table if name.startswith("placebo")])
        table["n_usable"] = 1
        table = table.iloc[list(entry.arms)].reset_index(names="arm")
        if self.result.present is None:
            return table
        there = self.result.present[list(entry.arms), prompt].numpy()
        return table[there].reset_index(drop=True) if there.any() else table

    def prompt_values(self, measure: Measure, prompt: int) -> Float64[Tensor, "arm"]:
        """The measure of one prompt. NaN where its two runs are equal, and where it lacks the positions."""
        r = self.result
        d = r.goal[prompt] - r.start[prompt] if self.usable[prompt] else torch.tensor(torch.nan, dtype=torch.float64)
        moved = r.patched[:, prompt] - r.start[prompt]
        if measure == "effect":
            values = moved / d
        elif measure == "closed":
            values = 1 - (d - moved).square() / d.square()
        elif measure == "change":
            values = moved * d.sign()
        else:
            assert r.placebo is not None
            values = (r.patched[:, prompt] - r.placebo[:, prompt]) / d
        return values if r.present is None else values.where(r.present[:, prompt], torch.nan)


def listed(shown: Shown, entry: Entry, measure: Measure, test: Test, prompt: int | None) -> list[tuple[str, int]]:
    """Labels and arms of an entry, of all prompts or one: the largest by the measure first, undetermined ones last."""
    values = shown.table[measure] if prompt is None else shown.prompt_values(measure, prompt)
    marked = shown.p(test) < LEVEL
    found = sorted(
        ((float(values[arm]), arm) for arm in entry.arms), key=lambda pair: (pair[0] != pair[0], -abs(pair[0]))
    )
    options = []
    for value, arm in found:
        star = " ●" if prompt is None and marked[arm] else ""
        number = NOTHING if value != value else f"{value:.3f}"
        options.append((f"{number:>7}  {visible(where_of(shown.result.rows[arm], shown.result))}{star}", arm))
    return options


def further_axes(shown: Shown, entry: Entry) -> tuple[str, ...]:
    """The axes that one panel has no room for."""
    if len(entry.axes) < 3 or any(axis in RANKED for axis in entry.axes):
        return ()
    drawn = directions(shown.of(entry, "effect", "0"), entry.axes)
    return tuple(axis for axis in entry.axes if axis not in drawn)


def less_placebo(result: "PatchingResult") -> "PatchingResult":
    """The result with each arm's gain over its placebo as its gain."""
    assert result.placebo is not None
    return replace(result, patched=result.patched - result.placebo + result.start, placebo=None)
