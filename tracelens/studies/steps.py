"""The steps from full precision to a quantized model, as precisions that build on each other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from tracelens.errors import PrecisionSpecError
from tracelens.precision import QuantizationConfig, QuantizationType

StepName = Literal["compute", "weights", "activations", "kv_cache"]
STEPS: tuple[StepName, ...] = get_args(StepName)
Compute = Literal["bf16", "fp16"]

_HALF = (QuantizationType.BF16, QuantizationType.FP16)


def step_precisions(
    precision: str | QuantizationType | QuantizationConfig,
    *,
    compute: Compute | None = "bf16",
    order: Sequence[str] = STEPS,
) -> dict[StepName, QuantizationConfig]:
    """Step → the precision with it and all steps before it; steps that the precision does not take are left out.

    Args:
        compute: what kernels compute in where the precision does not say; None leaves this step out.

    The last precision is the one that was given, computing in `compute`. One that takes no step at all has the one step
    "weights", which changes nothing.
    Raises `PrecisionSpecError` unless `order` names each step once, and for LLM.int8() with activations before weights.
    """
    if sorted(order) != sorted(STEPS):
        raise PrecisionSpecError(f"order is {tuple(order)}; expected each of {STEPS} once")
    config = QuantizationConfig.parse(precision)
    half = config.type if config.type in _HALF else config.compute
    if half is QuantizationType.FP32 and compute is not None:
        half = QuantizationType(compute)
    is_llm = config.type is QuantizationType.LLM_INT8
    taken = {
        "compute": half is not QuantizationType.FP32,
        "weights": config.type not in (QuantizationType.FP32, *_HALF),
        "activations": config.activations is not None or is_llm,
        "kv_cache": config.kv_cache is not None,
    }
    steps: list[StepName] = [step for step in sorted(STEPS, key=list(order).index) if taken[step]]
    if is_llm and steps.index("activations") < steps.index("weights"):
        raise PrecisionSpecError(
            f"precision {config} decomposes activations by its int8 weights; put weights before activations in order"
        )
    if not steps:
        return {"weights": config}
    return {step: _with(config, half, set(steps[: i + 1])) for i, step in enumerate(steps)}


def _with(config: QuantizationConfig, half: QuantizationType, taken: set[StepName]) -> QuantizationConfig:
    """What is left of a precision that takes only some of its steps."""
    if {"weights", "activations"} <= taken:
        made = replace(config, kv_cache=None, compute=QuantizationType.FP32)
    elif "weights" in taken:
        made = config.weights_only
    else:
        made = QuantizationConfig(
            QuantizationType.FP32, activations=config.activations if "activations" in taken else None
        )
    made = replace(made, kv_cache=config.kv_cache) if "kv_cache" in taken else made
    return replace(made, compute=half) if "compute" in taken else made
