"""Sparse autoencoders on models: loading them, and fingerprints of the features that carry a behaviour."""

from tracelens.features.fingerprint import CircuitTracer, Fingerprint
from tracelens.features.health import sae_health
from tracelens.features.health_result import HealthThresholds, SAEHealth
from tracelens.features.maxima import PromptMaxima
from tracelens.features.saes import check_saes, encode, load_saes, normalise_saes, provenance_of, sae_hash
from tracelens.features.selection import FingerprintFeature, select_features

__all__ = [
    "CircuitTracer",
    "Fingerprint",
    "FingerprintFeature",
    "HealthThresholds",
    "PromptMaxima",
    "SAEHealth",
    "check_saes",
    "encode",
    "load_saes",
    "normalise_saes",
    "provenance_of",
    "sae_hash",
    "sae_health",
    "select_features",
]
