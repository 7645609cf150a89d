"""The tables of a report: features, smeared pairs, prompts."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tracelens.audit_report import FEATURE_COLUMNS, PAIR_COLUMNS, PROMPT_COLUMNS, severity
from tracelens.auditing.replicates import RESOLUTION
from tracelens.features.survival import Survival
from tracelens.metrics.cpfr import fidelity
from tracelens.metrics.drift import correlation, drift, novelty, retention
from tracelens.metrics.moments import FeatureMoments
from tracelens.metrics.muting import muting_rate
from tracelens.metrics.survival import survival_class
from tracelens.stats import benjamini_hochberg, sign_flip_tests

if TYPE_CHECKING:
    import pandas as pd

CAPABILITY = "capability"

Kinds = list[tuple[str, ...]]
"""Behaviours of every feature of every site, best first; empty for a capability feature."""


def feature_table(
    moments: FeatureMoments,
    noise: list[FeatureMoments],
    survival: Survival,
    kinds: Kinds,
    live: Bool[Tensor, "feature"],
    settings: Any,
) -> "pd.DataFrame":
    """One row per live feature, worst first.

    Args:
        moments: of the quantized model, by block of prompts.
        noise: of each draw of matched noise.
        settings: the `AuditSettings`.
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
    columns["fidelity_noise"] = _fidelity_under(noise, keep).numpy()
    p = sign_flip_tests(_shift(some), seed=settings.seed)
    columns |= {"p_shift": p.numpy(), "q_shift": benjamini_hochberg(p).numpy()}
    table = pd.DataFrame(columns, columns=pd.Index(FEATURE_COLUMNS))
    return table.loc[severity(table).sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def _shift(m: FeatureMoments) -> Tensor:
    """Σq − Σr by block and feature, 0 where it may be float32 rounding: that can be the same in every block."""
    shift = m.sum_quant - m.sum_ref
    return shift.where(shift.abs() > RESOLUTION * torch.maximum(m.sum_ref, m.sum_quant), 0).cpu()


def _fidelity_under(noise: list[FeatureMoments], keep: Tensor) -> Tensor:
    if not noise:
        return torch.full((len(keep),), torch.nan, dtype=torch.float64)
    return torch.stack([fidelity(draw.select(keep).total())[0].cpu() for draw in noise]).mean(0)


def pair_table(total: FeatureMoments, survival: Survival, variant: str, kinds: Kinds, settings: Any) -> "pd.DataFrame":
    """One row per smeared pair, worst first."""
    import pandas as pd

    n_active = total.n_ref[0].long().tolist()
    rows, start = [], 0
    for site, size in survival.sites.items():
        for pair in _pairs(survival, variant, site, settings):
            behaviour = [kinds[start + k][0] if kinds[start + k] else CAPABILITY for k in (pair.i, pair.j)]
            cosines = (pair.cos_ref, pair.cos_quant, pair.increase)
            n = min(n_active[start + pair.i], n_active[start + pair.j])
            rows.append((str(site), pair.i, pair.j, *behaviour, *cosines, n))
        start += size
    table = pd.DataFrame(rows, columns=pd.Index(PAIR_COLUMNS))
    return table.loc[severity(table).sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def n_smeared(survival: Survival, model: str, settings: Any) -> int | None:
    """Smeared pairs of all sites; None if the model's smearing was not measured."""
    if model not in survival.smearing:
        return None
    return sum(len(_pairs(survival, model, site, settings)) for site in survival.sites)


def _pairs(survival: Survival, model: str, site: Any, settings: Any) -> list[Any]:
    accumulator = survival.smearing.get(model, {}).get(site)
    if accumulator is None:
        return []
    return accumulator.finalize(settings.smearing_tau, settings.smearing_delta, settings.min_active).pairs


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
