"""Integer codes in packed bytes, and the arithmetic of codes with a scale and a zero point per group."""

from collections.abc import Callable

import torch
from torch import Tensor

UNITS = {
    1: (1, torch.int64),
    2: (1, torch.int32),
    3: (3, torch.int64),
    4: (1, torch.int16),
    5: (5, torch.int64),
    6: (3, torch.int32),
    7: (7, torch.int64),
}
"""Bits of a code -> the bytes that a whole number of codes fills, and an integer with one byte for each of them."""

BLOCK = 2**18
"""Weights that are worked on at a time."""


def spread(octets: Tensor, bits: int) -> Tensor:
    """Codes of a little-endian bit stream along the last axis: uint8, `8 * bytes // bits` of them; b = 1 to 8.

    Several codes are moved at a time: an integer is cut in halves, and the halves in halves, until each byte of it
    holds one code.
    """
    assert octets.dtype == torch.uint8, octets.dtype
    if bits == 8:
        return octets
    take, unit = UNITS[bits]
    count = octets.shape[-1] * 8 // bits
    groups = torch.nn.functional.pad(octets, (0, -octets.shape[-1] % take)).unflatten(-1, (-1, take))
    wide = groups[..., 0].to(unit)
    for place in range(1, take):
        wide |= groups[..., place].to(unit) << 8 * place
    half = unit.itemsize // 2
    while half:
        wide |= wide << half * (8 - bits)
        wide &= sum(2 ** (half * bits) - 1 << at for at in range(0, 8 * unit.itemsize, 8 * half))
        half //= 2
    return wide.contiguous().view(torch.uint8)[..., :count]


def scaled(
    packed: Tensor,
    unpack: Callable[[Tensor], Tensor],
    zeros: Tensor,
    scales: Tensor,
    groups: int | Tensor,
    columns: int,
) -> Tensor:
    """`(codes - zeros) * scales`, (rows, columns) float32, with a zero point and a scale per row and group of columns.

    Args:
        packed: codes of all rows, in any packing in which rows, or blocks of as many rows each, can be cut apart.
        unpack: makes (rows, columns or more) codes of some of it; uint8 if they have less than 8 bits, otherwise in a
            dtype that holds differences.
        zeros: (rows, groups) integers, 0 to 256; at most 128 if the codes are uint8.
        scales: (rows, groups) float32.
        groups: columns in a group, the last one ragged; or the group of each column, (columns,) int64.
    """
    result = torch.empty((len(zeros), columns), dtype=torch.float32, device=packed.device)
    together = len(zeros) // len(packed)
    # What is made on the way stays in the cache of a processor; a GPU has the bandwidth, and is better asked once.
    step = max(1, BLOCK // (columns * together)) if packed.device.type == "cpu" else len(packed)
    for start in range(0, len(packed), step):
        rows = slice(start * together, (start + step) * together)
        codes = unpack(packed[start : start + step])[:, :columns]
        _scale_into(result[rows], codes, zeros[rows], scales[rows], groups)
    return result


def _scale_into(result: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor, groups: int | Tensor) -> None:
    if isinstance(groups, Tensor):
        # Indexing is fast in float32 alone.
        result.copy_(codes).sub_(zeros.to(torch.float32).index_select(1, groups))
        result.mul_(scales.index_select(1, groups))
        return
    whole = codes.shape[-1] // groups
    for of, columns in ((slice(whole), slice(whole * groups)), (slice(whole, None), slice(whole * groups, None))):
        if not codes[:, columns].shape[-1]:
            continue
        shape = (zeros[:, of].shape[-1], -1)
        part = result[:, columns].unflatten(-1, shape)
        part.copy_(_difference(codes[:, columns].unflatten(-1, shape), zeros[:, of, None]))
        part.mul_(scales[:, of, None])


def _difference(codes: Tensor, zeros: Tensor) -> Tensor:
    if codes.dtype != torch.uint8:
        return codes - zeros.to(codes.dtype)
    # What wraps around in uint8 is right again as int8, at a quarter of the memory of int32.
    return (codes - zeros.to(torch.uint8)).view(torch.int8)
