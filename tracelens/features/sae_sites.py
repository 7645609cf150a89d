"""What an SAE is to Tracelens, and what it says of itself: its site and the model that it was trained on."""

import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tracelens.errors import SAEError, UnknownNameError
from tracelens.sites import Site


@runtime_checkable
class SparseEncoder(Protocol):
    """What Tracelens needs of an SAE; every SAELens SAE has it.

    `encode` maps `[token, d_in]` to non-negative `[token, d_sae]`, `W_dec` is `[d_sae, d_out]`. Where `cfg` says `d_in`
    and (itself or in `metadata`) `hook_name`, they are used; otherwise `d_in` is the width of `W_dec` and the site
    comes from the caller's key. Measuring reconstructions takes `decode` as well, `[token, d_sae]` to `[token, d_in]`.
    """

    W_dec: Tensor

    def encode(self, x: Tensor, /) -> Tensor: ...


SAEs = Mapping[Site, SparseEncoder]

_HF_BLOCK = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)")
"""A block among the modules of a transformers model, whose output is the residual stream after it."""


def said(sae: Any, name: str) -> Any:
    """What the SAE's config says under `name`, in its metadata or (older SAEs) itself; None where it says nothing."""
    cfg = getattr(sae, "cfg", None)
    value = getattr(getattr(cfg, "metadata", None), name, None)
    return getattr(cfg, name, None) if value is None else value


def architecture(sae: Any) -> str:
    """The architecture by SAELens' name, or else the name of the class."""
    name = getattr(getattr(sae, "cfg", None), "architecture", None)
    return str(name() if callable(name) else name or type(sae).__name__)


def own_site(sae: Any) -> Site:
    """Where the SAE says it belongs; raises `SAEError` if it names no hook point, or one that is no `Site`."""
    name = said(sae, "hook_name")
    if not name:
        raise SAEError("the SAE names no hook point (cfg.metadata.hook_name); give it as {Site(layer, name): sae}")
    if block := _HF_BLOCK.fullmatch(name):
        return Site(int(block[1]))
    try:
        return Site.parse(name)
    except UnknownNameError as error:
        raise SAEError(f"hook name {name!r} is no site: {error}") from error


def is_transcoder(sae: Any) -> bool:
    """Whether what the SAE decodes to is not what it encodes: the decoder writes to another place."""
    out = said(sae, "hook_name_out")
    return bool(out and out != said(sae, "hook_name")) or hasattr(getattr(sae, "cfg", None), "d_out")


_UNFIT = {
    "temporal": "it reads a prompt's tokens together, and features here are a function of one token",
    "abstopk": "its features fire in both directions, and the metrics are defined for activations of at least 0",
    "batchtopk": "as it is trained, which features fire on a token depends on the other tokens of the batch; "
    "save_inference_model writes it as JumpReLU, and load_saes opens its checkpoints so",
}
_UNFIT["matryoshka_batchtopk"] = _UNFIT["batchtopk"]


def refuse_unfit(sae: Any) -> None:
    """Raises `SAEError` for an SAE whose features are no non-negative function of one token's activation."""
    if reason := _UNFIT.get(architecture(sae)):
        raise SAEError(f"{type(sae).__name__} cannot be used here: {reason}")
    if (head := said(sae, "hook_head_index")) is not None:
        raise SAEError(f"the SAE reads attention head {head} alone; use one that reads all heads of its layer")
