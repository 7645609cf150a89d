"""Restoring weights: matrices, rows or layers, what they cost in 16 bits, how they are ranked, and what they bring."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.matrices import Matrix, restored
from tracelens.causal.matrices import Part as Restored
from tracelens.causal.repair.activation_repair import ActivationRepair, _slope
from tracelens.causal.repair.halves import Part
from tracelens.causal.repair.roles import components_fed
from tracelens.causal.repair.runs import Gradient, Name, Runs, check_gradient, weight_gradients
from tracelens.errors import UnknownNameError

Grain = Literal["matrix", "row", "layer"]
ORDERS = (
    *(
        "importance",
        "drift",
        "importance×drift",
        "attribution",
        "attribution size",
        "magnitude",
        "relative magnitude",
        "alone",
        "random",
    ),
)
"""What weights can be ranked by."""


@dataclass
class WeightRepair:
    """Reference weights in the quantized model.

    Attributes:
        matrices: all that the models have.
        grain: what one component is; a row is an output channel.
        runs: the pair, and how it is run.
        choose: the prompts that components are ranked on.
        bits: bits of a quantized weight, scales included; None counts all 16 of a kept weight.
        heads: for importance and drift: the heads and MLPs, and their numbers.
    """

    matrices: Sequence[Matrix]
    grain: Grain
    runs: Runs
    choose: Part
    bits: float | None = None
    gradient: Gradient = "reference"
    heads: ActivationRepair | None = None

    @property
    def bytes_note(self) -> str:
        if self.bits is None:
            return "bytes of the kept weights in 16 bits; what their quantized form took is not known and not taken off"
        return f"bytes that keeping weights in 16 bits adds to {self.bits:g} bits a weight, scales included"

    @cached_property
    def owners(self) -> list[Tensor]:
        """Of each matrix, which component each of its rows belongs to: int [out]."""
        if self.grain == "layer":
            layers = sorted({m.layer for m in self.matrices})
            return [torch.full((m.shape[0],), layers.index(m.layer)) for m in self.matrices]
        if self.grain == "matrix":
            return [torch.full((m.shape[0],), i) for i, m in enumerate(self.matrices)]
        starts = torch.tensor([0, *(m.shape[0] for m in self.matrices)]).cumsum(0)
        return [torch.arange(a, b) for a, b in pairwise(starts.tolist())]

    @property
    def size(self) -> int:
        return int(max(int(owner.max()) for owner in self.owners)) + 1

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @cached_property
    def _names(self) -> tuple[str, ...]:
        if self.grain == "layer":
            return tuple(f"layer {layer}" for layer in sorted({m.layer for m in self.matrices}))
        if self.grain == "matrix":
            return tuple(m.name for m in self.matrices)
        return tuple(f"{m.name} row {row}" for m in self.matrices for row in range(m.shape[0]))

    @property
    def layers(self) -> tuple[int, ...]:
        found = torch.zeros(self.size, dtype=torch.long)
        for m, owner in zip(self.matrices, self.owners, strict=True):
            found[owner] = m.layer
        return tuple(found.tolist())

    def bytes(self, prompts: Any = None) -> Float64[Tensor, "component"]:
        """Bytes that each component adds if it is kept in 16 bits; none for what quantization left as it was."""
        each = (16 - (self.bits or 0.0)) / 8
        total = torch.zeros(self.size, dtype=torch.float64)
        for m, owner, error in zip(self.matrices, self.owners, self._norms["error"], strict=True):
            changed = bool(error.sum() > 0)
            total.index_add_(0, owner, torch.full((len(owner),), each * m.shape[1] * changed, dtype=torch.float64))
        return total

    def scores(self, by: str) -> Float64[Tensor, "component"]:
        """How much speaks for each component: the largest is restored first."""
        if by == "magnitude":
            return self._sum(self._norms["error"]).sqrt()
        if by == "relative magnitude":
            size = self._sum(self._norms["size"])
            return torch.where(size > 0, self._sum(self._norms["error"]) / size, 0).sqrt()
        if by == "attribution":
            return self._sum(self._attribution)
        if by == "attribution size":
            return self._sum(self._attribution).abs()
        if by in ("importance", "drift", "importance×drift"):
            return self._by_heads(by)
        if by == "alone":
            start, goal = self._ends
            return _slope(self.measure([(i,) for i in range(self.size)], self.choose) - start, goal - start)
        raise UnknownNameError.of("order of weights", by, ORDERS)

    def measure(self, states: Sequence[Sequence[int]], part: Part) -> Float64[Tensor, "state prompt"]:
        """The metric with each set of components restored. States that grow, each holding the one before it, cost least."""
        from tqdm.auto import tqdm

        runner = self.runs.runner("quantized", part.prompts, part.metric)
        runner.progress = False
        found = torch.empty(len(states), len(part.prompts), dtype=torch.float64)
        held: set[int] = set()
        with ExitStack() as stack:
            for index, state in enumerate(tqdm(states, desc="restoring weights", disable=not self.runs.progress)):
                wanted = set(state)
                if not held <= wanted:
                    stack.close()
                    held = set()
                stack.enter_context(restored(self.parts(wanted - held)))
                held = wanted
                found[index] = runner.unpatched()
        return found

    def parts(self, components: set[int]) -> list[Restored]:
        """What has to be put back for these components: whole matrices, or rows of them."""
        chosen = torch.zeros(self.size, dtype=torch.bool)
        chosen[list(components)] = True
        found = []
        for m, owner in zip(self.matrices, self.owners, strict=True):
            rows = chosen[owner]
            if rows.any():
                found.append(Restored(m, None if rows.all() else rows.nonzero()[:, 0]))
        return found

    def _sum(self, rows: Sequence[Tensor]) -> Float64[Tensor, "component"]:
        total = torch.zeros(self.size, dtype=torch.float64)
        for owner, values in zip(self.owners, rows, strict=True):
            total.index_add_(0, owner, values)
        return total

    @cached_property
    def _norms(self) -> dict[str, list[Tensor]]:
        """Squared norms of each row of each matrix, [out]: of its error, and of itself."""
        return {
            "error": [m.error.square().sum(1).double().cpu() for m in self.matrices],
            "size": [m.flat(m.reference.detach()).float().square().sum(1).double().cpu() for m in self.matrices],
        }

    @cached_property
    def _ends(self) -> tuple[Float64[Tensor, "prompt"], Float64[Tensor, "prompt"]]:
        prompts, metric = self.choose.prompts, self.choose.metric
        return self.runs.plain("quantized", prompts, metric), self.runs.plain("reference", prompts, metric)

    @cached_property
    def _attribution(self) -> list[Tensor]:
        """First-order recovery of each row, Σ_p d_p ∇_W m_p · (W_ref − W_quant) / Σ d²: one backward pass of Σ_p d_p m_p."""
        check_gradient(self.runs.pair, self.choose.metric, self.gradient)
        start, goal = self._ends
        d = goal - start
        if not d.square().sum() > 0:
            return [torch.zeros(m.shape[0], dtype=torch.float64) for m in self.matrices]
        ends: tuple[Name, ...] = ("reference", "quantized") if self.gradient == "both" else (self.gradient,)
        total = [torch.zeros(m.shape[0], dtype=torch.float64) for m in self.matrices]
        weights = d / d.square().sum()
        for name in ends:
            parameters = [getattr(m, name) for m in self.matrices]
            found = weight_gradients(self.runs, name, self.choose.prompts, self.choose.metric, weights, parameters)
            for into, m, gradient in zip(total, self.matrices, found, strict=True):
                into -= (m.flat(gradient) * m.error).sum(1).double().cpu() / len(ends)
        return total

    def _by_heads(self, by: str) -> Float64[Tensor, "component"]:
        """Importance is that of the heads and MLPs that a component is part of, added up; drift is their mean."""
        assert self.heads is not None
        amounts = self.heads.scores(by)
        total = torch.zeros(self.size, dtype=torch.float64)
        n = torch.zeros(self.size, dtype=torch.float64)
        done: set[tuple[int, int]] = set()
        for m, owner in zip(self.matrices, self.owners, strict=True):
            fed = components_fed(m, self.heads.places, self.runs.pair.reference.cfg)
            for row, component in enumerate(owner.tolist()):
                for head in fed[row]:
                    if (component, head) not in done:
                        done.add((component, head))
                        total[component] += amounts[head]
                        n[component] += 1
        return total / n.clamp(min=1) if by == "drift" else total
