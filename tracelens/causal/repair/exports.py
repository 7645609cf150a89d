"""Modules to keep in 16 bit, as quantizers are told: GPTQModel's `dynamic`, llm-compressor's `ignore`, bitsandbytes' skip list.

Each library matches names in its own way, and a name that matches too much keeps too much. So every export is run against the
names of all of the model's linear layers by its library's rule (`matched`) before it is handed out:

- GPTQModel (7.x; vLLM and SGLang read `dynamic` alike): keys are regular expressions that must match at the start of the full
  name (`re.match`), the first that matches decides, and `-:` before one means not to quantize.
- llm-compressor (compressed-tensors): a name or a class, exactly; behind `re:` a regular expression that must match at the start.
- bitsandbytes (transformers 5.17, `should_convert_module`): each entry is a regular expression that must match at the start, or
  the end of the name as it stands. A list that is given *replaces* the default, which is the output layer: it has to be in it.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tracelens.causal.repair.module_names import aliases, is_linear, output_layers
from tracelens.errors import PlanError, UnknownNameError

Library = Literal["gptqmodel", "llm-compressor", "bitsandbytes"]
LIBRARIES = ("gptqmodel", "llm-compressor", "bitsandbytes")
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layer of vLLM → those of a checkpoint that it is made of."""


def export(
    modules: Sequence[str], architecture: str, library: str, *, known: Sequence[str], recipe: str | None = None
) -> Any:
    """What to hand to a library so that it leaves these modules in 16 bit, and the output layer too.

    Args:
        modules: to keep.
        known: all linear modules of the model's blocks, against which the export is checked.
        recipe: for llm-compressor, how all else is quantized, as `tracelens.quantize` takes it: the export then has a
            whole "recipe" too.

    Returns:
        gptqmodel: a dict for `QuantizeConfig(dynamic=...)`.
        llm-compressor: {"ignore": [...]}, with "recipe" a dict that, written as YAML, `oneshot(recipe=...)` reads.
        bitsandbytes: a list for `BitsAndBytesConfig(llm_int8_skip_modules=...)`, for 4 bits too.

    Raises `UnknownNameError` for a library, `PlanError` for a module that it cannot be told of.
    """
    if library not in LIBRARIES:
        raise UnknownNameError.of("library to export to", library, LIBRARIES)
    if stacked := [module for module in modules if not is_linear(module)]:
        raise PlanError(
            f"{stacked[0]} holds several experts in one tensor, and {library} has no name for such a layer; plan without the experts"
        )
    output = output_layers(architecture)
    names = [name for module in modules for name in aliases(module)]
    makers = {"gptqmodel": _gptqmodel, "llm-compressor": _llm_compressor, "bitsandbytes": _bitsandbytes}
    made = makers[library]([*names, *output], known)
    found = set(matched(made, library, known))
    if found != set(modules):
        odd = sorted(found ^ set(modules))
        raise PlanError(
            f"{library} would read this plan otherwise than it is meant: {', '.join(odd[:4])}; its names are ambiguous"
        )
    if not set(output) <= set(matched(made, library, output)):
        raise PlanError(f"{library} would quantize the output layer, {output[0]}")
    return made if recipe is None or library != "llm-compressor" else made | {"recipe": _recipe(recipe, made["ignore"])}


def matched(exported: Any, library: str, modules: Iterable[str]) -> list[str]:
    """Those of `modules` that the library would leave in 16 bit, by its rule."""
    rules = {
        "gptqmodel": _gptqmodel_skips,
        "llm-compressor": _llm_compressor_skips,
        "bitsandbytes": _bitsandbytes_skips,
    }
    if library not in rules:
        raise UnknownNameError.of("library to export to", library, LIBRARIES)
    return [module for module in modules if rules[library](exported, module)]


def _gptqmodel(names: Sequence[str], known: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {f"-:{_whole(name)}": {} for name in names}


def _llm_compressor(names: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    return {"ignore": list(names)}


def _bitsandbytes(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names as they stand, which other readers take too, but where one would match another layer as well."""
    kept = set(names)
    plain = [
        n if not any(_bitsandbytes_skips([n], other) for other in known if other not in kept) else _whole(n)
        for n in names
    ]
    # vLLM asks for the layer that it makes of several, and it can be one only if all of them are kept.
    packed = [
        f"{prefix}.{whole}"
        for whole, parts in _PACKED.items()
        for prefix in dict.fromkeys(name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == parts[0])
        if all(f"{prefix}.{part}" in kept for part in parts)
    ]
    return plain + packed


def _whole(name: str) -> str:
    """A regular expression for this name and no other, where matching begins at the start."""
    return f"^{re.escape(name)}$"


def _gptqmodel_skips(dynamic: dict[str, Any], module: str) -> bool:
    for key in dynamic:
        if re.match(key.removeprefix("-:").removeprefix("+:"), module):
            return key.startswith("-:")
    return False


def _llm_compressor_skips(exported: dict[str, Any], module: str) -> bool:
    return any(
        re.match(name.removeprefix("re:"), module) is not None if name.startswith("re:") else name == module
        for name in exported["ignore"]
    )


def _bitsandbytes_skips(names: Sequence[str], module: str) -> bool:
    return any(re.match(name, module) is not None or module.endswith(name) for name in names)


def _recipe(recipe: str, ignore: list[str]) -> dict[str, Any]:
    """A recipe of llm-compressor as plain values."""
    from tracelens.precision.recipes import Recipe, scheme

    parsed = Recipe.parse(recipe)
    if parsed.config is None:
        raise PlanError(f"{recipe} is a file that says itself what it ignores; put the ignore list into it")
    groups = {"group_0": _plain(scheme(parsed.config))}
    rounding = {"gptq": "GPTQModifier", "rtn": "QuantizationModifier"}[parsed.rounding]
    smoothing = {None: None, "awq": "AWQModifier", "smoothquant": "SmoothQuantModifier"}[parsed.smoothing]
    modifiers: dict[str, Any] = {} if smoothing is None else {smoothing: {}}
    return {"plan_stage": {"plan_modifiers": modifiers | {rounding: {"config_groups": groups, "ignore": ignore}}}}


def _plain(value: Any) -> Any:
    """dtypes as their names."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float | bool | list | None) else str(value)
