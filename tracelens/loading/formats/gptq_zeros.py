"""Zero points of GPTQ: stored as they are, or less one, and what becomes of a zero point of 0 that is stored less one.

A zero point 0, less one, does not fit its field. Writers differ in what they store then: GPTQModel lets the subtraction
borrow from the field above (2, 4, 8 bits) or wraps the field (other widths); AutoGPTQ sets every field above it in the
word to ones, which destroys them, and then reads all of these as 0, or as 2^bits, depending on its kernel. None of this
can happen when all zero points are in the middle, as in symmetric checkpoints, where the data also tell whether one was
subtracted.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Stored
from tracelens.loading.formats.group_codes import spread
from tracelens.loading.formats.packed_linear import GET, declared, packing_format

Storage = Literal["as is", "less one", "less one, borrowing", "less one, overflowing"]
"""What is stored: z; z - 1, each field for itself; z - 1, the whole word at once; z - 1 of z = 1 to 2^bits."""

AS_IS = ("gptq_v2", "gptq_p", "auto_round", "auto_round:gptqmodel")
LESS_ONE = ("gptq", "auto_round:auto_gptq", "auto_round:gptq")
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bits of a code -> widths of the planes it is split into in GPTQModel's planar layout, lowest bits first."""


@dataclass(frozen=True)
class ZeroPoints:
    """How the zero points of one module are to be read."""

    storage: Storage
    symmetric: bool
    wrapped: int = 0
    """Fields of all ones: zero points of 0, less one, and what their writer destroyed beside them."""
    lost: bool = False
    """Whether some of `wrapped` were destroyed, and are what AutoGPTQ takes them for."""
    label_belied: bool = False
    """Whether the data say otherwise than the config."""


def codes(words: Tensor, bits: int, planar: bool) -> Tensor:
    """Codes packed in 32-bit words along the last axis: uint8, as many as fit."""
    octets = words.contiguous().view(torch.uint8)
    if not planar or bits not in PLANES:
        return spread(octets, bits)
    # Each 32 codes take `bits` words: first those of the lowest plane, then those of the next.
    planes = octets.unflatten(-1, (-1, bits * 4)).split([width * 4 for width in PLANES[bits]], dim=-1)
    result = spread(planes[0], PLANES[bits][0])
    above = PLANES[bits][0]
    for plane, width in zip(planes[1:], PLANES[bits][1:], strict=True):
        result = result | spread(plane, width) << above
        above += width
    return result.flatten(-2)


def read_zeros(words: Tensor, bits: int, planar: bool, storage: Storage, outputs: int) -> Tensor:
    """Zero points from `qzeros`, (groups, outputs · bits / 32): int16 (groups, outputs), 0 to 2^bits."""
    if storage == "less one, borrowing":
        # Adding one to every field at once carries where the writer's subtraction borrowed.
        ones = sum(1 << at for at in range(0, 32, bits))
        return codes(words + ones, bits, planar)[..., :outputs].to(torch.int16)
    fields = codes(words, bits, planar)[..., :outputs].to(torch.int16)
    if storage == "as is":
        return fields
    return fields + 1 if storage == "less one, overflowing" else (fields + 1) & (2**bits - 1)


def judge(stored: Stored, module: str, bits: int, planar: bool, outputs: int) -> ZeroPoints:
    """Finds out how a module's zero points are stored, from the config and from all of `qzeros`.

    Raises `CheckpointError` if they cannot be known: destroyed when they were written, or not what the config says.
    """
    name = f"{module}.qzeros"
    fields = codes(stored.read(name), bits, planar)[..., :outputs]
    low, high = (int(value) for value in torch.aminmax(fields))
    convention, middle, full = _convention(stored), 2 ** (bits - 1), 2**bits - 1
    symmetric = declared(stored, module, "sym")
    if symmetric is not False and low == high and low in (middle, middle - 1):
        storage = "as is" if low == middle else "less one"
        return ZeroPoints(storage, True, label_belied=convention not in (storage, None))
    if symmetric:
        raise CheckpointError(
            f"{name!r} in {stored.path} holds zero points from {low} to {high}, but sym = {symmetric} in the config "
            f"means that all are {middle} (stored as {middle}, or as {middle - 1}): either may be damaged; if the "
            f"original was quantized with sym = false, say so in the config; otherwise {GET}"
        )
    if high == 0:
        raise CheckpointError(
            f"{name!r} in {stored.path} holds nothing but zeros, expected zero points of {bits} bits that the writer "
            f"of an asymmetric checkpoint chose: they were lost; {GET}"
        )
    if convention is None:
        raise CheckpointError(
            f"{name!r} in {stored.path} may hold zero points as they are or less one, and the config "
            f"({_label(stored) or 'no checkpoint_format'}) does not say which; expected checkpoint_format "
            f'"gptq" or "gptq_v2", or an auto-round packing_format; {GET}'
        )
    if convention == "as is":
        return ZeroPoints("as is", low == high == middle)
    version = _gptqmodel(stored)
    if bits == 3 and version is not None and version < (7,):
        raise CheckpointError(
            f"{name!r} in {stored.path} was written by GPTQModel {'.'.join(map(str, version))}, which subtracted one "
            "from asymmetric 3-bit zero points in the wrong places; load the full-precision original, or quantize it "
            "again with GPTQModel 7 or with checkpoint_format gptq_v2"
        )
    if high < full:
        return ZeroPoints("less one", low == high == middle - 1)
    wrapped = int((fields == full).sum())
    if version is not None and version >= (0, 9):
        return ZeroPoints("less one, borrowing" if bits in (2, 4, 8) else "less one", False, wrapped)
    if "auto_gptq_version" in stored.files.metadata:
        # Which of AutoGPTQ's kernels read it is settled by the config; the one for act-order does not mask, nor does 3 bit.
        grouped = (declared(stored, module, "group_size") or -1) != -1
        masked = bits != 3 and not (declared(stored, module, "desc_act") and grouped)
        return ZeroPoints("less one" if masked else "less one, overflowing", False, wrapped, lost=True)
    raise CheckpointError(
        f"{name!r} in {stored.path} has {wrapped} of {fields.numel()} fields of all ones ({full}): zero points of 0, less "
        "one. The writer is not known to be GPTQModel; others destroy the zero points beside them in that case, and "
        "libraries disagree on how to read them; load the full-precision original, or quantize it again with "
        "checkpoint_format gptq_v2"
    )


def _label(stored: Stored) -> str:
    config: dict[str, Any] = stored.quantization
    named = packing_format(stored) or config.get("checkpoint_format") or config.get("format")
    return named.lower() if isinstance(named, str) else ""


def _convention(stored: Stored) -> Literal["as is", "less one"] | None:
    """What the labels say about how zero points are stored; None if they say nothing that is known."""
    label = _label(stored)
    if label in AS_IS:
        return "as is"
    if label in LESS_ONE or label.startswith(tuple(f"{known}:" for known in LESS_ONE)):
        return "less one"
    # AutoGPTQ, which came first, has no such label.
    return "less one" if not label and stored.method == "gptq" else None


def _gptqmodel(stored: Stored) -> tuple[int, ...] | None:
    """Version of the GPTQModel that quantized; None if it was another library."""
    meta = stored.quantization.get("meta")
    tools = meta.get("quantizer") if isinstance(meta, dict) else None
    for tool in tools if isinstance(tools, list) else [tools]:
        name, _, version = str(tool).lower().partition(":")
        if name == "gptqmodel":
            numbers = [part for part in version.split("-")[0].split(".") if part.isdigit()]
            return tuple(int(part) for part in numbers) or (0,)
    return None
