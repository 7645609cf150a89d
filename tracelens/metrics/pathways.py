"""New pathways: features that fire in the quantized model only, and others to compare them with."""

import torch
from jaxtyping import Bool, Float64, Int, Int64
from torch import Tensor

from tracelens.metrics.drift import novelty
from tracelens.metrics.moments import FeatureMoments

NOVEL_AT = 0.9
"""Novelty from which a feature is called a new pathway."""


def novel_features(
    moments: FeatureMoments, novel_at: float = NOVEL_AT, min_active: int = 10
) -> Bool[Tensor, "feature"]:
    """Features whose novelty 1 − n_both / n_quant is at least `novel_at`, among those that the quantized model fires on at
    least `min_active` tokens. What the reference never fires is among them, with novelty 1."""
    total = moments.total()
    return (total.n_quant[0] >= max(1, min_active)) & (novelty(total)[0] >= novel_at)


def equally_active(
    chosen: Int64[Tensor, "chosen"],
    pool: Bool[Tensor, "feature"],
    n_active: Float64[Tensor, "feature"],
    site: Int[Tensor, "feature"],
    *,
    neighbours: int = 20,
    seed: int = 0,
) -> Int64[Tensor, "control"]:
    """For each chosen feature one of the pool at random, of the same site and among the `neighbours` nearest in log
    firing count; each is drawn at most once, and none where the site's pool is used up."""
    generator = torch.Generator().manual_seed(seed)
    left, drawn = pool.clone(), []
    for feature in chosen.tolist():
        left[feature] = False
        candidates = (left & (site == site[feature]) & (n_active > 0)).nonzero().squeeze(1)
        if not len(candidates):
            continue
        distance = (n_active[candidates].log() - n_active[feature].log()).abs()
        near = candidates[distance.argsort(stable=True)[:neighbours]]
        drawn.append(int(near[torch.randint(len(near), (1,), generator=generator)]))
        left[drawn[-1]] = False
    return torch.tensor(drawn, dtype=torch.long)
