"""`Fragility`: importance against drift, and whether the two go together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tracelens.causal.ablation_result import Importance
from tracelens.causal.component_drift import Drift
from tracelens.causal.component_files import read_tensors, write_tensors
from tracelens.output import decode
from tracelens.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "tracelens_fragility"
ALPHA = 0.05


@dataclass(frozen=True)
class Association:
    """Whether important components drift less, in one quantized model, among components of one kind.

    Kinds are never pooled: MLPs both matter more and drift less than heads, which makes a correlation of its own (Simpson).

    Attributes:
        label: the quantized model's name.
        kind: "head", "mlp", ...
        n_components: the points of the scatter.
        correlation: Spearman's ρ of importance (mean |Δ metric|) and drift (mean over prompts), with the bootstrap interval
            over prompts in which both are measured anew. Negative: the important drift less.
        p_value: permutation p over components; p_adjusted over all associations of the result (Benjamini & Hochberg).
        detectable: |ρ| from which on p ≤ .05 with so many components.
        partial: ρ with the component's output norm and its layer controlled for (`covariates`): a component that
            writes little matters little, and drifts much for the same error. With its own p and what it could detect.
        noise: ρ for matched noise in place of the quantization error, mean over its seeds; None if none was run.
        versus_noise: correlation − noise, resampled in pairs, each with one of the seeds: both are single draws.
        rounds_activations: whether the quantized model rounds activations too, which its noise, on weights, does not match.
    """

    label: str
    kind: str
    n_components: int
    correlation: Estimate
    p_value: float
    p_adjusted: float
    detectable: float
    partial: Estimate
    partial_p: float
    partial_detectable: float
    noise: Estimate | None
    versus_noise: Estimate | None
    rounds_activations: bool = False

    @property
    def verdict(self) -> str:
        """What these numbers support, in a sentence."""
        rho = self.correlation.value
        who = f"{self.n_components} {_PLURAL.get(self.kind, self.kind)}"
        if rho != rho:
            return f"{self.label}, {who}: undefined: too few components, or importance or drift does not vary."
        numbers = f"ρ = {self.correlation}, p = {self.p_value:.2g}"
        if self.p_adjusted > ALPHA or self.p_adjusted != self.p_adjusted:
            adjusted = f" ({self.p_adjusted:.2g} adjusted)" if self.p_value <= ALPHA else ""
            reach = (
                f"only |ρ| ≥ {self.detectable:.2f} could be told from chance"
                if self.detectable == self.detectable
                else "so few can show none"
            )
            hidden = f"; {self._cause()}" if self.partial_p <= ALPHA else ""
            return f"{self.label}, {who}: not distinguishable from none ({numbers}{adjusted}); {reach}{hidden}."
        claim = f"{self.label}, {who}: the important drift {'less' if rho < 0 else 'more'} ({numbers}); {self._cause()}"
        return f"{claim}; {self._against_noise()}."

    def _cause(self) -> str:
        rho = self.partial.value
        if rho != rho:
            return "too few to control for norm and layer"
        numbers = f"ρ = {self.partial}, p = {self.partial_p:.2g}"
        if self.partial_p > ALPHA:
            reach = f", only |ρ| ≥ {self.partial_detectable:.2f} could be told" if self.partial_detectable <= 1 else ""
            return f"with norm and layer controlled for, not distinguishable from none ({numbers}{reach})"
        return f"with norm and layer controlled for, the important drift {'less' if rho < 0 else 'more'} ({numbers})"

    def _against_noise(self) -> str:
        if self.noise is None or self.versus_noise is None or self.noise.value != self.noise.value:
            return "not compared with noise"
        if self.versus_noise.low <= 0 <= self.versus_noise.high:
            return f"noise of the same size shows as much (ρ = {self.noise}), so this is nothing particular to quantization"
        said = f"noise of the same size gives ρ = {self.noise}, a difference of {self.versus_noise}"
        return (
            f"{said}, but it is on weights alone, and this model rounds activations too"
            if self.rounds_activations
            else said
        )


_PLAIN = ("p_value", "p_adjusted", "detectable", "partial_p", "partial_detectable", "rounds_activations")
_PLURAL = {"head": "heads", "mlp": "MLPs", "attn": "attention layers", "layer": "layers", "feature": "features"}


@dataclass(frozen=True, eq=False)
class Fragility:
    """Importance of components in the reference against their drift in quantized models.

    Attributes:
        importance: of the components, in the reference.
        drifts: by quantized model.
        noise: drifts under matched noise, one for each seed, by quantized model; empty tuples if none were run.
        associations: by quantized model and kind of component.
        settings: how it was measured.
    """

    importance: Importance
    drifts: dict[str, Drift] = field(repr=False)
    noise: dict[str, tuple[Drift, ...]] = field(repr=False)
    associations: tuple[Association, ...]
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def verdict(self) -> str:
        """One sentence for each quantized model and kind."""
        return "\n".join(found.verdict for found in self.associations)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a component and quantized model: what it is, model, importance and drift with their intervals, norm, and
        noise_drift, the mean over seeds.
        """
        import pandas as pd

        shared = self.importance.table.drop(columns=["n_prompts"])
        parts = []
        for label, drift in self.drifts.items():
            own: Any = drift.table[["drift", "drift_low", "drift_high", "norm", "n_prompts"]]
            noisy = [noise.value.numpy() for noise in self.noise[label]]
            mean = sum(noisy) / len(noisy) if noisy else float("nan")
            parts.append(pd.concat([shared, own], axis=1).assign(model=label, noise_drift=mean))
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def correlations(self) -> "pd.DataFrame":
        """One row an association: its fields, estimates with their intervals."""
        import pandas as pd

        rows = []
        for found in self.associations:
            row: dict[str, Any] = {"model": found.label, "kind": found.kind, "n_components": found.n_components}
            for name in ("correlation", "partial", "noise", "versus_noise"):
                e = getattr(found, name)
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), _ends(e), strict=True))
            rows.append(row | {n: getattr(found, n) for n in _PLAIN})
        return pd.DataFrame(rows)

    def to_dataframe(self) -> "pd.DataFrame":
        """`table`."""
        return self.table

    def plot(self, **options: Any) -> "go.Figure":
        """The scatters of importance against drift, a panel for each quantized model."""
        from tracelens.views.fragility_figures import fragility_figure

        return fragility_figure(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the tensors."""
        return {
            "importance": self.importance.to_dict(),
            "drifts": {label: drift.to_dict() for label, drift in self.drifts.items()},
            "noise": {label: [drift.to_dict() for drift in drifts] for label, drifts in self.noise.items()},
            "associations": list(self.associations),
            "settings": self.settings,
        }

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, which `load` reads back."""
        tensors = {f"importance.{name}": t for name, t in self.importance.tensors().items()}
        for i, label in enumerate(self.drifts):
            for k, drift in enumerate([self.drifts[label], *self.noise[label]]):
                tensors |= {f"drift.{i}.{k}.{name}": t for name, t in drift.tensors().items()}
        return write_tensors(path, KIND, self.to_dict(), tensors)

    @classmethod
    def load(cls, path: str | Path) -> "Fragility":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        return read_tensors(path, KIND, cls._of)

    @classmethod
    def _of(cls, data: dict[str, Any], tensors: dict[str, Tensor]) -> "Fragility":
        def under(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}

        drifts: dict[str, Drift] = {}
        noise: dict[str, tuple[Drift, ...]] = {}
        for i, (label, own) in enumerate(data["drifts"].items()):
            made = [
                Drift.from_dict(saved, under(f"drift.{i}.{k}.")) for k, saved in enumerate([own, *data["noise"][label]])
            ]
            drifts[label], noise[label] = made[0], tuple(made[1:])
        associations = tuple(decode(Association, saved) for saved in data["associations"])
        importance = Importance.from_dict(data["importance"], under("importance."))
        return cls(importance, drifts, noise, associations, data["settings"])


def _ends(estimate: Estimate | None) -> Sequence[float]:
    nan = float("nan")
    return (nan, nan, nan) if estimate is None else (estimate.value, estimate.low, estimate.high)
