"""GGUF's blocks: in GGUF files, and in safetensors as gptqmodel writes them (`quant_method: gguf`).

The blocks are undone by `gguf.quants.dequantize`, the reference in NumPy that llama.cpp ships (it works in pieces that
fit a cache; whole-tensor torch was no faster). What the converter did to whole tensors, permuted rows or a 1 added, is
undone from `GGUF_ARCHITECTURES`.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Layout, Quantized, Read, Scheme, Stored, register
from tracelens.loading.gguf import DENSE, GgufFiles
from tracelens.loading.gguf_architectures import Change, gguf_architecture
from tracelens.loading.gguf_config import ROPE_TENSORS


class Kind(NamedTuple):
    """A type of blocks."""

    bits: float
    """Bits of one code, without scales."""
    block: int
    """Inputs that share one scale."""
    symmetric: bool = True
    code: str | None = None
    """What reports call it, if not by GGUF's name."""


KINDS: Mapping[str, Kind] = {
    **{"Q4_0": Kind(4.0, 32), "Q4_1": Kind(4.0, 32, False), "Q5_0": Kind(5.0, 32), "Q5_1": Kind(5.0, 32, False)},
    **{"Q8_0": Kind(8.0, 32), "Q2_K": Kind(2.0, 16, False), "Q3_K": Kind(3.0, 16), "Q4_K": Kind(4.0, 32, False)},
    **{"Q5_K": Kind(5.0, 32, False), "Q6_K": Kind(6.0, 16), "IQ4_NL": Kind(4.0, 32), "IQ4_XS": Kind(4.0, 32)},
    # Vectors of 8 (IQ3: 4) codes out of a table: bits of the index and the signs for each of them.
    **{"IQ1_S": Kind(1.375, 32), "IQ1_M": Kind(1.375, 16), "IQ2_XXS": Kind(1.875, 32), "IQ2_XS": Kind(2.0, 16)},
    **{"IQ2_S": Kind(2.25, 16), "IQ3_XXS": Kind(2.875, 32), "IQ3_S": Kind(3.25, 32)},
    **{"TQ1_0": Kind(1.6, 256, code="ternary"), "TQ2_0": Kind(2.0, 256, code="ternary")},
    **{"MXFP4": Kind(4.0, 32, code="e2m1"), "NVFP4": Kind(4.0, 16, code="e2m1")},
}


def blocks_to_floats(octets: Tensor, kind: str) -> Tensor:
    """Blocks of uint8 (..., bytes of a row) -> float32 (..., elements of a row), on the device of the blocks."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # damaged scales are found, and named, by whoever asked for the tensor
        floats = dequantize(octets.cpu().numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(floats).to(octets.device)


# --- GGUF files


def _is_file(stored: Stored) -> bool:
    return isinstance(stored.files, GgufFiles)


def _layout_of_file(stored: Stored) -> Layout:
    files = stored.files
    assert isinstance(files, GgufFiles)
    row = gguf_architecture(files.values["general.architecture"])
    tensors: dict[str, Quantized] = {}
    renamed: dict[str, str] = {}
    for name in stored.names:
        if name in ROPE_TENSORS:
            continue
        found = row.plain(name)
        if found is None:
            raise CheckpointError(
                f"tensor {name!r} in {stored.path} is no part of {row.architecture} as GGUF has it; "
                "a model without it would be another model: load the original folder on the hub instead"
            )
        plain, change = found
        if files.kind(name) in DENSE and change is None:
            renamed[plain] = name
        else:
            tensors[plain] = _quantized(stored, files, name, change)
    kinds = sorted({files.kind(name) for name in stored.names} - DENSE.keys())
    rope = tuple(name for name in stored.names if name in ROPE_TENSORS)
    notes = (*row.notes, *(f"{name} became rope_parameters of the config" for name in rope))
    return Layout(f"gguf ({', '.join(kinds) or 'not quantized'})", tensors, runtime=rope, renamed=renamed, notes=notes)


def _quantized(stored: Stored, files: GgufFiles, name: str, change: Change | None) -> Quantized:
    kind, shape = files.kind(name), files.elements(name)
    notes = (NOTES[change],) if change else ()
    if kind in DENSE:
        scheme = Scheme("float", DENSE[kind].itemsize * 8.0, notes=notes)
    else:
        scheme = _scheme(kind, f"tensor {name!r} in {stored.path}", notes)
    undo = _undo(stored, name, shape, change) if change else None
    return Quantized(
        shape=shape[::-1] if change == "transposed" else shape,
        parts=(name,),
        scheme=scheme,
        dequantize=partial(_dequantize, name=name, kind=kind, undo=undo),
    )


def _scheme(kind: str, what: str, notes: tuple[str, ...] = ()) -> Scheme:
    if kind not in KINDS:
        raise CheckpointError(
            f"{what} has blocks of type {kind}, which cannot be dequantized; supported: {', '.join(KINDS)}. "
            "Get another quantization of the model"
        )
    bits, block, symmetric, code = KINDS[kind]
    return Scheme(code or kind, bits, (1, block), symmetric, (*((kind,) if code else ()), *notes))


def _dequantize(read: Read, *, name: str, kind: str, undo: Callable[[Tensor], Tensor] | None) -> Tensor:
    stored = read(name)
    floats = stored.float() if kind in DENSE else blocks_to_floats(stored, kind)
    return undo(floats).contiguous() if undo else floats


NOTES: Mapping[Change, str] = {
    "interleaved": "rows of heads put back in order",
    "plus one": "the added 1 subtracted",
    "transposed": "transposed back",
    "split by q, k, v": "rows of heads put back in order",
}


def _undo(stored: Stored, name: str, shape: tuple[int, ...], change: Change) -> Callable[[Tensor], Tensor]:
    if change == "plus one":
        return lambda weight: weight - 1
    if change == "transposed":
        return lambda weight: weight.T
    of_keys = change == "interleaved" and ".attn_k." in name
    heads = stored.config["num_key_value_heads" if of_keys else "num_attention_heads"]
    per_row = heads * (2 if change == "interleaved" else 3)
    if not isinstance(heads, int) or heads < 1 or shape[0] % per_row:
        raise CheckpointError(
            f"tensor {name!r} in {stored.path} is {list(shape)}, whose rows {heads} heads cannot share; "
            "its metadata and its tensors disagree: get the file again"
        )
    if change == "interleaved":
        return lambda weight: weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return lambda weight: weight.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


# --- gptqmodel


BLOCKS = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}
"""Types that gptqmodel writes -> elements and bytes of a block."""
WIDTHS = ("hidden_size", "n_embd", "intermediate_size", "n_inner", "ffn_dim")


def _is_gptqmodel(stored: Stored) -> bool:
    return stored.method == "gguf" and not isinstance(stored.files, GgufFiles)


def _layout_of_gptqmodel(stored: Stored) -> Layout:
    kind = _declared_kind(stored)
    tensors = {}
    for module in stored.modules("qweight"):
        name = f"{module}.qweight"
        if stored.dtype(name) != torch.uint8 or len(stored.shape(name)) != 2:
            raise CheckpointError(
                f"{name!r} in {stored.path} is {stored.dtype(name)} {list(stored.shape(name))}, "
                "expected rows of uint8; the checkpoint is not as gptqmodel writes it: get it again"
            )
        n_outputs, inputs = stored.shape(name)[0], _inputs(stored, name, kind)
        transposed = stored.transposed(module)
        tensors[f"{module}.weight"] = Quantized(
            shape=(inputs, n_outputs) if transposed else (n_outputs, inputs),
            parts=(name,),
            scheme=_scheme(kind, name),
            dequantize=partial(_without_padding, name=name, kind=kind, inputs=inputs, transposed=transposed),
        )
    if not tensors:
        raise CheckpointError(
            f"{stored.path} says quant_method gguf, but holds no qweight; get the whole checkpoint, or take "
            "quantization_config out of config.json if it is not quantized"
        )
    return Layout(f"gptqmodel gguf ({kind})", tensors)


def _declared_kind(stored: Stored) -> str:
    said: Mapping[str, Any] = stored.quantization
    if any(not str(pattern).startswith("-:") for pattern in said.get("dynamic") or {}):
        raise CheckpointError(
            f"{stored.path} has GGUF blocks of several types (quantization_config dynamic), which is not supported; "
            "get the full-precision original"
        )
    form = str(said.get("format") or said.get("checkpoint_format") or "").lower()
    bits = str(said.get("bits")).lower()
    # Either bits 4 with format q_k_m, or both in one, q4_k_m.
    name = bits if bits.startswith("q") else form.replace("q_", f"q{bits}_", 1)
    found = re.fullmatch(r"(q\d_[0k])(?:_[sm])?", name)
    kind = found[1].upper() if found else ""
    if kind not in BLOCKS:
        raise CheckpointError(
            f"{stored.path} has GGUF blocks of bits {said.get('bits')!r} and format {form!r}, which is not known; "
            f"known: {', '.join(BLOCKS)}. Get the full-precision original"
        )
    return kind


def _inputs(stored: Stored, name: str, kind: str) -> int:
    """Inputs of a linear; gptqmodel pads them to whole blocks, and only the config tells by how much."""
    per_block, block_bytes = BLOCKS[kind]
    n_blocks, rest = divmod(stored.shape(name)[1], block_bytes)
    padded = n_blocks * per_block
    config = stored.config
    widths = {config[key] for key in WIDTHS if isinstance(config.get(key), int)}
    if (head := config.get("head_dim")) and (heads := config.get("num_attention_heads")):
        widths.add(head * heads)
    if config.get("n_embd"):
        widths.add(4 * config["n_embd"])
    possible = sorted(width for width in widths if padded - per_block < width <= padded)
    if rest or len(possible) != 1:
        raise CheckpointError(
            f"{name!r} in {stored.path} has rows of {stored.shape(name)[1]} bytes; as {kind} these are "
            f"{stored.shape(name)[1] / block_bytes:g} blocks of {per_block}, and the config has "
            f"{possible or sorted(widths)} as widths, which leaves open how many inputs there are; "
            "get the full-precision original, or the checkpoint's own config.json"
        )
    return possible[0]


def _without_padding(read: Read, *, name: str, kind: str, inputs: int, transposed: bool) -> Tensor:
    floats = blocks_to_floats(read(name), kind)[:, :inputs]
    return (floats.T if transposed else floats).contiguous()


register("gguf", _is_file, _layout_of_file)
register("gguf (gptqmodel)", _is_gptqmodel, _layout_of_gptqmodel)
