"""optimum-quanto: int8 and float8 rows, int4 and int2 groups, as its frozen modules save them.

Layout: `QBytesTensor`, `QBitsTensor` and `PackedTensor` of optimum-quanto 0.2. config.json says nothing of it, and
quanto_qmap.json, which names each module's types, need not be there.

- 8 bit: `weight._data` (out, in), `weight._scale` (out, 1); W = data · scale.
- 4 and 2 bit: `weight._data._data` uint8, the first rows of groups in the low bits, `weight._scale` and
  `weight._shift` (groups, 1); W = data · scale - shift, or (data - shift) · scale for an integer shift.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Layout, Quantized, Read, Scheme, Stored, register
from tracelens.loading.formats.fp8 import FLOAT8, float8_values

BYTES, PACKED = "weight._data", "weight._data._data"
RUNTIME = ("input_scale", "output_scale")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _recognise(stored: Stored) -> bool:
    return any(name.endswith((f".{BYTES}", f".{PACKED}")) for name in stored.names)


def _layout(stored: Stored) -> Layout:
    # Modules are named there as in memory, and tensors, by transformers, maybe as in older checkpoints.
    qmap = stored.json("quanto_qmap.json") or {}
    types = {stored.plain_name(f"{module}.weight"): entry for module, entry in qmap.items()}
    tensors = {f"{module}.weight": _bytes(stored, module) for module in stored.modules(BYTES, "weight._scale")}
    if packed := stored.modules(PACKED, "weight._scale", "weight._shift"):
        shapes = _plain_shapes(stored)
        tensors |= {f"{module}.weight": _groups(stored, module, types, shapes) for module in packed}
    _check_types(stored, types, tensors)
    runtime = tuple(name for name in stored.names if name.rpartition(".")[2] in RUNTIME)
    kinds = dict.fromkeys(quantized.scheme.code for quantized in tensors.values())
    return Layout(f"quanto ({', '.join(kinds)})", tensors, runtime, notes=_notes(types))


def _type(types: dict[str, Any], weight: str, key: str = "weights") -> str | None:
    """`qint4`, `qfloat8_e4m3fn`, `none`, …; None if quanto_qmap.json does not say."""
    entry = types.get(weight)
    return entry.get(key) if isinstance(entry, dict) else None


def _notes(types: dict[str, Any]) -> tuple[str, ...]:
    kinds = {kind for weight in types if (kind := _type(types, weight, "activations")) not in (None, "none")}
    return tuple(
        f"the runtime also quantizes activations to {str(kind).removeprefix('q')}, which the loaded model does not"
        for kind in sorted(map(str, kinds))
    )


def _check_types(stored: Stored, types: dict[str, Any], tensors: dict[str, Quantized]) -> None:
    """Every weight that quanto_qmap.json calls quantized is."""
    found = {stored.plain_name(name) for name in tensors}
    lost = [weight for weight in types if _type(types, weight) not in (None, "none") and weight not in found]
    if lost:
        raise CheckpointError(
            f"quanto_qmap.json says that {lost[0].removesuffix('.weight')!r} is {_type(types, lost[0])}, but "
            f"{lost[0] + '._data'!r} is not in the weights of {stored.path}; get the whole checkpoint"
        )


def _bytes(stored: Stored, module: str) -> Quantized:
    codes, scale = f"{module}.{BYTES}", f"{module}.weight._scale"
    dtype, shape = stored.dtype(codes), stored.shape(codes)
    if len(shape) != 2 or dtype not in (torch.int8, *FLOAT8):
        raise CheckpointError(
            f"{codes!r} is {dtype} {list(shape)}, expected int8 or 8-bit floats of two axes; "
            "get the full-precision original"
        )
    _check_factor(stored, scale, (shape[0], 1))

    def dequantize(read: Read) -> Tensor:
        data = read(codes)
        values = data.to(torch.float32) if data.dtype == torch.int8 else float8_values(data)
        return values.mul_(read(scale).to(torch.float32))

    scheme = Scheme("int8" if dtype == torch.int8 else FLOAT8[dtype], 8, (1, shape[1]))
    return Quantized(shape, (codes, scale), scheme, dequantize)


def _groups(stored: Stored, module: str, types: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Quantized:
    codes, scale, shift = f"{module}.{PACKED}", f"{module}.weight._scale", f"{module}.weight._shift"
    shape = _plain_shape(stored, f"{module}.weight", shapes)
    if stored.dtype(codes) != torch.uint8 or len(stored.shape(codes)) != 2 or len(stored.shape(scale)) != 2:
        raise CheckpointError(
            f"{codes!r} is {stored.dtype(codes)} {list(stored.shape(codes))} with scales {list(stored.shape(scale))}, "
            "expected uint8 and scales of two axes each; get the checkpoint again"
        )
    packed_rows, width = stored.shape(codes)
    rows = stored.shape(scale)[0]
    _check_factor(stored, scale, (rows, 1))
    _check_factor(stored, shift, (rows, 1), integers=True)
    if rows * width != math.prod(shape) or shape[1] % width:
        raise CheckpointError(
            f"{codes!r} holds {rows} groups of {width} codes, expected {math.prod(shape)} codes in groups within the "
            f"rows of {module + '.weight'!r}, {list(shape)}; config.json and weights belong to different checkpoints"
        )
    bits = _bits(stored, module, types, rows, packed_rows)

    def dequantize(read: Read) -> Tensor:
        scales, shifts = read(scale).to(torch.float32), read(shift)
        values = _unpacked(read(codes), bits)[:rows]
        if shifts.is_floating_point():
            values.mul_(scales).sub_(shifts.to(torch.float32))
        else:
            values.sub_(shifts.to(torch.float32)).mul_(scales)
        return values.view(shape)

    scheme = Scheme(f"int{bits}", bits, (1, width), symmetric=False)
    return Quantized(shape, (codes, scale, shift), scheme, dequantize)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """(rows · codes in a byte, columns) float32 codes: the low bits of all bytes come first."""
    planes, step = 8 // bits, len(packed)
    values = torch.empty(planes * step, packed.shape[1], device=packed.device)
    for plane in range(planes):
        values[plane * step : (plane + 1) * step] = (packed >> (bits * plane)) & (2**bits - 1)
    return values


def _bits(stored: Stored, module: str, types: dict[str, Any], rows: int, packed_rows: int) -> int:
    """From the number of bytes; a group or two take one byte either way, and then quanto_qmap.json must tell."""
    fitting = [bits for bits in (4, 2) if packed_rows == -(-rows * bits // 8)]
    type_said = _type(types, stored.plain_name(f"{module}.weight"))
    said = {"qint4": 4, "qint2": 2}.get(type_said or "")
    if (said and said not in fitting) or (not said and len(fitting) != 1):
        raise CheckpointError(
            f"{module + '.' + PACKED!r} has {packed_rows} rows of bytes for {rows} groups, expected "
            f"{-(-rows // 2)} for int4 or {-(-rows // 4)} for int2, and quanto_qmap.json says "
            f"{type_said or 'nothing'}; get the whole checkpoint from {stored.path}'s source"
        )
    return said or fitting[0]


def _check_factor(stored: Stored, name: str, shape: tuple[int, ...], *, integers: bool = False) -> None:
    dtype = stored.dtype(name)
    known = dtype in FLOATS or (integers and dtype in (torch.int8, torch.uint8))
    if stored.shape(name) != shape or not known:
        raise CheckpointError(
            f"{name!r} is {dtype} {list(stored.shape(name))}, expected floating point {list(shape)}: one for each row "
            "of codes, as quanto's modules save them; get the checkpoint again"
        )


def _plain_shape(stored: Stored, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    shape = shapes.get(name) or shapes.get(stored.plain_name(name))
    if shape is None or len(shape) != 2:
        raise CheckpointError(
            f"{name!r} is stored in groups, without its shape, and the model that config.json describes has no such "
            "matrix; get the checkpoint's own config.json"
        )
    return shape


def _plain_shapes(stored: Stored) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the model that config.json describes: groups do not tell rows from columns."""
    import transformers

    name = (stored.config.get("architectures") or [""])[0]
    model_class = getattr(transformers, name or " ", None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{stored.path} stores weights in groups, without their shapes, and transformers {transformers.__version__} "
            f"has no architecture {name!r} to tell them; check `architectures` in config.json"
        )
    try:
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_dict(dict(stored.config)))  # pyright: ignore
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot make a {name} from config.json of {stored.path} ({error}), which tells the shapes of "
            "its weights; get the checkpoint's own config.json"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}


register("quanto", _recognise, _layout)
