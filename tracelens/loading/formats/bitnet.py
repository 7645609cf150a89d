"""BitNet's ternary weights (`quant_method: bitnet`), as transformers packs them.

`weight` is uint8 (out / 4, in): of each byte, bits 2i and 2i + 1 are the code of row i · out / 4 + row, the weight plus
one. `weight_scale` is one number per matrix, and the two layers that transformers has for it use it in opposite ways:
`BitLinear` divides its output by it, `AutoBitLinear` multiplies (integrations/bitnet.py). The config's `linear_class`
says which one a checkpoint was made for.
"""

from functools import partial

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Layout, Quantized, Read, Scheme, Stored, register

PER_BYTE = 4
CLASSES = ("bitlinear", "autobitlinear")


def _recognise(stored: Stored) -> bool:
    return stored.method == "bitnet"


def _layout(stored: Stored) -> Layout:
    kind = _linear_class(stored)
    tensors = {}
    for module in stored.modules("weight_scale", "weight"):
        name, scale = f"{module}.weight", f"{module}.weight_scale"
        _check(stored, name, scale)
        rows, inputs = stored.shape(name)
        tensors[name] = Quantized(
            shape=(rows * PER_BYTE, inputs),
            parts=(name, scale),
            scheme=Scheme("ternary", 1.58),
            dequantize=partial(_dequantize, name=name, scale=scale, divide=kind == "bitlinear", path=str(stored.path)),
        )
    if not tensors:
        raise CheckpointError(
            f"{stored.path} says quant_method bitnet, but holds no weight_scale; get the whole checkpoint, or take "
            "quantization_config out of config.json if it is not quantized"
        )
    packed = {name for name in stored.names if stored.dtype(name) == torch.uint8 and name.endswith(".weight")}
    if bare := sorted(packed - tensors.keys()):
        raise CheckpointError(f"{bare[0]!r} in {stored.path} has no weight_scale; get the whole checkpoint")
    return Layout(f"bitnet ({kind})", tensors, notes=("inputs of these layers are quantized to int8 per token",))


def _linear_class(stored: Stored) -> str:
    said = stored.quantization
    kind, mode = said.get("linear_class", "bitlinear"), said.get("quantization_mode", "offline")
    if kind not in CLASSES:
        raise CheckpointError(
            f"{stored.path} has the BitNet linear_class {kind!r}; known: {', '.join(CLASSES)}. Whether scales multiply or "
            "divide depends on it: get the original config.json"
        )
    if kind == "autobitlinear" and mode != "offline":
        raise CheckpointError(
            f"{stored.path} holds BitNet weights that are rounded anew in every forward pass (quantization_mode "
            f"{mode!r}); get the packed checkpoint, with quantization_mode 'offline'"
        )
    if said.get("use_rms_norm"):
        raise CheckpointError(
            f"{stored.path} normalizes the input of every BitNet layer (use_rms_norm), which the plain model does not; "
            "get a checkpoint without"
        )
    return kind


def _check(stored: Stored, name: str, scale: str) -> None:
    if stored.dtype(name) != torch.uint8 or len(stored.shape(name)) != 2:
        raise CheckpointError(
            f"{name!r} in {stored.path} is {stored.dtype(name)} {list(stored.shape(name))}, expected ternary weights "
            "packed as uint8 (out / 4, in); get the packed checkpoint"
        )
    if stored.shape(scale) not in ((1,), ()):
        raise CheckpointError(f"{scale!r} in {stored.path} is {list(stored.shape(scale))}, expected one number")


def _dequantize(read: Read, *, name: str, scale: str, divide: bool, path: str) -> Tensor:
    octets = read(name)
    if ((octets & octets >> 1) & 0b01010101).any():
        raise CheckpointError(
            f"{name!r} in {path} holds a code that is not -1, 0 or 1; the file is damaged: get it again"
        )
    weight = torch.empty((PER_BYTE, *octets.shape), device=octets.device)
    for plane in range(PER_BYTE):
        weight[plane] = octets >> 2 * plane & 3
    weight -= 1
    factor = read(scale).float().reshape(())
    return (weight.div_(factor) if divide else weight.mul_(factor)).flatten(0, 1)


register("bitnet", _recognise, _layout)
