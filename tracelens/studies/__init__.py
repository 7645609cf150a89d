"""What can be read from several audits together, or asked of a pair beyond one: curves, causes, predictions.

Names are imported here and not resolved on use: `feature_damage` is a module too, and the function must win.
"""

from tracelens.studies.decomposition import decompose
from tracelens.studies.decomposition_result import Decomposition
from tracelens.studies.feature_damage import FeatureDamage, feature_damage
from tracelens.studies.forecast_check import ForecastCheck, check_forecasts
from tracelens.studies.muting import MutingThresholds, dead_features, muting_thresholds
from tracelens.studies.muting_causes import MutingTrace, feature_muting
from tracelens.studies.muting_control import noise_moments
from tracelens.studies.neurons import neuron_muting
from tracelens.studies.overlap import DamageOverlap, damage_overlap, overlap_table
from tracelens.studies.pathways import NewPathways, new_pathways
from tracelens.studies.prediction import SurvivalPrediction, predict_survival
from tracelens.studies.pruning import MatchedPruning, match_pruning
from tracelens.studies.smearing import SmearingTrace, groups_of, trace_smearing
from tracelens.studies.survival import SurvivalCurve, survival_curve
from tracelens.studies.survival_predictor import SurvivalForecast, SurvivalPredictor

__all__ = [
    "DamageOverlap",
    "Decomposition",
    "FeatureDamage",
    "ForecastCheck",
    "MatchedPruning",
    "MutingThresholds",
    "MutingTrace",
    "NewPathways",
    "SmearingTrace",
    "SurvivalCurve",
    "SurvivalForecast",
    "SurvivalPrediction",
    "SurvivalPredictor",
    "check_forecasts",
    "damage_overlap",
    "dead_features",
    "decompose",
    "feature_damage",
    "feature_muting",
    "groups_of",
    "match_pruning",
    "muting_thresholds",
    "neuron_muting",
    "new_pathways",
    "noise_moments",
    "overlap_table",
    "predict_survival",
    "survival_curve",
    "trace_smearing",
]
