"""What a behaviour depends on, in one model and across precisions: patching, ablation, attribution, repair."""

from tracelens.causal import repair
from tracelens.causal.ablation import active_features, importance
from tracelens.causal.ablation_result import Importance
from tracelens.causal.attribution import attribute_weights
from tracelens.causal.attribution_result import WeightAttribution
from tracelens.causal.bound import drift_bound, drift_bounds
from tracelens.causal.bound_result import DriftBound
from tracelens.causal.component_drift import Drift, component_drift
from tracelens.causal.contrast_check import ContrastCheck
from tracelens.causal.contrasts import Contrasts
from tracelens.causal.corruptions import EmbeddingNoise, MeanEmbedding, ResampleEmbedding, ZeroEmbedding
from tracelens.causal.dataset_contrasts import dataset_contrasts
from tracelens.causal.fragility import fragility
from tracelens.causal.fragility_result import Fragility
from tracelens.causal.organism_contrasts import organism_contrasts
from tracelens.causal.patching import activation_patching, cross_precision_patching
from tracelens.causal.patching_result import PatchingResult
from tracelens.causal.paths import cross_precision_path_patching, path_patching
from tracelens.causal.places import Place
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import KL, Function, LogitDifference, LogProb, Loss, Margin, Metric

__all__ = [
    "KL",
    "ContrastCheck",
    "Contrasts",
    "Drift",
    "DriftBound",
    "EmbeddingNoise",
    "Fragility",
    "Function",
    "Importance",
    "LogProb",
    "LogitDifference",
    "Loss",
    "Margin",
    "MeanEmbedding",
    "Metric",
    "PatchingResult",
    "Place",
    "PromptSet",
    "ResampleEmbedding",
    "WeightAttribution",
    "ZeroEmbedding",
    "activation_patching",
    "active_features",
    "attribute_weights",
    "component_drift",
    "cross_precision_patching",
    "cross_precision_path_patching",
    "dataset_contrasts",
    "drift_bound",
    "drift_bounds",
    "fragility",
    "importance",
    "organism_contrasts",
    "path_patching",
    "repair",
]
