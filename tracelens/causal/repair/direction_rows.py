"""Several directions repaired in one pass: a batch of prompts, once for each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from tracelens.causal.prompts import Batch
from tracelens.causal.repair.directions import Directions
from tracelens.causal.rerun import Edit
from tracelens.sites import Site


@dataclass(frozen=True)
class Rows:
    """A batch, several times over: once for each direction."""

    batch: Batch
    times: int
    cells: Bool[Tensor, "prompt pos"]
    ours: dict[Site, Tensor]
    """What the reference holds."""

    def repeated(self, value: Tensor) -> Tensor:
        return value.repeat(self.times, *[1] * (value.dim() - 1))

    def edit(self, layer: int, along: Sequence[Directions | None]) -> Edit:
        """Puts the reference's amount along each direction in place; where there is none, all that the reference holds."""

        def edit(value: Tensor) -> Tensor:
            off = (self.ours[Site(layer)] - value.unflatten(0, (self.times, -1))) * self.cells.to(value.device)[
                ..., None
            ]
            steps = []
            for part, directions in zip(off, along, strict=True):
                d = None if directions is None else directions[layer].to(part)
                steps.append(part if d is None else (part @ d)[..., None] * d)
            return value + torch.cat(steps)

        return edit
