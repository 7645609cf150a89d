"""torchao: tensor subclasses taken apart into plain tensors, their class in the metadata of safetensors.

Layout: `flatten_tensor_state_dict` of torchao 0.14 to 0.18. A weight `a.weight` is stored as `a._weight_qdata`,
`a._weight_scale` and maybe `a._weight_zero_point`; the metadata has, under its own name, JSON with its class and the
block of values that share a scale. W = (qdata - zero_point) · scale.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Layout, Quantized, Read, Scheme, Stored, register
from tracelens.loading.formats.fp8 import FLOAT8, float8_values

PART = re.compile(r"(?:(?P<module>.*)\.)?_(?P<tensor>[^.]+)_(?P<part>qdata|scale|zero_point)")
CLASSES = {
    "Int8Tensor": (torch.int8,),
    "IntxUnpackedToInt8Tensor": (torch.int8,),
    "Float8Tensor": tuple(FLOAT8),
}
"""Subclasses that are known, and the dtypes of their codes."""
PLAIN = "Tensor"
ACTIVATION = ("act_quant_scale", "act_quant_zero_point")
"""Parts that only kernels use, to quantize activations."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _recognise(stored: Stored) -> bool:
    return stored.method == "torchao" or any(name.endswith("_weight_qdata") for name in stored.names)


def _layout(stored: Stored) -> Layout:
    tensors: dict[str, Quantized] = {}
    runtime: list[str] = []
    dynamic = False
    # The metadata have the names of modules in memory, and tensors maybe those of older checkpoints.
    homes = {stored.plain_name(name): name for name in stored.names}
    for name, text in stored.files.metadata.items():
        said = _said(name, text, about=stored.plain_name(_part(name, "qdata")) in homes)
        if said is None or (kind := said.get("_type")) == PLAIN:
            continue
        if kind not in CLASSES:
            raise CheckpointError(
                f"{name!r} in {stored.path} is a {kind} of torchao; of its classes, only {', '.join(CLASSES)} are known: "
                "get the full-precision original, or dequantize it with torchao and save that"
            )
        names = {part: _part(name, part) for part in said.get("_tensor_data_names") or ()}
        parts = {part: stored.need(homes.get(stored.plain_name(name), name)) for part, name in names.items()}
        runtime += [parts.pop(part) for part in ACTIVATION if part in parts]
        tensors[name] = _quantized(stored, name, said, parts)
        attributes = said["_data"]
        dynamic = dynamic or any(attributes.get(k) for k in ("act_quant_kwargs", "activation_quantization"))
    _check_all(stored, tensors, runtime)
    kinds = dict.fromkeys(quantized.scheme.code for quantized in tensors.values())
    notes = ("the runtime also quantizes activations, which the loaded model does not",) if dynamic else ()
    return Layout(f"torchao ({', '.join(kinds)})", tensors, tuple(runtime), notes=notes)


def _part(name: str, part: str) -> str:
    module, dot, tensor = name.rpartition(".")
    return f"{module}{dot}_{tensor}_{part}"


def _said(name: str, text: str, *, about: bool) -> dict[str, Any] | None:
    """What the metadata says of a tensor; None for an entry that is `about` none."""
    try:
        said = json.loads(text)
    except ValueError as error:
        if about:
            raise CheckpointError(f"the metadata of {name!r} is no JSON ({error}); get the checkpoint again") from error
        return None
    if not isinstance(said, dict) or "_type" not in said:
        if about:
            raise CheckpointError(f"the metadata of {name!r} names no class of torchao; get the checkpoint again")
        return None
    return said


def _check_all(stored: Stored, tensors: Mapping[str, Quantized], runtime: list[str]) -> None:
    """Every part of a weight is spoken for, and there is one."""
    spoken_for = {part for quantized in tensors.values() for part in quantized.parts} | set(runtime)
    for name in stored.names:
        if (found := PART.fullmatch(name)) and name not in spoken_for:
            weight = ".".join(filter(None, (found["module"], found["tensor"])))
            raise CheckpointError(
                f"{name!r} is a part of {weight!r}, whose class the metadata of the safetensors file does not name: "
                "it was lost when the file was copied tensor by tensor; get the checkpoint again"
            )
    if not tensors:
        raise CheckpointError(
            f"config.json of {stored.path} says torchao, but no weight is stored as safetensors of torchao >= 0.14; load "
            "it with the torchao that wrote it and save it again with transformers >= 5 (safe_serialization)"
        )


def _quantized(stored: Stored, name: str, said: Mapping[str, Any], parts: dict[str, str]) -> Quantized:
    attributes = said.get("_data")
    missing = [part for part in ("qdata", "scale") if part not in parts]
    unknown = [part for part in parts if part not in ("qdata", "scale", "zero_point")]
    if missing or unknown or not isinstance(attributes, dict):
        raise CheckpointError(
            f"{name!r} in {stored.path} is a {said['_type']} made of {', '.join(parts) or 'nothing'}, expected qdata, scale "
            "and maybe zero_point; get the full-precision original"
        )
    codes, scale, zero = parts["qdata"], parts["scale"], parts.get("zero_point")
    shape, dtype = stored.shape(codes), stored.dtype(codes)
    if dtype not in CLASSES[said["_type"]]:
        raise CheckpointError(
            f"{codes!r} is {dtype}, expected {' or '.join(map(str, CLASSES[said['_type']]))} in a {said['_type']}; "
            "get the checkpoint again"
        )
    block = _block(stored, name, attributes, shape, scale)
    grid = tuple(size // part for size, part in zip(shape, block, strict=True))
    for factor in filter(None, (scale, zero)):
        _check_factor(stored, factor, grid, block, integers=factor == zero)

    def dequantize(read: Read) -> Tensor:
        data = read(codes)
        values = data.to(torch.float32) if data.dtype == torch.int8 else float8_values(data)
        blocks = values.view([size for pair in zip(grid, block, strict=True) for size in pair])
        shared = [size for count in grid for size in (count, 1)]
        if zero:
            blocks.sub_(read(zero).to(torch.float32).view(shared))
        blocks.mul_(read(scale).to(torch.float32).view(shared))
        return values

    return Quantized(
        shape, (codes, scale, *([zero] if zero else [])), _scheme(stored, attributes, dtype, block, shape), dequantize
    )


def _block(
    stored: Stored, name: str, attributes: Mapping[str, Any], shape: tuple[int, ...], scale: str
) -> tuple[int, ...]:
    """Values that share a scale, along each axis."""
    said = attributes.get("block_size")
    block = said if isinstance(said, list) and all(type(part) is int and part > 0 for part in said) else []
    if len(block) != len(shape) or any(size % part for part, size in zip(block, shape, strict=True)):
        raise CheckpointError(
            f"the metadata of {name!r} gives block_size {said!r}, expected divisors of its shape {list(shape)} "
            f"(scales: {list(stored.shape(scale))}); get the checkpoint again"
        )
    return tuple(block)


def _check_factor(stored: Stored, name: str, grid: tuple[int, ...], block: tuple[int, ...], *, integers: bool) -> None:
    shape, dtype = stored.shape(name), stored.dtype(name)
    # Axes of one block may be left out.
    squeezed = tuple(size for size in shape if size != 1) == tuple(size for size in grid if size != 1)
    known = dtype in FLOATS or (integers and dtype == torch.int8)
    if not squeezed or not known or math.prod(shape) != math.prod(grid):
        raise CheckpointError(
            f"{name!r} is {dtype} {list(shape)}, expected {'int8 or ' if integers else ''}floating point {list(grid)}: "
            f"one for each block of {list(block)}; get the checkpoint again"
        )


def _scheme(
    stored: Stored, attributes: Mapping[str, Any], dtype: torch.dtype, block: tuple[int, ...], shape: tuple[int, ...]
) -> Scheme:
    target = attributes.get("target_dtype")
    said = str(target.get("_data")) if isinstance(target, Mapping) else ""
    code = FLOAT8.get(dtype) or (said if re.fullmatch(r"int[1-8]", said) else "int8")
    bits = 8 if dtype in FLOAT8 else int(code.removeprefix("int"))
    symmetric = '"ASYMMETRIC"' not in json.dumps(stored.quantization.get("quant_type"), default=str)
    shared = None if block == shape else (math.prod(block[:-1]), block[-1])
    return Scheme(code, bits, shared, symmetric)


register("torchao", _recognise, _layout)
