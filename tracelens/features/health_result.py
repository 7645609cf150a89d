"""`SAEHealth`: how well SAEs fit both models of a pair, and which do not."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.errors import ResultFileError, UnknownNameError
from tracelens.features.sae_fit import Ablation
from tracelens.features.sae_processing import Processing
from tracelens.output import decode, encode, write_atomically
from tracelens.sites import Site
from tracelens.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

VERSION = 1


@dataclass(frozen=True)
class Fit:
    """How well one SAE fits one model; intervals are 95 % bootstraps over prompts.

    Attributes:
        explained_variance: 1 − Σ‖x − x̂‖² / Σ‖x − mean‖², at most 1.
        cross_entropy_recovered: 1 if the model predicts as well from the reconstruction, 0 if as badly as with the site
            ablated, below 0 if worse; NaN where ablation costs nothing.
        l0: features that fire per token.
        cosine: mean cosine of x and x̂.
        bias: Σ‖x̂‖² / Σ x·x̂, below 1 if reconstructions are shrunken.
        dead: share of features that fire on none of these tokens; of these tokens, so without an interval.
        cross_entropy: of the model as it is, nats per token.
    """

    explained_variance: Estimate
    cross_entropy_recovered: Estimate
    l0: Estimate
    cosine: Estimate
    bias: Estimate
    dead: float
    cross_entropy: float


@dataclass(frozen=True)
class HealthThresholds:
    """Where an SAE counts as broken.

    Attributes:
        min_explained_variance: less than this, in either model.
        min_cross_entropy_recovered: less than this, in either model.
        max_drop: explained variance lost from the reference to the quantized model, as a difference.
        max_l0_ratio: of the two models' L0, the larger over the smaller.
    """

    min_explained_variance: float = 0.5
    min_cross_entropy_recovered: float = 0.8
    max_drop: float = 0.1
    max_l0_ratio: float = 2.0


@dataclass(frozen=True)
class SiteHealth:
    """One SAE on both models; changes are quantized − reference, paired by prompt."""

    d_sae: int
    processing: Processing
    """What is done to activations before the SAE reads them."""
    reference: Fit
    quantized: Fit
    explained_variance_change: Estimate
    cross_entropy_recovered_change: Estimate
    l0_change: Estimate


@dataclass(frozen=True)
class SAEHealth:
    """What `sae_health` found.

    Attributes:
        sites: hook name → health of its SAE.
        thresholds: where an SAE counts as broken.
        reference, quantized: names of the models.
        n_prompts, tokens: what it was measured on.
        ablation: what cross-entropy recovered is 0 at.
    """

    sites: dict[str, SiteHealth]
    thresholds: HealthThresholds
    reference: str
    quantized: str
    n_prompts: int
    tokens: int
    ablation: Ablation

    def ok(self, site: Site | str | None = None) -> bool:
        """Whether the SAE at a site fits both models, or all SAEs do; raises `UnknownNameError` for a site without one."""
        if site is None:
            return not self.broken
        if str(site) not in self.sites:
            raise UnknownNameError.of("site of these SAEs", site, self.sites)
        return not self._findings(str(site))

    @property
    def broken(self) -> list[str]:
        """A sentence for each SAE that does not fit."""
        return [
            f"the SAE at {site} {' and '.join(findings)}: {self._consequence(site)}"
            for site in self.sites
            if (findings := self._findings(site))
        ]

    def summary(self) -> str:
        """A table in plain text, and what is broken."""
        head = f"{'site':<28} {'':<10} {'explained variance':<24} {'cross-entropy recovered':<24} {'L0':<26} dead"
        lines = [f"Fit of the SAEs: {self.n_prompts} prompts, {self.tokens} tokens", head]
        for site, health in self.sites.items():
            for side, fit in (("reference", health.reference), ("quantized", health.quantized)):
                numbers = f"{fit.explained_variance!s:<24} {fit.cross_entropy_recovered!s:<24} {_wide(fit.l0):<26}"
                lines.append(f"{site if side == 'reference' else '':<28} {side:<10} {numbers} {fit.dead:.1%}")
        return "\n".join([*lines, "", *(self.broken or ["All SAEs fit both models."])])

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per site and model; each estimate with its `_low` and `_high`."""
        import pandas as pd

        rows = []
        for site, health in self.sites.items():
            for side, fit in (("reference", health.reference), ("quantized", health.quantized)):
                row: dict[str, Any] = {"site": site, "model": side, "ok": self.ok(site)}
                for name, value in vars(fit).items():
                    single = not isinstance(value, Estimate)
                    row |= (
                        {name: value}
                        if single
                        else {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
                    )
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> "go.Figure":
        """Explained variance, cross-entropy recovered and L0 of each SAE on both models."""
        from tracelens.views.health_figures import health_figure

        return health_figure(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"tracelens_sae_health": VERSION} | encode(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SAEHealth":
        """What `to_dict` gave; raises `ResultFileError` for another version, `KeyError` or `TypeError` for something else."""
        if data["tracelens_sae_health"] != VERSION:
            raise ResultFileError(
                f"a health of SAEs of version {data['tracelens_sae_health']}; this Tracelens reads {VERSION}"
            )
        return decode(cls, data)

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "SAEHealth":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            cause = error if isinstance(error, ResultFileError) else repr(error)
            raise ResultFileError(f"{path} is not a health that SAEHealth.save wrote: {cause}") from error

    def _findings(self, site: str) -> list[str]:
        """What is wrong with a site's SAE; a number that does not exist is not held against it."""
        health, limits = self.sites[site], self.thresholds
        reference, quantized = health.reference, health.quantized
        ours, theirs = reference.explained_variance.value, quantized.explained_variance.value
        found = []
        if min(ours, theirs) < limits.min_explained_variance or ours - theirs > limits.max_drop:
            found.append(
                f"explains {theirs:.2f} of the variance in {self.quantized} against {ours:.2f} in {self.reference}"
            )
        ours, theirs = reference.cross_entropy_recovered.value, quantized.cross_entropy_recovered.value
        if any(value < limits.min_cross_entropy_recovered for value in (ours, theirs)):
            found.append(
                f"recovers {theirs:.2f} of the cross-entropy in {self.quantized} against {ours:.2f} in {self.reference}"
            )
        ours, theirs = reference.l0.value, quantized.l0.value
        if max(ours, theirs) > limits.max_l0_ratio * min(ours, theirs):
            found.append(
                f"fires {theirs:.1f} features a token in {self.quantized} against {ours:.1f} in {self.reference}"
            )
        return found

    def _consequence(self, site: str) -> str:
        fit, limits = self.sites[site].reference, self.thresholds
        never = (
            fit.explained_variance.value < limits.min_explained_variance
            or fit.cross_entropy_recovered.value < limits.min_cross_entropy_recovered
        )
        if never:
            return "it does not fit the reference itself, so it measures neither model"
        return "drift there is the ruler's as well as the model's"


def _wide(estimate: Estimate) -> str:
    return "nan" if math.isnan(estimate.value) else f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"
