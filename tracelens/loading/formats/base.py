"""What a format has to say about a checkpoint: which weights it stores, in which parts, and how to undo it exactly."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.architectures import ARCHITECTURES
from tracelens.loading.files import TensorFiles, read_json

Read = Callable[[str], Tensor]
"""Stored name -> the tensor as it is stored, on the device where dequantization happens."""


@dataclass(frozen=True)
class Scheme:
    """How the codes of one weight were made: what reports print and what errors are judged against."""

    code: str
    """Kind of code: `int4`, `nf4`, `fp4`, `e4m3`, `e2m1`, `ternary`, `Q4_K`, …; `float` for a weight that is only folded."""
    bits: int | float
    """Bits of one code."""
    block: tuple[int, int] | None = None
    """(outputs, inputs) of the plain `nn.Linear` weight that share one scale, the last block ragged; None if all do."""
    symmetric: bool = True
    """Whether zero is a code of every block, in the middle of its range (no zero point)."""
    notes: tuple[str, ...] = ()
    """Particulars in few words: `act-order`, `double-quantized`, `rotated`, `activation scales folded`."""

    def __str__(self) -> str:
        block = "per tensor" if self.block is None else f"block {self.block[0]}×{self.block[1]}"
        return ", ".join([self.code, block, *([] if self.symmetric else ["asymmetric"]), *self.notes])


@dataclass(frozen=True)
class Quantized:
    """One weight of the plain model that is not simply stored."""

    shape: tuple[int, ...]
    """Shape in the plain model: (out, in) of `nn.Linear`, (in, out) of GPT-2's `Conv1D`."""
    parts: tuple[str, ...]
    """Stored names of all it is made from."""
    scheme: Scheme
    dequantize: Callable[[Read], Tensor]
    """Reads its parts and returns the weight: float32, of `shape`, exact."""
    fold: Callable[[Read, Tensor], Tensor] | None = None
    """Takes the dequantized weight, which it may overwrite, and returns it with what the quantized model computes
    beside this layer and the plain model has no place for: AWQ's division of activations."""


def one_above_the_other(pieces: Sequence[Quantized]) -> Quantized:
    """Weights of the same inputs as one, their outputs in a row."""

    def dequantize(read: Read) -> Tensor:
        return torch.cat([piece.dequantize(read) for piece in pieces])

    first = pieces[0]
    return Quantized(
        shape=(sum(piece.shape[0] for piece in pieces), *first.shape[1:]),
        parts=tuple(part for piece in pieces for part in piece.parts),
        scheme=first.scheme,
        dequantize=dequantize,
    )


@dataclass(frozen=True)
class Layout:
    """What a format found in a checkpoint. Stored tensors that it does not mention are plain tensors of the model."""

    format: str
    """The format's name, with its variant: `gptq`, `awq (gemv)`, `compressed-tensors (pack-quantized)`."""
    tensors: Mapping[str, Quantized]
    """Name in the plain model's state dict -> how it is stored."""
    runtime: tuple[str, ...] = ()
    """Stored tensors that only kernels use, not the weights: scales of activations and of the KV cache."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Name in the plain model's state dict -> stored name, for plain tensors that are stored under another name."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know: activations that the runtime quantizes, a label that the data belie."""


class Stored:
    """A checkpoint before any meaning is given to its tensors: what formats look at."""

    def __init__(self, path: Path, config: Mapping[str, Any], files: TensorFiles) -> None:
        self.path, self.config, self.files = path, config, files
        self.names: dict[str, None] = dict.fromkeys(files.names())
        """Stored names, in file order."""
        beside = self.json("quantize_config.json") or {}
        inside = config.get("quantization_config") or config.get("compression_config") or {}
        if not isinstance(inside, Mapping):
            raise CheckpointError(f"config.json of {path}: quantization_config is no object; get the original")
        self.quantization: dict[str, Any] = {**beside, **inside}
        """`quantization_config` of config.json, over what `quantize_config.json` says; empty if there is neither."""

    @property
    def method(self) -> str:
        """`quant_method` in lower case; empty if there is none."""
        return str(self.quantization.get("quant_method") or "").lower()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.shape(self.need(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.files.dtype(self.need(name))

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A stored tensor, as it is stored."""
        return self.files.read(self.need(name)).to(device)

    def need(self, name: str) -> str:
        """The name, if there is such a tensor; raises `CheckpointError` otherwise."""
        if name not in self.names:
            raise CheckpointError(f"the weights of {self.path} lack {name!r}; get the whole checkpoint")
        return name

    def plain_name(self, name: str) -> str:
        """The name in the plain model's state dict of a tensor that may be stored, or spoken of, under an older one."""
        architecture = ARCHITECTURES.get((self.config.get("architectures") or [""])[0])
        return architecture.canonical(name) if architecture else name

    def modules(self, *suffixes: str) -> list[str]:
        """Modules that have a stored tensor under the first suffix, each with the others; raises if one is missing.

        `modules("qweight", "scales")` -> `["model.layers.0.self_attn.q_proj", ...]`.
        """
        first = "." + suffixes[0]
        found = [name.removesuffix(first) for name in self.names if name.endswith(first)]
        for module in found:
            for suffix in suffixes[1:]:
                self.need(f"{module}.{suffix}")
        return found

    def json(self, file: str) -> dict[str, Any] | None:
        """A JSON file of the folder; None if it is not there."""
        if not self.path.is_dir() or not (self.path / file).is_file():
            return None
        return read_json(self.path / file)

    def transposed(self, module: str) -> bool:
        """Whether the plain model keeps this module's weight as (in, out): the `Conv1D` layers of GPT-2."""
        kind = self.config.get("model_type")
        return kind in CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_MODULES


CONV1D_MODELS = ("gpt2", "openai-gpt")
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class Format:
    """An entry of the registry."""

    name: str
    recognise: Callable[[Stored], bool]
    """Whether a checkpoint is of this format: by its tensors first, labels being what they are. Reads no tensor data."""
    layout: Callable[[Stored], Layout]
    """What it holds. Raises `CheckpointError`, naming the tensor, for whatever would not dequantize exactly."""


FORMATS: dict[str, Format] = {}


def register(name: str, recognise: Callable[[Stored], bool], layout: Callable[[Stored], Layout]) -> None:
    """Adds a format to the registry; a name can be taken once."""
    assert name not in FORMATS, f"format {name} is registered twice"
    FORMATS[name] = Format(name, recognise, layout)


ByteOrder = Literal["low first", "high first"]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 codes of 4-bit floats (OCP Microscaling Formats 1.0, table 5)."""


def unpack_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """Codes of a little-endian bit stream over 32-bit words along `dim`: uint8, `32 * words / bits` of them.

    Code i is made of bits [i·b, (i+1)·b) of the words put end to end, b = 1 to 8; a last incomplete code is dropped.
    """
    assert 1 <= bits <= 8, bits
    assert words.dtype == torch.int32, words.dtype
    words = words.movedim(dim, -1)
    if 8 % bits == 0:
        # Whole codes lie in each byte, and the bytes of a word in order.
        octets = words.contiguous().view(torch.uint8)
        if bits == 8:
            return octets.movedim(-1, dim)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = (octets.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return codes.flatten(-2).movedim(-1, dim)
    # 32 codes lie in `bits` words, some of them across two.
    count = words.shape[-1] * 32 // bits
    padded = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits)).unflatten(-1, (-1, bits))
    start = torch.arange(32, device=words.device) * bits
    first, offset = start // 32, (start % 32).to(torch.int32)
    second = (first + 1).clamp(max=bits - 1)
    # Arithmetic shifts smear the sign into high bits, so what is shifted down is masked to what was really there.
    low = (padded[..., first] >> offset) & (2 ** (32 - offset.long()).clamp(max=bits) - 1).to(torch.int32)
    across = (offset + bits > 32).to(torch.int32)
    high = (padded[..., second] << (32 - offset).clamp(max=31)) * across
    codes = ((low | high) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :count].movedim(-1, dim)


def nibbles(octets: Tensor, order: ByteOrder) -> Tensor:
    """The two 4-bit codes of each byte, side by side along the last axis: uint8, twice as long."""
    assert octets.dtype == torch.uint8, octets.dtype
    low, high = octets & 15, octets >> 4
    return torch.stack((low, high) if order == "low first" else (high, low), dim=-1).flatten(-2)


def exponents(octets: Tensor) -> Tensor:
    """E8M0 scales, 2^(byte - 127), as float32 (OCP Microscaling Formats 1.0, section 5.4); 255 stands for NaN."""
    scales = torch.ldexp(torch.ones_like(octets, dtype=torch.float32), octets.to(torch.int32) - 127)
    return torch.where(octets == 255, torch.nan, scales)
