"""What GPTQ and AWQ have in common: `qweight`, `qzeros` and `scales` per module, told apart by their shapes, and what
the config declares about each module."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Stored
from tracelens.loading.formats.refused import refusal

Packing = Literal["gptq", "gemm", "gemv", "gemv_fast"]
METHODS = ("", "gptq", "awq", "auto-round", "autoround", "intel/auto-round")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GET = "load the full-precision original, or get the checkpoint again with its own config"


def family(stored: Stored) -> Literal["gptq", "awq"] | None:
    """Whose tensors these are, by the shapes of most modules; by the label if no shapes fit. None if neither's."""
    modules = stored.modules("qweight")
    if not modules or stored.method not in METHODS or refusal(stored):
        return None
    found = Counter(packing(stored, module) for module in modules)
    known = Counter({kind: count for kind, count in found.items() if kind})
    if not known:
        return "awq" if "awq" in stored.method + packing_format(stored) else "gptq"
    return "gptq" if known.most_common(1)[0][0] == "gptq" else "awq"


def packing(stored: Stored, module: str) -> Packing | None:
    """How a module's codes are packed, by shapes and dtypes; None if they fit no packing.

    With K inputs, N outputs, G groups: gptq (K·b/32, N), scales (G, N); gemm (K, N·b/32), scales (G, N);
    gemv (N, K/8), scales (N, padded G); gemv_fast int16 (N/4, K), scales (padded G, N).
    """
    names = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    if any(name not in stored or len(stored.shape(name)) != 2 for name in names):
        return None
    (rows, columns), zeros, (first, last) = (stored.shape(name) for name in names)
    kinds = [stored.dtype(name) for name in names]
    if kinds[2] not in FLOATS:
        return None
    if kinds[:2] == [torch.int16, kinds[2]]:
        return "gemv_fast" if rows * 4 == last and zeros == (first, last) else None
    if kinds[:2] != [torch.int32, torch.int32]:
        return None
    fits: dict[Packing, bool] = {
        "gptq": columns == last and first == zeros[0] and zeros[1] < last,
        "gemv": rows == first == zeros[0] and zeros[1] * 8 == last,
        "gemm": columns in (last // 8, last // 4) and zeros == (first, columns),
    }
    candidates: list[Packing] = [kind for kind, does in fits.items() if does]
    if candidates == ["gptq", "gemv"] and "awq" in stored.method:
        return "gemv"
    return candidates[0] if candidates else None


def packing_format(stored: Stored) -> str:
    """What auto-round calls its packing, e.g. `auto_round:auto_gptq`; empty if the config names none."""
    named = stored.quantization.get("packing_format") or stored.quantization.get("backend")
    return named.lower() if isinstance(named, str) else ""


def declared(stored: Stored, module: str, *keys: str) -> Any:
    """What the config says about a module under the first of some keys that it has; None if it says nothing."""
    for settings in (*_overrides(stored.quantization, module), stored.quantization):
        for key in keys:
            if settings.get(key) is not None:
                return settings[key]
    return None


def whole_number(stored: Stored, module: str, *keys: str) -> int | None:
    """A declared setting that must be a whole number."""
    value = declared(stored, module, *keys)
    if value is None:
        return None
    try:
        if float(value) != int(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise CheckpointError(
            f"the quantization config of {stored.path} says {keys[0]} = {value!r} for {module!r}, expected a whole "
            f"number; {GET}"
        ) from None


def check_group_size(stored: Stored, module: str, inputs: int, groups: int, size: int | None) -> int:
    """Inputs in a group: what is declared, if it fits the number of groups stored.

    Zero and negative sizes stand for one group. Raises `CheckpointError` naming both if they disagree.
    """
    if size is None and groups > 0 and inputs % groups == 0:
        return inputs // groups
    wanted = inputs if size is None or size <= 0 else size
    if groups != -(-inputs // wanted):
        raise CheckpointError(
            f"{module!r} in {stored.path}: group_size {size} of the config makes {-(-inputs // wanted)} groups of "
            f"{inputs} inputs, but {module + '.scales'!r} {list(stored.shape(module + '.scales'))} holds {groups} "
            f"(group_size {-(-inputs // max(groups, 1))}); {GET}"
        )
    return min(wanted, inputs)


def misfit(stored: Stored, module: str, expected: str) -> CheckpointError:
    """The error for a module whose tensors do not belong together."""
    parts = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    found = ", ".join(
        f"{name.rpartition('.')[2]} {str(stored.dtype(name)).removeprefix('torch.')} {list(stored.shape(name))}"
        for name in parts
        if name in stored
    )
    return CheckpointError(f"{module!r} in {stored.path} has {found}; expected {expected}; {GET}")


def _overrides(config: Mapping[str, Any], module: str) -> Iterator[Mapping[str, Any]]:
    """What GPTQModel's `dynamic` and auto-round's `extra_config` say about one module, most specific first."""
    rules = config.get("extra_config")
    for name, settings in rules.items() if isinstance(rules, Mapping) else ():
        if isinstance(settings, Mapping) and (name == module or _matches(name, module, whole=True)):
            yield settings
    rules = config.get("dynamic")
    # `-:` rules name what is not quantized; tensors say that already.
    for rule, settings in rules.items() if isinstance(rules, Mapping) else ():
        if isinstance(settings, Mapping) and not rule.startswith("-:") and _matches(rule.removeprefix("+:"), module):
            yield settings
            return


def _matches(pattern: str, module: str, whole: bool = False) -> bool:
    try:
        return bool((re.fullmatch if whole else re.match)(pattern, module))
    except re.error:
        return False
