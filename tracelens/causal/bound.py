"""How much a metric can move, to first order, for what quantization does to activations: Σ |∇m| · |δ|."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tracelens.causal.arms import evaluating
from tracelens.causal.bound_result import DriftBound, DriftBounds
from tracelens.causal.components import arm_of, components_of
from tracelens.causal.gradients import Measured, graph_rows, site_gradients
from tracelens.causal.memory import site_bytes
from tracelens.causal.places import PATTERNS, Place
from tracelens.causal.prompts import Batch, PromptSet, Spans
from tracelens.causal.readout import Metric, as_metric, check_baselines, default_metric
from tracelens.causal.rerun import Edit, Rerunner
from tracelens.chat import Chat
from tracelens.errors import UnknownNameError
from tracelens.pair import PrecisionPair
from tracelens.sites import Site

Errors = Literal["total", "local"]
CUTS = ("resid_pre", "z", "resid_mid")
"""Where a local error ends: what is read behind these is of the reference again."""


def drift_bound(
    pair: PrecisionPair,
    prompts: Any,
    *,
    metric: Any = None,
    components: Sequence[str | Place] = ("head", "mlp"),
    errors: str = "total",
    label: str = "quantized",
    spans: Spans | None = None,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
) -> DriftBound:
    """The drift-weighted bound of one pair; see `drift_bounds`."""
    return drift_bounds(
        pair.reference,
        {label: pair.quantized},
        prompts,
        metric=metric,
        components=components,
        errors=errors,
        spans=spans,
        chat=chat,
        tokenizer=pair.tokenizer if tokenizer is None else tokenizer,
        batch_size=batch_size,
        memory_budget=memory_budget,
        progress=progress,
    )[label]


def drift_bounds(
    reference: Any,
    quantized: Mapping[str, Any],
    prompts: Any,
    *,
    metric: Any = None,
    components: Sequence[str | Place] = ("head", "mlp"),
    errors: str = "total",
    spans: Spans | None = None,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
) -> DriftBounds:
    """For each precision and prompt, the bound Σ_c |∇_{a_c} m| · |δ_c| on the metric's change, beside the change.

    a_c is what component c holds in the reference (a head's z, before its part of W_O; an MLP's output), δ_c = a_c of the
    quantized model − a_c of the reference, and ∇ the gradient of the metric at the reference, taken once for all precisions: one
    forward and one backward pass of the reference, and one forward pass of each quantized model. Three readings of the
    product, each at most the next (`DriftBound`): Σ ∇ · δ with its signs, which predicts the change; Σ |∇| |δ| element by
    element; ‖∇‖₂ ‖δ‖₂ over a component's positions and channels (Cauchy & Schwarz).

    It is no bound. It is first order: for a large δ the gradient at the reference says little, and the change can be
    larger. And `errors="total"`, the study's, counts errors more than once. The gradient at an early head runs through all
    that reads it, later heads included; and δ of the later heads already holds what the early head's error did to them. With
    δ = own + propagated, the propagated part is in both terms: one error in the first layer of an otherwise exact model is
    counted in every later component it passes through, so that Σ ∇ · δ is not the first-order change and the bound grows with
    depth. `errors="local"` takes of each component only the error of its own weights: the quantized model is run with what the
    reference holds before each of them, at the cost of one further run of the reference. Each weight's error is then counted
    once, and Σ ∇ · δ over "head", "attn" and "mlp" is, for small errors, the first-order change of all matrices in the
    blocks, as in `attribute_weights` (δ itself is not first order: softmax and MLP bend). A local δ of an attention layer
    (`attn_out`) is that of its output projection alone; with "total" errors, "attn" and "head" hold the same errors and
    should not be summed.

    What no component covers: embeddings, final norm and unembedding, and rounding between components.

    Args:
        quantized: name → model; each must fit the reference as in a `PrecisionPair`.
        metric: what `as_metric` takes; None is `default_metric`. At the reference the gradient of `KL("reference")` is zero.
        components: kinds ("head", "mlp", "attn") or places at whole positions, as `components_of` takes; no features.
        errors: "total" or "local".
        batch_size: prompts of a pass at most. memory_budget: bytes; by default a share of what is free.

    Parameters are left as they are, `requires_grad` included. Raises `UnknownNameError` for components or `errors` that do not
    exist, `PairMismatchError`, `PromptError`, `MetricInputError`, `MemoryBudgetError`.
    """
    if errors not in get_args(Errors):
        raise UnknownNameError.of("kind of errors", errors, get_args(Errors))
    if not quantized:
        raise UnknownNameError("there are no quantized models; give at least one, {name: model}")
    pairs = {name: PrecisionPair(reference, model, tokenizer=tokenizer) for name, model in quantized.items()}
    tokenizer = getattr(reference, "tokenizer", None) if tokenizer is None else tokenizer
    prompt_set = PromptSet.of(prompts, reference, tokenizer=tokenizer, spans=spans, chat=chat)
    chosen = default_metric(prompt_set, tokenizer) if metric is None else as_metric(metric)
    check_baselines(chosen, ("reference",))
    places = _places(reference, components)
    bound = chosen.bound(prompt_set, reference.cfg.d_vocab)
    job = _Job(reference, dict(quantized), prompt_set, bound, places, errors)
    with evaluating(reference, *quantized.values()):
        sums = job.run(batch_size, memory_budget, progress)
    return DriftBounds(
        {
            name: DriftBound(
                components=places,
                label=name,
                errors=errors,
                metric=chosen.name,
                unit=chosen.unit,
                reference=job.reference_values,
                quantized=one.quantized,
                signed=one.signed,
                elementwise=one.elementwise,
                norms=one.norms,
                prompts=prompt_set.texts,
                settings={"pair": pairs[name].settings},
            )
            for name, one in sums.items()
        }
    )


def _places(model: Any, components: Sequence[str | Place]) -> tuple[Place, ...]:
    places = components_of(model, components)
    for place in places:
        if place.where is not None:
            raise UnknownNameError(f"{place} is at some positions; the bound is over all positions of a component")
        if place.feature is not None or place.site.name in PATTERNS or arm_of(place) != (place,):
            raise UnknownNameError(
                f"{place} is no component that holds activations of its own; give heads, MLPs, attention layers or sites"
            )
    return places


class _Sums:
    """Of one quantized model."""

    def __init__(self, n_components: int, n_prompts: int) -> None:
        shape = (n_components, n_prompts)
        self.signed, self.elementwise, self.norms = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        self.quantized = torch.full((n_prompts,), torch.nan, dtype=torch.float64)


@dataclass
class _Job:
    reference: Any
    quantized: dict[str, Any]
    prompts: PromptSet
    metric: Metric
    places: tuple[Place, ...]
    errors: str

    def run(self, batch_size: int, memory_budget: int | None, progress: bool) -> dict[str, _Sums]:
        from tqdm.auto import tqdm

        self.sites = list(dict.fromkeys(place.site for place in self.places))
        self.reference_values = torch.full((len(self.prompts),), torch.nan, dtype=torch.float64)
        sums = {name: _Sums(len(self.places), len(self.prompts)) for name in self.quantized}
        source = Measured(self.reference, self.metric, {"reference": self.reference})
        pos = max(map(len, self.prompts.tokens))
        kept = 4 * sum(site_bytes(self.reference.cfg, site, pos) for site in self.sites)
        size = graph_rows(self.reference, self.prompts, batch_size, memory_budget, kept)
        total = len(self.prompts) * (1 + len(sums))
        with tqdm(total=total, desc="drift-weighted bound", unit="run", disable=not progress) as bar:
            for batch in self.prompts.batches(size):
                values, ours, gradients = site_gradients(source, batch, self.sites)
                self.reference_values[batch.prompt] = values.double().cpu()
                bar.update(len(batch))
                for name, model in self.quantized.items():
                    job = Measured(model, self.metric, {"reference": self.reference})
                    with torch.no_grad():
                        changed, theirs = self._held(job, batch)
                        sums[name].quantized[batch.prompt] = changed.double().cpu()
                        self._add(sums[name], batch, ours, theirs, gradients)
                    bar.update(len(batch))
        return sums

    def _held(self, job: Measured, batch: Batch) -> tuple[Float[Tensor, "prompt"], dict[Site, Tensor]]:
        """The quantized model's metric, and what it holds at the sites."""
        held: dict[Site, Tensor] = {}

        def keeping(site: Site) -> Edit:
            def keep(value: Tensor) -> Tensor:
                held[site] = value
                return value

            return keep

        values = job(batch, {str(site): keeping(site) for site in self.sites})
        if self.errors == "local":
            # Only sites are of this run: what comes before each of them is the reference's.
            self._local(job.runner, batch, held)
        return values, held

    def _local(self, runner: Rerunner, batch: Batch, held: dict[Site, Tensor]) -> None:
        hooks = getattr(runner.model, "hook_dict", {})
        every = [Site(layer, name) for layer in range(runner.n_layers) for name in CUTS]
        cuts = [site for site in every if str(site) in hooks]
        before = Rerunner(self.reference).run(batch.tokens, keep=cuts)[1]

        def at(site: Site) -> Edit:
            def edit(value: Tensor) -> Tensor:
                if site in self.sites:
                    held[site] = value
                return before.get(site, value)

            return edit

        runner.run(batch.tokens, edits={str(site): at(site) for site in dict.fromkeys([*cuts, *self.sites])})

    def _add(
        self,
        sums: _Sums,
        batch: Batch,
        ours: dict[Site, Tensor],
        theirs: dict[Site, Tensor],
        gradients: dict[Site, Tensor],
    ) -> None:
        found: dict[Site, tuple[Tensor, Tensor, Tensor]] = {}
        for site in self.sites:
            gradient, error = gradients[site].double(), theirs[site].double() - ours[site].double()
            heads = gradient.ndim == 4
            dims = (1, 3) if heads else (1, 2)
            products = gradient * error
            size = gradient.square().sum(dims).sqrt() * error.square().sum(dims).sqrt()
            found[site] = (products.sum(dims).cpu(), products.abs().sum(dims).cpu(), size.cpu())
        for index, place in enumerate(self.places):
            for target, values in zip((sums.signed, sums.elementwise, sums.norms), found[place.site], strict=True):
                target[index, batch.prompt] = _of_unit(values, place)


def _of_unit(values: Float64[Tensor, "prompt *head"], place: Place) -> Float64[Tensor, "prompt"]:
    if place.unit is not None:
        return values[:, place.unit]
    return values if values.ndim == 1 else values.sum(1)
