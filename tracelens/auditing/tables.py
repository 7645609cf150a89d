"""The tables of a report: features, smeared pairs, prompts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tracelens.audit_report import FEATURE_COLUMNS, PAIR_COLUMNS, PROMPT_COLUMNS, severity
from tracelens.auditing.feature_intervals import bootstrap_intervals, over_draws
from tracelens.auditing.replicates import RESOLUTION
from tracelens.features.survival import Survival
from tracelens.metrics.cpfr import fidelity
from tracelens.metrics.drift import correlation, drift, novelty, retention
from tracelens.metrics.moments import FeatureMoments
from tracelens.metrics.muting import muting_rate
from tracelens.metrics.smearing import PairCosines
from tracelens.metrics.survival import survival_class
from tracelens.sites import Site
from tracelens.stats import benjamini_hochberg, sign_flip_tests

if TYPE_CHECKING:
    import pandas as pd

CAPABILITY = "capability"

Kinds = list[tuple[str, ...]]
"""Behaviours of every feature of every site, best first; empty for a capability feature."""
Pairs = Mapping[Site, PairCosines]
"""Pairs of features of each site."""


def feature_table(
    moments: FeatureMoments,
    noise: list[FeatureMoments],
    survival: Survival,
    kinds: Kinds,
    live: Bool[Tensor, "feature"],
    settings: Any,
    weights: Float[Tensor, "resample block"],
) -> "pd.DataFrame":
    """One row per live feature, worst first.

    Args:
        moments: of the quantized model, by block of prompts.
        noise: of each draw of matched noise.
        settings: the `AuditSettings`.
        weights: the report's resamples of blocks.
    """
    import pandas as pd

    keep = live.nonzero().squeeze(1)
    sites = [(str(site), i) for site, size in survival.sites.items() for i in range(size)]
    columns: dict[str, Any] = {
        "site": [sites[k][0] for k in keep.tolist()],
        "feature": [sites[k][1] for k in keep.tolist()],
        "behaviour": [kinds[k][0] if kinds[k] else CAPABILITY for k in keep.tolist()],
    }
    some = moments.select(keep)
    total = some.total()
    measures = {"fidelity": fidelity, "correlation": correlation, "drift": drift, "retention": retention}
    measures |= {"muting_rate": muting_rate, "novelty": novelty}
    columns |= {name: measure(total)[0].cpu().numpy() for name, measure in measures.items()}
    columns["degraded"] = columns["fidelity"] < settings.degradation_threshold
    columns["n_active"] = total.n_ref[0].cpu().long().numpy()
    columns["survival"] = survival_class(columns["correlation"], settings.survived_at, settings.damaged_at)
    intervals = over_draws(noise, keep) | bootstrap_intervals(some, weights)
    columns |= {name: values.numpy() for name, values in intervals.items()}
    p = sign_flip_tests(_shift(some), seed=settings.seed)
    columns |= {"p_shift": p.numpy(), "q_shift": benjamini_hochberg(p).numpy()}
    table = pd.DataFrame(columns, columns=pd.Index(FEATURE_COLUMNS))
    return table.loc[severity(table).sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def _shift(m: FeatureMoments) -> Tensor:
    """Σq − Σr by block and feature, 0 where it may be float32 rounding: that can be the same in every block."""
    shift = m.sum_quant - m.sum_ref
    return shift.where(shift.abs() > RESOLUTION * torch.maximum(m.sum_ref, m.sum_quant), 0).cpu()


def pair_table(total: FeatureMoments, survival: Survival, pairs: Pairs, kinds: Kinds) -> "pd.DataFrame":
    """One row per pair, worst first."""
    import pandas as pd

    n_active = total.n_ref[0].long().cpu().numpy()
    behaviour = np.array([kind[0] if kind else CAPABILITY for kind in kinds], dtype=object)
    parts, start = [pd.DataFrame(columns=pd.Index(PAIR_COLUMNS))], 0
    for site, size in survival.sites.items():
        if found := pairs.get(site):
            i, j = found.i + start, found.j + start
            columns = (str(site), found.i, found.j, behaviour[i], behaviour[j], found.cos_ref, found.cos_quant)
            columns += (found.increase, np.minimum(n_active[i], n_active[j]))
            parts.append(pd.DataFrame(dict(zip(PAIR_COLUMNS, columns, strict=True))))
        start += size
    table = pd.concat(parts[1:] or parts, ignore_index=True)
    return table.loc[severity(table).sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def smeared_pairs(survival: Survival, model: str, settings: Any, floors: tuple[float, float] | None = None) -> Pairs:
    """The model's smeared pairs by site, at the audit's thresholds or at others; of a model whose smearing was not measured, none."""
    tau, delta = floors or (settings.smearing_tau, settings.smearing_delta)
    measured = survival.smearing.get(model, {}).items()
    return {site: accumulator.cosines(tau, delta, settings.min_active) for site, accumulator in measured}


def n_smeared(survival: Survival, model: str, settings: Any) -> int | None:
    """Smeared pairs of all sites; None if the model's smearing was not measured."""
    if model not in survival.smearing:
        return None
    return sum(map(len, smeared_pairs(survival, model, settings).values()))


def prompt_table(
    question: Any, reference: Float[Tensor, "prompt"], quantized: Float[Tensor, "prompt"]
) -> "pd.DataFrame":
    """One row per prompt of an `assembly.Question`; margins in nats."""
    import pandas as pd

    shows, still = (reference > 0).tolist(), (quantized > 0).tolist()
    flip = ["" if a == b else "refuse→comply" if a else "comply→refuse" for a, b in zip(shows, still, strict=True)]
    safety = [label is not None for label in question.labels]
    columns = (question.texts, question.behaviours, safety, reference.tolist(), quantized.tolist(), flip)
    return pd.DataFrame(dict(zip(PROMPT_COLUMNS, columns, strict=True)))
