"""Rotary position embeddings: rope parameters of config.json -> fields of the hooked config."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from tracelens.errors import CheckpointError

Rope = Mapping[str, Any]
KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "truncate", "finetuned"),
    *("mscale", "mscale_all_dim"),
}


def _need(rope: Rope, key: str) -> Any:
    if rope.get(key) is None:
        raise CheckpointError(f"rope parameters lacks {key!r}; get the checkpoint's original config.json")
    return rope[key]


def _linear(rope: Rope, trained: int) -> dict[str, Any]:
    return {"rotary_scaling_factor": _need(rope, "factor")}


def _llama3(rope: Rope, trained: int) -> dict[str, Any]:
    return {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_factor": _need(rope, "factor"),
        "NTK_by_parts_low_freq_factor": _need(rope, "low_freq_factor"),
        "NTK_by_parts_high_freq_factor": _need(rope, "high_freq_factor"),
        "NTK_original_ctx_len": rope.get("original_max_position_embeddings", trained),
    }


def _yarn(rope: Rope, trained: int) -> dict[str, Any]:
    factor = _need(rope, "factor")
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise CheckpointError("yarn rope parameters with mscale or mscale_all_dim are not supported")
    # The paper's temperature (arXiv:2309.00071, eq. 22), as transformers applies it to sines and cosines.
    temperature = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return {
        "use_yarn_rope": True,
        "yarn_factor": factor,
        "yarn_attention_factor": rope.get("attention_factor") or temperature,
        "yarn_beta_fast": rope.get("beta_fast") or 32.0,
        "yarn_beta_slow": rope.get("beta_slow") or 1.0,
        "yarn_truncate": rope.get("truncate", True),
        "yarn_original_max_position_embeddings": rope.get("original_max_position_embeddings", trained),
    }


def _longrope(rope: Rope, trained: int) -> dict[str, Any]:
    short, original = _need(rope, "short_factor"), _need(rope, "original_max_position_embeddings")
    factor = rope.get("factor") or trained / original
    temperature = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {"long_rope": (tuple(short), rope.get("attention_factor") or temperature)}


ROPES: dict[str, Callable[[Rope, int], dict[str, Any]]] = {
    "default": lambda rope, trained: {},
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters under whichever key; the length that a model was first trained with may lie beside them."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if (original := config.get("original_max_position_embeddings")) is not None:
        rope["original_max_position_embeddings"] = original
    return rope


def long_rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rope parameters of a model that rotates prompts by their length; None for another one.

    Up to `original_max_position_embeddings` tokens it rotates by `short_factor`, which is what a hooked model does;
    longer prompts are rotated by `long_factor` as a whole.
    """
    rope = _given(config)
    # Phi-3's first configs call it su, and some say yarn and mean this.
    if (rope.get("rope_type") or rope.get("type")) not in ("longrope", "su", "yarn"):
        return None
    return {**rope, "rope_type": "longrope"}


def rope_fields(
    config: Mapping[str, Any], d_head: int, *, partial: bool, layered: bool, windowed: bool, long: bool = False
) -> dict[str, Any]:
    """Rotary fields from either style: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5).

    `partial`: part of each head may be rotated; `layered`: windowed layers have parameters of their own; `windowed`:
    there are such layers; `long`: longrope is understood. Raises `CheckpointError` for what a hooked model would rotate otherwise.
    """
    rope = _given(config)
    windows: dict[str, Any] = {}
    if long and (stretched := long_rope(config)):
        fields = {"rotary_adjacent_pairs": False, "rotary_dim": _rotary_dim(config, stretched, d_head, partial)}
        fields |= {"rotary_base": stretched.get("rope_theta") or config.get("rope_theta") or 10000.0}
        fields |= _longrope(stretched, config["max_position_embeddings"])
        if len(fields["long_rope"][0]) != fields["rotary_dim"] // 2:
            raise CheckpointError(
                f"config.json: short_factor has {len(fields['long_rope'][0])} values, expected "
                f"{fields['rotary_dim'] // 2}, half of what is rotated of a head"
            )
        return fields
    if layered:
        rope, windows = _by_layer(config, rope)
    for parameters in (rope, windows):
        if any(isinstance(value, Mapping) for value in parameters.values()):
            raise CheckpointError("config.json: rope parameters that differ between layers are not supported here")
        if unknown := sorted(key for key, value in parameters.items() if key not in KEYS and value is not None):
            kind = _kind(parameters)  # names an unknown kind before its unknown keys
            raise CheckpointError(f"config.json: rope parameters {', '.join(unknown)} ({kind}) are not supported")
    fields = {"rotary_adjacent_pairs": False, "rotary_dim": _rotary_dim(config, rope, d_head, partial)}
    fields["rotary_base"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    scaling = ROPES[_kind(rope)](rope, config["max_position_embeddings"])
    if layered:
        if _kind(windows) != "default":
            raise CheckpointError("config.json: rope scaling of windowed layers is not supported")
        fields["rotary_base_local"] = windows["rope_theta"]
        if "use_yarn_rope" in scaling:
            scaling["yarn_global_attn_only"] = True
        if "use_NTK_by_parts_rope" in scaling and windowed:
            raise CheckpointError("config.json: llama3 rope scaling of some layers only is not supported")
    elif "rotary_scaling_factor" in scaling and windowed:
        # transformer-lens scales linearly only where there is no window.
        raise CheckpointError("linear rope scaling together with a sliding window is not supported")
    return fields | scaling


def _by_layer(config: Mapping[str, Any], rope: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of layers without and with a window."""
    if "full_attention" in rope or "sliding_attention" in rope:
        full, windows = dict(rope.pop("full_attention", None) or {}), dict(rope.pop("sliding_attention", None) or {})
        full |= {key: value for key, value in rope.items() if key not in full}
    else:
        full, windows = rope, {}
    full.setdefault("rope_theta", config.get("rope_theta"))
    windows.setdefault("rope_theta", config.get("rope_local_base_freq") or full["rope_theta"])
    return full, windows


def _kind(rope: Rope) -> str:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPES:
        raise CheckpointError(f"config.json: rope scaling {kind!r} is not supported; supported: {', '.join(ROPES)}")
    return kind


def _rotary_dim(config: Mapping[str, Any], rope: Rope, d_head: int, partial: bool) -> int:
    factor = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if factor != 1.0 and not partial:
        raise CheckpointError(
            "config.json: a partial_rotary_factor other than 1 is not supported for this architecture"
        )
    rotated = int(d_head * factor)
    if not 0 < rotated <= d_head or rotated % 2:
        raise CheckpointError(
            f"config.json: partial_rotary_factor={factor} rotates {rotated} of {d_head} values of a head; "
            "it must be an even number of them, and some"
        )
    return rotated
