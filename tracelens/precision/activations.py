"""Rounding of activations as a kernel does it, by hooks that stay with the model.

The hooks are torch's own, on the modules, and not TransformerLens hooks: `reset_hooks` and `run_with_hooks` leave
them alone, and being first they run before any hook that reads. So what is captured at such a place is what the
kernel would see.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tracelens.precision.activation_grids import round_beside_outliers, round_fixed, round_rows
from tracelens.precision.bridge_places import (
    bridge_keys_and_values,
    bridge_linear_inputs,
    bridge_stored_tensors,
    is_bridge,
)
from tracelens.precision.config import ActivationConfig, QuantizationConfig, QuantizationType
from tracelens.precision.grids import round_to_dtype
from tracelens.precision.places import (
    Place,
    as_rows,
    check_blocks,
    check_unfolded,
    keys_and_values,
    linear_inputs,
    stored_tensors,
)
from tracelens.precision.ranges import observe_ranges

HALF = {QuantizationType.BF16: torch.bfloat16, QuantizationType.FP16: torch.float16}


class _StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is that of the identity: the true one is zero almost everywhere and would say nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def simulate_activations(model: Any, config: QuantizationConfig, *, calibration: Sequence[Any] | None = None) -> None:
    """Registers on `model`, for good, the hooks by which it rounds activations as `config` says; none for weight-only
    formats. Gradients pass straight through.

    `+bf16`, `+fp16`: all that a kernel of that dtype stores, see `stored_tensors`.
    `+a8`, `+a4`, `+afp8`: the inputs of the linear layers, symmetric, one scale per token over the whole input; the
    unembedding and the routers of experts read full precision.
    `+kv8`, `+kv4`, `+kvfp8`: keys, rotated as they are cached, and values; one scale per token and key-value head.
    `-static`: one scale for each of these tensors (for all keys of a layer, all values of a layer), from the largest
    magnitude over the `calibration` prompts; what is larger saturates. The ranges are those of `model` with nothing
    rounded but what `+bf16` rounds.
    `llm-int8`: int8 per token beside outliers, see `round_beside_outliers`.

    Sums are in the model's dtype: a kernel's integer products are exact there, and a float32 product of rounded numbers
    differs in the last bits. The largest static magnitudes stay on the model as `static_ranges`.
    Raises `PrecisionSpecError` for blocks that are not known, norm weights that are folded, and static scales without
    calibration prompts.
    """
    half = HALF.get(config.type) or HALF.get(config.compute)
    outliers = config.outlier_threshold if config.type is QuantizationType.LLM_INT8 else None
    inputs = config.activations is not None or outliers is not None
    if half is None and not inputs and config.kv_cache is None:
        return
    bridge = is_bridge(model)
    if not bridge:
        check_blocks(model, str(config))
    if inputs:
        check_unfolded(model, str(config))
    at_inputs = [*(bridge_linear_inputs if bridge else linear_inputs)(model)] if inputs else []
    at_cache = [*(bridge_keys_and_values if bridge else keys_and_values)(model)] if config.kv_cache else []
    if half is not None:
        for place in (bridge_stored_tensors if bridge else stored_tensors)(model):
            _round(place, partial(round_to_dtype, dtype=half))
    if outliers is not None:
        for place in at_inputs:
            _round(place, partial(round_beside_outliers, threshold=outliers))
        at_inputs = []
    formats = [(place, config.activations) for place in at_inputs] + [(place, config.kv_cache) for place in at_cache]
    _round_to_formats(model, [(place, format) for place, format in formats if format is not None], calibration)


def _round_to_formats(
    model: Any, formats: Sequence[tuple[Place, ActivationConfig]], calibration: Sequence[Any] | None
) -> None:
    static = [place for place, format in formats if format.static]
    ranges = observe_ranges(model, static, calibration) if static else {}
    for place, format in formats:
        if format.static:
            _round(place, partial(round_fixed, format=format.format, largest=ranges[place.range_name]))
        else:
            _round(place, partial(round_rows, format=format.format))
    if static:
        model.static_ranges = {name: largest.item() for name, largest in ranges.items()}


def _round(place: Place, rounding: Callable[[Tensor], Tensor]) -> None:
    # The hook holds no module: a deep copy of the model shares its hooks, and must not keep the first model alive.
    width, clip = place.width, place.clip

    def by_rows(x: Tensor) -> Tensor:
        return rounding(as_rows(x, width, clip)).view_as(x)

    place.attach(lambda x: _StraightThrough.apply(x, by_rows))
