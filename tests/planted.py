"""Faults with a known place: models that no longer write a feature's direction, or write two as one."""

from typing import Any

import torch
from torch import Tensor

from tracelens.precision.sharing import copy_sharing


def unwritten(model: Any, directions: Tensor, layer: int) -> Any:
    """The model, in which nothing up to `layer` writes into the span of `directions` [direction, d_model]."""
    span = torch.linalg.pinv(directions.double()) @ directions.double()
    return _rewritten(model, torch.eye(len(span)) - span, layer)


def merged(model: Any, first: Tensor, second: Tensor, layer: int) -> Any:
    """The model that writes up to `layer` along the mean of the two directions what it would write along either.

    So a token that had one of them has half of both, and the rest of the residual stream is as it was.
    """
    pair = torch.stack([first, second]).double()
    amounts = torch.linalg.pinv(pair)  # x @ amounts: how much of either direction is in x
    return _rewritten(model, torch.eye(len(first)) + amounts @ (pair.mean(0) - pair), layer)


def _rewritten(model: Any, change: Tensor, layer: int) -> Any:
    writers = ["embed.W_E"]
    for i in range(layer + 1):
        writers += [f"blocks.{i}.{name}" for name in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")]
    parameters = dict(model.named_parameters())
    return copy_sharing(
        model,
        {name: (p.detach().double() @ change).to(p) for name in writers if (p := parameters.get(name)) is not None},
    )


def written(model: Any, amounts: Tensor, directions: Tensor) -> Any:
    """The model whose embedding writes along `directions` [direction, d_model] too: `amounts` [token, direction] of them."""
    embedding = model.embed.W_E.detach()
    extra = amounts.double() @ directions.double()
    return copy_sharing(model, {"embed.W_E": (embedding.double() + extra).to(embedding)})
