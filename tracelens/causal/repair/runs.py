"""Plain runs of the two models of a pair, and gradients of a metric in them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.arms import ArmRunner, evaluating
from tracelens.causal.gradients import Measured, site_gradients
from tracelens.causal.gradients import check_gradient as check_differentiable
from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.readout import KL, Context, Metric, checked
from tracelens.causal.rerun import Rerunner
from tracelens.errors import MetricInputError, PairMismatchError
from tracelens.sites import Site

Gradient = Literal["reference", "quantized", "both"]
"""In which model's run a gradient is taken; "both" is the mean of the two."""
Name = Literal["reference", "quantized"]


@dataclass
class Runs:
    """The two models, and how they are run.

    Attributes:
        baselines: name → logits of that model as it was given, for metrics that compare with it.
    """

    pair: Any
    saes: Mapping[Site, Any] | None = None
    batch_size: int = 32
    memory_budget: int | None = None
    progress: bool = False
    baselines: dict[str, Callable[[Batch], Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("reference", "quantized"):
            self.baselines[name] = _Remembered(getattr(self.pair, name))

    def runner(self, name: Name, prompts: PromptSet, metric: Metric) -> ArmRunner:
        for wanted in metric.baselines:
            remembered = self.baselines.get(wanted)
            if isinstance(remembered, _Remembered):
                # Now, while the model is as it was given.
                remembered.read(prompts, self.batch_size, whole=metric.whole)
        return ArmRunner(
            getattr(self.pair, name),
            prompts,
            metric,
            saes=self.saes,
            memory_budget=self.memory_budget,
            batch_size=self.batch_size,
            progress=self.progress,
            baselines=self.baselines,
        )

    def plain(self, name: Name, prompts: PromptSet, metric: Metric) -> Float64[Tensor, "prompt"]:
        """The metric of a model as it is now."""
        runner = self.runner(name, prompts, metric)
        runner.progress = False
        return runner.unpatched()


class _Remembered:
    """Logits of a model by prompt, kept since the model will be changed."""

    def __init__(self, model: Any) -> None:
        self._runner = Rerunner(model)
        self._known: dict[tuple[int, ...], Tensor] = {}

    def read(self, prompts: PromptSet, batch_size: int, *, whole: bool) -> None:
        for batch in prompts.batches(batch_size):
            if any(tuple(ids) not in self._known for ids in batch.tokens.tolist()):
                with torch.no_grad(), evaluating(self._runner.model):
                    logits, _ = self._runner.run(batch.tokens, whole=whole)
                assert logits is not None
                self._known.update(zip(map(tuple, batch.tokens.tolist()), logits, strict=True))

    def __call__(self, batch: Batch) -> Tensor:
        return torch.stack([self._known[tuple(ids)] for ids in batch.tokens.tolist()])


def check_gradient(pair: Any, metric: Metric, gradient: Gradient) -> None:
    """Raises where a gradient would say nothing."""
    inner = getattr(metric, "inner", metric)
    if gradient == "reference" and isinstance(inner, KL) and inner.of == "reference":
        raise MetricInputError(
            "KL to the reference is least in the reference's own run, where its gradient is 0; take gradient='both'"
        )
    precision = getattr(pair.quantized, "precision", None)
    if gradient != "reference" and precision is not None and (precision.activations or precision.kv_cache):
        raise PairMismatchError(
            f"the quantized model rounds its activations ({precision}), and rounding has gradient 0 almost everywhere; "
            "take gradient='reference'"
        )


def activation_gradients(
    runs: Runs, name: Name, batch: Batch, metric: Metric, sites: Sequence[Site]
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """What the sites hold in a model's run, and the gradient of each prompt's metric there: both [prompt, pos, ...]."""
    model = getattr(runs.pair, name)
    job = Measured(model, metric, {"reference": runs.pair.reference, "quantized": runs.pair.quantized})
    with evaluating(model):
        _, values, gradients = site_gradients(job, batch, sites)
    return values, gradients


def weight_gradients(
    runs: Runs, name: Name, prompts: PromptSet, metric: Metric, weights: Tensor, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Gradient of Σ_p weight_p · metric_p with respect to parameters of a model, summed over all prompts."""
    model = getattr(runs.pair, name)
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    with torch.enable_grad(), evaluating(model), _differentiable(parameters):
        for batch in prompts.batches(runs.batch_size):
            logits, _ = Rerunner(model).run(batch.tokens, whole=metric.whole)
            assert logits is not None
            context = _context(runs, batch, logits)
            values = checked(metric, metric(logits, context), logits, context)
            check_differentiable(metric, values)
            loss = (values * weights[batch.prompt].to(values)).sum()
            for into, gradient in zip(
                total, torch.autograd.grad(loss, list(parameters), allow_unused=True), strict=True
            ):
                if gradient is not None:
                    into += gradient.float()
    return total


def _context(runs: Runs, batch: Batch, logits: Tensor) -> Context:
    return Context(batch.prompt.to(logits.device), lambda name: runs.baselines[name](batch).to(logits))


@contextmanager
def _differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for parameter in parameters:
            if not parameter.requires_grad:
                stack.callback(parameter.requires_grad_, False)
                parameter.requires_grad_()
        yield
