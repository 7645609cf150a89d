"""What a number format does to a model, simulated in memory.

`apply_precision(model, "int4-g32")` returns a second model whose weights (and, where the format says so, activations)
hold only what the format can hold; everything it does not touch is shared with the first. `matched_noise` and
`permuted_error` make the controls for it.
"""

from tracelens.precision.apply import apply_precision
from tracelens.precision.config import ActivationConfig, QuantizationConfig, QuantizationType, parse
from tracelens.precision.controls import matched_noise, permuted_error
from tracelens.precision.weights import WeightMatrix, weight_matrices

__all__ = [
    "ActivationConfig",
    "QuantizationConfig",
    "QuantizationType",
    "WeightMatrix",
    "apply_precision",
    "matched_noise",
    "parse",
    "permuted_error",
    "weight_matrices",
]
