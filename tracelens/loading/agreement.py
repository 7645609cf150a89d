"""Whether two models compute the same: logits of a hooked and of a plain model, and of a quantized model beside its
reference and beside the reference rounded to nearest.
"""

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracelens.loading.checkpoint import Checkpoint
from tracelens.loading.diagnosis import Function
from tracelens.loading.equivalence import turned
from tracelens.loading.roundtrip import prune, roundtrip, two_of_four

Logits = Float[Tensor, "batch pos vocab"]
Ids = Int[Tensor, "batch pos"]


class Rounded(Checkpoint):
    """A reference whose weights are rounded to nearest as those of a quantized checkpoint are; for `build_plain`."""

    def __init__(self, reference: Checkpoint, like: Checkpoint) -> None:
        # The same open files under another reading.
        vars(self).update(vars(reference))
        self._like = like

    def weight(self, name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        tensor = super().weight(name, device=device)
        quantized = self._like.quantized(name) if name in self._like else None
        if quantized is None or tensor.ndim < 2:
            return tensor.to(dtype)
        wanted, like = (turned(self._like, name, t) for t in (tensor, self._like.weight(name, device=device)))
        rows = prune(wanted.flatten(0, -2)) if two_of_four(like.flatten(0, -2)) else wanted.flatten(0, -2)
        return turned(self._like, name, roundtrip(rows, quantized.scheme).reshape(wanted.shape)).to(dtype)


def logits_of(plain: Any, ids: Ids) -> Logits:
    """Logits of a plain model, without gradients."""
    with torch.inference_mode():
        return plain(ids).logits.float()


def differences(hooked: Any, plain: Any, ids: Ids) -> Iterator[tuple[str, float]]:
    """Largest difference over the largest logit: of whole prompts, and of two lengths padded on either side."""
    yield "whole prompts", _difference(hooked(ids), plain(ids).logits)
    length = ids.shape[1]
    short = max(1, length // 2)
    for side in ("left", "right"):
        mask = torch.ones_like(ids[:2])
        mask[-1, : length - short] = 0
        if side == "right":
            mask = mask.flip(1)
        padded = torch.where(mask.bool(), ids[:2], 0)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        a = hooked(padded, attention_mask=mask)
        b = plain(padded, attention_mask=mask, **_positions(plain, positions)).logits
        yield f"padded {side}", _difference(a[mask.bool()], b[mask.bool()])


def _positions(plain: Any, positions: Ids) -> Mapping[str, Ids]:
    """Position ids for models that take them; others (ALiBi, OPT) derive them from the mask."""
    return {"position_ids": positions} if "position_ids" in signature(plain.forward).parameters else {}


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def function(reference: Logits, quantized: Logits, rounded: Logits) -> Function:
    """How far the logits of a quantized model and of the rounded reference are from the reference's."""
    r, q, n = (logits - logits.mean(-1, keepdim=True) for logits in (reference, quantized, rounded))

    def kl(other: Logits) -> float:
        p = r.log_softmax(-1)
        return float((p.exp() * (p - other.log_softmax(-1))).sum(-1).mean().clamp_min(0))

    return Function(
        kl=kl(q),
        kl_rounding=kl(n),
        error=float((q - r).norm() / r.norm()),
        error_rounding=float((n - r).norm() / r.norm()),
        kl_uniform=kl(torch.zeros_like(r)),
        agreement=float((q.argmax(-1) == r.argmax(-1)).float().mean()),
    )
