"""How far the same run's metric wanders with what else is computed beside it: below that, no effect can be told."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.readout import Context, Metric

TRIED, ROWS = 16, (1, 8)
"""Prompts that are tried, spread over all, and how often each stands in the batches that are compared."""


def rounds(model: Any) -> bool:
    """Whether hooks that stay act on the model, as those do that round activations."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def numerical_noise(
    logits: Callable[[Batch], Tensor],
    baselines: Mapping[str, Callable[[Batch], Tensor]],
    metric: Metric,
    prompts: PromptSet,
    measured: Float64[Tensor, "prompt"],
) -> float:
    """The largest difference between the metric as `measured` and that of the same unpatched runs in other batches.

    Sums of floats depend in their last bits on how many rows go together. In float32 that makes some 1e-6; where
    activations are rounded, such a bit may move a code, and the metric some thousandths of a nat.
    In the metric's units; at most 16 prompts are tried, so larger differences may occur.
    """
    step = -(-len(prompts) // TRIED)
    most = 0.0
    for index in range(0, len(prompts), step):
        for rows in ROWS:
            batch = Batch(torch.full((rows,), index), torch.tensor([prompts.tokens[index]] * rows))
            found = logits(batch)
            context = Context(batch.prompt.to(found.device), lambda name, at=batch: baselines[name](at))
            values = metric(found, context).double().cpu()
            most = max(most, float((values - measured[index]).abs().max()))
    return most
