"""First-order attribution against the exact change: each matrix restored, or quantized alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.agreement import agreement, rank_correlations
from tracelens.causal.arms import evaluating
from tracelens.causal.attribution_result import WeightAttribution, kind_of_name, means, put
from tracelens.causal.component_files import read_tensors, write_tensors
from tracelens.causal.effects import Effects, effects
from tracelens.causal.gradients import Measured
from tracelens.causal.matrices import Matrix, Part, choose, matrices, restored
from tracelens.causal.prompts import Batch, PromptSet, Spans
from tracelens.causal.readout import as_metric, default_metric
from tracelens.chat import Chat
from tracelens.errors import PairMismatchError, UnknownNameError
from tracelens.pair import PrecisionPair
from tracelens.sites import Site
from tracelens.stats import Estimate, bootstrap_weights, percentile_interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "tracelens_attribution_check"
How = Literal["restore", "alone"]
TENSORS = ("predicted", "exact", "reference", "quantized")


@dataclass(frozen=True, eq=False)
class AttributionCheck:
    """What first order predicts of each matrix beside what it does.

    Attributes:
        names, layers: of the matrices that were run.
        how: "restore": the exact change is the quantized model's metric less that with this matrix restored; "alone": the metric
            of the reference with this matrix quantized, less the reference's. The two differ by what matrices do together.
        at: where the gradient was taken.
        metric, unit: what was read.
        predicted: `WeightAttribution.first_order` of these matrices.
        exact: the measured change.
        reference, quantized: the metric of each prompt in either model.
        prompts: the texts.
    """

    names: tuple[str, ...] = field(repr=False)
    layers: tuple[int, ...] = field(repr=False)
    how: str
    at: str
    metric: str
    unit: str
    predicted: Float64[Tensor, "matrix prompt"] = field(repr=False)
    exact: Float64[Tensor, "matrix prompt"] = field(repr=False)
    reference: Float64[Tensor, "prompt"] = field(repr=False)
    quantized: Float64[Tensor, "prompt"] = field(repr=False)
    prompts: tuple[str, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        found = self.summary
        return (
            f"AttributionCheck({len(self.names)} matrices, {self.how}, gradient at {self.at}: over matrices and prompts r "
            f"{found['pearson']:.3f}, slope {found['slope']:.3f}; rank correlation of matrices {found['ranks']})"
        )

    @cached_property
    def predicted_effects(self) -> Effects:
        """Predicted effects of restoring; see `tracelens.causal.effects`."""
        return effects(self.quantized - self.predicted, self.quantized, self.reference)

    @cached_property
    def exact_effects(self) -> Effects:
        """Measured effects of restoring; with "alone", as if restoring gave back what quantizing took."""
        return effects(self.quantized - self.exact, self.quantized, self.reference)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`agreement` of predicted with exact over all matrices and prompts: slope, pearson, spearman, r2. And over matrices,
        Spearman's rank correlation `ranks` of their mean predicted and exact change towards the reference, with its 95 %
        bootstrap interval over prompts; and `best`, whether both name the same matrix as the one that matters most.
        """
        ranks = self._ranks()
        ours, theirs = (
            torch.tensor([e.value for e in found.change]) for found in (self.predicted_effects, self.exact_effects)
        )
        best = bool(ours.argmax() == theirs.argmax()) if len(ours) and bool(ours.isfinite().all()) else None
        return agreement(self.predicted.flatten(), self.exact.flatten()) | {"ranks": ranks, "best": best}

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a matrix: name, layer, kind; predicted and exact (mean change over prompts, metric's unit), effect_predicted
        and effect_exact (of restoring, normalised), each with its 95 % bootstrap interval; and `agreement` over prompts.
        """
        import pandas as pd

        kinds = [kind_of_name(name) for name in self.names]
        table = pd.DataFrame({"name": self.names, "layer": self.layers, "kind": kinds})
        for name, values in (("predicted", self.predicted), ("exact", self.exact)):
            put(table, name, means(values))
        put(table, "effect_predicted", self.predicted_effects.effect)
        put(table, "effect_exact", self.exact_effects.effect)
        found = [agreement(ours, theirs) for ours, theirs in zip(self.predicted, self.exact, strict=True)]
        for key in ("slope", "pearson", "spearman", "r2"):
            table[key] = [row[key] for row in found]
        return table

    def to_dataframe(self) -> "pd.DataFrame":
        """`table`."""
        return self.table

    def plot(self, **options: Any) -> "go.Figure":
        """Predicted against exact, a point for each matrix."""
        from tracelens.views.attribution_figures import check_figure

        return check_figure(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the tensors."""
        plain = ("how", "at", "metric", "unit")
        many = ("names", "layers", "prompts")
        return {name: getattr(self, name) for name in plain} | {name: list(getattr(self, name)) for name in many}

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, which `load` reads back."""
        return write_tensors(path, KIND, self.to_dict(), {name: getattr(self, name) for name in TENSORS})

    @classmethod
    def load(cls, path: str | Path) -> "AttributionCheck":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""

        def made(data: dict[str, Any], tensors: dict[str, Tensor]) -> "AttributionCheck":
            many: dict[str, Any] = {name: tuple(data.pop(name)) for name in ("names", "layers", "prompts")}
            return cls(**{**data, **many, **tensors})

        return read_tensors(path, KIND, made)

    def _ranks(self) -> Estimate:
        sign = (self.reference - self.quantized).sign()
        ours, theirs = -self.predicted * sign, -self.exact * sign
        n = ours.shape[1]
        if len(ours) < 3 or not ours.any() or not theirs.any():
            return Estimate(*[float("nan")] * 3, n=n, method="bootstrap")
        weights = bootstrap_weights(n)
        value = rank_correlations(ours.mean(1)[None], theirs.mean(1)[None])[0]
        return percentile_interval(float(value), rank_correlations(weights @ ours.T, weights @ theirs.T), n=n)


@torch.no_grad()
def check_attribution(
    attribution: WeightAttribution,
    pair: PrecisionPair,
    prompts: Any,
    *,
    metric: Any = None,
    names: Sequence[str] | None = None,
    how: str | None = None,
    spans: Spans | None = None,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    progress: bool = False,
) -> AttributionCheck:
    """Runs the model once for each matrix, with it restored (quantized), and compares with the prediction.

    Args:
        attribution: what `attribute_weights` gave for this pair and these prompts.
        metric: the one it was given.
        names: of matrices; None is all of them.
        how: "restore" puts the reference's matrix into the quantized model, "alone" the quantized matrix into the reference. By
            default what the gradient predicts: "alone" for one at the reference, "restore" otherwise.

    Raises `UnknownNameError` for names or `how` that do not exist, `PairMismatchError` for another pair, prompts or metric than
    those of the attribution.
    """
    how = ("alone" if attribution.at == "reference" else "restore") if how is None else how
    if how not in get_args(How):
        raise UnknownNameError.of("check", how, get_args(How))
    tokenizer = pair.tokenizer if tokenizer is None else tokenizer
    prompt_set = PromptSet.of(prompts, pair.reference, tokenizer=tokenizer, spans=spans, chat=chat)
    chosen = default_metric(prompt_set, tokenizer) if metric is None else as_metric(metric)
    if prompt_set.texts != attribution.prompts or chosen.name != attribution.metric:
        raise PairMismatchError(
            f"the attribution is of {len(attribution.prompts)} prompts and {attribution.metric}, the check of {len(prompt_set)} "
            f"prompts and {chosen.name}; check with the same prompts and metric"
        )
    found = choose(matrices(pair.reference, pair.quantized), attribution.names if names is None else names)
    models = {"reference": pair.reference, "quantized": pair.quantized}
    target = "quantized" if how == "restore" else "reference"
    job = Measured(models[target], chosen.bound(prompt_set, pair.reference.cfg.d_vocab), models)
    with evaluating(*models.values()):
        plain, moved = _exact(job, prompt_set, found, how, batch_size, progress)
    _same(plain, getattr(attribution, target), target)
    rows = [attribution.names.index(matrix.name) for matrix in found]
    return AttributionCheck(
        names=tuple(matrix.name for matrix in found),
        layers=tuple(matrix.layer for matrix in found),
        how=how,
        at=attribution.at,
        metric=attribution.metric,
        unit=attribution.unit,
        predicted=attribution.first_order[rows],
        exact=plain - moved if how == "restore" else moved - plain,
        reference=attribution.reference,
        quantized=attribution.quantized,
        prompts=attribution.prompts,
    )


def _exact(
    job: Measured, prompts: PromptSet, found: Sequence[Matrix], how: str, batch_size: int, progress: bool
) -> tuple[Float64[Tensor, "prompt"], Float64[Tensor, "matrix prompt"]]:
    """The target's metric as it is, and with each matrix exchanged; runs begin at the layer of the matrix."""
    from tqdm.auto import tqdm

    plain = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
    moved = torch.full((len(found), len(prompts)), torch.nan, dtype=torch.float64)
    with tqdm(total=len(found) * len(prompts), desc="exact change", unit="run", disable=not progress) as bar:
        for batch in prompts.batches(batch_size):
            plain[batch.prompt] = job(batch).double().cpu()
            for layer in sorted({matrix.layer for matrix in found}):
                options = _from_layer(job, batch, layer)
                for index, matrix in enumerate(found):
                    if matrix.layer != layer:
                        continue
                    with restored([Part(matrix if how == "restore" else _swapped(matrix))]):
                        moved[index, batch.prompt] = job(batch, **options).double().cpu()
                    bar.update(len(batch))
    return plain, moved


def _from_layer(job: Measured, batch: Batch, layer: int) -> dict[str, Any]:
    """How a run of the batch begins at a layer: its residual stream there, where the model can start from it."""
    if layer == 0 or not job.runner.resumes:
        return {}
    entry = Site(layer, "resid_pre")
    held = job.runner.run(batch.tokens, keep=[entry], stop=layer + 1)[1]
    return {"start": layer, "residual": held[entry]}


def _swapped(matrix: Matrix) -> Matrix:
    return replace(matrix, reference=matrix.quantized, quantized=matrix.reference)


def _same(found: Float64[Tensor, "prompt"], expected: Float64[Tensor, "prompt"], target: str) -> None:
    """Batches of other sizes sum in another order; the difference is of rounding size."""
    scale = max(1.0, float(expected.abs().max()))
    if (off := float((found - expected).abs().max())) > 1e-2 * scale:
        raise PairMismatchError(
            f"the {target} model's metric is up to {off:.3g} off that of the attribution; check with the pair it was made of"
        )
