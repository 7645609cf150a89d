"""Activations that AWQ scales: `act(x) / scales` in the quantized model, folded into the linear layer that follows.

Where no linear layer precedes that could be scaled instead, AutoAWQ puts the division behind the activation function
and stores its scales there. The plain model has no such place: dividing the columns of the next weight is the same.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Quantized, Read, Scheme, Stored

NEXT_LINEAR = {
    "bloom": ("gelu_impl", "dense_4h_to_h"),
    "falcon": ("act", "dense_4h_to_h"),
    "RefinedWeb": ("act", "dense_4h_to_h"),
    "RefinedWebModel": ("act", "dense_4h_to_h"),
    "gpt_bigcode": ("act", "c_proj"),
    "gpt_neox": ("act", "dense_4h_to_h"),
    "gptj": ("act", "fc_out"),
    "mpt": ("act", "down_proj"),
    "starcoder2": ("act", "c_proj"),
}
"""`model_type` -> the activation that carries scales, and the linear layer beside it that takes its output."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def fold(stored: Stored, tensors: dict[str, Quantized]) -> dict[str, Quantized]:
    """The weights, quantized or not, that scales of activations are folded into.

    Raises `CheckpointError` for scales behind an activation that no linear layer is known to follow.
    """
    kind = stored.config.get("model_type")
    activations = {activation for activation, _ in NEXT_LINEAR.values()}
    found = {}
    for scales in stored.names:
        parent, _, last = scales.removesuffix(".scales").rpartition(".")
        if last not in activations or not scales.endswith(".scales"):
            continue
        activation, following = NEXT_LINEAR.get(str(kind), (None, ""))
        weight = f"{parent}.{following}.weight"
        if last != activation or (weight not in tensors and weight not in stored):
            raise CheckpointError(
                f"{scales!r} in {stored.path} scales an activation, and for model_type {kind!r} the linear layer "
                f"behind it is not known, expected one of {', '.join(NEXT_LINEAR)}; load the full-precision original"
            )
        found[weight] = _folded(stored, scales, weight, tensors.get(weight))
    return found


def _folded(stored: Stored, scales: str, weight: str, inner: Quantized | None) -> Quantized:
    shape = inner.shape if inner else stored.shape(weight)
    if stored.shape(scales) != shape[1:]:
        raise CheckpointError(
            f"{scales!r} in {stored.path} has shape {list(stored.shape(scales))}, expected {list(shape[1:])}, the inputs "
            f"of {weight!r}; load the full-precision original, or get the checkpoint again"
        )
    for name in (scales,) if inner else (scales, weight):
        if stored.dtype(name) not in FLOATS:
            raise CheckpointError(
                f"{name!r} in {stored.path} is {stored.dtype(name)}, expected floating point; load the full-precision "
                "original, or get the checkpoint again"
            )

    def fold(read: Read, exact: Tensor) -> Tensor:
        return exact.div_(read(scales).to(torch.float32))

    note = "activation scales folded"
    if inner is None:
        scheme = Scheme("float", stored.dtype(weight).itemsize * 8, notes=(note,))
        return Quantized(shape, (weight, scales), scheme, lambda read: read(weight).to(torch.float32, copy=True), fold)
    scheme = replace(inner.scheme, notes=(*inner.scheme.notes, note))
    return replace(inner, parts=(*inner.parts, scales), scheme=scheme, fold=fold)
