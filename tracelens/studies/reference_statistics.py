"""What is known of each feature before anything is quantized: how it fires in the reference, and how its decoder lies."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracelens.audit_report import AuditReport
from tracelens.errors import MetricInputError, SAEError
from tracelens.features.saes import SparseEncoder, normalise_saes
from tracelens.sites import Site

if TYPE_CHECKING:
    import pandas as pd

PREDICTORS = ("peak", "mean", "mean_active", "firing_rate", "decoder_norm", "nearest_cosine", "layer")
"""Columns of `reference_statistics` that a prediction may use."""
_CHUNK = 2**24
"""Cosines held at once (64 MB)."""


def reference_statistics(report: AuditReport, saes: Any) -> "pd.DataFrame":
    """One row per live feature, by site and number, from the reference alone.

    Columns: site, feature, behaviour; peak (largest activation), mean (over all tokens), mean_active (over the tokens on which it fires),
    firing_rate (share of tokens), decoder_norm, nearest_cosine (the largest cosine of its decoder row with another's, in [−1, 1]),
    layer. Live is what `report.features` lists.
    Raises `SAEError` unless `saes` (as `normalise_saes` takes them) are those of the audit, `MetricInputError` if no feature is live.
    """
    import pandas as pd

    saes = normalise_saes(saes)
    report.fingerprint.check(saes)
    total = report.moments.total()
    n_ref = total.n_ref[0].cpu()
    live = n_ref >= report.settings["min_active"]
    if not live.any():
        raise MetricInputError("no feature is live in the audit; use more prompts or a lower min_active")
    tables, start = [], 0
    for site, sae in _in_order(report, saes).items():
        size = report.sites[site]
        keep = live[start : start + size].nonzero().squeeze(1)
        rows = keep + start
        peak, mass = total.max_ref.cpu()[rows], total.sum_ref[0].cpu()[rows]
        directions = sae.W_dec.detach().flatten(1)
        columns = {
            "peak": peak,
            "mean": mass / total.n.cpu(),
            "mean_active": mass / n_ref[rows],
            "firing_rate": n_ref[rows] / total.n.cpu(),
            "decoder_norm": directions.float().norm(dim=1).cpu()[keep],
            "nearest_cosine": nearest_cosine(directions, keep),
        }
        table = pd.DataFrame({name: column.double().numpy() for name, column in columns.items()})
        table.insert(0, "site", site)
        table.insert(1, "feature", keep.numpy())
        tables.append(table.assign(layer=float(Site.parse(site).layer)))
        start += size
    statistics = pd.concat(tables, ignore_index=True)
    behaviour = report.features[["site", "feature", "behaviour"]]
    return statistics.merge(behaviour, on=["site", "feature"], how="left")


def nearest_cosine(directions: Float[Tensor, "d_sae d_out"], features: Int[Tensor, "_"]) -> Float[Tensor, "_"]:
    """The largest cosine of the row of each of `features` with any other row; −1 for an only row, 0 for one of norm 0.

    Takes len(features) × d_sae × d_out multiplications and never holds more than 64 MB of cosines.
    """
    unit = torch.nn.functional.normalize(directions.float(), dim=1)
    found = [unit.new_zeros(0)]
    for part in features.to(unit.device).split(max(1, _CHUNK // max(1, len(unit)))):
        cosines = unit[part] @ unit.T
        cosines[torch.arange(len(part), device=unit.device), part] = -1
        found.append(cosines.amax(1))
    return torch.cat(found).clamp(-1, 1).cpu()


def _in_order(report: AuditReport, saes: Mapping[Any, SparseEncoder]) -> dict[str, SparseEncoder]:
    """The SAEs in the order of the report's moments."""
    by_name = {str(site): sae for site, sae in saes.items()}
    wrong = [site for site, size in report.sites.items() if site not in by_name or len(by_name[site].W_dec) != size]
    if wrong:
        raise SAEError(
            f"the audit looked through other SAEs at {', '.join(wrong)}; give those that the report was made with"
        )
    return {site: by_name[site] for site in report.sites}
