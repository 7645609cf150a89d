"""HQQ: W = (q - zero) · scale in groups, as transformers saves it (safetensors) and as hqq does (qmodel.pt).

Layout: `Quantizer` and `BitPack` of hqq 0.1 to 0.2. What describes a weight stands beside it under the same names: as
small tensors in safetensors, text as the bytes of its characters, and as plain values in qmodel.pt, where hqq 0.1 keeps
it in a dict `meta` and can quantize scales and zero points a second time.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Layout, Quantized, Read, Scheme, Stored, register


class Packing(NamedTuple):
    """How codes lie: planes of rows from the top bits down, so that a word holds rows that are far apart."""

    word: torch.dtype
    bits: int
    """Bits from one plane to the next."""
    planes: int
    codes: tuple[float, ...]
    """Bits of the codes that are packed so: fewer than there is room for in some."""


PACKINGS = {
    "8bit_u8": Packing(torch.uint8, 8, 1, (8, 6, 5)),
    "4bit_u8": Packing(torch.uint8, 4, 2, (4,)),
    "3bit_32": Packing(torch.int32, 3, 10, (3,)),
    "2bit_u8": Packing(torch.uint8, 2, 4, (2, 1.58)),
    "1bit_u8": Packing(torch.uint8, 1, 8, (1,)),
}
FLAGS = ("view_as_float", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config")
SETTINGS = ("channel_wise", "optimize", "round_zero")
DESCRIPTION = (
    "nbits",
    "group_size",
    "shape",
    "axis",
    "packing",
    "unpack_view_dtype",
    "compute_dtype",
    *FLAGS,
    *SETTINGS,
)


def _recognise(stored: Stored) -> bool:
    # SINQ has codes of the same name, and two scales for each weight.
    second = any(name.endswith(".scale2") for name in stored.names)
    return not second and any(name.endswith(".W_q") for name in stored.names)


def _layout(stored: Stored) -> Layout:
    tensors = {f"{module}.weight": _quantized(stored, module) for module in stored.modules("W_q")}
    described = "transformers" if stored.method == "hqq" else "native"
    return Layout(f"hqq ({described})", tensors)


def _quantized(stored: Stored, module: str) -> Quantized:
    where = f"{module}.meta" if f"{module}.meta.packing" in stored.files.values else module
    grid = _grid(stored, where, Part(stored.need(f"{module}.W_q")))
    if len(grid.shape) != 2:
        raise CheckpointError(
            f"{where + '.shape'!r} is {list(grid.shape)}, expected the [out, in] of {module + '.W_q'!r}; "
            "get the checkpoint again"
        )
    described = [name for key in DESCRIPTION if (name := f"{where}.{key}") in stored]
    parts = tuple(dict.fromkeys([*grid.parts(), *described]))
    return Quantized(grid.shape, parts, _scheme(grid), grid.dequantize)


@dataclass(frozen=True)
class Part:
    """A stored tensor, or one of the two that lie in it."""

    name: str
    index: int | None = None

    def parts(self) -> list[str]:
        return [self.name]

    def read(self, read: Read) -> Tensor:
        tensor = read(self.name)
        return tensor if self.index is None else tensor[self.index]

    def dequantize(self, read: Read) -> Tensor:
        return self.read(read).to(torch.float32)

    def shape(self, stored: Stored) -> tuple[int, ...]:
        return stored.shape(self.name) if self.index is None else stored.shape(self.name)[1:]


@dataclass(frozen=True)
class Grid:
    """Packed codes with scales and zero points, which may be such a grid each."""

    codes: Part
    packing: Packing
    bits: int | float
    rows: int
    """Rows of codes once unpacked; what the packing adds to fill its words is dropped."""
    group: int | None
    axis: int
    shape: tuple[int, ...]
    scale: "Part | Grid"
    zero: "Part | Grid"

    def parts(self) -> list[str]:
        return [*self.codes.parts(), *self.scale.parts(), *self.zero.parts()]

    def dequantize(self, read: Read) -> Tensor:
        words = self.codes.read(read)
        if words.is_floating_point():
            words = words.contiguous().view(self.packing.word)
        values = _unpacked(words, self.packing)[: self.rows]
        values.sub_(self.zero.dequantize(read)).mul_(self.scale.dequantize(read))
        return values.reshape(self.shape)


def _unpacked(words: Tensor, packing: Packing) -> Tensor:
    """(planes · rows, columns) float32 codes of (rows, columns) words."""
    step, mask = len(words), 2**packing.bits - 1
    codes = torch.empty(packing.planes * step, *words.shape[1:], device=words.device)
    for plane in range(packing.planes):
        shift = packing.bits * (packing.planes - 1 - plane)
        codes[plane * step : (plane + 1) * step] = (words >> shift) & mask
    return codes


def _value(stored: Stored, name: str) -> Any:
    """What describes a weight, by its name: None if it is not there."""
    if name not in stored:
        return stored.files.values.get(name)
    tensor = stored.read(name)
    if tensor.ndim == 0:
        return tensor.item()
    return bytes(tensor.tolist()).decode("ascii", "replace") if tensor.dtype == torch.uint8 else tuple(tensor.tolist())


def _grid(stored: Stored, where: str, codes: Part) -> Grid:
    """The grid that `where.nbits` and its like describe."""
    nbits, packing = _value(stored, f"{where}.nbits"), _value(stored, f"{where}.packing")
    if packing not in PACKINGS or not _fits(nbits, PACKINGS[packing]):
        known = ", ".join(f"{name} ({' or '.join(map(str, p.codes))} bits)" for name, p in PACKINGS.items())
        raise CheckpointError(
            f"{codes.name!r} holds {nbits} bit codes in the packing {packing!r}, expected one of {known}; "
            "dequantize it with hqq and save that"
        )
    group, axis, shape = (_value(stored, f"{where}.{key}") for key in ("group_size", "axis", "shape"))
    positive = isinstance(shape, tuple) and all(isinstance(size, int) and size > 0 for size in shape)
    if axis not in (0, 1) or not positive or not (group is None or (isinstance(group, int) and group > 0)):
        raise CheckpointError(
            f"{where!r} has axis {axis!r}, shape {shape!r} and group_size {group!r}, expected 0 or 1, the shape of a "
            "weight and a positive number; get the checkpoint again"
        )
    scale, zero = (_factor(stored, where, key) for key in ("scale", "zero"))
    sizes = {_shape(stored, scale), _shape(stored, zero)}
    rows, columns, shared = _arrangement(tuple(shape), group, axis, whole=sizes == {()})
    if sizes not in ({()}, {shared}):
        found = " and ".join(str(list(size)) for size in sizes)
        raise CheckpointError(
            f"scale and zero of {where!r} have shape {found}, expected {list(shared)}: group_size {group} along axis "
            f"{axis} of {list(shape)}; get the checkpoint again"
        )
    grid = Grid(codes, PACKINGS[packing], nbits, rows, group, axis, tuple(shape), scale, zero)
    _check_codes(stored, where, grid, columns)
    return grid


def _fits(nbits: Any, packing: Packing) -> bool:
    # 1.58 bits are stored as float32.
    return isinstance(nbits, (int, float)) and any(math.isclose(nbits, bits, rel_tol=1e-6) for bits in packing.codes)


def _arrangement(
    shape: tuple[int, ...], group: int | None, axis: int, *, whole: bool
) -> tuple[int, int, tuple[int, int]]:
    """Rows and columns of codes, and the shape of their scales. With one scale for all, groups are not formed."""
    count = math.prod(shape)
    if group is None or whole:
        rows, columns = shape[0], count // shape[0]
    else:
        rows, columns = (count // group, group) if axis == 1 else (group, count // group)
        if rows * columns != count:
            raise CheckpointError(
                f"group_size {group} does not divide the {count} values of a weight of shape {list(shape)}; "
                "get the checkpoint again"
            )
    return rows, columns, (rows, 1) if axis == 1 else (1, columns)


def _factor(stored: Stored, where: str, key: str) -> Part | Grid:
    """Scales or zero points: stored, stacked upon each other for offloading, or quantized."""
    both = f"{where}.zero_scale"
    stacked = Part(both, ("zero", "scale").index(key)) if both in stored else None
    if _value(stored, f"{where}.quant_{key}"):
        return _grid(stored, f"{where}.meta_{key}", stacked or Part(stored.need(f"{where}.{key}_q")))
    factor = stacked or Part(stored.need(f"{where}.{key}"))
    if not stored.dtype(factor.name).is_floating_point:
        raise CheckpointError(
            f"{factor.name!r} is {stored.dtype(factor.name)}, expected floating point; get the checkpoint again"
        )
    return factor


def _shape(stored: Stored, factor: Part | Grid) -> tuple[int, ...]:
    return factor.shape if isinstance(factor, Grid) else factor.shape(stored)


def _check_codes(stored: Stored, where: str, grid: Grid, columns: int) -> None:
    packing, dtype = grid.packing, stored.dtype(grid.codes.name)
    shape = grid.codes.shape(stored)
    if dtype.is_floating_point and _value(stored, f"{where}.view_as_float"):
        # Words are stored as the numbers that have their bits.
        shape = (*shape[:-1], shape[-1] * dtype.itemsize // packing.word.itemsize)
    elif dtype != packing.word:
        raise CheckpointError(
            f"{grid.codes.name!r} is {dtype}, expected {packing.word} for codes of {grid.bits} bits; "
            "get the checkpoint again"
        )
    expected = (-(-grid.rows // packing.planes), columns)
    if shape != expected:
        raise CheckpointError(
            f"{grid.codes.name!r} has shape {list(shape)}, expected {list(expected)}: codes of {grid.bits} bits for a "
            f"weight of {list(grid.shape)}, group_size {grid.group} along axis {grid.axis}; get the checkpoint again"
        )


def _scheme(grid: Grid) -> Scheme:
    outputs, inputs = grid.shape
    notes = ["double-quantized"] if isinstance(grid.scale, Grid) or isinstance(grid.zero, Grid) else []
    if grid.axis == 0:
        # Outputs that share a scale are not neighbours: they lie outputs / group apart.
        return Scheme(
            f"int{grid.bits:g}", grid.bits, (grid.group or outputs, 1), False, (*notes, "groups across outputs")
        )
    group = grid.group or inputs
    block = (1, group) if inputs % group == 0 else (max(1, group // inputs), min(group, inputs))
    return Scheme(f"int{grid.bits:g}", grid.bits, block, False, tuple(notes))


register("hqq", _recognise, _layout)
