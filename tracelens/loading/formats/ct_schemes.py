"""What a compressed-tensors config says about the modules of a model: config groups, their targets and formats."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Stored

EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "wpe", "word_embeddings", "embeddings")
"""Last names of embedding modules, which are no `Linear`; the class of a stored module is not written anywhere."""
AUTO_ROUND = ("auto-round", "auto_round", "intel/auto-round")
AUTO_ROUND_TYPES = {"mx_fp": "mxfp", "nv_fp": "nvfp"}


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups`, as far as weights go."""

    name: str
    targets: tuple[str, ...]
    """Module names, `re:` and a regular expression that matches their beginning, or names of classes."""
    format: str
    """How the weights are stored, this group's own or the model's; empty if config.json does not say."""
    bits: int
    type: str
    """`int` or `float`."""
    strategy: str
    """What shares a scale: `tensor`, `channel`, `group`, `tensor_group` or `block`."""
    group_size: int | None
    block: tuple[int, int] | None
    """(outputs, inputs) of a block, for the strategy `block`."""
    symmetric: bool
    ordered: bool
    """Whether columns share scales in the order of their activations, so that a group is stored for each (`actorder`)."""
    activations: str
    """How the runtime quantizes the inputs of these modules, in words; empty if it does not."""


def read_groups(stored: Stored) -> list[Group]:
    """The groups of config.json that quantize weights, in its order.

    Raises `CheckpointError` for a group that is not written out or says something impossible.
    """
    config = stored.quantization
    if stored.method in AUTO_ROUND:
        return _auto_round(config)
    entries = config.get("config_groups") or {}
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"config_groups in the config.json of {stored.path} is no object; get the original")
    groups = []
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            raise CheckpointError(
                f"config group {name!r} of {stored.path} is {entry!r}, expected an object with targets and weights; "
                "write the scheme out, as compressed-tensors saves it"
            )
        if entry.get("weights"):
            groups.append(_group(str(name), entry, str(config.get("format") or "")))
    return groups


def group_of(module: str, groups: list[Group], plain: str | None = None) -> Group | None:
    """The group that quantizes a module: by its exact name, then by a regular expression, then by its class.

    `plain` is its name in memory, which targets have, if its tensors are stored under an older one.

    With a single group there is nothing to choose: a quantized module belongs to it, whatever its targets are called
    in the model that was quantized. None if no group can be told.
    """
    targets = {target: group for group in groups for target in group.targets}
    for target in sorted(targets, key=lambda target: (target.startswith("re:"), target)):
        if names(target, module) or (plain is not None and names(target, plain)):
            return targets[target]
    kind = "Embedding" if is_embedding(module) else "Linear"
    if kind in targets:
        return targets[kind]
    return groups[0] if len(groups) == 1 else None


def names(target: str, module: str) -> bool:
    """Whether a target names a module, exactly or by a regular expression."""
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise CheckpointError(
            f"{target!r} in config.json is no regular expression ({error}); get the original"
        ) from error


def matches(module: str, targets: Iterable[str]) -> bool:
    """Whether one of the targets names a module or, as `Linear` or `Embedding`, its class."""
    kind = "Embedding" if is_embedding(module) else "Linear"
    return any(target == kind or names(target, module) for target in targets)


def is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in EMBEDDINGS


def _group(name: str, entry: Mapping[str, Any], model_format: str) -> Group:
    weights = entry["weights"]
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in ("tensor", "channel", "group", "tensor_group", "block"):
        raise CheckpointError(
            f"config group {name!r} quantizes weights per {strategy!r}, expected tensor, channel, group, tensor_group or "
            "block; get the full-precision original"
        )
    bits = weights.get("num_bits", 8)
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise CheckpointError(
            f"config group {name!r} says num_bits {bits!r}, expected 1 to 8; get the original config.json"
        )
    grouped = strategy in ("group", "tensor_group")
    if grouped and (not isinstance(size, int) or size < 1):
        raise CheckpointError(
            f"config group {name!r} says group_size {size!r} with the strategy {strategy!r}, expected a positive number; "
            "get the original config.json"
        )
    # A group's format goes before the model's, which for several is no format of its own.
    own = str(entry.get("format") or model_format)
    targets = entry.get("targets") or ()
    return Group(
        name=name,
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        format="" if own == "mixed-precision" else own,
        bits=bits,
        type=str(weights.get("type") or "int"),
        strategy=strategy,
        group_size=size if grouped else None,
        block=_block(name, weights.get("block_structure")) if strategy == "block" else None,
        symmetric=bool(weights.get("symmetric", True)),
        ordered=weights.get("actorder") in (True, "group", "dynamic"),
        activations=_in_words(entry.get("input_activations")),
    )


def _block(name: str, structure: Any) -> tuple[int, int]:
    # Versions before 0.11 wrote "128x128".
    sizes = structure.lower().split("x") if isinstance(structure, str) else structure
    try:
        rows, columns = (int(size) for size in sizes)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise CheckpointError(
            f"config group {name!r} quantizes weights in blocks with block_structure {structure!r}, expected two positive "
            "numbers; get the original config.json"
        )
    return rows, columns


def _in_words(activations: Any) -> str:
    if not isinstance(activations, Mapping):
        return ""
    when = "as they come" if activations.get("dynamic") else "with stored scales"
    return f"{activations.get('num_bits', 8)}-bit {activations.get('type', 'int')} per {activations.get('strategy')}, {when}"


def _auto_round(config: Mapping[str, Any]) -> list[Group]:
    """The one scheme of an auto-round config, whose exceptions (`extra_config`) are told from shapes instead."""
    if config.get("extra_config"):
        return []
    kind = next(
        (short for long, short in AUTO_ROUND_TYPES.items() if str(config.get("data_type")).startswith(long)), ""
    )
    bits, size = config.get("bits"), config.get("group_size")
    if not kind or not isinstance(bits, int) or not isinstance(size, int):
        return []
    formats = {("mxfp", 4): "mxfp4-pack-quantized", ("mxfp", 8): "mxfp8-quantized", ("nvfp", 4): "nvfp4-pack-quantized"}
    width, coded = config.get("act_bits"), str(config.get("act_data_type") or "float")
    activations = f"{width}-bit {coded} per group" if isinstance(width, int) and width < 16 else ""
    return [
        Group(
            name="auto-round",
            targets=("Linear",),
            format=formats.get((kind, bits), ""),
            bits=bits,
            type="float",
            strategy="group",
            group_size=size,
            block=None,
            symmetric=True,
            ordered=False,
            activations=activations,
        )
    ]
