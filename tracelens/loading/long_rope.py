"""Rotation with a factor of its own for each frequency (LongRoPE, arXiv:2402.13753), as Phi-3 has it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stretch(model: Any, factors: Sequence[float], temperature: float) -> None:
    """Replace each block's attention by one that divides frequency i by `factors[i]` and scales what it rotates.

    transformer-lens has other kinds of scaling only.
    """

    def stretched(attention: type) -> type:
        class StretchedAttention(attention):
            def calculate_sin_cos_rotary(
                self, rotary_dim: int, n_ctx: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
            ) -> tuple[Tensor, Tensor]:
                exact = torch.float64 if dtype == torch.float64 else torch.float32
                power = torch.arange(0, rotary_dim, 2, dtype=exact) / rotary_dim
                frequency = 1.0 / (torch.tensor(factors, dtype=exact) * base**power)
                angle = (torch.arange(n_ctx, dtype=exact)[:, None] * frequency).repeat(1, 2)
                return (angle.sin() * temperature).to(dtype), (angle.cos() * temperature).to(dtype)

        return StretchedAttention

    for layer, block in enumerate(model.blocks):
        block.attn = stretched(type(block.attn))(model.cfg, block.attn.attn_type, layer)
    model.setup()
