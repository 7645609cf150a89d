"""compressed-tensors, as llm-compressor and auto-round write it: finds each module's tensors and reads them by kind.

Layouts: the source of compressed-tensors 0.4 to 0.19. The tensors say what a module is; config.json has to agree.
"""

import re
from collections.abc import Callable, Mapping

import torch

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Layout, Quantized, Stored, register
from tracelens.loading.formats.ct_elements import POWERS, elements
from tracelens.loading.formats.ct_float import four_bit_float
from tracelens.loading.formats.ct_module import Module
from tracelens.loading.formats.ct_packed import packed
from tracelens.loading.formats.ct_rotation import fold_rotations, offline_notes
from tracelens.loading.formats.ct_schemes import AUTO_ROUND, Group, group_of, read_groups
from tracelens.loading.formats.ct_sparse import sparse

MARKS = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale"),
    *("scale_packed", "compressed", "bitmask", "row_offsets"),
)
"""Parts that only quantized modules have."""
PARTS = (*MARKS, "weight", "shape", "meta")
RUNTIME = re.compile(r"\.(?:input|output|[qkv])_(?:scale|zero_point|global_scale|g_idx)$")
"""Names of what only kernels use: the quantization of activations and of the KV cache."""
KINDS = {
    "pack-quantized": ("pack-quantized",),
    "int-quantized": ("int-quantized",),
    "float-quantized": ("float-quantized",),
    "naive-quantized": ("int-quantized", "float-quantized"),
    "nvfp4-pack-quantized": ("nvfp4-pack-quantized",),
    "mxfp4-pack-quantized": ("mxfp4-pack-quantized",),
    "mxfp8-quantized": ("mxfp8-quantized",),
}
"""Format in config.json -> kinds of tensors that it may have, named after the formats that are theirs alone."""
READERS: dict[str, Callable[[Module], Quantized]] = {
    "pack-quantized": packed,
    "nvfp4-pack-quantized": four_bit_float,
    "mxfp4-pack-quantized": four_bit_float,
    "sparse": sparse,
}


def _recognise(stored: Stored) -> bool:
    if stored.method == "compressed-tensors":
        return True
    if stored.method in AUTO_ROUND and str(stored.quantization.get("packing_format")).endswith("llm_compressor"):
        return True
    # `compression_config` is how its first versions called it; some name no method.
    return stored.method in ("", *AUTO_ROUND) and any(
        name.endswith((".weight_packed", ".bitmask")) for name in stored.names
    )


def _layout(stored: Stored) -> Layout:
    _refuse_marlin(stored)
    groups = read_groups(stored)
    tensors: dict[str, Quantized] = {}
    kinds: dict[str, None] = {}
    activations: dict[str, int] = {}
    unnamed = 0
    for name, found in _modules(stored).items():
        weight = name if name.endswith(".weight") else f"{name}.weight"
        group = group_of(name, groups, stored.plain_name(weight).removesuffix(".weight"))
        module = Module(stored, name, found, group)
        kind = _kind(module)
        tensors[weight] = _read(module, kind)
        if left := module.left_over():
            raise CheckpointError(
                f"{', '.join(left)} in {stored.path} have no place in a {kind} module; get the original checkpoint"
            )
        kinds[kind] = None
        unnamed += group is None
        if group and group.activations:
            activations[group.activations] = activations.get(group.activations, 0) + 1
    tensors = fold_rotations(stored, tensors)
    runtime = tuple(name for name in stored.names if RUNTIME.search(name))
    writer = "auto-round" if stored.method in AUTO_ROUND else "compressed-tensors"
    return Layout(
        format=f"{writer} ({', '.join(_format(stored, kind) for kind in kinds) or 'dense'})",
        tensors=tensors,
        runtime=runtime,
        notes=(*_notes(stored, activations, unnamed), *offline_notes(stored)),
    )


def _modules(stored: Stored) -> dict[str, dict[str, str]]:
    """Module -> part -> stored name, of modules that are quantized, in file order."""
    found: dict[str, dict[str, str]] = {}
    for name in stored.names:
        module, _, part = name.rpartition(".")
        if part in PARTS:
            found.setdefault(module, {})[part] = name
    quantized = {}
    for module, parts in found.items():
        if any(part in MARKS for part in parts):
            quantized[module] = parts
        elif "weight" in parts and stored.dtype(parts["weight"]).itemsize == 1:
            stored.need(f"{module}.weight_scale")
    return quantized


def _kind(module: Module) -> str:
    """What a module's tensors are. Raises `CheckpointError` if they are nothing known, or not what config.json says."""
    found, stored = module.found, module.stored
    if "bitmask" in found or "compressed" in found:
        return "sparse"
    if "weight_packed" in found:
        dtype = stored.dtype(found["weight_packed"])
        if dtype not in (torch.int32, torch.uint8):
            raise module.wrong("weight_packed", "int32 or uint8", "get the original checkpoint")
        power = stored.dtype(module.take("weight_scale")) in POWERS
        kind = "pack-quantized" if dtype == torch.int32 else f"{'mx' if power else 'nv'}fp4-pack-quantized"
    else:
        weight = module.take("weight")
        power = stored.dtype(module.take("weight_scale")) in POWERS
        integers = stored.dtype(weight) == torch.int8
        kind = "int-quantized" if integers else "mxfp8-quantized" if power else "float-quantized"
    _check_format(module, kind, module.group)
    return kind


def _check_format(module: Module, kind: str, group: Group | None) -> None:
    # A dense format names none, and sparse ones may be quantized in any.
    if group is None or group.format in ("", "dense", "fakequant", "sparse-24-bitmask", "sparse-bitmask"):
        return
    if group.format not in KINDS:
        raise CheckpointError(
            f"{module.stored.path} is stored in the format {group.format!r}, which is not known; known are {', '.join(KINDS)}. "
            "Load the full-precision original"
        )
    if kind not in KINDS[group.format]:
        raise CheckpointError(
            f"config group {group.name!r} of {module.stored.path} is in the format {group.format!r}, but the tensors of "
            f"{module.name} are {kind}; get the original config.json"
        )


def _read(module: Module, kind: str) -> Quantized:
    if module.stored.transposed(module.name):
        raise CheckpointError(
            f"{module.name} in {module.stored.path} is a Conv1D of GPT-2, which compressed-tensors does not quantize, so the "
            "orientation of its codes is not known; load the full-precision original"
        )
    if reader := READERS.get(kind):
        return reader(module)
    shape, weight = module.matrix("weight"), module.take("weight")
    return elements(module, shape, (weight,), lambda read: read(weight))


def _refuse_marlin(stored: Stored) -> None:
    marked = next((name for name in stored.names if name.endswith(".scale_packed")), None)
    if marked or "marlin" in str(stored.quantization.get("format")):
        raise CheckpointError(
            f"{stored.path} is stored in the format 'marlin-24' ({marked or 'by its config.json'}), permuted for one kernel; "
            "nobody has verified how to undo it. Load the full-precision original, or compress it as pack-quantized"
        )


def _format(stored: Stored, kind: str) -> str:
    if kind != "sparse":
        return kind
    return str((stored.quantization.get("sparsity_config") or {}).get("format") or "sparse-24-bitmask")


def _notes(stored: Stored, activations: dict[str, int], unnamed: int) -> list[str]:
    notes = [
        f"the runtime quantizes the inputs of {count} modules too ({how}); the weights alone are what is measured here"
        for how, count in activations.items()
    ]
    cache = stored.quantization.get("kv_cache_scheme")
    if isinstance(cache, Mapping):
        notes.append(
            f"the runtime quantizes the KV cache too ({cache.get('num_bits', 8)}-bit {cache.get('type', 'int')} per "
            f"{cache.get('strategy') or 'tensor'}); it is left in full precision here"
        )
    if unnamed:
        notes.append(f"{unnamed} quantized modules are named by no group of config.json and were read by their shapes")
    return notes


register("compressed-tensors", _recognise, _layout)
