"""MXFP4 experts of gpt-oss (`quant_method: mxfp4`), as OpenAI published them and transformers keeps them.

`<projection>_blocks` is uint8 (experts, out, in / 32, 16), two 4-bit floats (E2M1) per byte, low half first;
`<projection>_scales` is uint8 (experts, out, in / 32), exponents (E8M0) of the blocks of 32. The plain parameter is
`<projection>`, (experts, in, out). OCP Microscaling Formats 1.0, sections 5.3 and 5.4.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import E2M1, Layout, Quantized, Read, Scheme, Stored, exponents, register

BLOCK = 32
BLOCKS, SCALES = "_blocks", "_scales"


def _projections(stored: Stored) -> list[str]:
    return [name.removesuffix(BLOCKS) for name in stored.names if name.endswith(BLOCKS)]


def _recognise(stored: Stored) -> bool:
    return stored.method == "mxfp4" or any(name + SCALES in stored for name in _projections(stored))


def _layout(stored: Stored) -> Layout:
    tensors = {}
    for name in _projections(stored):
        blocks, scales = name + BLOCKS, name + SCALES
        _check(stored, blocks, scales)
        experts, outputs, n_blocks, _ = stored.shape(blocks)
        tensors[name] = Quantized(
            shape=(experts, n_blocks * BLOCK, outputs),
            parts=(blocks, scales),
            scheme=Scheme("e2m1", 4.0, (1, BLOCK), notes=("MXFP4",)),
            dequantize=partial(_dequantize, blocks=blocks, scales=scales),
        )
    if not tensors:
        raise CheckpointError(
            f"{stored.path} says quant_method mxfp4, but no tensor ends in {BLOCKS}; get the whole checkpoint, or take "
            "quantization_config out of config.json if it is not quantized"
        )
    if alone := [n for n in stored.names if n.endswith(SCALES) and n.removesuffix(SCALES) not in tensors]:
        raise CheckpointError(f"{alone[0]!r} in {stored.path} has no {BLOCKS} beside it; get the whole checkpoint")
    return Layout("mxfp4", tensors)


def _check(stored: Stored, blocks: str, scales: str) -> None:
    shape, dtypes = stored.shape(blocks), {stored.dtype(blocks), stored.dtype(scales)}
    if len(shape) != 4 or shape[-1] != BLOCK // 2 or stored.shape(scales) != shape[:-1] or dtypes != {torch.uint8}:
        raise CheckpointError(
            f"{blocks!r} in {stored.path} is {stored.dtype(blocks)} {list(shape)} and its scales {stored.dtype(scales)} "
            f"{list(stored.shape(scales))}; expected uint8 (experts, out, blocks, 16) and (experts, out, blocks): "
            "get the checkpoint again"
        )


def _dequantize(read: Read, *, blocks: str, scales: str) -> Tensor:
    octets = read(blocks)
    values = torch.tensor(E2M1, device=octets.device)
    # Both values of a byte are found in one step: byte -> (low, high).
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)
    weights = embedding(octets.int(), pairs).flatten(-2)
    weights *= exponents(read(scales)).unsqueeze(-1)
    return weights.flatten(-2).transpose(1, 2)


register("mxfp4", _recognise, _layout)
