"""Weights that bring out what number formats do at their edges."""

import torch
from torch import Tensor


def awkward(out: int, width: int, seed: int = 0) -> Tensor:
    """(out, width) float32: rows of very different sizes and tails, one above zero, one of zeros, one with a single value,
    one on a coarse grid (so that it has ties), one with a zero group."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(out, width, generator=generator)
    matrix[3::4] = matrix[3::4] ** 3
    matrix *= torch.randn(out, 1, generator=generator).mul(1.5).exp()
    matrix[0] += 5
    matrix[1] = 0
    matrix[2] = 0
    matrix[2, 0] = -0.3
    if out > 5:
        matrix[4] = torch.randint(-12, 13, (width,), generator=generator) / 4
        matrix[5, :128] = 0
    return matrix
