"""A weight matrix as rows that share a scale, and rounding of them a few at a time."""

from collections.abc import Callable

import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

_CHUNK = 2**22
"""Values rounded at once: temporaries of rounding stay below 100 MB whatever the matrix, one row aside."""


def in_chunks(
    rounding: Callable[..., Tensor], rows: Float32[Tensor, "rows size"], *beside: Shaped[Tensor, " rows"]
) -> Float32[Tensor, "rows size"]:
    """`rounding(rows, *beside)`, some rows at a time; `beside` is cut along with the rows."""
    together = max(1, _CHUNK // max(1, rows.shape[1]))
    rounded = torch.empty_like(rows)
    for start in range(0, len(rows), together):
        part = slice(start, start + together)
        rounded[part] = rounding(rows[part], *(tensor[part] for tensor in beside))
    return rounded


def to_tiles(matrix: Float32[Tensor, "out in"], size: int) -> Float32[Tensor, "tiles area"]:
    """Tiles of `size` × `size`, row by row of tiles, each flat; at the edges filled up with zeros."""
    out, width = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -width % size, 0, -out % size))
    return padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2).reshape(-1, size * size)


def from_tiles(tiles: Float32[Tensor, "tiles area"], size: int, shape: torch.Size) -> Float32[Tensor, "out in"]:
    """The inverse of `to_tiles` for a matrix of `shape`."""
    across = -(-shape[1] // size)
    padded = tiles.view(-1, across, size, size).transpose(1, 2).reshape(-1, across * size)
    return padded[: shape[0], : shape[1]].contiguous()
