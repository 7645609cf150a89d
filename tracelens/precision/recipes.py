"""Names of calibrated quantizations (`gptq-int4-g128`), and what they mean to llm-compressor."""

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tracelens.errors import PrecisionSpecError
from tracelens.precision.config import ActivationConfig, QuantizationConfig, QuantizationType

Smoothing = Literal["awq", "smoothquant"]
Rounding = Literal["gptq", "rtn"]

_FLOATS = {
    QuantizationType.NVFP4: {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    QuantizationType.MXFP4: {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    QuantizationType.MXFP8: {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
}
_FORMATS = tuple(
    kind
    for kind in QuantizationType
    if kind.is_integer or kind in (QuantizationType.INT8_DYNAMIC, QuantizationType.FP8, *_FLOATS)
)
_KNOWN = (
    "a recipe is METHOD-PRECISION, where METHOD is gptq, awq, smoothquant, awq-gptq, smoothquant-gptq or rtn (the default: "
    f"rounding to nearest), and PRECISION one of {', '.join(kind.value for kind in _FORMATS)} with its options "
    "(gptq-int4-g128, awq-int4-g128-asym, smoothquant-int8, gptq-int8+a8, rtn-fp8-block); or the path of a recipe of "
    "llm-compressor (.yaml)"
)


@dataclass(frozen=True)
class Recipe:
    """How weights are quantized: what is moved between layers first, how weights are rounded, and to what."""

    name: str
    smoothing: Smoothing | None = None
    rounding: Rounding = "rtn"
    config: QuantizationConfig | None = None
    """Of the weights and of activations; None where a file says it."""
    file: Path | None = None

    @classmethod
    def parse(cls, recipe: "str | PathLike[str] | Recipe") -> "Recipe":
        """The recipe that a name or the path of a `.yaml` file stands for.

        Raises `PrecisionSpecError` for a name that says something else than llm-compressor can do; it lists what can.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, PathLike) or recipe.endswith((".yaml", ".yml")):
            return _from_file(Path(recipe))
        methods, rest = [], recipe.strip().lower()
        while (word := rest.partition("-")[0]) in (*get_args(Smoothing), *get_args(Rounding)):
            methods.append(word)
            rest = rest.partition("-")[2]
        smoothing = [word for word in methods if word in get_args(Smoothing)]
        rounding = [word for word in methods if word in get_args(Rounding)]
        if len(smoothing) > 1 or len(rounding) > 1 or methods != smoothing + rounding:
            raise PrecisionSpecError(f"recipe {recipe!r}: {'-'.join(methods)} is no order of methods; {_KNOWN}")
        try:
            config = QuantizationConfig.parse(rest)
        except PrecisionSpecError as error:
            raise PrecisionSpecError(
                f"recipe {recipe!r}: {rest!r} is no precision ({str(error).split('. Known:')[0]}); {_KNOWN}"
            ) from error
        return cls._checked(recipe, smoothing[0] if smoothing else None, rounding[0] if rounding else "rtn", config)  # pyright: ignore[reportArgumentType]

    @classmethod
    def _checked(
        cls, name: str, smoothing: Smoothing | None, rounding: Rounding, config: QuantizationConfig
    ) -> "Recipe":
        if config.type not in _FORMATS:
            raise PrecisionSpecError(
                f"recipe {name!r}: llm-compressor writes no checkpoint in {config.type.value}; {_KNOWN}. "
                f"To simulate it, use {str(config)!r} as a precision"
            )
        if config.kv_cache is not None:
            raise PrecisionSpecError(
                f"recipe {name!r}: a checkpoint holds weights, and keys and values are rounded by the runtime; leave "
                f"+kv{config.kv_cache} out, and simulate it beside the checkpoint (precision='fp32+kv{config.kv_cache}')"
            )
        if smoothing == "smoothquant" and config.activations is None:
            config = replace(config, activations=ActivationConfig("int8"))
        if smoothing == "awq" and (not config.type.is_integer or config.granularity == "tensor"):
            raise PrecisionSpecError(
                f"recipe {name!r}: awq looks for scales of integers with a scale per group or channel, "
                "as in awq-int4-g128"
            )
        return cls(name, smoothing, rounding, config)

    @property
    def needs_calibration(self) -> bool:
        """Whether prompts are run: always, but for rounding to nearest with no static scales of activations."""
        static = self.config is not None and self.config.needs_calibration
        return self.file is not None or self.smoothing is not None or self.rounding == "gptq" or static

    @property
    def dtype(self) -> torch.dtype | None:
        """What `+bf16` or `+fp16` says that the model is held in, scales and unquantized weights included."""
        compute = self.config.compute if self.config else QuantizationType.FP32
        return {QuantizationType.BF16: torch.bfloat16, QuantizationType.FP16: torch.float16}.get(compute)

    def modifiers(self, ignore: list[str]) -> Any:
        """The recipe as llm-compressor takes it: modifier objects, or the path of the file (which says itself what it
        ignores)."""
        if self.file is not None:
            return str(self.file)
        assert self.config is not None
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        smoothing = {"awq": AWQModifier, "smoothquant": SmoothQuantModifier}
        rounding = {"gptq": GPTQModifier, "rtn": QuantizationModifier}
        first = [smoothing[self.smoothing]()] if self.smoothing else []
        return [*first, rounding[self.rounding](config_groups={"group_0": scheme(self.config)}, ignore=ignore)]


def scheme(config: QuantizationConfig) -> dict[str, Any]:
    """A config group of compressed-tensors for the linear layers."""
    found: dict[str, Any] = {"targets": ["Linear"], "weights": _weights(config)}
    if config.activations is not None:
        number: dict[str, Any] = {"num_bits": 4 if config.activations.format == "int4" else 8}
        number["type"] = "float" if config.activations.format == "fp8" else "int"
        static = {"strategy": "tensor", "dynamic": False, "observer": "static_minmax"}
        found["input_activations"] = number | (static if config.activations.static else _DYNAMIC)
    return found


_DYNAMIC = {"strategy": "token", "dynamic": True, "symmetric": True}


def _weights(config: QuantizationConfig) -> dict[str, Any]:
    if config.type in _FLOATS:
        grid = _FLOATS[config.type]
        return {"num_bits": config.bits, "type": "float", "symmetric": True, "zp_dtype": grid["scale_dtype"], **grid}
    found: dict[str, Any] = {
        "num_bits": config.bits,
        "type": "float" if config.type is QuantizationType.FP8 else "int",
        "symmetric": config.symmetric,
        "strategy": "group" if config.group_size else config.granularity,
    }
    if config.group_size:
        found["group_size"] = config.group_size
    if config.granularity == "block":
        found["block_structure"] = [128, 128]
    if config.clipping == "mse":
        found["observer"] = "memoryless_mse"
    return found


def _from_file(file: Path) -> Recipe:
    if not file.is_file():
        raise PrecisionSpecError(f"there is no recipe at {file}; {_KNOWN}")
    return Recipe(file.name, file=file)
