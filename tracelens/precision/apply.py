"""`apply_precision`: a model as a number format leaves it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tracelens.precision.activations import HALF, simulate_activations
from tracelens.precision.config import QuantizationConfig, QuantizationType
from tracelens.precision.rounding import round_weight, to_half
from tracelens.precision.sharing import copy_sharing
from tracelens.precision.weights import weight_matrices


@torch.no_grad()
def apply_precision(
    model: Any,
    config: str | QuantizationType | QuantizationConfig,
    *,
    calibration: Sequence[Any] | None = None,
    progress: bool = False,
) -> Any:
    """A model of the same class that computes as `config` lets it; the result's `.precision` is the
    `QuantizationConfig`.

    Weight formats round the weights of the linear layers and leave embeddings, unembedding, norms and biases alone, as
    quantizers do. `+a8` also rounds the inputs of those layers, `+kv8` keys and values. `bf16` and `fp16`, alone or as
    `+bf16`, round all that a half-precision kernel stores (every parameter; inputs and outputs of linear layers; the
    residual stream) while sums stay in the model's dtype. `fp32` changes nothing.

    `calibration`: prompts (texts or token ids) on which static scales are found; the ranges are those of the model with
    its weights rounded. `progress` shows a bar over the weights: the search of `-mse` takes minutes for a billion of
    them. Every tensor that is not rounded is shared with `model`, so edit neither in place; hooks of
    `model` are not copied.
    Raises `PrecisionSpecError` for an unknown specification, a group size that does not divide an input width, static
    scales without calibration prompts, and a model that already carries a simulated precision; `NonFiniteError` if a
    weight overflows fp16 or is not finite.
    """
    config = QuantizationConfig.parse(config)
    quantized = copy_sharing(model, _rounded(model, config, progress))
    simulate_activations(quantized, config, calibration=calibration)
    quantized.precision = config
    return quantized


def _rounded(model: Any, config: QuantizationConfig, progress: bool) -> dict[str, Tensor]:
    """Parameters that change. With `+bf16` the model is held in bf16 before its weights are rounded, as a quantizer finds
    it, and what a kernel dequantizes is bf16 again."""
    half = HALF.get(config.type) or HALF.get(config.compute)
    held: dict[str, Tensor] = {}
    if half is not None:
        held = {name: to_half(name, parameter, half) for name, parameter in model.named_parameters()}
    if config.type in (QuantizationType.FP32, *HALF):
        return held
    from tqdm.auto import tqdm

    for weight in tqdm(list(weight_matrices(model)), desc=f"rounding to {config}", unit="weight", disable=not progress):
        source = replace(weight, parameter=held.get(weight.name, weight.parameter))
        rounded = weight.restore(round_weight(source.matrix, config, weight.name))
        held[weight.name] = rounded if half is None else to_half(weight.name, rounded, half)
    return held
