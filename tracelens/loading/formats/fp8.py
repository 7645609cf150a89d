"""8-bit floats with scales for blocks, rows or whole weights, as `nn.Linear` modules store them beside `weight`.

Writers, and what W is made of codes w and scales s:

- DeepSeek and transformers (`fp8`): `weight_scale_inv`, blocks or the whole weight, W = w · s.
- GPTQModel (`fp8` with `weight_scale_semantics: inverse`): `weight_scale_inv`, blocks, rows or whole, W = w / s.
- AutoFP8 (`fp8`): `weight_scale`, the whole weight, W = w · s.
- FBGEMM (`fbgemm_fp8`): `weight_scale` (out, 1), W = w · s.
- auto-round (`auto_round:fp8`, `auto_round:fp8_static`): `weight_scale_inv`, blocks; `weight_scale` (out,), W = w · s.
- NVIDIA ModelOpt (`FP8`, `FP8_PER_CHANNEL_PER_TOKEN`): `weight_scale`, whole or (out,), W = w · s.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Layout, Quantized, Read, Scheme, Stored, exponents, register

FLOAT8 = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2fnuz: "e5m2fnuz",
}
SCALES = ("weight_scale_inv", "weight_scale")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
"""Powers of two (`scale_fmt: ue8m0`) are stored as E8M0 floats or as their bytes."""
RUNTIME = (
    "input_scale",
    "input_scale_ub",
    "activation_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
)
"""Scales of activations and of the KV cache."""
MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
METHODS = ("fp8", "fbgemm_fp8", "auto-round", "modelopt")
PIECE = 2**16
"""Codes that are looked up at a time: what is made of them on the way stays in the cache of one core."""
Operation = Literal["multiply", "divide"]


def float8_values(codes: Tensor) -> Tensor:
    """8-bit floats as float32: looked up, which takes a quarter of the time of torch's own conversion."""
    table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(codes.dtype).to(torch.float32)
    octets = codes.contiguous().view(torch.uint8).view(-1)
    values = torch.empty(codes.shape, device=codes.device)
    piece = PIECE if codes.device.type == "cpu" else max(1, len(octets))
    for part, out in zip(octets.split(piece), values.view(-1).split(piece), strict=True):
        torch.index_select(table, 0, part.to(torch.int32), out=out)
    return values


def _method(stored: Stored) -> str:
    said = _modelopt(stored)
    method = "auto-round" if stored.method in ("auto-round", "auto_round", "intel/auto-round") else stored.method
    return "modelopt" if said and not method else method


def _modelopt(stored: Stored) -> Mapping[str, Any]:
    """`quantization` of hf_quant_config.json, or `quantization_config` of config.json, of ModelOpt; else empty."""
    if stored.method == "modelopt":
        return stored.quantization
    said = stored.json("hf_quant_config.json") or {}
    producer, inner = said.get("producer"), said.get("quantization")
    ours = isinstance(producer, Mapping) and producer.get("name") == "modelopt"
    return inner if ours and isinstance(inner, Mapping) else {}


def _recognise(stored: Stored) -> bool:
    method = _method(stored)
    if method not in METHODS or "llm_compressor" in str(stored.quantization.get("packing_format")):
        return False
    return method in ("fp8", "fbgemm_fp8") or any(
        name.endswith(".weight") and stored.dtype(name) in FLOAT8 for name in stored.names
    )


def _layout(stored: Stored) -> Layout:
    method = _method(stored)
    if method == "modelopt" and (algorithm := _modelopt(stored).get("quant_algo")) not in MODELOPT:
        raise CheckpointError(
            f"{stored.path} is quantized by ModelOpt with quant_algo {algorithm!r}; of ModelOpt's, only "
            f"{' and '.join(MODELOPT)} are known: get the full-precision original"
        )
    operation = _operation(stored)
    scales = [name for name in stored.names if name.rpartition(".")[2] in SCALES]
    tensors: dict[str, Quantized] = {}
    for scale in scales:
        weight = f"{scale.rpartition('.')[0]}.weight"
        if weight in tensors:
            raise CheckpointError(
                f"{weight!r} has scales of two kinds, {' and '.join(SCALES)}; get the checkpoint again"
            )
        tensors[weight] = _weight(stored, method, weight, scale, operation)
    if bare := [name for name in stored.names if stored.dtype(name) in FLOAT8 and name not in tensors]:
        raise CheckpointError(
            f"{bare[0]!r} is stored as {stored.dtype(bare[0])}, and no {' or '.join(SCALES)} stands beside it; "
            "get the whole checkpoint, or the full-precision original"
        )
    if not tensors:
        raise CheckpointError(
            f"config.json of {stored.path} says {method}, but no weight is stored in 8-bit floats; if it is full "
            "precision, which transformers would quantize while loading, remove quantization_config from config.json"
        )
    runtime = tuple(name for name in stored.names if name.rpartition(".")[2] in RUNTIME)
    notes = (
        []
        if operation == "divide"
        else ["the runtime also quantizes activations to FP8, which the loaded model does not"]
    )
    variant = _spread(tensors) if method == "fp8" else f"{method}, {_spread(tensors)}"
    return Layout(f"fp8 ({variant})", tensors, runtime, notes=tuple(notes))


def _spread(tensors: Mapping[str, Quantized]) -> str:
    blocks = {quantized.scheme.block for quantized in tensors.values()}
    return "per tensor" if blocks == {None} else "rows" if all(b and b[0] == 1 for b in blocks) else "blocks"


def _operation(stored: Stored) -> Operation:
    semantics = stored.quantization.get("weight_scale_semantics")
    if semantics not in (None, "inverse"):
        raise CheckpointError(
            f"config.json of {stored.path} gives weight_scale_semantics {semantics!r}, expected 'inverse' or nothing; "
            "get the full-precision original"
        )
    return "divide" if semantics else "multiply"


def _weight(stored: Stored, method: str, weight: str, scale: str, operation: Operation) -> Quantized:
    shape, module = stored.shape(weight), weight.removesuffix(".weight")
    if stored.dtype(weight) not in FLOAT8 or len(shape) != 2:
        raise CheckpointError(
            f"{weight!r} is {stored.dtype(weight)} {list(shape)}, expected 8-bit floats of two axes beside {scale!r}; "
            "get the full-precision original"
        )
    if stored.dtype(scale) not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale!r} is {stored.dtype(scale)}, expected floating-point scales or exponents; get the full-precision original"
        )
    for unknown in ("weight_zp", "pre_quant_scale", "weight_scale_2"):
        if f"{module}.{unknown}" in stored:
            raise CheckpointError(
                f"{module + '.' + unknown!r} changes what {weight!r} means in a way nobody has verified; "
                "get the full-precision original"
            )
    # GPTQModel turns the weights of GPT-2 to (out, in) before it quantizes them; the others do not take Conv1D.
    transposed = stored.transposed(module)
    if transposed and operation == "multiply":
        raise CheckpointError(
            f"{weight!r} belongs to a Conv1D layer, which {method} does not quantize: whether it lies as (in, out) or "
            "(out, in) is not known; get the full-precision original"
        )
    block = _block(stored, weight, scale, operation)

    def dequantize(read: Read) -> Tensor:
        scales = read(scale)
        scales = exponents(scales) if scales.dtype == torch.uint8 else scales.to(torch.float32)
        values = apply_scales(float8_values(read(weight)), scales, block, operation)
        return values.t().contiguous() if transposed else values

    scheme = Scheme(FLOAT8[stored.dtype(weight)], 8, block)
    return Quantized(shape[::-1] if transposed else shape, (weight, scale), scheme, dequantize)


def _block(stored: Stored, weight: str, scale: str, operation: Operation) -> tuple[int, int] | None:
    """(outputs, inputs) that share a scale: as config.json says it, never by dividing shapes, since the last is ragged."""
    (rows, columns), shape = stored.shape(weight), stored.shape(scale)
    said, group = stored.quantization.get("weight_block_size"), stored.quantization.get("group_size")
    said = group if said is None and isinstance(group, list) else said
    if said is not None:
        if not isinstance(said, (list, tuple)) or len(said) != 2 or not all(type(n) is int and n > 0 for n in said):
            raise CheckpointError(
                f"config.json of {stored.path} gives weight_block_size {said!r}, expected [rows, columns]; "
                "get the checkpoint's own config.json"
            )
        grid = (-(-rows // said[0]), -(-columns // said[1]))
        if shape != grid:
            raise CheckpointError(
                f"{scale!r} has shape {list(shape)}, expected {list(grid)}: {weight!r} is {rows}×{columns}, in blocks "
                f"of {said[0]}×{said[1]} (weight_block_size); config.json and weights belong to different checkpoints"
            )
        return said[0], said[1]
    if stored.dtype(scale) == torch.uint8:
        raise CheckpointError(
            f"{scale!r} holds exponents (uint8) of blocks, whose size weight_block_size in config.json should tell; "
            "get the checkpoint's own config.json"
        )
    if math.prod(shape) == 1:
        return None
    if shape in ((rows,), (rows, 1)):
        if scale.endswith("_inv") and operation == "multiply":
            raise CheckpointError(
                f"{scale!r} has a scale for each row, and config.json has no weight_scale_semantics to say whether "
                "they multiply or divide; get the checkpoint's own config.json"
            )
        return 1, columns
    raise CheckpointError(
        f"{scale!r} has shape {list(shape)} for {weight!r} of {rows}×{columns}, expected one scale, or one for each row; "
        "scales of blocks need weight_block_size in config.json: get the checkpoint's own config.json"
    )


def apply_scales(values: Tensor, scales: Tensor, block: tuple[int, int] | None, operation: Operation) -> Tensor:
    """Multiplies or divides each block of (out, in) `values` by its scale, in place; the last blocks may be smaller."""
    apply = Tensor.mul_ if operation == "multiply" else Tensor.div_
    if block is None:
        return apply(values, scales.reshape(()))
    rows, columns = block
    height, width = values.shape
    scales = scales.reshape(-(-height // rows), -(-width // columns))
    if width % columns:
        scales, columns = scales.repeat_interleave(columns, dim=1)[:, :width], 1
    across, whole = width // columns, height // rows
    last = height - whole * rows
    apply(values[: whole * rows].view(whole, rows, across, columns), scales[:whole, None, :, None])
    apply(values[whole * rows :].view(last, across, columns), scales[whole:, :, None])
    return values


register("fp8", _recognise, _layout)
