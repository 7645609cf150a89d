"""NF4 and FP4: 4-bit codes of a table, in blocks of the flattened weight, with scales that may be 8-bit codes."""

import torch
from jaxtyping import Float32
from torch import Tensor

from tracelens.precision.blocks import in_chunks

# Quantiles of a normal distribution scaled to [-1, 1] (Dettmers et al., QLoRA, arXiv 2305.14314, appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
FP4 = tuple(sign * value / 12 for sign in (-1, 1) for value in (12, 8, 6, 4, 3, 2, 0.0625, 0))
"""bitsandbytes' 4-bit floats, which are not E2M1."""
_NESTED_BLOCK = 256
_BINS = 65535


def round_to_codebook(
    matrix: Float32[Tensor, "out in"], codebook: tuple[float, ...], block: int, *, double_quant: bool = False
) -> Float32[Tensor, "out in"]:
    """Every value the nearest of `codebook` times its block's absmax, the lower of two as near.

    Blocks of `block` values run through the flattened matrix, row after row: where `block` does not divide the width they
    cross from one row to the next, and the last may be short. `double_quant`: the absmax of the blocks, less their mean,
    are themselves rounded to 8 bits in blocks of 256 (Dettmers et al., arXiv 2305.14314, section 3).
    Bit for bit bitsandbytes' `quantize_4bit` and `dequantize_4bit` on a CPU.
    """
    flat = matrix.flatten()
    whole = flat.numel() - flat.numel() % block
    blocks, rest = flat[:whole].view(-1, block), flat[whole:]
    absmax = blocks.abs().amax(-1)
    if rest.numel():
        absmax = torch.cat([absmax, rest.abs().amax()[None].clamp_min(1e-38)])
    scale = _round_scales(absmax) if double_quant else absmax
    levels = matrix.new_tensor(sorted(set(codebook)))

    def rounded(part: Tensor, largest: Tensor, scale: Tensor) -> Tensor:
        scaled = part * (1.0 / largest.clamp_min(1e-38))[:, None]
        return _nearest(scaled, levels) * scale[:, None]

    full = in_chunks(rounded, blocks, absmax[: len(blocks)], scale[: len(blocks)]).flatten()
    if not rest.numel():
        return full.view_as(matrix)
    # The library divides in the last block, and elsewhere multiplies by the reciprocal.
    tail = _nearest(rest / absmax[-1], levels) * scale[-1]
    return torch.cat([full, tail]).view_as(matrix)


def _nearest(values: Float32[Tensor, "*shape"], levels: Float32[Tensor, " n_levels"]) -> Float32[Tensor, "*shape"]:
    return levels[torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True)]


def _round_scales(absmax: Float32[Tensor, " blocks"]) -> Float32[Tensor, " blocks"]:
    """Scales as double quantization leaves them.

    The library's CPU kernel looks codes up in a table of 65536 values between -1 and 1. The nearest code, which its other
    kernels take, is its neighbour for about one scale in 600.
    """
    offset = absmax.mean()
    centred = absmax - offset
    padding = -len(centred) % _NESTED_BLOCK
    blocks = torch.nn.functional.pad(centred, (0, padding)).view(-1, _NESTED_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    scaled = (blocks * torch.where(largest == 0, 0.0, 1 / largest)).clamp_(-1, 1)
    bins = ((scaled + 1) * 0.5 * _BINS + 0.5).int()
    rounded = _nearest(2 * bins.float() / _BINS - 1, dynamic_codes().to(absmax.device)) * largest
    return rounded.flatten()[: len(absmax)] + offset


def dynamic_codes() -> Float32[Tensor, "256"]:
    """The 8-bit dynamic data type, ascending (Dettmers et al., arXiv 2110.02861): seven decades, each with
    twice as many values as the one below, of either sign; and 0 and 1."""
    codes = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        magnitudes = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        codes += [magnitudes, -magnitudes]
    return torch.cat(codes).sort().values
