"""bitsandbytes: LLM.int8() rows, and NF4 or FP4 codes in blocks of the flattened weight, as its modules save them.

Layouts: `Linear8bitLt` and `QuantState.as_dict` of bitsandbytes 0.41 to 0.50. What a weight is quantized with stands
beside it; `bnb_4bit_quant_type` and its like in config.json may be stale and are not looked at.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Layout, Quantized, Read, Scheme, Stored, register

STATE = ".quant_state.bitsandbytes__"
"""After a weight's name and before `nf4` or `fp4`: a tensor that holds JSON."""
CODES = ("nf4", "fp4")
ONE_127TH = 0.007874015718698502
"""1/127 in float32, by which bitsandbytes multiplies; dividing by 127 rounds otherwise."""
ROW_MAJOR = 0
"""`weight_format` of codes in plain order; 1 to 3 are tiles for kernels of former GPUs."""
PIECE = 2**17
"""Values that are made at a time: their temporaries fit the cache of one core."""
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What a weight was before it was quantized. bitsandbytes rounds to that again, so it is part of the result."""


def _recognise(stored: Stored) -> bool:
    return stored.method == "bitsandbytes" or any(name.endswith(".SCB") or STATE in name for name in stored.names)


def _layout(stored: Stored) -> Layout:
    rows = {f"{module}.weight": _rows(stored, module) for module in stored.modules("SCB", "weight")}
    blocks = {name.partition(STATE)[0]: name for name in stored.names if STATE in name}
    tensors = rows | {weight: _blocks(stored, weight, state) for weight, state in blocks.items()}
    for name in stored.names:
        if name.endswith(".weight") and name not in tensors and stored.dtype(name) in (torch.int8, torch.uint8):
            lacking = f"{name.removesuffix('weight')}SCB or {name}{STATE}nf4"
            raise CheckpointError(
                f"{name!r} in {stored.path} holds {stored.dtype(name)} codes, and {lacking} is not there to say what "
                "they mean; get the whole checkpoint"
            )
    if not tensors:
        raise CheckpointError(
            f"config.json of {stored.path} says bitsandbytes, but no weight is stored quantized; if it is full "
            "precision, which bitsandbytes would quantize while loading, remove quantization_config from config.json"
        )
    kinds = dict.fromkeys(quantized.scheme.code for quantized in tensors.values())
    notes = (
        ["the runtime also quantizes activations to int8 (LLM.int8), which the loaded model does not"] if rows else []
    )
    return Layout(f"bitsandbytes ({', '.join(kinds)})", tensors, notes=tuple(notes))


def _rows(stored: Stored, module: str) -> Quantized:
    """LLM.int8(): int8 codes (out, in) and the largest magnitude of each row."""
    codes, largest, order = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    shape = stored.shape(codes)
    if stored.dtype(codes) != torch.int8 or len(shape) != 2:
        raise CheckpointError(
            f"{codes!r} is {stored.dtype(codes)} {list(shape)}, expected int8 codes of two axes beside {largest!r}; "
            "get the checkpoint again"
        )
    if math.prod(stored.shape(largest)) != shape[0]:
        raise CheckpointError(
            f"{largest!r} has shape {list(stored.shape(largest))}, expected one scale for each of the {shape[0]} rows "
            f"of {codes!r}; get the checkpoint again"
        )
    if order in stored and (found := stored.read(order).flatten().tolist()) != [ROW_MAJOR]:
        raise CheckpointError(
            f"{order!r} is {found}: the codes are stored in tiles for one kind of GPU; expected [{ROW_MAJOR}], row by "
            "row, as bitsandbytes >= 0.37 saves them: load it on such a GPU with the version that wrote it and save it"
        )
    transposed = stored.transposed(module)

    def dequantize(read: Read) -> Tensor:
        weight = read(codes).to(torch.float32)
        weight.mul_(read(largest).to(torch.float32).reshape(-1, 1)).mul_(ONE_127TH)
        return weight.t().contiguous() if transposed else weight

    parts = (codes, largest, *([order] if order in stored else []))
    return Quantized(shape[::-1] if transposed else shape, parts, Scheme("int8", 8, (1, shape[1])), dequantize)


@dataclass(frozen=True)
class _Blocks:
    """Values shared by blocks of consecutive codes: which tensors, and how long a block is."""

    codes: str
    scales: str
    table: str
    size: int

    def check(self, stored: Stored, count: int, values: int) -> None:
        blocks = -(-count // self.size)
        if stored.shape(self.scales) != (blocks,):
            raise CheckpointError(
                f"{self.scales!r} has shape {list(stored.shape(self.scales))}, expected [{blocks}]: one scale for each "
                f"{self.size} of the {count} values of {self.codes!r}; get the checkpoint again"
            )
        if stored.shape(self.table) != (values,) or stored.dtype(self.table) not in FLOATS.values():
            raise CheckpointError(
                f"{self.table!r} is {stored.dtype(self.table)} {list(stored.shape(self.table))}, expected the {values} "
                f"numbers that the codes of {self.codes!r} stand for; get the checkpoint again"
            )


def _blocks(stored: Stored, weight: str, state: str) -> Quantized:
    """NF4 or FP4: two codes in a byte, the first in the high bits, over the flattened (out, in) weight."""
    kind = state.partition(STATE)[2]
    said = _said(stored, state)
    if kind not in CODES or said.get("quant_type") != kind:
        raise CheckpointError(
            f"{state!r} speaks of codes {said.get('quant_type')!r}, expected {' or '.join(CODES)}, the same as in its "
            "name; get the checkpoint again, or its full-precision original"
        )
    shape = tuple(_whole(state, said, "shape", size) for size in _list(state, said))
    outer = _Blocks(weight, f"{weight}.absmax", f"{weight}.quant_map", _whole(state, said, "blocksize"))
    count = math.prod(shape)
    outer.check(stored, count, 16)
    _check_codes(stored, weight, shape)
    nested = _nested(stored, weight, state, said)
    if nested:
        nested.check(stored, stored.shape(outer.scales)[0], 256)
    if (stored.dtype(outer.scales) == torch.uint8) != bool(nested):
        raise CheckpointError(
            f"{outer.scales!r} is {stored.dtype(outer.scales)}, expected {'uint8' if nested else 'float32'}, since "
            f"{state!r} {'has' if nested else 'has no'} nested scales; get the checkpoint again"
        )
    offset = float(said["nested_offset"]) if nested else 0.0
    rounded = _rounded(state, said)
    module = weight.removesuffix(".weight")
    transposed = stored.transposed(module) and len(shape) == 2

    def dequantize(read: Read) -> Tensor:
        scales = read(outer.scales)
        if nested:
            scales = read(nested.table).to(torch.float32).index_select(0, scales.to(torch.int32))
            _scale(scales, read(nested.scales).to(torch.float32), nested.size)
            scales.add_(torch.tensor(offset, dtype=torch.float32))
        octets = read(weight).contiguous().view(-1).view(torch.uint8)
        table, scales = read(outer.table).to(torch.float32), scales.to(torch.float32)
        values = _values(octets, table, scales, outer.size, count, rounded).view(shape)
        return values.t().contiguous() if transposed else values

    parts = (weight, outer.scales, outer.table, *([nested.scales, nested.table] if nested else []), state)
    scheme = _scheme(kind, shape, outer.size, "double-quantized" if nested else "", _note(rounded))
    return Quantized(shape[::-1] if transposed else shape, parts, scheme, dequantize)


def _values(octets: Tensor, table: Tensor, scales: Tensor, size: int, count: int, rounded: torch.dtype) -> Tensor:
    """`count` float32: what the two codes of each byte stand for, times the scale of each `size`, rounded.

    A pair of float32 is looked up as the one float64 that has its bits, in a third of the time of any other way, and
    in pieces that stay in the cache.
    """
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1).view(torch.float64).view(-1)
    values = torch.empty(2 * len(octets), device=octets.device)
    # An even number of blocks, so that a piece begins with a byte.
    piece = 2 * size * max(1, (PIECE if octets.device.type == "cpu" else count) // (2 * size))
    for start in range(0, count, piece):
        pieces = slice(start // 2, (start + piece) // 2)
        torch.index_select(pairs, 0, octets[pieces].to(torch.int32), out=values.view(torch.float64)[pieces])
        part = values[start : min(start + piece, count)]
        _scale(part, scales[start // size :], size)
        if rounded != torch.float32:
            part.copy_(part.to(rounded))
    return values[:count]


def _scale(values: Tensor, scales: Tensor, size: int) -> None:
    """Multiplies each block by its scale, in place; the last block may be shorter."""
    whole, last = divmod(values.numel(), size)
    values[: whole * size].view(whole, size).mul_(scales[:whole, None])
    if last:
        values[whole * size :].mul_(scales[whole])


def _said(stored: Stored, state: str) -> dict[str, Any]:
    """The JSON object that a tensor holds as bytes."""
    try:
        said = json.loads(bytes(stored.read(state).to(torch.uint8).flatten().tolist()).decode())
    except ValueError as error:
        raise CheckpointError(f"{state!r} holds no JSON ({error}); get the checkpoint again") from error
    if not isinstance(said, Mapping):
        raise CheckpointError(f"{state!r} holds {said!r}, expected a JSON object; get the checkpoint again")
    return dict(said)


def _list(state: str, said: Mapping[str, Any]) -> list[Any]:
    shape = said.get("shape")
    if not isinstance(shape, list) or not shape:
        raise CheckpointError(
            f"{state!r} gives the shape {shape!r}, expected that of the weight, such as [out, in]; get the checkpoint again"
        )
    return shape


_MISSING = object()


def _whole(state: str, said: Mapping[str, Any], key: str, value: Any = _MISSING) -> int:
    value = said.get(key) if value is _MISSING else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{state!r} gives {key} {value!r}, expected a positive integer; get the checkpoint again")
    return value


def _rounded(state: str, said: Mapping[str, Any]) -> torch.dtype:
    if (dtype := said.get("dtype")) not in FLOATS:
        raise CheckpointError(
            f"{state!r} gives the dtype {dtype!r}, to which values are rounded; expected {', '.join(FLOATS)}: "
            "get the checkpoint again"
        )
    return FLOATS[dtype]


def _note(rounded: torch.dtype) -> str:
    return "" if rounded == torch.float32 else f"rounded to {str(rounded).removeprefix('torch.')}"


def _nested(stored: Stored, weight: str, state: str, said: Mapping[str, Any]) -> _Blocks | None:
    """How the scales are quantized themselves; None if they are not."""
    scales, table = f"{weight}.nested_absmax", f"{weight}.nested_quant_map"
    if "nested_blocksize" not in said:
        if scales in stored:
            raise CheckpointError(
                f"{scales!r} is there, but {state!r} gives no nested_blocksize for it; get the checkpoint again"
            )
        return None
    offset = said.get("nested_offset")
    if not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise CheckpointError(f"{state!r} gives nested_offset {offset!r}, expected a number; get the checkpoint again")
    size = _whole(state, said, "nested_blocksize")
    return _Blocks(f"{weight}.absmax", stored.need(scales), stored.need(table), size)


def _check_codes(stored: Stored, weight: str, shape: tuple[int, ...]) -> None:
    count, unit = math.prod(shape), stored.dtype(weight).itemsize
    octets, needed = math.prod(stored.shape(weight)) * unit, -(-count // 2)
    # Bytes are stored as wider numbers when bnb_4bit_quant_storage says so, and then the last one may be padded.
    if not needed <= octets < needed + unit:
        raise CheckpointError(
            f"{weight!r} holds {2 * octets} 4-bit codes, expected {count} for its shape {list(shape)}; "
            "get the checkpoint again"
        )


def _scheme(kind: str, shape: tuple[int, ...], size: int, *notes: str) -> Scheme:
    inputs = shape[-1]
    across = "blocks run across rows" if inputs % size and size % inputs else ""
    block = (1, size) if size < inputs or size % inputs else (size // inputs, inputs)
    return Scheme(kind, 4, block, notes=tuple(note for note in (*notes, across) if note))


register("bitsandbytes", _recognise, _layout)
