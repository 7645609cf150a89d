"""`DriftBound`: a first-order bound on a metric's change across precisions beside the change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.agreement import agreement
from tracelens.causal.attribution_result import means, put
from tracelens.causal.component_files import read_tensors, write_tensors
from tracelens.causal.components import described, from_dict, to_dict
from tracelens.causal.effects import MIN_DIFFERENCE
from tracelens.causal.places import Place
from tracelens.errors import MetricInputError, UnknownNameError
from tracelens.stats import Estimate, bootstrap_weights, percentile_interval, wilson

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND, KIND_MANY = "tracelens_drift_bound", "tracelens_drift_bounds"
Kind = Literal["norms", "elementwise", "signed"]
TENSORS = ("reference", "quantized", "signed", "elementwise", "norms")


@dataclass(frozen=True, eq=False)
class DriftBound:
    """Σ |∇m| · |δ| of every prompt, by component. What it is and is not: `tracelens.causal.bound.drift_bounds`.

    Attributes:
        components: which; a head's z, an MLP's output.
        label: the quantized model's name.
        errors: "total", errors that earlier components passed on included, or "local", each component's own.
        metric, unit: what was read.
        reference, quantized: the metric of each prompt in either model.
        signed: Σ ∇ · δ, the change of the metric that the component's error predicts.
        elementwise: Σ |∇| |δ|, ≥ |signed|.
        norms: ‖∇‖₂ ‖δ‖₂ over positions and channels, ≥ elementwise.
        prompts: the texts.
        settings: what the pair shares.
    """

    components: tuple[Place, ...] = field(repr=False)
    label: str
    errors: str
    metric: str
    unit: str
    reference: Float64[Tensor, "prompt"] = field(repr=False)
    quantized: Float64[Tensor, "prompt"] = field(repr=False)
    signed: Float64[Tensor, "component prompt"] = field(repr=False)
    elementwise: Float64[Tensor, "component prompt"] = field(repr=False)
    norms: Float64[Tensor, "component prompt"] = field(repr=False)
    prompts: tuple[str, ...] = field(default=(), repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        shape = (len(self.components), len(self.reference))
        for name in ("signed", "elementwise", "norms"):
            if (found := getattr(self, name)).shape != shape:
                raise MetricInputError(
                    f"{name} has shape {list(found.shape)}; expected [component, prompt], {list(shape)}"
                )

    def __repr__(self) -> str:
        held = self.summary("elementwise")
        return (
            f"DriftBound({self.label}, {self.errors} errors, {len(self.components)} components, {len(self.reference)} prompts; "
            f"|change| {held['measured']}, bound {held['bound']}, violated {held['violated']})"
        )

    @property
    def measured(self) -> Float64[Tensor, "prompt"]:
        """|quantized − reference|, the metric's measured change."""
        return (self.quantized - self.reference).abs()

    def bound(self, kind: str = "elementwise") -> Float64[Tensor, "prompt"]:
        """The bound on `measured`: the sum over components of `norms` or `elementwise`; for "signed", |Σ ∇ · δ|, which is a
        prediction and no bound.
        """
        if kind not in get_args(Kind):
            raise UnknownNameError.of("kind of bound", kind, get_args(Kind))
        return getattr(self, kind).sum(0).abs()

    @property
    def n_undetermined(self) -> int:
        """Prompts that move by less than rounding does (`effects.MIN_DIFFERENCE`): they have no ratio to the bound."""
        return int((self.measured < MIN_DIFFERENCE).sum())

    def summary(self, kind: str = "elementwise") -> dict[str, Any]:
        """measured and bound, means over prompts; looseness, mean bound / mean measured (1 is tight), with its 95 % bootstrap
        interval over prompts; q05, median and q95 of bound / measured over prompts that move; violated, the share of those
        prompts that move by more than the bound (Wilson); pearson and spearman of bound and measured over prompts; of the
        signed prediction the same against the signed change, `signed_pearson` and `signed_slope` (Σ predicted · change /
        Σ change²); n_usable, prompts that move.

        Models that do not differ have no ratio: NaN.
        """
        bound, measured = self.bound(kind), self.measured
        moved = measured >= MIN_DIFFERENCE
        ratio = (bound / measured)[moved]
        nan = Estimate(*[float("nan")] * 3, n=0, method="bootstrap")
        quantiles = torch.quantile(ratio, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)) if len(ratio) else None
        predicted = agreement(self.signed.sum(0), self.quantized - self.reference)
        together = agreement(bound, measured)
        found: dict[str, Any] = dict(zip(("measured", "bound"), means(torch.stack([measured, bound])), strict=True))
        found["looseness"] = _ratio(bound[moved], measured[moved]) if len(ratio) else nan
        found |= dict(
            zip(("q05", "median", "q95"), [float("nan")] * 3 if quantiles is None else quantiles.tolist(), strict=True)
        )
        found["violated"] = wilson(int((ratio < 1).sum()), len(ratio))
        found |= {name: together[name] for name in ("pearson", "spearman")}
        found |= {f"signed_{name}": predicted[name] for name in ("pearson", "slope")}
        return found | {"n_usable": len(ratio), "n_prompts": len(measured)}

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a component: what it is (`components.described`); elementwise, norms and signed (means over prompts, in the
        metric's unit) and share, of the elementwise bound's mean, each with its 95 % bootstrap interval.
        """
        import pandas as pd

        table = pd.DataFrame([described(place) for place in self.components])
        for name in ("elementwise", "norms", "signed"):
            put(table, name, means(getattr(self, name)))
        put(table, "share", self._shares())
        return table

    def to_dataframe(self) -> "pd.DataFrame":
        """`table`."""
        return self.table

    def top(self, k: int = 10) -> "pd.DataFrame":
        """The `k` components that carry most of the bound."""
        return self.table.sort_values("elementwise", ascending=False, kind="stable").head(k).reset_index(drop=True)

    def plot(self, **options: Any) -> "go.Figure":
        """Bound against measured, a point for each prompt."""
        return DriftBounds({self.label: self}).plot(**options)

    def plot_components(self, **options: Any) -> "go.Figure":
        """Which components carry it, with intervals."""
        from tracelens.views.attribution_figures import carriers_figure

        return carriers_figure(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the tensors."""
        plain = ("label", "errors", "metric", "unit", "settings")
        places = [to_dict(place) for place in self.components]
        return {name: getattr(self, name) for name in plain} | {"components": places, "prompts": list(self.prompts)}

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, which `load` reads back."""
        return write_tensors(path, KIND, self.to_dict(), self._tensors())

    @classmethod
    def load(cls, path: str | Path) -> "DriftBound":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        return read_tensors(path, KIND, cls._of)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}

    @classmethod
    def _of(cls, data: dict[str, Any], tensors: dict[str, Tensor]) -> "DriftBound":
        components = tuple(from_dict(place) for place in data.pop("components"))
        found: dict[str, Any] = {**data, **tensors}
        return cls(components=components, prompts=tuple(found.pop("prompts")), **found)

    def _shares(self) -> list[Estimate]:
        n = len(self.reference)
        if not self.elementwise.any():
            return [Estimate(*[float("nan")] * 3, n=n, method="bootstrap")] * len(self.components)
        drawn = bootstrap_weights(n) @ self.elementwise.T
        drawn = drawn / drawn.sum(1, keepdim=True)
        value = self.elementwise.sum(1) / self.elementwise.sum()
        return [percentile_interval(float(v), column, n=n) for v, column in zip(value, drawn.T, strict=True)]


@dataclass(frozen=True, eq=False)
class DriftBounds(Mapping[str, DriftBound]):
    """Bounds of several precisions against one reference, by name."""

    bounds: Mapping[str, DriftBound]

    def __getitem__(self, name: str) -> DriftBound:
        if name not in self.bounds:
            raise UnknownNameError.of("precision", name, self.bounds)
        return self.bounds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds)

    def to_dataframe(self, kind: str = "elementwise") -> "pd.DataFrame":
        """One row a precision: `DriftBound.summary`, intervals as columns."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for name, one in self.items():
            row: dict[str, Any] = {"precision": name}
            for key, value in one.summary(kind).items():
                if isinstance(value, Estimate):
                    row |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
                else:
                    row[key] = value
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, **options: Any) -> "go.Figure":
        """Bound against measured, a point for each prompt, by precision."""
        from tracelens.views.attribution_figures import bound_figure

        return bound_figure(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the tensors."""
        return {"bounds": {name: one.to_dict() for name, one in self.items()}}

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, which `load` reads back."""
        tensors = {
            f"{i}.{key}": value.clone() for i, one in enumerate(self.values()) for key, value in one._tensors().items()
        }
        return write_tensors(path, KIND_MANY, self.to_dict(), tensors)

    @classmethod
    def load(cls, path: str | Path) -> "DriftBounds":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""

        def made(data: dict[str, Any], tensors: dict[str, Tensor]) -> "DriftBounds":
            each = enumerate(data["bounds"].items())
            return cls(
                {name: DriftBound._of(one, {key: tensors[f"{i}.{key}"] for key in TENSORS}) for i, (name, one) in each}
            )

        return read_tensors(path, KIND_MANY, made)


def _ratio(bound: Float64[Tensor, "prompt"], measured: Float64[Tensor, "prompt"]) -> Estimate:
    weights = bootstrap_weights(len(bound))
    return percentile_interval(
        float(bound.sum() / measured.sum()), (weights @ bound) / (weights @ measured), n=len(bound)
    )
