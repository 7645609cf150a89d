"""Tracelens: does a language model's safety machinery survive quantization, which part breaks, and what brings it back?

Public names are resolved on first use, so that `import tracelens` loads neither torch nor transformer_lens.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "tracelens.audit": ("Audit", "AuditReport"),
    "tracelens.errors": ("TracelensError",),
    "tracelens.features": ("CircuitTracer", "Fingerprint", "SAEHealth", "load_saes", "sae_health"),
    "tracelens.hooks": ("ActivationCapture", "HookConfig", "HookManager"),
    "tracelens.loading": ("Checkpoint", "load"),
    "tracelens.loading.doctor": ("Diagnosis", "doctor"),
    "tracelens.optimization_auditor": ("OptimizationAuditor", "SweepResult"),
    "tracelens.pair": ("PrecisionPair",),
    "tracelens.precision": ("QuantizationConfig", "QuantizationType", "apply_precision"),
    "tracelens.precision.calibrated": ("quantize",),
    "tracelens.sites": ("Site",),
    "tracelens.studies.decomposition": ("decompose",),
    "tracelens.studies.decomposition_result": ("Decomposition",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_SUBPACKAGES = (
    "behaviour",
    "causal",
    "datasets",
    "features",
    "loading",
    "metrics",
    "organism",
    "precision",
    "studies",
    "views",
)

__all__ = ["__version__", *_HOME_OF, *_SUBPACKAGES]

if TYPE_CHECKING:
    from tracelens import behaviour, causal, datasets, features, loading, metrics, organism, precision, studies, views
    from tracelens.audit import Audit, AuditReport
    from tracelens.errors import TracelensError
    from tracelens.features import CircuitTracer, Fingerprint, SAEHealth, load_saes, sae_health
    from tracelens.hooks import ActivationCapture, HookConfig, HookManager
    from tracelens.loading import Checkpoint, load
    from tracelens.loading.doctor import Diagnosis, doctor
    from tracelens.optimization_auditor import OptimizationAuditor, SweepResult
    from tracelens.pair import PrecisionPair
    from tracelens.precision import QuantizationConfig, QuantizationType, apply_precision
    from tracelens.precision.calibrated import quantize
    from tracelens.sites import Site
    from tracelens.studies.decomposition import decompose
    from tracelens.studies.decomposition_result import Decomposition


def __getattr__(name: str):
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    elif name in _SUBPACKAGES:
        value = import_module(f"tracelens.{name}")
    else:
        raise AttributeError(f"module 'tracelens' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
