"""`load`: whatever names a model -> a hooked model, at a simulated precision if one is asked for."""

from os import PathLike
from typing import Any, Literal, get_args

import torch

from tracelens.errors import CheckpointError, UnknownNameError
from tracelens.loading.checkpoint import Checkpoint, open_checkpoint

Wrapper = Literal["hooked", "bridge"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What analyses ask of a model, whichever class it is.
INTERFACE = ("cfg", "to_tokens", "run_with_cache", "run_with_hooks", "hooks")


def load(
    source: Any,
    *,
    precision: Any = None,
    wrapper: str = "hooked",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    n_ctx: int | None = None,
    round_to: torch.dtype | None = None,
    share: Any = None,
    progress: bool = False,
) -> Any:
    """Load a model with hook points: call -> logits, `run_with_cache`, `to_tokens`, `cfg`.

    Quantized weights are dequantized exactly, in float32, and then cast to `dtype`: the model computes in full
    precision with the very weights that the quantized checkpoint stands for. What a kernel does beside that, such as
    rounding activations, is not simulated; `Checkpoint(source).describe()` notes it.

    Args:
        source: a local Hugging Face folder under whatever name, quantized or not (`loading.formats.FORMATS`); a
            `.gguf` file; the id of a model on the hub; `"organism"` (the embedded model; a folder of that name is
            `"./organism"`); a `Checkpoint`; or a hooked model, which is passed through as it is.
        precision: a `QuantizationConfig` or its string (`"int8"`, `"int4-g32"`) to simulate on the loaded weights;
            the model passed in is not changed.
        wrapper: `"hooked"`, transformer-lens' `HookedTransformer` (architectures in
            `loading.architectures.ARCHITECTURES`), or `"bridge"`, a `TransformerBridge` over the transformers model,
            which knows more of them.
        dtype: of weights and activations of a model loaded from disk.
        device: for a model loaded from disk; by default a GPU if there is one, else the CPU.
        revision: branch, tag or commit of a model on the hub.
        local_files_only: use what the hub's cache holds, and no network.
        n_ctx: length of the context, if not the checkpoint's own; learned positions can only be cut.
        round_to: round quantized weights to this dtype after dequantization, whatever `dtype` is: the weights of a
            library that multiplies codes and scales in `torch.bfloat16` or `torch.float16`. Exact by default.
        share: a hooked model that is loaded already. Tensors that quantization left as they are there use its memory,
            so a pair takes little more than its quantized weights twice; edit neither model in place. Of hooked models
            only, not of bridges.
        progress: show a bar over the tensors of a hooked model.

    Returns:
        The model in eval mode, without gradients and without weight processing, its `cfg.model_name` the folder's
        name, its `stored_as` the checkpoint's format. `model.to_tokens(text)` equals
        `model.tokenizer(text).input_ids`, BOS included or not as the checkpoint's tokenizer has it. What lies on this
        machine is loaded without the network.

    Raises:
        CheckpointNotFoundError: no such folder, file or model on the hub.
        UnsupportedArchitectureError: an architecture without a conversion.
        CheckpointError: a checkpoint that cannot be read in full and exactly; the message names the tensor.
        NonFiniteError: NaN or infinity in the weights.
        UnknownNameError: an unknown precision, wrapper or dtype.
    """
    if wrapper not in get_args(Wrapper):
        raise UnknownNameError.of("wrapper", wrapper, get_args(Wrapper))
    if dtype not in DTYPES:
        raise UnknownNameError.of("dtype", dtype, DTYPES)
    if n_ctx is not None and n_ctx < 1:
        raise CheckpointError(f"n_ctx is {n_ctx}; it must be at least 1")
    if round_to is not None and round_to not in DTYPES:
        raise UnknownNameError.of("dtype to round to", round_to, DTYPES)
    quantization = None
    if precision is not None:
        from tracelens.precision import QuantizationConfig

        quantization = QuantizationConfig.parse(precision)  # a mistake in it is found before anything is read
    if share is not None and wrapper == "bridge":
        raise CheckpointError("a bridge keeps its tensors to itself: share=... goes with wrapper='hooked'")
    if isinstance(source, str | PathLike | Checkpoint):
        source = open_checkpoint(source, revision=revision, local_files_only=local_files_only, round_to=round_to)
    if isinstance(source, Checkpoint):
        model = _build(source, wrapper, dtype, device, n_ctx, share, progress)
    elif missing := [name for name in INTERFACE if not hasattr(source, name)]:
        raise CheckpointError(
            f"a {type(source).__name__} is not a model with hook points (it lacks {', '.join(missing)}); "
            "pass a folder, a .gguf file, the id of a model on the hub, 'organism' or a HookedTransformer"
        )
    else:
        model = source
    if quantization is None:
        return model
    from tracelens.precision import apply_precision

    return apply_precision(model, quantization)


def _build(
    checkpoint: Checkpoint,
    wrapper: str,
    dtype: torch.dtype,
    device: str | torch.device | None,
    n_ctx: int | None,
    share: Any,
    progress: bool,
) -> Any:
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wrapper == "bridge":
        from tracelens.loading.bridge import build_bridge

        model = build_bridge(checkpoint, dtype=dtype, device=on, n_ctx=n_ctx)
    else:
        from tracelens.loading.hooked import build_hooked

        model = build_hooked(checkpoint, dtype=dtype, device=on, n_ctx=n_ctx, share=share, progress=progress)
    model.stored_as = checkpoint.format  # for the record of whoever measures it
    return model
