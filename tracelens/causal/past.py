"""Keys and values of unpatched runs, for runs that change nothing before some position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Past:
    """What every layer's attention remembers of a batch of prompts.

    In a causal model nothing at a position depends on later ones, so a run that first changes position p needs the positions
    from p on alone, beside these keys and values of the ones before. Keys are not rotated yet, as the models cache them.
    """

    keys: Sequence[Float[Tensor, "prompt pos kv_head d_head"]]
    values: Sequence[Float[Tensor, "prompt pos kv_head d_head"]]

    @classmethod
    def of(cls, cache: Any) -> "Past":
        """From a cache that an unpatched run has filled."""
        return cls([entry.past_keys for entry in cache], [entry.past_values for entry in cache])

    def before(self, position: int, prompt: Int[Tensor, "row"]) -> list["_Layer"]:
        """What a run of these prompts, one a row, remembers of the positions before `position`, by layer."""
        return [_Layer(k[:, :position], v[:, :position], prompt) for k, v in zip(self.keys, self.values, strict=True)]


@dataclass(frozen=True)
class _Layer:
    """In the place of TransformerLens' cache entry. Rows are gathered when they are needed: a layer may see the first only."""

    past_keys: Float[Tensor, "prompt past kv_head d_head"]
    past_values: Float[Tensor, "prompt past kv_head d_head"]
    prompt: Int[Tensor, "row"]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.prompt[: len(keys)].to(keys.device)
        return (
            torch.cat([self.past_keys[rows].to(keys), keys], dim=1),
            torch.cat([self.past_values[rows].to(values), values], dim=1),
        )
