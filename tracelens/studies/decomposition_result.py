"""`Decomposition`: what each step on the way to a precision changes of every metric."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.errors import UnknownNameError
from tracelens.metrics.result import Result
from tracelens.output import decode, encode, reading
from tracelens.stats import Estimate
from tracelens.studies.storage import read_result, write_result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "tracelens_decomposition"
UNITS = {
    "cpfr_safety": "mean fidelity of safety features",
    "cpfr_capability": "mean fidelity of capability features",
    "survived": "share of live features that survived",
    "kl": "KL(reference ‖ quantized), nats per token",
    "perplexity": "perplexity",
    "flips": "share of prompts with another decision",
    "margin": "mean margin of safety prompts, nats",
}
"""Metrics that are always decomposed → what they are, and in which unit."""


@dataclass(frozen=True)
class Step(Result):
    """A step: "compute", "weights", "activations" or "kv_cache", and the precision with it and all before it."""

    name: str
    precision: str


@dataclass(frozen=True)
class Contribution(Result):
    """What one step changes of one metric.

    Attributes:
        value: the metric after the step.
        change: against the step before (the reference before the first); 95 % paired bootstrap over prompts.
        p: two-sided sign-flip p that the change is 0; None for metrics that are no mean over prompts.
    """

    metric: str
    step: str
    value: Estimate
    change: Estimate
    p: float | None


@dataclass(frozen=True)
class Decomposition:
    """Every metric's way from the reference to the precision, step by step; the changes of the steps add up to the total.

    Attributes:
        start: metric → its value in the reference.
        contributions: of each metric and step, in the order of the steps.
        total: metric → change over all steps, with its own paired interval.
    """

    reference: str
    precision: str
    steps: tuple[Step, ...]
    start: dict[str, Estimate]
    contributions: tuple[Contribution, ...]
    total: dict[str, Estimate]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        for metric, total in self.total.items():
            changes = [c.change.value for c in self.contributions if c.metric == metric]
            assert len(changes) == len(self.steps), (metric, changes)
            assert math.isnan(total.value) or math.isclose(sum(changes), total.value, abs_tol=1e-9, rel_tol=1e-9)

    @property
    def metrics(self) -> list[str]:
        return list(self.start)

    def of(self, metric: str) -> dict[str, Contribution]:
        """Step → its contribution; raises `UnknownNameError` for a metric that was not measured."""
        if metric not in self.start:
            raise UnknownNameError.of("metric", metric, self.metrics)
        return {c.step: c for c in self.contributions if c.metric == metric}

    def to_dataframe(self) -> "pd.DataFrame":
        """A row per metric and step: metric, step, precision, value, low, high, change, change_low, change_high, p (NaN: none)."""
        import pandas as pd

        specs = {step.name: step.precision for step in self.steps}
        rows = [
            {
                **{"metric": c.metric, "step": c.step, "precision": specs[c.step]},
                **{"value": c.value.value, "low": c.value.low, "high": c.value.high},
                **{"change": c.change.value, "change_low": c.change.low, "change_high": c.change.high},
                "p": math.nan if c.p is None else c.p,
            }
            for metric in self.metrics
            for c in self.of(metric).values()
        ]
        return pd.DataFrame(rows)

    def summary(self) -> str:
        """Each metric in a line or two: where it starts, what each step adds, and which step adds most."""
        lines = [f"From {self.reference} to {self.precision}, step by step; in brackets 95 % intervals over prompts."]
        for metric in self.metrics:
            found = self.of(metric)
            changes = ", ".join(f"{name} {_signed(c.change)}" for name, c in found.items())
            lines.append(f"{metric}: {self.start[metric].value:.4g}; {changes}; in all {_signed(self.total[metric])}.")
            if (most := largest_step(found)) is not None:
                lines[-1] += f" Most by {most}."
        lines.append("Steps are taken one after the other: what two do together counts for the later one.")
        return "\n".join(lines)

    def plot(self) -> "go.Figure":
        """A waterfall for each metric, with the interval of every change."""
        from tracelens.views.decomposition_figures import decomposition_figure

        return decomposition_figure(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: NaN as None."""
        return encode(self)

    def save(self, path: str | Path) -> Path:
        """Writes one JSON file; `Decomposition.load` reads it back."""
        return write_result(path, KIND, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Decomposition":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        data = read_result(path, KIND)
        with reading(path, f"a {KIND} file that Tracelens wrote"):
            return decode(cls, data)


def largest_step(found: dict[str, Contribution]) -> str | None:
    """The step that changes a metric most, if its interval leaves out 0 and those of smaller changes; None otherwise."""
    ranked = sorted(found.values(), key=lambda c: -abs(c.change.value))
    first = ranked[0].change
    if not (first.low > 0 or first.high < 0):
        return None
    least = min(abs(first.low), abs(first.high))
    return ranked[0].step if all(abs(c.change.value) < least for c in ranked[1:]) else None


def _signed(change: Estimate) -> str:
    return f"{change.value:+.3g} [{change.low:+.3g}, {change.high:+.3g}]"
