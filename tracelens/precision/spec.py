"""The one-line form of a precision, read and written: `int4-g128-asym+bf16+a8-static`."""

import re
from decimal import Decimal
from typing import Any, get_args

from tracelens.errors import PrecisionSpecError
from tracelens.precision.types import ActivationConfig, ActivationFormat, QuantizationType, grammar

_PLAIN = {
    "asym": ("symmetric", False),
    "tensor": ("granularity", "tensor"),
    "block": ("granularity", "block"),
    "mse": ("clipping", "mse"),
    "dq": ("double_quant", True),
}


def parse_spec(spec: str) -> tuple[QuantizationType, dict[str, Any]]:
    """The type and the fields of a `QuantizationConfig` that `spec` names; case and space around it do not matter.

    Raises `PrecisionSpecError` that says which part is wrong and lists what exists.
    """
    weights, *parts = spec.strip().lower().split("+")
    kind, fields = _parse_weights(spec, weights)
    for part in parts:
        name, value = _parse_part(spec, part)
        if name in fields:
            raise _unknown(spec, f"'+{part}' is a second {name}")
        fields[name] = value
    return kind, fields


def _unknown(spec: str, fault: str) -> PrecisionSpecError:
    return PrecisionSpecError(f"unknown precision {spec!r}: {fault}. {grammar()}")


def _parse_weights(spec: str, text: str) -> tuple[QuantizationType, dict[str, Any]]:
    # Names hold dashes themselves: the longest that fits is meant.
    names = sorted((kind.value for kind in QuantizationType), key=len, reverse=True)
    name = next((name for name in names if text == name or text.startswith(f"{name}-")), None)
    if name is None:
        raise _unknown(spec, f"there is no number format {text.split('-')[0]!r}")
    fields: dict[str, Any] = {}
    for option in text.removeprefix(name).split("-")[1:]:
        key, value = _parse_option(option)
        if key is None:
            raise _unknown(spec, f"{option!r} is not an option")
        if key in fields:
            fault = {"group_size": "is a second group size", "granularity": "says again what shares a scale"}
            raise _unknown(spec, f"{option!r} {fault.get(key, 'is given twice')}")
        fields[key] = value
    return QuantizationType(name), fields


def _parse_option(option: str) -> tuple[str | None, Any]:
    if option in _PLAIN:
        return _PLAIN[option]
    if re.fullmatch(r"g[1-9][0-9]*", option):
        return "group_size", int(option[1:])
    if match := re.fullmatch(r"([ts])([0-9]+(?:\.[0-9]+)?)", option):
        # Decimal, so that the percentage of any float is exact and comes back as that float.
        number = Decimal(match[2])
        return ("outlier_threshold", float(number)) if match[1] == "t" else ("sparsity", float(number.scaleb(-2)))
    return None, None


def _parse_part(spec: str, part: str) -> tuple[str, Any]:
    if part in ("bf16", "fp16"):
        return "compute", QuantizationType(part)
    if match := re.fullmatch(r"(a|kv)(8|4|fp8)(-static)?", part):
        name = match[2] if match[2] in get_args(ActivationFormat) else f"int{match[2]}"
        where = "activations" if match[1] == "a" else "kv_cache"
        return where, ActivationConfig(name, static=bool(match[3]))  # pyright: ignore[reportArgumentType]
    raise _unknown(spec, f"'+{part}' is not known")


def number(value: float, *, percent: bool = False) -> str:
    """`value`, or a hundred times it, in as few digits as name that float and no other, without an exponent."""
    exact = Decimal(repr(float(value)))
    return format((exact.scaleb(2) if percent else exact).normalize(), "f")
