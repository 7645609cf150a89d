"""`DirectionRepair`: what one direction brings back, beside random ones and beside everything."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.component_files import read_tensors, write_tensors
from tracelens.causal.effects import MIN_DIFFERENCE
from tracelens.causal.repair.measures import LEVEL, Measure, columns, estimated, gains, rank_p, tested
from tracelens.stats import benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "tracelens_direction_repair"
_TENSORS = ("measured", "start", "goal")
CONTROLS = ("random", "labels", "largest error")
"""What a direction is compared with: random ones, those of shuffled labels (the mean of several each), that of the largest error."""


@dataclass(frozen=True, eq=False)
class DirectionRepair:
    """The metric of every held-out prompt with a direction repaired.

    Attributes:
        metric: its name.
        unit: its unit.
        rows: of every repair: version ("activations", "weights"), direction ("refusal", "random 0", "labels 0", ..., "largest error",
            "everything"), layers (one, or "all" of them) and bytes (of weights in all; of activations by token).
        measured: the metric.
        start: the metric of the quantized model.
        goal: the metric of the reference.
        cosine: of each layer, between the reference's direction and that of the quantized model found in the same way.
        n_harmful, n_harmless: prompts that directions were found on.
        prompts: texts of the held-out prompts.
        min_difference: prompts whose |goal − start| is less are counted and left out.
        settings: of the pair and the call.
    """

    metric: str
    unit: str
    rows: tuple[dict[str, Any], ...] = field(repr=False)
    measured: Float64[Tensor, "row prompt"] = field(repr=False)
    start: Float64[Tensor, "prompt"] = field(repr=False)
    goal: Float64[Tensor, "prompt"] = field(repr=False)
    cosine: tuple[float, ...]
    n_harmful: int
    n_harmless: int
    prompts: tuple[str, ...] = field(repr=False)
    min_difference: float = MIN_DIFFERENCE
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def n_usable(self) -> int:
        """Prompts on which the two models differ."""
        return int(((self.goal - self.start).abs() >= self.min_difference).sum())

    def select(self, version: str, direction: str, layers: str) -> list[int]:
        """Indices of rows; "random" and "labels" are all of their kind."""
        return [
            i
            for i, row in enumerate(self.rows)
            if (row["version"], row["layers"]) == (version, layers)
            and (row["direction"] == direction or row["direction"].rpartition(" ")[0] == direction)
        ]

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a version, layers and direction.

        Columns: version; layers; direction ("random" and "labels" are means over their kind); bytes; recovery (Σ n d / Σ d²) and closed
        (1 − Σ (m_ref − m)² / Σ d²), each with its 95 % bootstrap interval over prompts; band_low, band_high, the least and the
        largest recovery of a kind; n_usable; n_prompts. Of "refusal" also: versus, the control that closes most; p_versus, paired
        sign flips that it closes as much; p_adjusted over all repairs of the refusal direction (Benjamini & Hochberg);
        controls_as_good, how many of all single controls close as much; wins: p_adjusted < .05, more closed than by the control,
        recovery larger too, and so few single controls as good that `rank_p` ≤ .05.
        """
        import pandas as pd

        records = []
        for version, layers in dict.fromkeys((row["version"], row["layers"]) for row in self.rows):
            for direction in ("refusal", *CONTROLS, "everything"):
                which = self.select(version, direction, layers)
                recovery, closed = (self._estimates(which, measure) for measure in ("recovery", "closed"))
                single = [e.value for e in estimated(self, gains(self, self.measured[which], "recovery")).effect]
                record = {"version": version, "layers": layers, "direction": direction}
                record |= (
                    {"bytes": self.rows[which[0]]["bytes"]} | columns("recovery", recovery) | columns("closed", closed)
                )
                record |= {"band_low": min(single), "band_high": max(single)}
                record |= {"n_usable": self.n_usable, "n_prompts": len(self.prompts)}
                records.append(record | (self._compared(version, layers) if direction == "refusal" else {}))
        table = pd.DataFrame(records)
        tested_rows = table["direction"] == "refusal"
        p = torch.tensor(table.loc[tested_rows, "p_versus"].to_numpy(dtype="float64").copy())
        table.loc[tested_rows, "p_adjusted"] = (benjamini_hochberg(p) if p.isfinite().all() else p).numpy()
        table["wins"] = table.pop("better").eq(True) & (table["p_adjusted"] < LEVEL)
        return table

    def to_dataframe(self) -> "pd.DataFrame":
        """`table`."""
        return self.table

    @property
    def verdict(self) -> str:
        """In words: what the direction brings back at all layers, and whether that is more than the controls do."""
        if not self.n_usable:
            return f"The two models give the same {self.metric} on all {len(self.prompts)} prompts (0/0): there is nothing to repair."
        said = [
            f"The refusal direction of the quantized model has a cosine of {min(self.cosine):.3f} to {max(self.cosine):.3f} with the "
            "reference's, by layer."
        ]
        table: Any = self.table
        for version in dict.fromkeys(table["version"]):
            here = table[(table["version"] == version) & (table["layers"] == "all")].set_index("direction")
            row, whole = here.loc["refusal"], here.loc["everything"]
            versus = str(row["versus"])
            word = "more than" if row["wins"] else "not reliably more than"
            said.append(
                f"Repaired in {version} at all layers it recovers {row['recovery']:.3f} [{row['recovery_low']:.3f}, "
                f"{row['recovery_high']:.3f}] of the {self.metric} and closes {row['closed']:.3f} of the gap, {word} the best control "
                f"({versus}: {here.loc[versus, 'closed']:.3f}; {int(row['controls_as_good'])} single controls are as good); "
                f"everything there closes {whole['closed']:.3f}, with {whole['bytes'] / row['bytes']:.0f} times the bytes."
            )
            alone = table[(table["version"] == version) & (table["layers"] != "all") & table["wins"]]
            if len(alone):
                said.append(f"At single layers it beats the controls at {', '.join(alone['layers'])}.")
        said.append(
            f"{len(self.prompts)} held-out prompts; p adjusted over versions and layers (Benjamini & Hochberg)."
        )
        return " ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, with the verdict."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}
        return plain | {"verdict": self.verdict}

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file."""
        return write_tensors(path, KIND, self.to_dict(), {name: getattr(self, name) for name in _TENSORS})

    @classmethod
    def load(cls, path: str | Path) -> "DirectionRepair":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""

        def made(data: dict[str, Any], tensors: dict[str, Tensor]) -> DirectionRepair:
            data.pop("verdict")
            for name in ("rows", "cosine", "prompts"):
                data[name] = tuple(data[name])
            found: dict[str, Any] = {**data, **tensors}
            return cls(**found)

        return read_tensors(path, KIND, made)

    def plot(self, **options: Any) -> "go.Figure":
        """Recovery by layers, beside the controls."""
        from tracelens.views.repair_figures import direction_figure

        return direction_figure(self, **options)

    def _estimates(self, which: Sequence[int], measure: Measure) -> Any:
        return estimated(self, gains(self, self.measured[list(which)], measure).mean(0)[None]).effect[0]

    def _compared(self, version: str, layers: str) -> dict[str, Any]:
        """The refusal direction against the control that closes most, and against all single ones."""
        own = gains(self, self.measured[self.select(version, "refusal", layers)], "closed")[0]
        controls = {name: gains(self, self.measured[self.select(version, name, layers)], "closed") for name in CONTROLS}
        means = {name: float(values.mean(0).sum()) for name, values in controls.items()}
        best = max(means, key=lambda name: means[name])
        against = self._estimates(self.select(version, best, layers), "recovery").value
        recovery = self._estimates(self.select(version, "refusal", layers), "recovery").value
        single = torch.cat(list(controls.values())).sum(1)
        as_good = int((single >= own.sum()).sum())
        better = float(own.sum()) > means[best] and recovery > against and rank_p(as_good, len(single)) <= LEVEL
        p = tested(self, (own - controls[best].mean(0))[None])
        return {"versus": best, "p_versus": float(p[0]), "controls_as_good": as_good, "better": better}
