"""Label-permuted fingerprints: what the selection of features finds where the prompts carry no behaviour."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracelens.features.maxima import Maxima
from tracelens.features.selection import FingerprintFeature, check_prompts, columns, half, tied
from tracelens.sites import Site
from tracelens.stats import auroc_under_permutation

LABEL_PERMUTATIONS = 200


def permuted_fingerprints(
    maxima: Mapping[Site, Maxima | Float[Tensor, "prompt _feature"]],
    labels: Sequence[str | None],
    *,
    ids: Sequence[str],
    features: Sequence[FingerprintFeature],
    among: Mapping[Site, Bool[Tensor, "_feature"]],
    split: float = 0.5,
    n_permutations: int = LABEL_PERMUTATIONS,
    seed: int = 0,
) -> list[dict[Site, Int[Tensor, "_chosen"]]]:
    """As many features as `features` holds, chosen in the same way from prompts whose labels were shuffled.

    Within the selection half and within the held-out half, labels are permuted over the prompts of a behaviour and of the baseline. A
    feature passes a threshold if its AUROC reaches it on both halves, as in `select_features`; the threshold is lowered until as many
    features of a site pass as the true fingerprint holds of that site and (best) behaviour. The test on the held-out half is left out:
    hardly anything passes it on shuffled labels, which is what it is there for.

    Args:
        maxima, labels, ids, split: what the true fingerprint was made from.
        features: its features, those outside of `among` aside.
        among: features to choose from, by site (those that are live).

    Returns per permutation the chosen features' indices by site; a feature that is chosen for two behaviours comes once.
    """
    wanted: dict[tuple[Site, str], int] = {}
    for row in features:
        if among[row.site][row.feature]:
            wanted[row.site, row.behaviour] = wanted.get((row.site, row.behaviour), 0) + 1
    baseline, sides = check_prompts(labels, ids)
    rng = np.random.default_rng(seed)
    chosen: list[dict[Site, list[Tensor]]] = [{} for _ in range(n_permutations)]
    for behaviour in dict.fromkeys(name for _, name in wanted):
        if behaviour not in sides:
            continue
        halves = [half(sides[behaviour], baseline, split, held_out) for held_out in (False, True)]
        shuffled = [_shuffled(is_safety, n_permutations, rng) for _, is_safety in halves]
        for site in (site for site, name in wanted if name == behaviour):
            index = among[site].nonzero().squeeze(1)
            values = columns(maxima[site], index)
            reached = torch.stack(
                [
                    auroc_under_permutation(tied(values[rows]), labeling)
                    for (rows, _), labeling in zip(halves, shuffled, strict=True)
                ]
            ).amin(0)
            top = index[reached.topk(min(wanted[site, behaviour], len(index)), dim=1).indices]
            for found, members in zip(chosen, top, strict=True):
                found.setdefault(site, []).append(members)
    return [{site: torch.cat(parts).unique() for site, parts in found.items()} for found in chosen]


def _shuffled(
    is_safety: Bool[Tensor, "prompt"], n: int, rng: np.random.Generator
) -> Bool[Tensor, "permutation prompt"]:
    return torch.from_numpy(rng.permuted(np.tile(is_safety.numpy(), (n, 1)), axis=1))
