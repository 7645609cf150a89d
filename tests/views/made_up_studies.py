"""Results of studies made by hand, as they are where there is nothing to see: no feature, no pair, no interval."""

from dataclasses import replace
from typing import Any

import pandas as pd

from tracelens.features.health_result import Fit, HealthThresholds, SAEHealth, SiteHealth
from tracelens.stats import Estimate
from tracelens.studies.decomposition_result import Contribution, Decomposition, Step
from tracelens.studies.muting import MutingThresholds, ThresholdComparison
from tracelens.studies.muting_causes import MutingTrace
from tracelens.studies.pathways import NewPathways
from tracelens.studies.smearing import SmearingTrace

NAN = float("nan")
NOTHING = Estimate(NAN, NAN, NAN)
LABEL = "<i>INT4</i>"
SITE = "blocks.1.hook_resid_post"


def decomposition(change: Estimate, metric: str = "flips") -> Decomposition:
    """One metric that starts at 0 and one step."""
    start = Estimate(NAN if change.value != change.value else 0.0, NAN, NAN)
    one = Contribution(metric, "weights", change, change, None)
    return Decomposition("made-up", "int4", (Step("weights", "int4"),), {metric: start}, (one,), {metric: change}, {})


def health(recovered: Estimate) -> SAEHealth:
    """One SAE."""
    fit = Fit(Estimate(0.9, 0.8, 0.95), recovered, Estimate(12.0, 11.0, 13.0), NOTHING, NOTHING, 0.0, 1.0)
    site = SiteHealth(8, "none", fit, fit, NOTHING, NOTHING, NOTHING)
    return SAEHealth({SITE: site}, HealthThresholds(), "made-up", LABEL, 2, 20, "zero")


def thresholds(share: float, *, safety: int) -> MutingThresholds:
    """A ladder of two steps; as many safety features muted in each as `share` says."""
    columns = ["precision", "bits", "set", "features", "share", "low", "high"]
    sets = [("capability", 3), *([("safety", safety)] if safety else [])]
    rows = [
        (precision, bits, name, n, share, share, share)
        for precision, bits in (("int8", 8.0), ("int4", 4.0))
        for name, n in sets
    ]
    comparison = ThresholdComparison(safety, 3, NAN, NAN, 1.0)
    return MutingThresholds(pd.DataFrame(), pd.DataFrame(rows, columns=columns), comparison, ("int8", "int4"), 0.9, 10)


def muting(n_units: int) -> MutingTrace:
    """As many units, none of which is muted."""
    units = ["site", "unit", "behaviour", "n_active", "muting_rate", "n_moved", "n_clipped", "bits_needed", "cause"]
    rows: list[tuple[Any, ...]] = [(SITE, i, "capability", 20, 0.0, 0, 0, 4.0, "") for i in range(n_units)]
    profile = pd.DataFrame(
        {"bits": [8, 2], "firings_clipped": [0.0, NAN], "units_muted": [0.0, NAN], "low": NAN, "high": NAN}
    )
    return MutingTrace("feature", LABEL, pd.DataFrame(rows, columns=units), profile, "token", 20, 0.9, 10, "<b>0.1</b>")


def smearing() -> SmearingTrace:
    """No pair, and no safety feature of which a share could be told."""
    share = [("quantized", "safety", NAN, NAN, NAN), ("quantized", "capability", 0.0, 0.0, 0.3)]
    leak = [("quantized", "capability", "capability", 1.0, NAN, NAN)]
    return SmearingTrace(
        label=LABEL,
        pairs=pd.DataFrame(),
        groups=pd.DataFrame(columns=["site", "size", "n_safety", "n_pairs", "density", "joins"]),
        shares=pd.DataFrame(share, columns=["model", "class", "share", "low", "high"]),
        leakage=pd.DataFrame(leak, columns=["model", "class_reference", "class_quantized", "ratio", "low", "high"]),
        tau=0.5,
        delta=0.2,
        min_active=10,
        n_prompts=2,
    )


def pathways() -> NewPathways:
    """No new feature, and noise that was not measured."""
    columns = ["site", "feature", "effect", "low", "high", "q_value", "n_quant", "n_prompts", "novelty"]
    empty = pd.DataFrame(columns=columns)
    return NewPathways(LABEL, empty, empty, 0, None, 5, 0.9, 10, 2)


def pathways_of_one() -> NewPathways:
    one = pathways().table
    one.loc[0] = [SITE, 3, 0.1, 0.05, 0.2, 0.01, 20, 2, 0.95]
    return replace(pathways(), table=one, n_novel=1, n_novel_noise=4)
