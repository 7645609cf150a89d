"""AWQ, as AutoAWQ, GPTQModel and auto-round write it.

Lin et al., AWQ, arXiv:2306.00978. Per linear layer with K inputs, N outputs and G groups of inputs, in three packings
that shapes and dtypes tell apart:

    gemm       qweight int32 (K, N·b/32)  qzeros int32 (G, N·b/32)       scales (G, N)
    gemv       qweight int32 (N, K/8)     qzeros int32 (N, padded G/8)   scales (N, padded G)
    gemv_fast  qweight int16 (N/4, K)     qzeros float (padded G, N)     scales (padded G, N)

    weight[n, k] = s[g, n] · (q[k, n] - z[g, n]),  g = k // group_size

gemv_fast stores -s·z, rounded, instead of z. For gemv and gemv_fast the weight is what AutoAWQ, their only writer, packed:
the product rounded to the dtype of the scales; for gemm it is the product itself, as readers of gemm compute it.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.awq_scales import fold
from tracelens.loading.formats.base import Layout, Quantized, Read, Scheme, Stored, register
from tracelens.loading.formats.group_codes import scaled, spread
from tracelens.loading.formats.packed_linear import (
    GET,
    Packing,
    check_group_size,
    family,
    misfit,
    packing,
    whole_number,
)

INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
"""Column within a 32-bit word of gemm -> the nibble that holds it."""


@dataclass(frozen=True)
class Linear:
    """One quantized module, checked."""

    module: str
    packing: Packing
    bits: int
    inputs: int
    outputs: int
    group: int
    inputs_first: bool
    symmetric: bool

    def dequantize(self, read: Read) -> Tensor:
        words, zeros, scales = (read(f"{self.module}.{part}") for part in ("qweight", "qzeros", "scales"))
        kind, groups = scales.dtype, -(-self.inputs // self.group)
        if self.packing == "gemm":
            # The words are transposed, not what comes out of them: that is eight times as much.
            words, unpack = words.t().contiguous(), partial(_columns, bits=self.bits)
            zeros, scales = _columns(zeros.t().contiguous(), self.bits), scales.t()
        elif self.packing == "gemv":
            unpack, zeros, scales = _nibbles, _nibbles(zeros)[:, :groups], scales[:, :groups]
        else:
            unpack, scales = _strips, scales[:groups].t()
            zeros = _whole_zeros(zeros[:groups].t(), scales)[0]
        scales = scales.to(torch.float32).contiguous()
        weight = scaled(words, unpack, zeros.contiguous(), scales, self.group, self.inputs)
        if self.packing != "gemm":
            weight.copy_(weight.to(kind))
        return weight.t().contiguous() if self.inputs_first else weight

    def quantized(self) -> Quantized:
        parts = tuple(f"{self.module}.{part}" for part in ("qweight", "qzeros", "scales"))
        shape = (self.inputs, self.outputs) if self.inputs_first else (self.outputs, self.inputs)
        scheme = Scheme(f"int{self.bits}", self.bits, (1, self.group), self.symmetric)
        return Quantized(shape, parts, scheme, self.dequantize)


def _columns(words: Tensor, bits: int) -> Tensor:
    """Codes of gemm, transposed: (N·b/32, K) int32 -> (N, K) int32; nibbles are interleaved, bytes are in order."""
    order = INTERLEAVED if bits == 4 else range(32 // bits)
    shifts = torch.tensor([place * bits for place in order], dtype=torch.int32, device=words.device)
    found = words.unsqueeze(1) >> shifts[:, None]
    found &= 2**bits - 1
    return found.flatten(0, 1)


def _nibbles(words: Tensor) -> Tensor:
    return spread(words.contiguous().view(torch.uint8), 4)


def _strips(words: Tensor) -> Tensor:
    """Codes of gemv_fast, (N/4, K) int16 -> (N, K) uint8.

    The nibbles of a word lie side by side in a strip of 64 inputs of one output; four strips, of consecutive outputs,
    follow each other. In a strip, each 32 inputs are shuffled twice: in pairs, and even before odd within each 8.
    """
    strips = _nibbles(words).unflatten(-1, (-1, 4, 64)).transpose(1, 2)
    pairs = strips.unflatten(-1, (2, 4, 2, 4)).transpose(-1, -2)
    inputs = pairs.flatten(-2).unflatten(-1, (4, 2)).transpose(-2, -3)
    return inputs.reshape(4 * len(words), -1)


def _whole_zeros(products: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Zero points from `-scale * zero`, which gemv_fast stores: uint8, and how far each is from a whole number."""
    exact = -products.to(torch.float32) / scales.to(torch.float32)
    # 0 / 0 stands for no zero point; that of a scale that is not finite makes no difference.
    exact.masked_fill_((scales == 0) & (products == 0) | ~scales.isfinite(), 0)
    whole = exact.round().nan_to_num(0, 0, 0).clamp(0, 15)
    return whole.to(torch.uint8), (exact - whole).abs()


def _check_whole_zeros(stored: Stored, module: str, groups: int) -> None:
    name = f"{module}.qzeros"
    products, scales = (stored.read(f"{module}.{part}")[:groups] for part in ("qzeros", "scales"))
    # A product rounded to 16 bits is off by 2^-9 of itself at most, of a zero point up to 15.
    if not bool((_whole_zeros(products, scales)[1] < 0.1).all()):
        raise CheckpointError(
            f"{name!r} in {stored.path} is not -scale times a whole zero point from 0 to 15, expected that of gemv_fast "
            f"in every group; {GET}"
        )


def _linear(stored: Stored, module: str) -> Linear:
    kind = packing(stored, module)
    if kind is None or kind == "gptq":
        raise misfit(stored, module, "shapes of AWQ's gemm, gemv or gemv_fast")
    (rows, columns), scales = stored.shape(f"{module}.qweight"), stored.shape(f"{module}.scales")
    bits, inputs, outputs, groups = {
        "gemm": (32 * columns // scales[1], rows, scales[1], scales[0]),
        "gemv": (4, columns * 8, rows, None),
        "gemv_fast": (4, columns, rows * 4, None),
    }[kind]
    said = whole_number(stored, module, "bits", "w_bit")
    if said not in (bits, None):
        raise CheckpointError(
            f"{module!r} in {stored.path}: the config says bits = {said}, but its shapes are those of {bits} bits "
            f"({kind}); {GET}"
        )
    size = whole_number(stored, module, "group_size", "q_group_size")
    if groups is None:
        group = _padded_group_size(stored, module, kind, inputs, size)
    else:
        group = check_group_size(stored, module, inputs, groups, size)
    if kind == "gemv_fast":
        _check_whole_zeros(stored, module, inputs // group)
    symmetric = kind != "gemv_fast" and _symmetric(stored, module, kind, bits, inputs // group)
    return Linear(module, kind, bits, inputs, outputs, group, stored.transposed(module), symmetric)


def _padded_group_size(stored: Stored, module: str, kind: Packing, inputs: int, size: int | None) -> int:
    """The declared group size, if it fits the padded number of groups, and if what pads is empty."""
    name = f"{module}.scales"
    if size is None:
        raise CheckpointError(
            f"{module!r} in {stored.path} is packed as {kind}, where the number of groups is padded, and the config "
            f"has no group_size, expected one; {GET}"
        )
    group = inputs if size <= 0 else size
    if inputs % group or (kind == "gemv_fast" and inputs % 64):
        raise CheckpointError(
            f"{module!r} in {stored.path}: {inputs} inputs do not divide into groups of {group}"
            f"{' and strips of 64' if kind == 'gemv_fast' else ''}; {GET}"
        )
    # Eight zero points fill a word, and rows are padded to 1, 2, 4 or 8 words (AutoAWQ, calculate_zeros_width).
    groups, words = inputs // group, max(1, 128 // group)
    padded = -(-groups // (8 * words)) * 8 * words
    across = 1 if kind == "gemv" else 0
    if stored.shape(name)[across] != padded:
        raise CheckpointError(
            f"{module!r} in {stored.path}: group_size {size} of the config makes {groups} groups, padded to {padded}, "
            f"but {name!r} {list(stored.shape(name))} holds {stored.shape(name)[across]}; {GET}"
        )
    if bool(stored.read(name).narrow(across, groups, padded - groups).count_nonzero()):
        raise CheckpointError(
            f"{name!r} in {stored.path} holds scales beyond the {groups} groups that group_size {size} of the config "
            f"makes, expected zeros there: the group size is smaller; {GET}"
        )
    return group


def _symmetric(stored: Stored, module: str, kind: Packing, bits: int, groups: int) -> bool:
    """Whether all zero points are in the middle; raises if there is nothing but zeros where they should be."""
    name = f"{module}.qzeros"
    octets = stored.read(name).contiguous().view(torch.uint8)
    zeros = spread(octets, bits)
    low, high = (int(value) for value in torch.aminmax(zeros[:, :groups] if kind == "gemv" else zeros))
    if high == 0:
        raise CheckpointError(
            f"{name!r} in {stored.path} holds nothing but zeros, expected zero points of {bits} bits, "
            f"{2 ** (bits - 1)} if they are symmetric: they were lost; {GET}"
        )
    return low == high == 2 ** (bits - 1)


def _layout(stored: Stored) -> Layout:
    linears = [_linear(stored, module) for module in stored.modules("qweight", "qzeros", "scales")]
    tensors = {f"{linear.module}.weight": linear.quantized() for linear in linears}
    tensors |= fold(stored, tensors)
    variants = ", ".join(dict.fromkeys(linear.packing for linear in linears))
    return Layout(f"awq ({variants})", tensors)


register("awq", lambda stored: family(stored) == "awq", _layout)
