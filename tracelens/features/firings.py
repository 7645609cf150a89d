"""Where features fire, token by token, in two models: kept for a sample of the prompts, within a limit of bytes."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracelens.metrics.support import JointSupport
from tracelens.pair import AlignedBatch

ENTRY = 20
"""Bytes of an entry."""
_SLACK = 1.25
"""How far beyond the limit a log may grow before what is too much is taken out: doing that for each batch would take long."""


@dataclass(frozen=True, eq=False)
class TokenFirings:
    """Entries (feature, token) at which either model fires, in no particular order."""

    prompts: Int[np.ndarray, "prompt"]
    """Prompts of which all entries are here, ascending; one on which nothing fires is among them."""
    feature: Int[np.ndarray, "entry"]
    """Features of all sites counted on from one site to the next."""
    prompt: Int[np.ndarray, "entry"]
    position: Int[np.ndarray, "entry"]
    """Index into the prompt's tokens, BOS counted."""
    reference: Float[np.ndarray, "entry"]
    quantized: Float[np.ndarray, "entry"]


@dataclass(frozen=True, eq=False)
class PromptSample:
    """Which prompts are kept: the first `size` of a random order, and of those as many as `limit` bytes hold."""

    rank: Int[Tensor, "prompt"]
    """Place of each prompt in the order."""
    size: int
    limit: int

    @classmethod
    def draw(cls, n_prompts: int, size: int, *, seed: int = 0, limit: int) -> "PromptSample":
        """A sample that depends on the seed and the number of prompts alone."""
        rank = np.empty(n_prompts, dtype=np.int64)
        rank[np.random.default_rng(seed).permutation(n_prompts)] = np.arange(n_prompts)
        return cls(torch.from_numpy(rank), min(size, n_prompts), limit)

    def first(self, prompts: list[int], n: int) -> list[int]:
        """Up to `n` of these prompts that the sample holds, those first in its order, ascending."""
        held = sorted((int(self.rank[p]), p) for p in prompts if self.rank[p] < self.size)
        return sorted(p for _, p in held[:n])


class FiringLog:
    """Takes the joint support of batches and keeps that of sampled prompts: whole prompts, as many as the limit holds.

    Which prompts are kept depends neither on the order in which they come nor on how they are batched: always the longest beginning of
    the sample's order that fits, because what is thrown out on the way lies behind the end of it for good.
    """

    def __init__(self, sample: PromptSample) -> None:
        self._rank, self._end = sample.rank, sample.size
        self._limit = sample.limit // ENTRY
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._size = 0

    def add(self, support: JointSupport, batch: AlignedBatch, start: int) -> None:
        """Takes a site of a batch; `start`: what its features are counted from."""
        kept = self._rank.to(batch.prompt.device)[batch.prompt] < self._end
        if not kept.any():
            return
        rows = kept[support.token]
        token = support.token[rows]
        places = (support.feature[rows] + start, batch.prompt[token], batch.position[token])
        values = (support.reference[rows], support.quantized[rows])
        part = (*(x.int().cpu().numpy() for x in places), *(x.float().cpu().numpy() for x in values))
        self._parts.append(part)
        self._size += len(part[0])
        if self._size > _SLACK * self._limit:
            self._shrink()

    def finalize(self) -> TokenFirings:
        self._shrink()
        prompts = np.flatnonzero(self._rank.numpy() < self._end)
        empty = tuple(np.empty(0, dtype) for dtype in (np.int32, np.int32, np.int32, np.float32, np.float32))
        return TokenFirings(prompts, *(np.concatenate(column) for column in zip(empty, *self._parts, strict=True)))

    def _shrink(self) -> None:
        """Moves the end forward until what is before it fits, and throws out what is behind it."""
        if self._size <= self._limit:
            return
        rank = self._rank.numpy()
        entries = np.zeros(self._end, dtype=np.int64)
        for _, prompt, *_ in self._parts:
            entries += np.bincount(rank[prompt], minlength=self._end)
        self._end = int(np.searchsorted(entries.cumsum(), self._limit, side="right"))
        keep = [rank[part[1]] < self._end for part in self._parts]
        self._parts = [tuple(x[rows] for x in part) for part, rows in zip(self._parts, keep, strict=True)]
        self._size = sum(len(part[0]) for part in self._parts)
