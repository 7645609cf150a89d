"""Random sets of features like the safety features: by firing rate, and by the same selection on labels that say nothing."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

NEIGHBOURS = 20


def matched_members(
    n_ref: Float64[Tensor, "feature"],
    site: Int[Tensor, "feature"],
    safety: Bool[Tensor, "feature"],
    capability: Bool[Tensor, "feature"],
    *,
    with_own: bool = False,
    n_sets: int = 2000,
    neighbours: int = NEIGHBOURS,
    seed: int = 0,
) -> Int[Tensor, "member set"]:
    """Indices of random sets of capability features that match the safety features in site and firing rate, one column per set.

    For each safety feature one of the `neighbours` capability features of its site that are nearest in log firing count is drawn, with
    replacement; `with_own` puts the safety feature itself among them, as the null of a permutation test must: with one safety feature
    and 20 like it nothing rarer than one in 21 can be seen. No sets if a site with safety features has no capability feature.
    """
    pools = []
    for feature in safety.nonzero().squeeze(1).tolist():
        pool = (capability & (site == site[feature])).nonzero().squeeze(1)
        if not len(pool):
            return torch.zeros(0, 0, dtype=torch.long)
        distance = (n_ref[pool].log() - n_ref[feature].log()).abs()
        own = torch.tensor([feature] * with_own, dtype=torch.long)
        pools.append(torch.cat([own, pool[distance.argsort(stable=True)[:neighbours]]]))
    if not pools:
        return torch.zeros(0, 0, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([pool[torch.randint(len(pool), (n_sets,), generator=generator)] for pool in pools])


def mean_of_members(
    values: Float64[Tensor, "feature"], sets: Int[Tensor, "member set"] | Sequence[Int[Tensor, "_"]]
) -> Float64[Tensor, "set"]:
    """Mean of a feature's number over each set, features without one (NaN) left out."""
    if isinstance(sets, Tensor):
        return values[sets].nanmean(0) if sets.numel() else torch.zeros(0, dtype=torch.float64)
    return torch.stack([values[members].nanmean() for members in sets]) if sets else torch.zeros(0, dtype=torch.float64)
