"""Checkpoints of compressed-tensors in memory, and packers that work one integer at a time."""

from pathlib import Path

import torch

from tracelens.loading.files import TensorFiles
from tracelens.loading.formats.base import Stored
from tracelens.loading.formats.compressed_tensors import _layout

NAME = "model.layers.0.mlp.up_proj"


class MemoryFiles(TensorFiles):
    def __init__(self, tensors):
        self.tensors, self.metadata, self.values = tensors, {}, {}

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name):
        return self.tensors[name]

    def home(self, name):
        return "memory"


def group(targets=("Linear",), format=None, inputs=None, **weights):
    """A config group as compressed-tensors writes it."""
    base = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "group_size": None,
        "dynamic": False,
    }
    return {"targets": list(targets), "format": format, "input_activations": inputs, "weights": base | weights}


def stored(tensors, *groups, config=None, **quantization):
    """A checkpoint with these config groups; tensors of the module `NAME` may be named by their parts alone."""
    named = {name if "." in name else f"{NAME}.{name}": tensor for name, tensor in tensors.items()}
    section = {"quant_method": "compressed-tensors", **quantization}
    if groups:
        section["config_groups"] = {f"group_{i}": entry for i, entry in enumerate(groups)}
    return Stored(Path("folder"), {**(config or {}), "quantization_config": section}, MemoryFiles(named))


def weight(checkpoint, name=f"{NAME}.weight"):
    """A weight as the format reads it; what it read must not have changed."""
    before = {key: tensor.clone() for key, tensor in checkpoint.files.tensors.items()}
    quantized = _layout(checkpoint).tensors[name]
    result = quantized.dequantize(checkpoint.read)
    assert result.dtype == torch.float32
    assert tuple(result.shape) == tuple(quantized.shape)
    assert result.is_contiguous()
    for key, tensor in before.items():
        assert torch.equal(
            tensor.flatten().view(torch.uint8), checkpoint.files.tensors[key].flatten().view(torch.uint8)
        )
    return result


def word(value):
    return value - 2**32 if value >= 2**31 else value


def pack_stream(rows, bits):
    """Unsigned codes -> int32 words, one code after the other across words."""
    packed = []
    for row in rows:
        total = sum(code << (bits * i) for i, code in enumerate(row))
        packed.append([word((total >> (32 * i)) & 0xFFFFFFFF) for i in range(-(-len(row) * bits // 32))])
    return torch.tensor(packed, dtype=torch.int32)


def pack_words(rows, bits):
    """Unsigned codes -> int32 words, as many whole codes in each as fit."""
    each = 32 // bits
    packed = []
    for row in rows:
        chunks = [row[i : i + each] for i in range(0, len(row), each)]
        packed.append([word(sum(code << (bits * i) for i, code in enumerate(chunk))) for chunk in chunks])
    return torch.tensor(packed, dtype=torch.int32)


def integers(rows, columns, bits, seed=0):
    """Signed codes of so many bits, extremes included."""
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=torch.Generator().manual_seed(seed))
    codes[0, 0], codes[0, 1] = -half, half - 1
    return codes


def unsigned(codes, bits):
    return (codes + 2 ** (bits - 1)).tolist()


def floats(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def by_hand(codes, scale, zero=None, index=None):
    """(q - z) s, one weight at a time, in exact float64 and then rounded once."""
    rows, columns = codes.shape
    out = torch.empty(rows, columns)
    for n in range(rows):
        for k in range(columns):
            g = int(index[k]) if index is not None else k * scale.shape[1] // columns
            z = 0 if zero is None else int(zero[n, g])
            out[n, k] = (int(codes[n, k]) - z) * float(scale[n, g])
    return out
