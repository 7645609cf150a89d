"""Orders in which components are restored."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from tracelens.causal.prompts import PromptSet
from tracelens.causal.repair.halves import Part
from tracelens.errors import UnknownNameError

PER_BYTE = " per byte"
"""Behind an order's name: the score by byte that the component costs."""
DEFAULT_ORDERS = ("importance", "drift", "importance×drift", "attribution", "attribution size", "magnitude", "random")


@runtime_checkable
class Repairs(Protocol):
    """What can be restored: activations or weights."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def bytes_note(self) -> str: ...
    def bytes(self, prompts: PromptSet) -> Float64[Tensor, "component"]: ...
    def scores(self, by: str) -> Float64[Tensor, "component"]: ...
    def measure(self, states: Sequence[Sequence[int]], part: Part) -> Float64[Tensor, "state prompt"]: ...


def checked_orders(by: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The orders, each once, with "magnitude" and "random" among them; raises `UnknownNameError` for others than `known`."""
    by = (by,) if isinstance(by, str) else tuple(by)
    for name in by:
        if name.removesuffix(PER_BYTE) not in known or name == "random" + PER_BYTE:
            raise UnknownNameError.of("order", name, [*known, f"... each with {PER_BYTE!r} behind it"])
    return tuple(dict.fromkeys([*(name for name in by if name != "random"), "magnitude"]))


def ranked(
    repairs: Repairs, by: Sequence[str], costs: Float64[Tensor, "component"], n_random: int, seed: int
) -> tuple[tuple[str, ...], Int[Tensor, "order component"], Float64[Tensor, "order component"]]:
    """Names of the orders, the components of each, the largest score first (ties as the model has them), and the scores."""
    scores = []
    for name in by:
        score = repairs.scores(name.removesuffix(PER_BYTE)).double().cpu()
        if name.endswith(PER_BYTE):
            # What costs nothing and brings nothing comes last.
            score = torch.where(costs > 0, score / costs.clamp(min=1e-300), torch.where(score > 0, torch.inf, 0))
        scores.append(score)
    n = len(repairs.names)
    rng = np.random.default_rng(seed)
    shuffled = [torch.from_numpy(rng.permutation(n)) for _ in range(n_random)]
    orders = [torch.argsort(score, descending=True, stable=True) for score in scores] + shuffled
    nothing = torch.full((n_random, n), torch.nan, dtype=torch.float64)
    names = (*by, *(f"random {i}" for i in range(n_random)))
    return names, torch.stack(orders), torch.cat([torch.stack(scores), nothing])


def spaced_counts(n: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, ... (each about 1.4 times the one before) up to all `n`: where curves bend is at their beginning."""
    found = {n}
    value = 1.0
    while value < n:
        found.add(round(value))
        value *= 2**0.5
    return tuple(sorted(found))
