"""Which weight matrices account for a metric's change across precisions, to first order: Σ ∇W · (W_quant − W_ref)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tracelens.causal.arms import evaluating
from tracelens.causal.attribution_result import WeightAttribution
from tracelens.causal.gradients import Measured, check_gradient, frozen, gradients_to, graph_rows
from tracelens.causal.matrices import Matrix, matrices
from tracelens.causal.prompts import PromptSet, Spans
from tracelens.causal.readout import Metric, as_metric, check_baselines, default_metric
from tracelens.chat import Chat
from tracelens.errors import UnknownNameError
from tracelens.pair import PrecisionPair

At = Literal["reference", "quantized", "both"]


def attribute_weights(
    pair: PrecisionPair,
    prompts: Any,
    *,
    metric: Any = None,
    at: str = "reference",
    rows: bool = False,
    spans: Spans | None = None,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
) -> WeightAttribution:
    """The part of the metric's change, quantized − reference, that each weight matrix accounts for to first order, by prompt:
    Σ over its weights of ∇W · (W_quant − W_ref). One forward and one backward pass for each prompt.

    The base point decides what is predicted. With ∇W `at` the reference it is what the metric loses when this matrix alone is
    quantized (damage); at the quantized model, the negative of what restoring this matrix alone gives (repair). "both" takes
    the mean of the two gradients: the trapezoid rule for the path from one model to the other, whose sum over matrices is
    right up to terms of third order where either end's is right up to second. The sign is the same for all three: a matrix
    that quantization made lower the metric has a negative entry. In the terms of Syed et al. (2023, arXiv 2310.10348), the
    reference is the clean run and the quantized model the corrupted one, and weights stand where activations do.

    First order holds for small errors. Coarse formats are not small: `WeightAttribution.check` compares with restoring each
    matrix exactly. Attributions of single matrices leave out what two of them do together. The gradient of `KL("reference")`
    at the reference, its minimum, is zero, and so is every attribution there.

    Weights that are not linear layers inside the blocks (embeddings, biases, norms) and differ between the models have entries of
    their own (`others`). Rounding of activations is not attributed: with `at="quantized"` gradients go straight through it.
    What is left, `unattributed`, is that, and all that is not first order.

    Args:
        prompts: whatever `PromptSet.of` takes, with `spans`, `chat` and `tokenizer`.
        metric: what `as_metric` takes; None is `default_metric`.
        at: where the gradient is taken.
        rows: keep the sums of each matrix's rows (output channels) and of its columns by prompt too, which `.rows`, and `.heads`
            need: 4 bytes for each row, column and prompt.
        batch_size: prompts of a run without gradients. memory_budget: bytes; a pass with the graph that would not fit is refused.

    Raises `UnknownNameError` for another `at`, `PairMismatchError`, `PromptError`, `MetricInputError` for a metric without a
    gradient, with NaN or of the wrong shape, `MemoryBudgetError`.
    """
    if at not in get_args(At):
        raise UnknownNameError.of("base point", at, get_args(At))
    tokenizer = pair.tokenizer if tokenizer is None else tokenizer
    prompt_set = PromptSet.of(prompts, pair.reference, tokenizer=tokenizer, spans=spans, chat=chat)
    chosen = default_metric(prompt_set, tokenizer) if metric is None else as_metric(metric)
    check_baselines(chosen, ("reference", "quantized"))
    job = _Job(
        {"reference": pair.reference, "quantized": pair.quantized},
        prompt_set,
        chosen.bound(prompt_set, pair.reference.cfg.d_vocab),
        batch_size,
        memory_budget,
        progress,
    )
    found = matrices(pair.reference, pair.quantized)
    changed, others = job.changed(found)
    with evaluating(pair.reference, pair.quantized):
        values = {name: job.values(name) for name in job.models}
        ends = {name: job.attributed(name, changed + others, rows) for name in (job.models if at == "both" else (at,))}
    sums = {name: job.placed(end, found, changed) for name, end in ends.items()}
    index = slice(len(changed), None)
    return WeightAttribution(
        names=tuple(matrix.name for matrix in found),
        layers=tuple(matrix.layer for matrix in found),
        shapes=tuple(matrix.shape for matrix in found),
        at=at,
        metric=chosen.name,
        unit=chosen.unit,
        first_order=torch.stack(list(sums.values())).mean(0),
        reference=values["reference"],
        quantized=values["quantized"],
        others=tuple(weight.name for weight in others),
        other_first_order=torch.stack([end.total[index] for end in ends.values()]).mean(0),
        at_reference=sums.get("reference") if at == "both" else None,
        at_quantized=sums.get("quantized") if at == "both" else None,
        row_sums=_mean([end.rows for end in ends.values()]),
        column_sums=_mean([end.columns for end in ends.values()]),
        prompts=prompt_set.texts,
        settings={"pair": pair.settings, "d_head": pair.reference.cfg.d_head},
    )


@dataclass(frozen=True)
class _Weight:
    """A parameter that differs between the models; `matrix` unless it is no linear layer's."""

    name: str
    reference: Tensor
    quantized: Tensor
    matrix: Matrix | None = None

    def products(self, gradient: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """∇W · (W_quant − W_ref), element by element, in float32 or wider."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        change = self.quantized.detach().to(wide) - self.reference.detach().to(wide)
        return change.mul_(gradient)


@dataclass(frozen=True)
class _End:
    """Sums at one base point."""

    total: Float64[Tensor, "weight prompt"]
    rows: dict[str, Float[Tensor, "row prompt"]]
    columns: dict[str, Float[Tensor, "column prompt"]]


@dataclass
class _Job:
    models: dict[str, Any]
    prompts: PromptSet
    metric: Metric
    batch_size: int
    memory_budget: int | None
    progress: bool

    def changed(self, found: Sequence[Matrix]) -> tuple[list[_Weight], list[_Weight]]:
        """Matrices that differ between the models, and other parameters that do."""
        inside = {id(matrix.reference) for matrix in found}
        mine = [_Weight(m.name, m.reference, m.quantized, m) for m in found if _differ(m.reference, m.quantized)]
        theirs = dict(named_parameters(self.models["quantized"]))
        rest = [
            _Weight(name, parameter, theirs[name])
            for name, parameter in named_parameters(self.models["reference"])
            if id(parameter) not in inside and name in theirs and _differ(parameter, theirs[name])
        ]
        return mine, rest

    @torch.no_grad()
    def values(self, name: str) -> Float64[Tensor, "prompt"]:
        """The metric of each prompt."""
        measured = Measured(self.models[name], self.metric, self.models)
        values = torch.full((len(self.prompts),), torch.nan, dtype=torch.float64)
        for batch in self.prompts.batches(self.batch_size):
            values[batch.prompt] = measured(batch).double().cpu()
        return values

    def attributed(self, name: str, weights: Sequence[_Weight], detailed: bool) -> _End:
        """Sums for the gradients at one of the models.

        Prompts go one at a time: the gradient of a weight is then that of a prompt, whatever the architecture does with it.
        """
        from tqdm.auto import tqdm

        total = torch.zeros(len(weights), len(self.prompts), dtype=torch.float64)
        end = _End(total, {}, {})
        if not weights:
            return end
        largest = max(weight.reference.numel() for weight in weights)
        graph_rows(self.models[name], self.prompts, 1, self.memory_budget, 3 * 4 * largest)
        measured = Measured(self.models[name], self.metric, self.models)
        prompt = -1

        def read(index: int, gradient: Tensor) -> None:
            weight = weights[index]
            products = weight.products(gradient)
            total[index, prompt] = products.sum(dtype=torch.float64).cpu()
            if detailed and weight.matrix is not None:
                flat = weight.matrix.flat(products)
                for axis, sums in ((1, end.rows), (0, end.columns)):
                    if weight.name not in sums:
                        sums[weight.name] = torch.zeros(flat.shape[1 - axis], len(self.prompts))
                    sums[weight.name][:, prompt] = flat.sum(axis).float().cpu()

        parameters = [getattr(weight, name) for weight in weights]
        with frozen(self.models[name].parameters()), gradients_to(parameters, read):
            bar = tqdm(
                self.prompts.batches(1), desc=f"gradients of the {name}", unit="prompt", disable=not self.progress
            )
            for batch in bar:
                prompt = int(batch.prompt[0])
                value = measured(batch)
                check_gradient(self.metric, value)
                value.sum().backward()
        return end

    def placed(
        self, end: _End, found: Sequence[Matrix], changed: Sequence[_Weight]
    ) -> Float64[Tensor, "matrix prompt"]:
        """Sums of all matrices; 0 for those that quantization left alone."""
        where = {matrix.name: i for i, matrix in enumerate(found)}
        out = torch.zeros(len(found), len(self.prompts), dtype=torch.float64)
        out[[where[weight.name] for weight in changed]] = end.total[: len(changed)]
        return out


def named_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters; of a bridge, the names of transformers."""
    for name, parameter in model.named_parameters():
        yield name.replace("._original_component", ""), parameter


def _differ(ours: Tensor, theirs: Tensor) -> bool:
    if ours is theirs or (ours.data_ptr() == theirs.data_ptr() and ours.shape == theirs.shape):
        return False
    return not torch.equal(ours, theirs)


def _mean(ends: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([end[name] for end in ends]).mean(0) for name in ends[0]}
