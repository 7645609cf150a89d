"""Rounding of activations as a kernel does it, by hooks that stay with the model.

The hooks are torch's own, on the modules, and not TransformerLens hooks: `reset_hooks` and `run_with_hooks` leave
them alone, and being first they run before any hook that reads. So what is captured at such a place is what the
kernel would see.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracelens.errors import PrecisionSpecError
from tracelens.precision.config import QuantizationConfig, QuantizationType
from tracelens.precision.grids import round_to_dtype, round_to_integers

HALF = {QuantizationType.BF16: torch.bfloat16, QuantizationType.FP16: torch.float16}

# What follows `blocks.{i}.` in the name of a module whose output enters a linear layer → the axes of one token's input.
# The norm modules themselves and not their hook_normalized, which TransformerLens places before the norm weight.
_LINEAR_INPUTS = {"ln1": 1, "ln2": 1, "attn.hook_z": 2, "mlp.hook_post": 1}
_LINEAR_OUTPUTS = (
    *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", "hook_attn_out"),
    *("mlp.hook_pre", "mlp.hook_pre_linear", "hook_mlp_out"),
)
_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


class _StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is that of the identity: the true one is zero almost everywhere and would say nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _per_token(x: Tensor, bits: int, axes: int) -> Tensor:
    # Symmetric with one scale per token over everything the linear layer reads: all heads together at the input of W_O.
    return round_to_integers(x.flatten(-axes), bits).view_as(x)


def _register(module: nn.Module, rounding: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_hook(lambda _module, _args, output: _StraightThrough.apply(output, rounding))


def _in_blocks(model: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if match := re.fullmatch(r"blocks\.\d+\.(.+)", name):
            yield match[1], module


def simulate_activations(model: Any, config: QuantizationConfig) -> None:
    """Registers on `model`, for good, the hooks by which it rounds activations as `config` says; none for weight-only
    formats.

    `int8-dynamic`: symmetric int8, one scale per token, at the inputs of the linear layers; the unembedding reads
    full precision. `bf16`, `fp16`: inputs and outputs of the linear layers and the residual stream; attention weights
    and logits are not rounded.
    Raises `PrecisionSpecError` for a model whose modules are not those of a `HookedTransformer`, and for blocks that
    normalise after the linear layer instead of before (OLMo 2).
    """
    if config.type not in HALF and config.type is not QuantizationType.INT8_DYNAMIC:
        return
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    if model.cfg.original_architecture in POST_NORM_ARCHITECTURES:
        raise PrecisionSpecError(
            f"precision {config} rounds the inputs of linear layers, which {model.cfg.original_architecture} does "
            "not take from "
            "its norms; weight-only formats (int8, int4-g32, ...) can be simulated on it"
        )
    if not any(name in _LINEAR_INPUTS for name, _ in _in_blocks(model)):
        raise PrecisionSpecError(
            f"precision {config} rounds activations inside the blocks, and those of a {type(model).__name__} are not "
            "known; load the model with wrapper='hooked'"
        )
    if config.type is QuantizationType.INT8_DYNAMIC:
        for name, module in _in_blocks(model):
            if name in _LINEAR_INPUTS:
                _register(module, partial(_per_token, bits=8, axes=_LINEAR_INPUTS[name]))
        return
    rounding = partial(round_to_dtype, dtype=HALF[config.type])
    for name, module in _in_blocks(model):
        if name in (*_LINEAR_INPUTS, *_LINEAR_OUTPUTS, *_RESIDUAL):
            _register(module, rounding)
    if hasattr(model, "ln_final"):
        _register(model.ln_final, rounding)
