"""`WeightAttribution`: what each weight matrix accounts for of a metric's change across precisions."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tracelens.causal.component_files import read_tensors, write_tensors
from tracelens.causal.effects import Effects, effects
from tracelens.errors import MetricInputError, UnknownNameError
from tracelens.output import encode
from tracelens.stats import Estimate, benjamini_hochberg, bootstrap_weights, percentile_interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.causal.attribution_check import AttributionCheck

KIND = "tracelens_weight_attribution"


@dataclass(frozen=True, eq=False)
class WeightAttribution:
    """First-order attribution of a metric's change, quantized − reference, to weights.

    Attributes:
        names: of the matrices, as `Matrix.name`; all of them, also those that quantization left alone, whose entries are 0.
        layers, shapes: of each matrix; shapes are (out, in).
        at: where the gradient was taken: "reference", "quantized", or "both" (the mean).
        metric, unit: what was read.
        first_order: Σ ∇W · (W_quant − W_ref) over a matrix: the change of the metric, quantized − reference, that it accounts for.
        reference, quantized: the metric of each prompt in either model.
        others: further parameters that differ between the models: embeddings, biases, norms.
        other_first_order: the same for them.
        at_reference, at_quantized: the two of which `first_order` is the mean; None unless `at` is "both".
        row_sums, column_sums: matrix → what each of its rows (output channels) and columns (inputs) accounts for; empty unless
            they were asked for.
        prompts: the texts.
        settings: what the pair shares.
    """

    names: tuple[str, ...] = field(repr=False)
    layers: tuple[int, ...] = field(repr=False)
    shapes: tuple[tuple[int, int], ...] = field(repr=False)
    at: str
    metric: str
    unit: str
    first_order: Float64[Tensor, "matrix prompt"] = field(repr=False)
    reference: Float64[Tensor, "prompt"] = field(repr=False)
    quantized: Float64[Tensor, "prompt"] = field(repr=False)
    others: tuple[str, ...] = ()
    other_first_order: Float64[Tensor, "other prompt"] | None = field(default=None, repr=False)
    at_reference: Float64[Tensor, "matrix prompt"] | None = field(default=None, repr=False)
    at_quantized: Float64[Tensor, "matrix prompt"] | None = field(default=None, repr=False)
    row_sums: dict[str, Float[Tensor, "row prompt"]] = field(default_factory=dict, repr=False)
    column_sums: dict[str, Float[Tensor, "column prompt"]] = field(default_factory=dict, repr=False)
    prompts: tuple[str, ...] = field(default=(), repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        shape = (len(self.names), len(self.reference))
        if self.first_order.shape != shape:
            raise MetricInputError(
                f"first_order has shape {list(self.first_order.shape)}; expected [matrix, prompt], {list(shape)}"
            )

    def __repr__(self) -> str:
        return (
            f"WeightAttribution({len(self.names)} matrices, {len(self.reference)} prompts, {self.metric}, gradient at "
            f"{self.at}; measured change {self.change.mean():.4f}, first order {self.total.mean():.4f})"
        )

    @property
    def change(self) -> Float64[Tensor, "prompt"]:
        """The measured change of the metric, quantized − reference."""
        return self.quantized - self.reference

    @property
    def total(self) -> Float64[Tensor, "prompt"]:
        """What all weights account for together: the first-order prediction of `change`."""
        total = self.first_order.sum(0)
        return total if self.other_first_order is None else total + self.other_first_order.sum(0)

    @property
    def unattributed(self) -> Float64[Tensor, "prompt"]:
        """`change` − `total`: higher orders, interactions of matrices, and the rounding of activations."""
        return self.change - self.total

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of each matrix, its name without layer and experts: "W_Q", "q_proj", ..."""
        return tuple(kind_of_name(name) for name in self.names)

    @cached_property
    def effects(self) -> Effects:
        """The effects that restoring each matrix alone is predicted to have (`tracelens.causal.effects`): 1 would bring every
        prompt back. `change` is how far towards the reference it takes a prompt. NaN for models that do not differ (0 / 0).
        """
        return effects(self.quantized - self.first_order, self.quantized, self.reference)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a matrix: name, layer, kind, n_weights; first_order (mean over prompts, metric's unit) with its 95 % bootstrap
        interval; size, the mean of its absolute value; effect and change of `effects`, with intervals; p_value, the sign-flip
        p that `change` is 0, and p_adjusted over all matrices (Benjamini & Hochberg); n_usable of n_prompts.
        """
        import pandas as pd

        found = self.effects
        rows = {"name": self.names, "layer": self.layers, "kind": self.kinds}
        table = pd.DataFrame(rows | {"n_weights": [out * in_ for out, in_ in self.shapes]})
        put(table, "first_order", means(self.first_order))
        table["size"] = self.first_order.abs().mean(1).numpy()
        put(table, "effect", found.effect)
        put(table, "change", found.change)
        table["p_value"] = found.p_value.numpy()
        known = found.n_usable > 0
        table["p_adjusted"] = (benjamini_hochberg(found.p_value) if known else found.p_value).numpy()
        table["n_usable"], table["n_prompts"] = found.n_usable, found.n_prompts
        return table

    @cached_property
    def summary(self) -> dict[str, Any]:
        """How much of the change first order accounts for: mean measured and predicted change (intervals over prompts), the same
        for `others`, and of `total` against `change` the slope through the origin Σ total · change / Σ change², Pearson's r and
        Spearman's ρ over prompts. NaN for models that do not differ.
        """
        from tracelens.causal.agreement import agreement

        other = torch.zeros_like(self.change) if self.other_first_order is None else self.other_first_order.sum(0)
        named = {"change": self.change, "first_order": self.total, "others": other, "unattributed": self.unattributed}
        found = means(torch.stack(list(named.values())))
        return dict(zip(named, found, strict=True)) | agreement(self.total, self.change)

    def by_layer(self) -> Float64[Tensor, "layer prompt"]:
        """Sums over the matrices of each layer, 0 to the last."""
        out = torch.zeros(max(self.layers) + 1, len(self.reference), dtype=torch.float64)
        return out.index_add_(0, torch.tensor(self.layers), self.first_order)

    def by_kind(self) -> dict[str, Float64[Tensor, "prompt"]]:
        """Sums over the layers, by kind of matrix."""
        kinds = self.kinds
        return {kind: self.first_order[[k == kind for k in kinds]].sum(0) for kind in dict.fromkeys(kinds)}

    def rows(self, name: str) -> Float[Tensor, "row prompt"]:
        """What each row (output channel) of a matrix accounts for; raises `UnknownNameError` if that was not kept."""
        return self._detail(self.row_sums, name, 0)

    def columns(self, name: str) -> Float[Tensor, "column prompt"]:
        """What each column (input) of a matrix accounts for."""
        return self._detail(self.column_sums, name, 1)

    def heads(self, name: str) -> Float[Tensor, "head prompt"]:
        """What each head of an attention matrix accounts for: of Q, K and V, whose outputs it is, by rows; of the output
        projection by columns. Keys and values have the model's key-value heads.

        Raises `UnknownNameError` for other matrices, and if rows were not kept.
        """
        kind = kind_of_name(name)
        by_columns = kind in ("W_O", "o_proj", "out_proj", "dense", "c_proj", "o")
        if not by_columns and kind not in ("W_Q", "W_K", "W_V", "q_proj", "k_proj", "v_proj", "q", "k", "v"):
            raise UnknownNameError(f"{name} is no attention matrix that parts into heads")
        detail = self.columns(name) if by_columns else self.rows(name)
        return detail.unflatten(0, (-1, int(self.settings["d_head"]))).sum(1)

    def order(self) -> list[str]:
        """Names of the matrices, the ones whose restoring is predicted to bring most back first (`change` of `effects`; for
        models that do not differ, by name's order).
        """
        gain = torch.tensor([e.value for e in self.effects.change], dtype=torch.float64).nan_to_num()
        return [self.names[i] for i in gain.argsort(descending=True, stable=True).tolist()]

    def top(self, k: int = 10) -> "pd.DataFrame":
        """The `k` matrices whose restoring is predicted to bring most back."""
        return self.table.sort_values("change", ascending=False, kind="stable").head(k).reset_index(drop=True)

    def check(self, pair: Any, prompts: Any, **options: Any) -> "AttributionCheck":
        """Against restoring each matrix exactly: `tracelens.causal.attribution_check.check_attribution`."""
        from tracelens.causal.attribution_check import check_attribution

        return check_attribution(self, pair, prompts, **options)

    def to_dataframe(self) -> "pd.DataFrame":
        """`table`."""
        return self.table

    def plot(self, **options: Any) -> "go.Figure":
        """Heatmap by layer and kind of matrix, intervals on hover."""
        from tracelens.views.attribution_figures import attribution_figure

        return attribution_figure(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the tensors."""
        plain = ("names", "layers", "shapes", "at", "metric", "unit", "others", "prompts", "settings")
        return encode({name: getattr(self, name) for name in plain})

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, which `load` reads back."""
        single = ("first_order", "reference", "quantized", "other_first_order", "at_reference", "at_quantized")
        tensors: dict[str, Tensor] = {name: value for name in single if (value := getattr(self, name)) is not None}
        for which in ("row_sums", "column_sums"):
            tensors |= {json.dumps([which, name]): value for name, value in getattr(self, which).items()}
        return write_tensors(path, KIND, self.to_dict(), tensors)

    @classmethod
    def load(cls, path: str | Path) -> "WeightAttribution":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        return read_tensors(path, KIND, cls._of)

    @classmethod
    def _of(cls, data: dict[str, Any], tensors: dict[str, Tensor]) -> "WeightAttribution":
        for name in ("names", "layers", "others", "prompts"):
            data[name] = tuple(data[name])
        data["shapes"] = tuple(tuple(shape) for shape in data["shapes"])
        found: dict[str, Any] = {"row_sums": {}, "column_sums": {}}
        for key, value in tensors.items():
            if key.startswith("["):
                which, name = json.loads(key)
                found[which][name] = value
            else:
                found[key] = value
        return cls(**data, **found)

    def _detail(self, kept: dict[str, Tensor], name: str, axis: int) -> Tensor:
        if name not in self.names:
            raise UnknownNameError.of("weight matrix", name, self.names)
        if name in kept:
            return kept[name]
        index = self.names.index(name)
        if not self.first_order[index].any():
            return torch.zeros(self.shapes[index][axis], len(self.reference))
        raise UnknownNameError(f"rows and columns of {name} were not kept; attribute with rows=True")


def kind_of_name(name: str) -> str:
    """ "blocks.3.attn._W_K" → "W_K", "model.layers.3.self_attn.q_proj.weight" → "q_proj"."""
    return re.sub(r"\.weight$", "", name).rpartition(".")[2].lstrip("_")


def means(values: Float64[Tensor, "row prompt"]) -> list[Estimate]:
    """Mean of each row with its 95 % bootstrap interval over prompts."""
    n = values.shape[1]
    replicates = bootstrap_weights(n) @ values.T / n
    return [
        percentile_interval(float(row.mean()), column, n=n) for row, column in zip(values, replicates.T, strict=True)
    ]


def put(table: "pd.DataFrame", name: str, estimates: Sequence[Estimate]) -> None:
    """Columns of values and of the ends of their intervals."""
    table[name] = [e.value for e in estimates]
    table[f"{name}_low"] = [e.low for e in estimates]
    table[f"{name}_high"] = [e.high for e in estimates]
