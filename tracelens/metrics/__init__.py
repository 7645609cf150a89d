"""What quantization does to features and outputs, as pure tensor maths: no model, no plot, no SAE library."""

from tracelens.metrics.clipping import Clipping, ClippingAccumulator
from tracelens.metrics.cpfr import CPFR, CPFRResult, cpfr, fidelity
from tracelens.metrics.divergence import Divergence, DivergenceAccumulator, nll, token_divergence
from tracelens.metrics.drift import (
    DriftResult,
    FeatureDrift,
    correlation,
    drift,
    firing_rate_change,
    jaccard,
    mean_activation_change,
    novelty,
    relative_drift,
    retention,
)
from tracelens.metrics.leakage import ClassLeakage, Leakage
from tracelens.metrics.moments import FeatureMoments, MomentAccumulator
from tracelens.metrics.muting import ActivationMuting, MutingResult, muting_rate
from tracelens.metrics.muting_causes import CauseAccumulator, MutingCauses
from tracelens.metrics.muting_thresholds import ThresholdBrackets, threshold_brackets
from tracelens.metrics.pathways import novel_features
from tracelens.metrics.smearing import FeatureSmearing, SmearedPair, SmearingAccumulator, SmearingResult
from tracelens.metrics.smearing_groups import SmearedGroup, smeared_groups
from tracelens.metrics.support import JointSupport

__all__ = [
    "CPFR",
    "ActivationMuting",
    "CPFRResult",
    "CauseAccumulator",
    "ClassLeakage",
    "Clipping",
    "ClippingAccumulator",
    "Divergence",
    "DivergenceAccumulator",
    "DriftResult",
    "FeatureDrift",
    "FeatureMoments",
    "FeatureSmearing",
    "JointSupport",
    "Leakage",
    "MomentAccumulator",
    "MutingCauses",
    "MutingResult",
    "SmearedGroup",
    "SmearedPair",
    "SmearingAccumulator",
    "SmearingResult",
    "ThresholdBrackets",
    "correlation",
    "cpfr",
    "drift",
    "fidelity",
    "firing_rate_change",
    "jaccard",
    "mean_activation_change",
    "muting_rate",
    "nll",
    "novel_features",
    "novelty",
    "relative_drift",
    "retention",
    "smeared_groups",
    "threshold_brackets",
    "token_divergence",
]
