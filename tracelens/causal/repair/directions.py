"""Directions in the residual stream, layer by layer: what refusing differs in, and controls of the same kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tracelens.causal.arms import evaluating
from tracelens.causal.prompts import PromptSet
from tracelens.causal.rerun import Rerunner
from tracelens.errors import PromptError
from tracelens.sites import Site

Directions = Float[Tensor, "layer d_model"]
"""Unit vectors."""


@dataclass(frozen=True)
class AnswerStates:
    """`resid_post` at the answer position of some prompts, in both models, float32: [layer, prompt, d_model]."""

    reference: Float[Tensor, "layer prompt d_model"]
    quantized: Float[Tensor, "layer prompt d_model"]

    @classmethod
    def of(cls, pair: Any, prompts: PromptSet, batch_size: int) -> "AnswerStates":
        return cls(*(_states(model, prompts, batch_size) for model in (pair.reference, pair.quantized)))


@torch.no_grad()
def _states(model: Any, prompts: PromptSet, batch_size: int) -> Float[Tensor, "layer prompt d_model"]:
    runner = Rerunner(model)
    sites = [Site(layer) for layer in range(runner.n_layers)]
    found = torch.empty(len(sites), len(prompts), int(model.cfg.d_model), device=runner.device)
    with evaluating(model):
        for batch in prompts.batches(batch_size):
            values = runner.run(batch.tokens, keep=sites)[1]
            for layer, site in enumerate(sites):
                found[layer, batch.prompt.to(runner.device)] = values[site][:, -1].float()
    return found


def mean_difference(states: Float[Tensor, "layer prompt d_model"], positive: Bool[Tensor, "prompt"]) -> Directions:
    """Unit vectors along mean(positive) − mean(the others), by layer (Arditi et al., 2406.11717, at the last position alone).

    Raises `PromptError` if a side has fewer than two prompts.
    """
    n = int(positive.sum())
    if min(n, len(positive) - n) < 2:
        raise PromptError(
            f"a difference of means needs two prompts and more on each side, there are {n} harmful and {len(positive) - n} harmless "
            "ones; give harmful= and harmless="
        )
    positive = positive.to(states.device)
    return unit(states[:, positive].mean(1) - states[:, ~positive].mean(1))


def shuffled_difference(
    states: Float[Tensor, "layer prompt d_model"], positive: Bool[Tensor, "prompt"], seed: int
) -> Directions:
    """`mean_difference` of labels that are shuffled among the prompts: what a direction found like this one is worth by itself."""
    generator = torch.Generator().manual_seed(seed)
    return mean_difference(states, positive[torch.randperm(len(positive), generator=generator)])


def random_directions(shape: Sequence[int], seed: int, device: torch.device) -> Directions:
    """Uniform on the sphere, of each layer its own."""
    return unit(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device))


def largest_difference(states: AnswerStates) -> Directions:
    """Along which the two models' states differ most in squares, by layer: the control by magnitude for activations."""
    off = states.reference - states.quantized
    return torch.linalg.svd(off, full_matrices=False).Vh[:, 0]


def unit(vectors: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    """Vectors of length 1; zeros stay."""
    size = vectors.norm(dim=-1, keepdim=True)
    return vectors / size.where(size > 0, 1)
