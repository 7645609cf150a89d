"""`RepairCurve`: what restoring more and more brings back, in several orders, beside random and magnitude."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from tracelens.causal.component_files import read_tensors, write_tensors
from tracelens.causal.effects import MIN_DIFFERENCE, effects
from tracelens.causal.repair.areas import Axis, areas_table
from tracelens.causal.repair.measures import Measure, columns, estimated, gains
from tracelens.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "tracelens_repair_curve"
_TENSORS = ("measured", "start", "goal", "bytes", "order", "scores")


@dataclass(frozen=True, eq=False)
class RepairCurve:
    """The metric of every held-out prompt with the first k components of each order restored.

    Attributes:
        restore: "activations" or "weights".
        metric: its name.
        unit: its unit.
        names: of the components.
        layers: of the components.
        bytes: what restoring each costs; `bytes_note` says how it is counted.
        orders: names of the orders; those from "random 0" on are random.
        order: components of each order, the first to be restored first.
        scores: what each order ranks by; NaN for random ones.
        counts: how many components are restored; from 0 to all of them.
        measured: the metric on the held-out prompts.
        start: the metric of the quantized model on them.
        goal: the metric of the reference.
        prompts: their texts.
        n_chosen_on: prompts that the orders were chosen on.
        min_difference: prompts whose |goal − start| is less are counted and left out.
        settings: of the pair and the call.
    """

    restore: str
    metric: str
    unit: str
    names: tuple[str, ...] = field(repr=False)
    layers: tuple[int, ...] = field(repr=False)
    bytes: Float64[Tensor, "component"] = field(repr=False)
    bytes_note: str
    orders: tuple[str, ...]
    order: Int[Tensor, "order component"] = field(repr=False)
    scores: Float64[Tensor, "order component"] = field(repr=False)
    counts: tuple[int, ...]
    measured: Float64[Tensor, "order count prompt"] = field(repr=False)
    start: Float64[Tensor, "prompt"] = field(repr=False)
    goal: Float64[Tensor, "prompt"] = field(repr=False)
    prompts: tuple[str, ...] = field(repr=False)
    n_chosen_on: int = 0
    min_difference: float = MIN_DIFFERENCE
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        shape = (len(self.orders), len(self.counts), len(self.prompts))
        assert self.measured.shape == shape, (self.measured.shape, shape)
        assert self.order.shape == self.scores.shape == (len(self.orders), len(self.names))
        assert self.counts[0] == 0
        assert self.counts[-1] == len(self.names)

    @property
    def lines(self) -> tuple[str, ...]:
        """Names of the orders, all random ones as "random"."""
        return tuple(dict.fromkeys("random" if is_random(name) else name for name in self.orders))

    @property
    def n_usable(self) -> int:
        """Prompts on which the two models differ; only on them is there anything to bring back."""
        return int(((self.goal - self.start).abs() >= self.min_difference).sum())

    def rows(self, line: str) -> list[int]:
        """Indices of the orders of a line: one, or all random ones."""
        return [i for i, name in enumerate(self.orders) if name == line or (line == "random" and is_random(name))]

    @cached_property
    def spent(self) -> Float64[Tensor, "order count"]:
        """Bytes of what is restored."""
        total = torch.cat([torch.zeros(len(self.orders), 1, dtype=torch.float64), self.bytes[self.order].cumsum(1)], 1)
        return total[:, list(self.counts)]

    @property
    def full(self) -> Estimate:
        """Recovery with everything restored: 1, unless something else than these components differs between the models."""
        return effects(self.measured[0, -1:], self.start, self.goal, min_difference=self.min_difference).effect[0]

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a line and count.

        Columns: order; count; share of the components; bytes; recovery (Σ n d / Σ d², see `effects`) and closed (1 − Σ (m_ref − m)² / Σ d²:
        what is closed of the squared gap between the models, which overshooting does not add to), each with its 95 % bootstrap
        interval over prompts; change (metric's units towards the reference); p_value (sign flips; that the change is 0);
        n_usable, n_prompts. "random" is the mean of the random orders; band_low and band_high are the least and the
        largest recovery among them (of other lines, their own).
        """
        import pandas as pd

        records = []
        for line in self.lines:
            which = self.rows(line)
            found = estimated(self, gains(self, self.measured[which], "recovery").mean(0), 10_000)
            closed = estimated(self, gains(self, self.measured[which], "closed").mean(0)).effect
            band = [[e.value for e in estimated(self, gains(self, self.measured[i], "recovery")).effect] for i in which]
            for k, count in enumerate(self.counts):
                records.append(
                    {
                        "order": line,
                        "count": count,
                        "share": count / len(self.names),
                        "bytes": float(self.spent[which, k].mean()),
                        **columns("recovery", found.effect[k]),
                        **columns("closed", closed[k]),
                        "band_low": min(b[k] for b in band),
                        "band_high": max(b[k] for b in band),
                        "change": found.change[k].value,
                        "p_value": float(found.p_value[k]),
                        "n_usable": found.n_usable,
                        "n_prompts": found.n_prompts,
                    }
                )
        return pd.DataFrame(records)

    def areas(self, axis: Axis = "components", measure: Measure = "recovery") -> "pd.DataFrame":
        """Area under each line over the share of the components, or of the bytes, from 0 to 1: see `areas_table`."""
        return self._areas[axis, measure]

    @cached_property
    def _areas(self) -> dict[tuple[str, str], "pd.DataFrame"]:
        axes: tuple[Axis, ...] = ("components", "bytes")
        kinds: tuple[Measure, ...] = ("recovery", "closed")
        return {(axis, measure): areas_table(self, axis, measure) for axis in axes for measure in kinds}

    def winners(self, axis: Axis = "components") -> tuple[str, ...]:
        """Orders that beat the better of random and magnitude both in recovery and in what they close of the gap."""
        recovery, closed = (
            table[table["wins"]]["order"].tolist() for table in (self.areas(axis), self.areas(axis, "closed"))
        )
        return tuple(name for name in recovery if name in closed)

    @property
    def verdict(self) -> str:
        """In words: what the full restoration brings back, and which orders, if any, beat random and magnitude."""
        from tracelens.causal.repair.curve_verdict import verdict_of

        return verdict_of(self)

    def top(self, order: str, k: int = 10) -> "pd.DataFrame":
        """The first `k` components of an order: component, layer, score, bytes."""
        import pandas as pd

        row = self.orders.index(order)
        first = self.order[row, :k].tolist()
        return pd.DataFrame(
            {
                "component": [self.names[i] for i in first],
                "layer": [self.layers[i] for i in first],
                "score": [float(self.scores[row, i]) for i in first],
                "bytes": [float(self.bytes[i]) for i in first],
            }
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """`table`."""
        return self.table

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, with the verdict."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}
        return plain | {"verdict": self.verdict}

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return write_tensors(path, KIND, self.to_dict(), tensors)

    @classmethod
    def load(cls, path: str | Path) -> "RepairCurve":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""

        def made(data: dict[str, Any], tensors: dict[str, Tensor]) -> RepairCurve:
            data.pop("verdict")
            for name in ("names", "layers", "orders", "counts", "prompts"):
                data[name] = tuple(data[name])
            found: dict[str, Any] = {**data, **tensors}
            return cls(**found)

        return read_tensors(path, KIND, made)

    def plot(self, **options: Any) -> "go.Figure":
        """Recovery against the number of components and against bytes."""
        from tracelens.views.repair_figures import curve_figure

        return curve_figure(self, **options)


def is_random(order: str) -> bool:
    """Whether an order is one of the random ones."""
    return order.startswith("random ")
