"""GPTQ, as AutoGPTQ, GPTQModel and auto-round write it.

Per linear layer with K inputs, N outputs and G groups of inputs:

    qweight  int32 (K·b/32, N)   codes q, packed along K
    qzeros   int32 (G, N·b/32)   zero points z, packed along N; maybe stored less one
    scales   float (G, N)        s
    g_idx    int32 (K,)          group of each input, optional; without it input k is in group k // group_size

    weight[n, k] = s[g, n] · (q[k, n] - z[g, n]),  g = g_idx[k]

Frantar et al., GPTQ, arXiv:2210.17323. Codes form a bit stream; those of 5, 6 and 7 bits, and all with GPTQModel's
`gptq_p`, lie in planes of 4, 2 and 1 bits.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Layout, Quantized, Read, Scheme, Stored, register
from tracelens.loading.formats.gptq_zeros import PLANES, ZeroPoints, codes, judge, read_zeros
from tracelens.loading.formats.group_codes import scaled
from tracelens.loading.formats.packed_linear import (
    GET,
    check_group_size,
    declared,
    family,
    misfit,
    packing,
    whole_number,
)

logger = logging.getLogger(__name__)

BITS = (2, 3, 4, 5, 6, 7, 8)
EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings")
"""Modules whose plain weight has what is packed first, one row for each entry of the vocabulary, first too."""


@dataclass(frozen=True)
class Linear:
    """One quantized module, checked."""

    module: str
    bits: int
    planar: bool
    inputs: int
    outputs: int
    group: int
    """Inputs in a group; the last group may be smaller."""
    act_order: bool
    """Whether `g_idx` says more than that inputs are grouped in order."""
    inputs_first: bool
    """Whether the plain weight is (in, out)."""
    zeros: ZeroPoints

    def dequantize(self, read: Read) -> Tensor:
        # The words are transposed, not what comes out of them: that is eight times as much at 4 bits.
        words = read(f"{self.module}.qweight").t().contiguous()
        zeros = read_zeros(read(f"{self.module}.qzeros"), self.bits, self.planar, self.zeros.storage, self.outputs)
        scales = read(f"{self.module}.scales").to(torch.float32)
        groups = read(f"{self.module}.g_idx").long() if self.act_order else self.group
        weight = scaled(words, self._unpack, zeros.t().contiguous(), scales.t().contiguous(), groups, self.inputs)
        return weight.t().contiguous() if self.inputs_first else weight

    def _unpack(self, words: Tensor) -> Tensor:
        found = codes(words, self.bits, self.planar)
        return found.to(torch.int16) if self.bits == 8 else found

    def quantized(self, stored: Stored) -> Quantized:
        parts = tuple(f"{self.module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
        scheme = Scheme(
            f"int{self.bits}",
            self.bits,
            (1, self.group),
            self.zeros.symmetric,
            ("act-order",) if self.act_order else (),
        )
        shape = (self.inputs, self.outputs) if self.inputs_first else (self.outputs, self.inputs)
        return Quantized(shape, tuple(part for part in parts if part in stored), scheme, self.dequantize)


def _linear(stored: Stored, module: str) -> Linear:
    if packing(stored, module) != "gptq":
        raise misfit(stored, module, "int32 (K·b/32, N) and (G, N·b/32) with float (G, N), as GPTQ packs them")
    (rows, outputs), (groups, columns) = stored.shape(f"{module}.qweight"), stored.shape(f"{module}.qzeros")
    indexed = f"{module}.g_idx" in stored
    bits = _bits(stored, module, outputs, columns)
    inputs = stored.shape(f"{module}.g_idx")[0] if indexed else rows * 32 // bits
    if -(-inputs * bits // 32) != rows:
        raise CheckpointError(
            f"{module!r} in {stored.path}: {rows} rows of qweight hold {rows * 32 // bits} codes of {bits} bits, but "
            f"g_idx is for {inputs} inputs; {GET}"
        )
    group = check_group_size(stored, module, inputs, groups, whole_number(stored, module, "group_size"))
    act_order = _act_order(stored, module, inputs, groups, group)
    planar = _planar(stored, module, bits)
    inputs_first = stored.transposed(module) or module.rpartition(".")[2] in EMBEDDINGS
    zeros = judge(stored, module, bits, planar, outputs)
    return Linear(module, bits, planar, inputs, outputs, group, act_order, inputs_first, zeros)


def _bits(stored: Stored, module: str, outputs: int, columns: int) -> int:
    """Bits of a code, from the shape of `qzeros`; the config must not say otherwise."""
    possible = [bits for bits in BITS if -(-outputs * bits // 32) == columns]
    said = whole_number(stored, module, "bits")
    if said in possible:
        return said
    if not possible or (said is None and len(possible) > 1):
        raise misfit(stored, module, f"{outputs} · b / 32 columns of qzeros, b = 2 to 8")
    if said is None:
        return possible[0]
    raise CheckpointError(
        f"{module!r} in {stored.path}: the config says bits = {said}, but {columns} columns of qzeros for {outputs} "
        f"outputs are {possible[0]} bits; {GET}"
    )


def _planar(stored: Stored, module: str, bits: int) -> bool:
    label = declared(stored, module, "checkpoint_format", "format")
    if bits in (5, 6, 7) and label != "gptq_p":
        raise CheckpointError(
            f"{module!r} in {stored.path} has {bits}-bit codes and checkpoint_format {label!r}, expected 'gptq_p': "
            f"only GPTQModel's planar layout has this width; {GET}"
        )
    return label == "gptq_p" and bits in PLANES


def _act_order(stored: Stored, module: str, inputs: int, groups: int, group: int) -> bool:
    """Whether inputs are grouped out of order; checks `g_idx`, every entry of it."""
    name = f"{module}.g_idx"
    if name not in stored:
        if declared(stored, module, "desc_act") and groups > 1:
            raise CheckpointError(f"{stored.path} says desc_act, but {name!r} is missing; {GET}")
        return False
    if stored.dtype(name) not in (torch.int32, torch.int64) or len(stored.shape(name)) != 1:
        raise misfit(stored, module, "g_idx int32 (K,)")
    index, ordered = stored.read(name).long(), torch.arange(inputs) // group
    if torch.equal(index, ordered):
        return False
    low, high = (int(value) for value in torch.aminmax(index))
    if low < 0 or high >= groups:
        raise CheckpointError(
            f"{name!r} in {stored.path} holds groups from {low} to {high}, expected 0 to {groups - 1}; {GET}"
        )
    counts, expected = torch.bincount(index, minlength=groups), torch.bincount(ordered, minlength=groups)
    if not torch.equal(counts, expected):
        wrong = int((counts != expected).nonzero()[0])
        raise CheckpointError(
            f"{name!r} in {stored.path} puts {int(counts[wrong])} inputs in group {wrong}, expected "
            f"{int(expected[wrong])} (group_size {group}); {GET}"
        )
    return True


def _notes(linears: list[Linear]) -> tuple[str, ...]:
    """What the zero points of the checkpoint are not, or only by agreement; logged as well."""
    notes = []
    if belied := [linear for linear in linears if linear.zeros.label_belied]:
        how = "as they are" if belied[0].zeros.storage == "as is" else "less one"
        notes.append(
            f"symmetric zero points of {_some(belied)} are stored {how}, contrary to the config; the data were followed"
        )
    if lost := [linear for linear in linears if linear.zeros.lost]:
        count = sum(linear.zeros.wrapped for linear in lost)
        notes.append(
            f"AutoGPTQ destroyed zero points in {_some(lost)} when it wrote them ({count} fields of all ones); read as "
            "its own kernels do, so that these weights are what AutoGPTQ computes with, not what was quantized"
        )
    if wrapped := [linear for linear in linears if linear.zeros.wrapped and not linear.zeros.lost]:
        count = sum(linear.zeros.wrapped for linear in wrapped)
        notes.append(
            f"{count} zero points of 0 in {_some(wrapped)} were stored less one, beyond their fields; read as "
            "GPTQModel, which wrote them, does"
        )
    for note in notes:
        logger.warning(note)
    return tuple(notes)


def _some(linears: list[Linear]) -> str:
    names = ", ".join(repr(linear.module) for linear in linears[:3])
    return names + (f" and {len(linears) - 3} more modules" if len(linears) > 3 else "")


def _layout(stored: Stored) -> Layout:
    linears = [_linear(stored, module) for module in stored.modules("qweight", "qzeros", "scales")]
    tensors = {f"{linear.module}.weight": linear.quantized(stored) for linear in linears}
    variant = " (planar)" if any(linear.planar for linear in linears) else ""
    return Layout(f"gptq{variant}", tensors, notes=_notes(linears))


register("gptq", lambda stored: family(stored) == "gptq", _layout)
