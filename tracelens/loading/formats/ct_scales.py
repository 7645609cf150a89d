"""Codes times scales on a grid of blocks, in float32 and one pass over memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tracelens.loading.formats.ct_module import Block

CACHED = 1 << 17
"""Weights computed at a time on a CPU, so that what lies between codes and weights stays in its cache."""


def slices(shape: tuple[int, int], device: torch.device) -> Iterator[slice]:
    """Rows to compute together."""
    rows, columns = shape
    step = max(1, CACHED // columns) if device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def on_rows(values: Tensor, shape: tuple[int, int], block: Block) -> Tensor:
    """Scales of blocks -> (rows, blocks in a row), or a single row that all share."""
    if block is None:
        return values.reshape(1, 1)
    values = values.reshape(-1, 1) if values.dim() == 1 else values
    return values if block[0] == 1 else values.repeat_interleave(block[0], 0)[: shape[0]]


def scaled(
    shape: tuple[int, int],
    codes: Callable[[slice], Tensor],
    scale: Tensor,
    zero: Tensor | None,
    block: Block,
    order: Tensor | None = None,
) -> Tensor:
    """(codes - zero) * scale: float32 of `shape`, each weight rounded once.

    `codes(rows)` gives some rows of int8 or floating-point codes; `scale` and `zero` (integers) hold a value for each
    block, and `order`, if given, the block of each column.
    """
    device = scale.device
    scale = on_rows(scale.float(), shape, block)
    zero = None if zero is None else on_rows(zero, shape, block)
    width = shape[1] if block is None else block[1]
    if order is None and shape[1] % width:
        order = torch.arange(shape[1], device=device) // width
    out = torch.empty(shape, dtype=torch.float32, device=device)
    for rows in slices(shape, device):
        part, target = codes(rows), out[rows]
        by, off = (None if x is None else x if x.shape[0] == 1 else x[rows] for x in (scale, zero))
        assert by is not None
        if order is None:
            part, target = (x.unflatten(1, (-1, width)) for x in (part, target))
            by, off = by.unsqueeze(-1), None if off is None else off.unsqueeze(-1)
        else:
            by, off = by[:, order], None if off is None else off[:, order]
        torch.mul(part if off is None else part - off, by, out=target)
    return out
