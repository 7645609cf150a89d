"""Number formats by name, the options each takes, and how activations may be rounded."""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Literal

Granularity = Literal["channel", "tensor", "block"]
"""What shares a scale: an output channel, the whole matrix, a block of 128 × 128."""
Clipping = Literal["absmax", "mse"]
ActivationFormat = Literal["int8", "int4", "fp8"]


class QuantizationType(Enum):
    """A number format of weights; the value is its name in a specification."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT2 = "int2"
    INT3 = "int3"
    INT4 = "int4"
    INT5 = "int5"
    INT6 = "int6"
    INT7 = "int7"
    INT8 = "int8"
    INT8_DYNAMIC = "int8-dynamic"
    LLM_INT8 = "llm-int8"
    LLM_INT8_WEIGHTS = "llm-int8-weights"
    NF4 = "nf4"
    FP4 = "fp4"
    FP8 = "fp8"
    FP8_E5M2 = "fp8-e5m2"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"
    MXFP8 = "mxfp8"
    PRUNED = "pruned"

    @property
    def bits(self) -> int:
        """Bits per weight, scales aside; 16 for pruning, which leaves weights as they are or takes them away."""
        if self is QuantizationType.PRUNED:
            return 16
        match = re.search(r"\d+", self.value)
        assert match is not None
        return int(match[0])

    @property
    def is_integer(self) -> bool:
        """Whether it is one of the weight-only integers, which take every option."""
        return self.value.startswith("int") and self is not QuantizationType.INT8_DYNAMIC

    @property
    def options(self) -> tuple[str, ...]:
        """Options of a specification that it takes: keys of `OPTIONS`."""
        if self.is_integer:
            return ("g", "tensor", "asym", "mse")
        if self in (QuantizationType.NF4, QuantizationType.FP4):
            return ("g", "dq")
        if self in (QuantizationType.FP8, QuantizationType.FP8_E5M2):
            return ("tensor", "block")
        return {QuantizationType.LLM_INT8: ("t",), QuantizationType.PRUNED: ("s",)}.get(self, ())


HALF_TYPES = (QuantizationType.BF16, QuantizationType.FP16)
FIXED_GROUPS = {QuantizationType.NVFP4: 16, QuantizationType.MXFP4: 32, QuantizationType.MXFP8: 32}
BLOCKS_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Sizes that NF4 and FP4 blocks can have; 64 unless said."""
OPTIONS = {
    "g": "-g<group size>",
    "tensor": "-tensor (one scale for a matrix)",
    "block": "-block (128 × 128)",
    "asym": "-asym",
    "mse": "-mse (clipped where the squared error is least)",
    "dq": "-dq (double quantization)",
    "t": "-t<outlier threshold>",
    "s": "-s<percent of the weights>",
}
"""Option of a specification -> how it is written."""


@dataclass(frozen=True)
class ActivationConfig:
    """How activations are rounded: symmetric, to `format`, with a scale per token, or per tensor from calibration
    prompts."""

    format: ActivationFormat
    static: bool = False

    def __str__(self) -> str:
        return self.format.removeprefix("int") + ("-static" if self.static else "")


def grammar() -> str:
    """What exists, for errors."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for kind in QuantizationType:
        kinds.setdefault(kind.options, []).append(kind.value)
    lines = [
        f"{', '.join(names)}" + (f" with {', '.join(OPTIONS[o] for o in options)}" if options else "")
        for options, names in kinds.items()
    ]
    return (
        f"Known: {'; '.join(lines)}. After the weights may follow +bf16 or +fp16 (what the kernels compute in), "
        "+a8, +a4, +afp8 (inputs of linear layers) and +kv8, +kv4, +kvfp8 (keys and values), each with -static for one "
        "calibrated scale per tensor instead of one per token: for example int4-g128+a8+kv8"
    )
