"""ALiBi with the slopes that BLOOM was trained with, for any number of heads (arXiv:2108.12409, section 3)."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def slopes(n_heads: int) -> Tensor:
    """Slope of each head: 2^(-8i/n) for a power of two n; otherwise those of the next smaller one, then every other of
    those of the next larger one.

    transformer-lens has the first case only.
    """
    smaller = 2 ** int(math.log2(n_heads))
    first = [2 ** (-8 * (i + 1) / smaller) for i in range(smaller)]
    rest = [2 ** (-4 * (2 * i + 1) / smaller) for i in range(n_heads - smaller)]
    return torch.tensor(first + rest)


def slope_as_trained(model: Any) -> None:
    """Replace each block's attention by one that biases scores with `slopes`, and zero the table of positions.

    transformer-lens makes such a table for every model that does not rotate, and does not read it here.
    """
    from transformer_lens.components.attention import Attention

    class SlopedAttention(Attention):
        def forward(self, *args: Any, **inputs: Any) -> Any:
            keys, past = inputs["key_input"], inputs.get("past_kv_cache_entry")
            length = keys.shape[1] + (past.past_keys.shape[1] if past is not None else 0)
            # transformer-lens makes its own biases only where these are too short.
            if self.alibi is None or length > self.alibi.shape[-1]:
                position = torch.arange(length, device=keys.device)
                distance = (position[None, :] - position[:, None]).clamp(max=0)
                self.alibi = slopes(self.cfg.n_heads).to(keys.device)[:, None, None] * distance
            return super().forward(*args, **inputs)

    for layer, block in enumerate(model.blocks):
        block.attn = SlopedAttention(model.cfg, "global", layer)
    # Zeros that nobody reads or writes are not given memory.
    model.pos_embed.W_pos = nn.Parameter(torch.zeros(model.cfg.n_ctx, model.cfg.d_model, dtype=model.cfg.dtype))
    model.setup()
