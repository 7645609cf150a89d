"""The largest activation of every feature on every prompt, from a stream of tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from tracelens.metrics.support import Activations, SparseActivations, shape_of
from tracelens.sites import Site

_CELLS = 2**22
"""Cells of a dense part (16 MB)."""


@dataclass(frozen=True, eq=False)
class Maxima:
    """[prompt, feature] maxima ≥ 0, of which only what is above 0 is held: 8 bytes each."""

    matrix: sparse.csc_array
    """Float32."""

    @classmethod
    def of(cls, maxima: "Float[Tensor, 'prompt feature'] | Maxima") -> "Maxima":
        """Of a dense tensor; itself if it is sparse already."""
        return maxima if isinstance(maxima, Maxima) else cls(sparse.csc_array(maxima.float().cpu().numpy()))

    def __len__(self) -> int:
        """Prompts."""
        return self.n_prompts

    @property
    def n_prompts(self) -> int:
        return shape_of(self.matrix)[0]

    @property
    def n_features(self) -> int:
        return shape_of(self.matrix)[1]

    def prompts(self, rows: Int[Tensor, "row"] | Sequence[int]) -> "Maxima":
        """The maxima of some prompts, in that order; a prompt may come twice."""
        return Maxima(sparse.csc_array(sparse.csr_array(self.matrix)[np.asarray(rows, dtype=np.int64)]))

    def columns(self, features: Int[Tensor, "column"] | Sequence[int]) -> Float[Tensor, "prompt column"]:
        """The maxima of some features, dense."""
        return torch.from_numpy(self.matrix[:, np.asarray(features, dtype=np.int64)].toarray())

    def live(self) -> Iterator[tuple[Int[Tensor, "column"], Float[Tensor, "prompt column"]]]:
        """The features that fire on any prompt, part by part, with their maxima; a part takes 16 MB."""
        firing = torch.from_numpy(np.flatnonzero(np.diff(self.matrix.indptr)))
        for features in firing.split(max(1, _CELLS // max(1, self.n_prompts))):
            if len(features):
                yield features, self.columns(features)

    def dense(self) -> Float[Tensor, "prompt feature"]:
        return torch.from_numpy(self.matrix.toarray())


class PromptMaxima:
    """Streams feature activations and keeps their maxima per site.

    Memory: 12 bytes for each (prompt, feature) that fires, and twice that for a moment, however wide the SAE is.
    """

    def __init__(self, n_prompts: int) -> None:
        self.n_prompts = n_prompts
        self._n_features: dict[Site, int] = {}
        self._parts: dict[Site, list[tuple[np.ndarray, np.ndarray]]] = {}
        """Ascending prompt × n_features + feature, and the maximum there; the first part is the longest."""

    def update(self, site: Site, activations: Activations, prompt: Int[Tensor, "token"]) -> "PromptMaxima":
        """Takes in tokens [token, feature], in any order, dense or sparse, whose prompts' indices are `prompt`."""
        seen = SparseActivations.of(activations)
        token, feature = seen.places()
        key = prompt.to(token.device).long().index_select(0, token) * seen.n_features + feature
        self._n_features[site] = seen.n_features
        self._take(site, [_largest(key.cpu().numpy(), seen.value.float().cpu().numpy())])
        return self

    def merge(self, other: "PromptMaxima") -> "PromptMaxima":
        """Takes in what another accumulator over the same prompts has seen."""
        for site, parts in other._parts.items():
            self._n_features[site] = other._n_features[site]
            self._take(site, parts)
        return self

    def finalize(self) -> Mapping[Site, Maxima]:
        """Maxima by site. More may be added afterwards."""
        found = {}
        for site, n_features in sorted(self._n_features.items()):
            key, value = _joined(self._parts[site])
            self._parts[site] = [(key, value)]
            rows = np.searchsorted(key, np.arange(self.n_prompts + 1) * n_features)
            shape = (self.n_prompts, n_features)
            matrix = sparse.csr_array((value, (key % max(1, n_features)).astype(np.int32), rows), shape=shape)
            found[site] = Maxima(sparse.csc_array(matrix))
        return found

    def _take(self, site: Site, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
        mine = self._parts.setdefault(site, [])
        mine += parts
        # Joined whenever the new is as much as the old, so that a prompt that comes in many parts is not held many times.
        if sum(len(key) for key, _ in mine[1:]) > len(mine[0][0]):
            self._parts[site] = [_joined(mine)]


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return _largest(np.concatenate(keys), np.concatenate(values))


def _largest(key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, ascending, with its largest value."""
    if not len(key):
        return key, value
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    return key[first], np.maximum.reduceat(value, first)
