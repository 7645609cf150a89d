"""Gradients of a metric, prompt by prompt: with respect to weights, and to what sites hold."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.causal.memory import rows_that_fit, run_bytes
from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.readout import Context, Metric, checked
from tracelens.causal.rerun import Edit, Rerunner
from tracelens.errors import MetricInputError
from tracelens.sites import Site


@dataclass
class Measured:
    """A model whose metric is read, with or without a graph behind it.

    Attributes:
        model: the one that is run.
        metric: bound to the prompts.
        models: name → model of the unpatched runs that the metric may compare with.
    """

    model: Any
    metric: Metric
    models: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runner = Rerunner(self.model)

    def __call__(
        self, batch: Batch, edits: Mapping[str, Edit] | None = None, **options: Any
    ) -> Float[Tensor, "prompt"]:
        """The metric of each prompt of a batch; `options` are those of `Rerunner.run`."""
        logits, _ = self.runner.run(batch.tokens, edits=edits, whole=self.metric.whole, **options)
        assert logits is not None
        context = Context(batch.prompt.to(logits.device), lambda name: self._baseline(name, batch))
        return checked(self.metric, self.metric(logits, context), logits, context)

    @torch.no_grad()
    def _baseline(self, name: str, batch: Batch) -> Tensor:
        logits, _ = Rerunner(self.models[name]).run(batch.tokens, whole=self.metric.whole)
        assert logits is not None
        return logits


@contextmanager
def gradients_to(parameters: Sequence[Tensor], read: Callable[[int, Float[Tensor, "..."]], None]) -> Iterator[None]:
    """Within it a backward pass hands the gradient of each parameter to `read`, by its number, and keeps none of them.

    So one matrix's gradient is held at a time. Other parameters of the model get no gradient from it, unless they asked for
    one: put `frozen` around it. `requires_grad` and `.grad` are afterwards as they were.
    """
    handles: list[Any] = []
    before = [(p, p.requires_grad, p.grad) for p in parameters]

    def reader(index: int) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            read(index, gradient)

        return take

    try:
        for index, parameter in enumerate(parameters):
            parameter.requires_grad_(True)
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(reader(index)))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.grad = gradient
            parameter.requires_grad_(required)


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within it none of these parameters asks for gradients: backward passes go to activations alone."""
    asked = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def site_gradients(
    job: Measured, batch: Batch, sites: Sequence[Site]
) -> tuple[Float[Tensor, "prompt"], dict[Site, Tensor], dict[Site, Tensor]]:
    """The metric, what the sites hold, and the metric's gradient there, one backward pass for the batch.

    A prompt's metric depends on its own row alone, so the gradient of the sum over prompts is that of each prompt.
    The gradient is the total one: through everything that reads the site, later layers included.
    Raises `MetricInputError` for a metric without a gradient.
    """
    held: dict[Site, Tensor] = {}

    def keeping(site: Site) -> Edit:
        def keep(value: Tensor) -> Tensor:
            # A bridge hands hooks a converted copy; what the hook gives back is what is computed with.
            held[site] = value if value.requires_grad else value.detach().requires_grad_(True)
            return held[site]

        return keep

    entry = Site(0, "resid_pre")
    edits: dict[str, Edit] = {str(entry): lambda value: value.detach().requires_grad_(True)}
    edits |= {str(site): keeping(site) for site in sites}
    with torch.enable_grad(), frozen(job.model.parameters()):
        values = job(batch, edits)
        check_gradient(job.metric, values)
        gradients = torch.autograd.grad(values.sum(), [held[site] for site in sites], allow_unused=True)
    found = {
        site: torch.zeros_like(held[site]) if gradient is None else gradient
        for site, gradient in zip(sites, gradients, strict=True)
    }
    return values.detach(), {site: value.detach() for site, value in held.items()}, found


def check_gradient(metric: Metric, values: Tensor) -> None:
    """Raises `MetricInputError` if the values of a metric do not depend on the logits in a way that can be differentiated."""
    if not values.requires_grad:
        raise MetricInputError(
            f"metric {metric.name!r} has no gradient: it detaches the logits or counts; use one that is differentiable"
        )


def graph_rows(model: Any, prompts: PromptSet, batch_size: int, budget: int | None, kept: int = 0) -> int:
    """How many prompts of one pass fit with the graph of all layers, at most `batch_size`, at the longest prompt.

    `kept` bytes go beside it. Raises `MemoryBudgetError`, with the estimate, if not even one does.
    """
    pos = max(map(len, prompts.tokens))
    row = (2 * model.cfg.n_layers + 1) * run_bytes(model.cfg, pos, ())
    return min(batch_size, rows_that_fit(budget, kept, row, pos, torch.device(model.cfg.device)))
