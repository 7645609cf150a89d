"""A checkpoint -> a `TransformerBridge`: transformer-lens' hook points on the transformers model itself.

The transformers model computes, so whatever architecture it has runs as it does there; the bridge gives its modules
the names of a `HookedTransformer`. Weights are not processed and compatibility mode stays off: no norm is folded and
nothing is centred, which is how `build_hooked` loads too, and activations at the same hook are the same. Code that
wants folded weights calls `enable_compatibility_mode()`, for both models of a pair.
"""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from tracelens.errors import CheckpointError, UnsupportedArchitectureError
from tracelens.loading.checkpoint import Checkpoint
from tracelens.loading.hooked import attach_tokenizer
from tracelens.loading.plain import build_plain

SAMPLE = 8
"""Tokens of each of the two rows on which the bridge is compared with the plain model."""
EXACT, HALF = 1e-4, 5e-2
"""Largest difference of logits, relative to the largest, in single or double and in half precision."""


def build_bridge(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, n_ctx: int | None = None) -> Any:
    """A `TransformerBridge` over the plain model (see `build_plain`), in eval mode, without gradients.

    `n_ctx` is the context that `cfg` states and at which texts are cut, if not the checkpoint's own. `model.to_tokens(text)` equals
    `tokenizer(text).input_ids`; a checkpoint without a tokenizer takes token ids. Nothing is downloaded and the name
    of the folder does not matter. Some attention is recomputed by the bridge, so its logits are compared with those of
    the plain model on a few tokens before it is handed out. Where a model fuses queries, keys and values, the bridge
    splits them; of GPT-NeoX it keeps both, a quarter more memory.

    Raises:
        UnsupportedArchitectureError: transformers or the bridge do not know the architecture, or the bridge does not
            compute what the plain model does.
        CheckpointError: the weights do not fit the config, or `n_ctx` does not fit the model.
        NonFiniteError: NaN or infinity in a tensor.
    """
    _check_supported(checkpoint.architecture)
    model = build_plain(checkpoint, dtype=dtype, device=device)
    try:
        expected = _some_logits(lambda ids: model(ids).logits, model.config, device)
        bridge = _wrap(model, checkpoint, device)
        # With all hooks in place, since some only fail to be neutral once they are used.
        found = _some_logits(lambda ids: bridge.run_with_cache(ids)[0], model.config, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"{checkpoint.path}: transformer-lens cannot run this {checkpoint.architecture} behind a TransformerBridge "
            f"({type(error).__name__}: {error}); load it with wrapper='hooked'"
        ) from error
    _check_same(expected, found, checkpoint)
    bridge.cfg.original_architecture = checkpoint.architecture
    bridge.cfg.n_ctx = _context(bridge, n_ctx)
    attach_tokenizer(bridge, checkpoint.tokenizer)
    return bridge.eval().requires_grad_(False)


def _wrap(model: Any, checkpoint: Checkpoint, device: torch.device) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    # A tokenizer given here would be opened again by its name, with a BOS switched on; it gets ours afterwards.
    return build_bridge_from_module(
        model,
        checkpoint.architecture,
        hf_config=model.config,
        tokenizer=None,
        device=device,
        model_name=checkpoint.name,
    )


def _some_logits(run: Callable[[Tensor], Tensor], config: Any, device: torch.device) -> Tensor:
    vocabulary = config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + 2 * SAMPLE, device=device).view(2, SAMPLE) * 7919 % vocabulary
    with torch.inference_mode():
        return run(ids)


def _check_same(expected: Tensor, found: Tensor, checkpoint: Checkpoint) -> None:
    tolerance = EXACT if expected.dtype in (torch.float32, torch.float64) else HALF
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= tolerance:
        raise UnsupportedArchitectureError(
            f"{checkpoint.path}: the logits of the TransformerBridge differ from those of the {checkpoint.architecture} "
            f"of transformers by {difference:.1e} of the largest, at most {tolerance} is accepted; transformer-lens "
            "does not support this configuration, load it with wrapper='hooked'"
        )


def _check_supported(architecture: str) -> None:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    if architecture in SUPPORTED_ARCHITECTURES:
        return
    close = get_close_matches(architecture, SUPPORTED_ARCHITECTURES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnsupportedArchitectureError(
        f"architecture {architecture!r} has no TransformerBridge.{hint} Supported: "
        f"{', '.join(sorted(SUPPORTED_ARCHITECTURES))}"
    )


def _context(bridge: Any, n_ctx: int | None) -> int:
    own = bridge.cfg.n_ctx
    if n_ctx is None:
        return own
    # Rotations and linear biases go on for as long as one likes, tables of positions end.
    tables = any(name.endswith("embed_positions") for name, _ in bridge.original_model.named_buffers())
    ends = tables or bridge.cfg.positional_embedding_type not in ("rotary", "alibi")
    if n_ctx < 1 or (ends and n_ctx > own):
        raise CheckpointError(
            f"n_ctx is {n_ctx}; {bridge.cfg.model_name} has positions for 1 to {own if ends else 'any number of'} tokens"
        )
    return n_ctx
