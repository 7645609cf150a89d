"""Groups of features that smear into each other: connected components of the smeared pairs."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tracelens.metrics.result import Result
from tracelens.metrics.smearing import SmearedPair


@dataclass(frozen=True)
class SmearedGroup(Result):
    """Features that are linked, directly or through others, by smeared pairs."""

    members: tuple[int, ...]
    """Ascending."""
    n_pairs: int
    """Smeared pairs among them."""
    mean_increase: float
    """Mean rise of the cosine over its pairs, in (0, 1]."""
    max_increase: float

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def density(self) -> float:
        """Smeared pairs over all pairs of its members, in (0, 1]: 1 where every member merged with every other, small
        where a chain of pairs ties together features that have little to do with each other."""
        return 2 * self.n_pairs / (self.size * (self.size - 1))


def smeared_groups(pairs: Iterable[SmearedPair]) -> list[SmearedGroup]:
    """The groups, largest first, and among equals those whose cosines rose most; each pair is in exactly one."""
    pairs = list(pairs)
    if not pairs:
        return []
    ends = np.array([(pair.i, pair.j) for pair in pairs])
    rises = np.array([pair.increase for pair in pairs])
    features, flat = np.unique(ends, return_inverse=True)
    i, j = flat.reshape(ends.shape).T
    graph = coo_array((np.ones(len(pairs)), (i, j)), shape=(len(features), len(features)))
    n, label = connected_components(graph, directed=False)
    sizes, edges = np.bincount(label), np.bincount(label[i])
    means = np.bincount(label[i], rises) / edges
    highest = np.zeros(n)
    np.maximum.at(highest, label[i], rises)
    members = np.split(features[np.argsort(label, kind="stable")], np.cumsum(sizes)[:-1])
    groups = [
        SmearedGroup(tuple(map(int, members[k])), int(edges[k]), float(means[k]), float(highest[k])) for k in range(n)
    ]
    return sorted(groups, key=lambda group: (-group.size, -group.mean_increase, group.members))
