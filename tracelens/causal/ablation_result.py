"""`Importance`: what each ablation did to each prompt, and to all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.component_files import read_tensors, write_tensors
from tracelens.causal.components import described, from_dict, kind_of, to_dict
from tracelens.causal.places import Place
from tracelens.stats import Estimate, benjamini_hochberg, bootstrap_weights, percentile_interval, sign_flip_tests

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "tracelens_importance"


@dataclass(frozen=True, eq=False)
class Importance:
    """Changes of a metric under the ablation of single components.

    Attributes:
        components: what was ablated, one at a time.
        method: "mean", "zero" or "resample".
        metric, unit: what was read.
        plain: the metric of each prompt as it is.
        change: the metric with the component ablated, less `plain`.
        placebo: the same for a displacement as large as the ablation's, in a random direction; None if it was not run.
        prompts: the texts.
        settings: how it was measured.
    """

    components: tuple[Place, ...]
    method: str
    metric: str
    unit: str
    plain: Float64[Tensor, "prompt"] = field(repr=False)
    change: Float64[Tensor, "component prompt"] = field(repr=False)
    placebo: Float64[Tensor, "component prompt"] | None = field(default=None, repr=False)
    prompts: tuple[str, ...] = field(default=(), repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of each component: "head", "mlp", "attn", "layer", "feature"."""
        return tuple(map(kind_of, self.components))

    @property
    def value(self) -> Float64[Tensor, "component"]:
        """Importance: the mean of |Δ metric| over prompts."""
        return self.change.abs().mean(1)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a component, in order: what it is (`described`); importance (mean |Δ|) and change (mean Δ), each with its 95 %
        bootstrap interval over prompts, in the metric's unit; p_value, the sign-flip p that the mean Δ is 0 (a component that
        raises some prompts and lowers others matters without it), and p_adjusted over all components (Benjamini & Hochberg);
        with a placebo, placebo_importance with its interval, and p_versus_placebo, the sign-flip p that |Δ| is no larger or
        smaller than the placebo's on the same prompt; n_prompts.
        """
        import pandas as pd

        table = pd.DataFrame([described(place) for place in self.components])
        n = self.change.shape[1]
        weights = bootstrap_weights(n)
        put_estimates(table, "importance", means(self.change.abs(), weights))
        put_estimates(table, "change", means(self.change, weights))
        p = sign_flip_tests(self.change.T.contiguous())
        table["p_value"], table["p_adjusted"] = p.numpy(), benjamini_hochberg(p).numpy()
        if self.placebo is not None:
            put_estimates(table, "placebo_importance", means(self.placebo.abs(), weights))
            gain = self.change.abs() - self.placebo.abs()
            table["p_versus_placebo"] = sign_flip_tests(gain.T.contiguous()).numpy()
        table["n_prompts"] = n
        return table

    def to_dataframe(self) -> "pd.DataFrame":
        """`table`."""
        return self.table

    def top(self, k: int = 10) -> "pd.DataFrame":
        """The `k` most important components."""
        return self.table.sort_values("importance", ascending=False, kind="stable").head(k).reset_index(drop=True)

    def plot(self, **options: Any) -> "go.Figure":
        """Heatmap of heads, bars of MLPs, attention layers and layers, intervals on hover."""
        from tracelens.views.fragility_figures import importance_figure

        return importance_figure(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the tensors."""
        return {
            "components": [to_dict(place) for place in self.components],
            **{name: getattr(self, name) for name in ("method", "metric", "unit", "settings")},
            "prompts": list(self.prompts),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What `to_dict` leaves out."""
        named = {"plain": self.plain, "change": self.change, "placebo": self.placebo}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, which `load` reads back."""
        return write_tensors(path, KIND, self.to_dict(), self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> "Importance":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        return read_tensors(path, KIND, cls.from_dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Importance":
        """From what `to_dict` gave, and the tensors."""
        places = tuple(from_dict(place) for place in data["components"])
        given: dict[str, Any] = {**data, **tensors}
        return cls(**{**given, "components": places, "prompts": tuple(data["prompts"])})


def means(values: Float64[Tensor, "component prompt"], weights: Float64[Tensor, "resample prompt"]) -> list[Estimate]:
    """Mean of each component over the prompts where it is known, with its bootstrap interval over prompts."""
    known = values.isfinite()
    filled = values.where(known, 0)
    counts = known.sum(1)
    value = filled.sum(1) / counts
    replicates = (weights @ filled.T) / (weights @ known.double().T)
    return [
        percentile_interval(float(v), column, n=int(n))
        for v, column, n in zip(value, replicates.T, counts, strict=True)
    ]


def put_estimates(table: "pd.DataFrame", name: str, estimates: Sequence[Estimate]) -> None:
    """Columns of values and of the ends of their intervals."""
    table[name] = [e.value for e in estimates]
    table[f"{name}_low"] = [e.low for e in estimates]
    table[f"{name}_high"] = [e.high for e in estimates]
