"""From activations to features and back, with the numbers that SAELens gives."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.errors import SAEError
from tracelens.features.sae_processing import centre, processing_of
from tracelens.features.sae_sites import SparseEncoder, is_transcoder, refuse_unfit, said


@torch.no_grad()
def encode(sae: SparseEncoder, activations: Float[Tensor, "token ..."]) -> Float[Tensor, "token d_sae"]:
    """Feature activations, ≥ 0, float32, on the SAE's device: `sae.encode` with the SAE's own normalisation and dtype.

    Heads, where a site has them, are flattened, and an SAE of a model with centred writing weights reads activations
    without their mean (`processing_of`). SAELens' standard and JumpReLU encoders without input normalisation are
    computed here with one temporary at most: same numbers (in float32 a bias is added before rounding and not after, a
    difference of one rounding), up to four times faster on large batches; their hooks do not fire.

    Raises `SAEError` if an SAE's activations can be negative, which no metric here is defined for.
    """
    with _heads_flat(sae):
        return _features(sae, _read(sae, activations)[0]).float()


@torch.no_grad()
def reconstruct(
    sae: SparseEncoder, activations: Float[Tensor, "token ..."]
) -> tuple[Float[Tensor, "token d_sae"], Float[Tensor, "token d_in"], Float[Tensor, "token d_in"]]:
    """Features as `encode` gives them, what the SAE read, and what it makes of it; all float32, on the SAE's device.

    What was read has its heads flattened and, where `processing_of` says so, no mean; input normalisation is undone.
    Raises as `encode`, and `SAEError` for a transcoder and for an SAE without `decode`.
    """
    if is_transcoder(sae):
        out = said(sae, "hook_name_out") or "another place"
        raise SAEError(
            f"{type(sae).__name__} is a transcoder from {said(sae, 'hook_name')} to {out}: it reconstructs nothing at its "
            "site; its features can be compared, its fit there cannot be measured"
        )
    if not hasattr(sae, "decode"):
        raise SAEError(f"{type(sae).__name__} has no .decode(features), which reconstructing takes")
    decoder: Any = sae
    x, _ = _read(sae, activations)
    # SAELens keeps the scale of an input normalisation on the SAE between encode and decode, so nothing may come between.
    with _heads_flat(sae):
        features = _features(sae, x)
        output = decoder.decode(features.to(sae.W_dec.dtype))
    return features.float(), x.to(sae.W_dec.device).float(), output.float()


@torch.no_grad()
def splice(sae: SparseEncoder, activations: Float[Tensor, "token ..."]) -> Float[Tensor, "token ..."]:
    """The activations as the SAE reconstructs them, in their own shape, dtype and device; a mean taken away is put back."""
    mean = _read(sae, activations)[1]
    output = reconstruct(sae, activations)[2].to(activations.device)
    return (output if mean is None else output + mean).view_as(activations).to(activations.dtype)


def _read(
    sae: SparseEncoder, activations: Tensor
) -> tuple[Float[Tensor, "token d_in"], Float[Tensor, "token 1"] | None]:
    """What the SAE reads, and the mean that was taken away, None if there is nothing to take."""
    flat = activations.flatten(1)
    return centre(flat) if processing_of(sae) == "centre" else (flat, None)


def _features(sae: Any, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
    """Feature activations in the SAE's dtype."""
    kind = _plain_architecture(sae)
    if kind is None:
        return _encode_any(sae, x)
    x = x.to(sae.W_enc.device, sae.W_enc.dtype)
    if sae.cfg.apply_b_dec_to_input:
        x = x - sae.b_dec
    # Below float32 a rounding is no trifle, and SAELens rounds before it adds the bias.
    wide = x.dtype in (torch.float32, torch.float64)
    acts = torch.addmm(sae.b_enc, x, sae.W_enc) if wide else x @ sae.W_enc + sae.b_enc
    if kind == "jumprelu":
        # A comparison written straight into floats: multiplying by a bool tensor is twice as slow.
        acts.mul_(torch.gt(acts, sae.threshold.clamp(min=0), out=torch.empty_like(acts)))
    else:
        acts.relu_()
    return acts


@contextmanager
def _heads_flat(sae: Any) -> Iterator[None]:
    """Within it, SAELens' SAEs of `hook_z` take and give [token, heads × d_head], and remember no shape of it."""
    if not getattr(sae, "hook_z_reshaping_mode", False):
        yield
        return
    names = ("reshape_fn_in", "reshape_fn_out", "d_head")
    kept = {name: getattr(sae, name) for name in names if hasattr(sae, name)}
    try:
        sae.reshape_fn_in, sae.reshape_fn_out, sae.d_head = (lambda x: x), (lambda x, d_head: x), None
        yield
    finally:
        del sae.d_head  # which SAELens sets with the first activations that it sees
        vars(sae).update(kept)


def _plain_architecture(sae: Any) -> str | None:
    """`"standard"` or `"jumprelu"` if `encode` may compute it itself; None for all else, subclasses included."""
    lens = sys.modules.get("sae_lens")  # imported already if this is an SAE of SAELens, and slow to import if not
    plain = {lens.StandardSAE: "standard", lens.JumpReLUSAE: "jumprelu"}.get(type(sae)) if lens else None
    # SAELens folds "expected_average_only_in" into the weights when it saves; at run time it is no normalisation.
    return plain if plain and sae.cfg.normalize_activations in ("none", "expected_average_only_in") else None


def _encode_any(sae: Any, x: Tensor) -> Tensor:
    refuse_unfit(sae)
    acts = sae.encode(x.to(sae.W_dec.device, sae.W_dec.dtype))
    acts = acts.to_dense() if acts.is_sparse else acts
    if acts.numel() and acts.min() < 0:
        raise SAEError(f"{type(sae).__name__} gives negative activations; use an SAE whose features are at least 0")
    return acts
