"""What a number format leaves of a weight matrix: the one place that maps a `QuantizationConfig` to a grid."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tracelens.errors import NonFiniteError, PrecisionSpecError
from tracelens.precision.blocks import from_tiles, in_chunks, to_tiles
from tracelens.precision.codebooks import FP4, NF4, round_to_codebook
from tracelens.precision.config import QuantizationConfig, QuantizationType
from tracelens.precision.floats import E2M1, E4M3, E5M2, round_scaled
from tracelens.precision.grids import round_to_dtype, round_to_integers, round_vectorwise
from tracelens.precision.microscaling import nvfp4_scale, round_mx, round_nvfp4
from tracelens.precision.pruning import prune
from tracelens.precision.types import FIXED_GROUPS

_UNTOUCHED = (QuantizationType.FP32, QuantizationType.BF16, QuantizationType.FP16)
_CODEBOOKS = {QuantizationType.NF4: NF4, QuantizationType.FP4: FP4}
_FP8 = {QuantizationType.FP8: E4M3, QuantizationType.FP8_E5M2: E5M2}
_MX = {QuantizationType.MXFP4: E2M1, QuantizationType.MXFP8: E4M3}
_LLM_INT8 = (QuantizationType.LLM_INT8, QuantizationType.LLM_INT8_WEIGHTS)
_TILE = 128


def round_weight(
    matrix: Float[Tensor, "out in"], config: QuantizationConfig, name: str = "the weight"
) -> Float[Tensor, "out in"]:
    """`matrix` as the weights of `config` can hold it, in its own dtype; bf16, fp16 and fp32 leave it alone.

    Computed in float32 with scales in float32 (those of LLM.int8() from float16 weights), whatever the dtype; the result
    is rounded to the dtype at the end. Pruning changes no weight that it keeps. `name` is for errors.
    Raises `PrecisionSpecError` for groups that do not divide the input width, `NonFiniteError` for a matrix that holds
    NaN or infinity or overflows float16 where the format goes through it.
    """
    if config.type in _UNTOUCHED:
        return matrix
    values = matrix.to(torch.float32)
    if not values.isfinite().all():
        raise NonFiniteError(f"{name} holds NaN or infinity (in float32) and cannot be rounded to {config.type.value}")
    if config.type is QuantizationType.PRUNED:
        assert config.sparsity is not None
        return prune(matrix, config.sparsity)
    return _rounded(values.contiguous(), config, name).to(matrix.dtype)


def to_half(name: str, weight: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """`weight` rounded to a half precision, in its own dtype. Raises `NonFiniteError` if that overflows."""
    half = round_to_dtype(weight, dtype)
    if not half.isfinite().all():
        raise NonFiniteError(
            f"{name} does not fit {str(dtype).removeprefix('torch.')}: its largest magnitude is "
            f"{weight.abs().max():.4g}, the format's is {torch.finfo(dtype).max:.4g}; use bf16"
        )
    return half


def _rounded(matrix: Float32[Tensor, "out in"], config: QuantizationConfig, name: str) -> Float32[Tensor, "out in"]:
    if config.type in _CODEBOOKS:
        group = config.weight_group
        assert group is not None
        return round_to_codebook(matrix, _CODEBOOKS[config.type], group, double_quant=config.double_quant)
    if config.type in _LLM_INT8:
        to_half(name, matrix, torch.float16)
    rows = _rows(matrix, config, name)
    rounded = in_chunks(_rounding(matrix, config), rows)
    return from_tiles(rounded, _TILE, matrix.shape) if config.granularity == "block" else rounded.view_as(matrix)


def _rounding(matrix: Float32[Tensor, "out in"], config: QuantizationConfig) -> Callable[[Tensor], Tensor]:
    """What rounds rows, each with a scale of its own."""
    kind = config.type
    if kind in _FP8:
        return partial(round_scaled, to=_FP8[kind])
    if kind in _MX:
        return partial(round_mx, element=_MX[kind])
    if kind is QuantizationType.NVFP4:
        return partial(round_nvfp4, tensor_scale=nvfp4_scale(matrix))
    if kind in _LLM_INT8:
        return round_vectorwise
    assert kind.is_integer or kind is QuantizationType.INT8_DYNAMIC, kind
    return partial(round_to_integers, bits=config.bits, symmetric=config.symmetric, clipping=config.clipping)


def _rows(matrix: Float32[Tensor, "out in"], config: QuantizationConfig, name: str) -> Float32[Tensor, "rows size"]:
    """What shares a scale side by side."""
    width, group = matrix.shape[1], config.weight_group
    if config.granularity == "block":
        return to_tiles(matrix, _TILE)
    if config.granularity == "tensor":
        return matrix.view(1, -1)
    if group is None:
        return matrix
    if width % group:
        fault = f"precision {config}: group size {group} does not divide the input width {width} of {name}"
        if config.type in FIXED_GROUPS:
            raise PrecisionSpecError(f"{fault}, and {config.type.value} has no other; choose another format")
        fitting = [size for size in range(2, width + 1) if width % size == 0]
        raise PrecisionSpecError(f"{fault}; group sizes that fit it: {', '.join(map(str, fitting))}")
    return matrix.view(-1, group)
