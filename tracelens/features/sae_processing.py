"""The model that an SAE was trained on: what processing of its weights changes at a site, and whether ours is the same.

SAELens trains on unprocessed weights unless `model_from_pretrained_kwargs` says otherwise. Folding the norms and centring
the unembedding change nothing at any site. Centring the writing weights takes the mean over d_model from whatever is
written to the residual stream, and nothing else, so it is made up for on a model without it, exactly.
"""

import logging
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.errors import SAEError
from tracelens.features.sae_sites import SAEs, architecture, own_site, said
from tracelens.pair import is_centred
from tracelens.sites import Site

log = logging.getLogger(__name__)

Processing = Literal["none", "centre"]
"""What is done to activations before an SAE reads them: nothing, or their mean over d_model is taken away."""

WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Sites in the space of the residual stream."""


def processing_of(sae: Any) -> Processing:
    """What makes activations of an unprocessed model into those that the SAE was trained on.

    Idempotent: on a model whose writing weights are centred already, taking the mean away changes nothing but rounding.
    Raises `SAEError` for an SAE of a centred model that names no hook point.
    """
    if not _kwargs(sae).get("center_writing_weights"):
        return "none"
    if not said(sae, "hook_name"):
        raise SAEError(
            "the SAE was trained on centred writing weights but names no hook point, so whether its input was centred "
            "is not known; set sae.cfg.metadata.hook_name"
        )
    return "centre" if own_site(sae).name in WRITTEN else "none"


def centre(x: Float[Tensor, "token d_in"]) -> tuple[Float[Tensor, "token d_in"], Float[Tensor, "token 1"]]:
    """Activations without their mean over d_in, and that mean; the mean is taken in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True)
    return (wide - mean).to(x.dtype), mean


def processing_problems(site: Site, sae: Any, model: Any) -> list[str]:
    """In which ways the model's weight processing contradicts the SAE's, each with what to do about it."""
    kwargs = _kwargs(sae)
    problems = []
    if site.name in WRITTEN:
        problems += _centring_problems(kwargs, sae, model)
    if kwargs.get("fold_value_biases") and site.name in ("v", "z") and _any_value_bias(model, site.layer):
        problems.append(
            f"fold_value_biases=True: what it was trained on lacks the value biases that this model has at {site.name!r}; "
            "load the model with them folded into b_O, or use an SAE at 'attn_out'"
        )
    if kwargs.get("refactor_factored_attn_matrices") and site.name in ("q", "k", "v", "z"):
        problems.append(
            f"refactor_factored_attn_matrices=True: it was trained on another basis of {site.name!r} than this model's; "
            "load the model refactored in the same way, or use an SAE at 'attn_out'"
        )
    if kwargs.get("fold_ln") and site.name == "mlp_post" and str(getattr(model.cfg, "act_fn", "")).endswith("_ln"):
        problems.append(
            "fold_ln=True: the norm inside the MLP had its scale folded away; load the model with its norms folded"
        )
    return problems


def _centring_problems(kwargs: dict[str, Any], sae: Any, model: Any) -> list[str]:
    asked = kwargs.get("center_writing_weights")
    norm = getattr(model.cfg, "normalization_type", None)
    if asked and norm not in ("LN", "LNPre"):
        return [
            f"center_writing_weights=True, but this model's norm is {norm or 'none'}, which reads the mean, and centring "
            "was skipped when it was trained (TransformerLens centres under LayerNorm alone); if so, set "
            "sae.cfg.metadata.model_from_pretrained_kwargs = {}"
        ]
    # A config that says nothing of processing may be of either kind, and LayerNorm on the input takes the mean away itself.
    says_not = said(sae, "model_from_pretrained_kwargs") is not None and not asked
    if says_not and _normalisation(sae) != "layer_norm" and is_centred(model, "W_E"):
        return [
            "it was trained without center_writing_weights, but this model's writing weights are centred, and the mean "
            "that it reads is lost; load the model without weight processing, as tracelens.load does"
        ]
    return []


def note_differences(saes: SAEs, model: Any) -> None:
    """Logs, as warnings, in what the SAEs' training differs from this model without contradicting it."""
    theirs = str(getattr(model.cfg, "model_name", "") or "")
    begins = _begins_with_bos(model)
    for site, sae in saes.items():
        name = said(sae, "model_name")
        if name and theirs and _short(name) != _short(theirs):
            log.warning("the SAE at %s was trained on %r; the model is called %r", site, name, theirs)
        bos = said(sae, "prepend_bos")
        if bos is not None and begins is not None and bool(bos) != begins:
            log.warning(
                "the SAE at %s was trained on prompts %s BOS, but the tokenizer %s; features of early tokens may differ",
                site,
                "with" if bos else "without",
                "adds it" if begins else "does not add it",
            )
        for key in ("checkpoint_index", "checkpoint_value", "revision"):
            if (value := _kwargs(sae).get(key)) is not None:
                log.warning("the SAE at %s was trained on %s=%r of its model", site, key, value)


def provenance_of(saes: SAEs) -> dict[str, dict[str, Any]]:
    """By hook name: architecture, the model and setting that the SAE says it was trained on, and what is done about it."""
    keys = ("model_name", "model_class_name", "prepend_bos", "context_size", "model_from_pretrained_kwargs")
    return {
        str(site): {
            "architecture": architecture(sae),
            "d_sae": int(sae.W_dec.shape[0]),
            "normalize_activations": _normalisation(sae),
            "processing": processing_of(sae),
            **{key: _plain(said(sae, key)) for key in keys},
        }
        for site, sae in saes.items()
    }


def _plain(value: Any) -> Any:
    """As JSON can hold it; a dtype among the keywords becomes its name."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _kwargs(sae: Any) -> dict[str, Any]:
    return dict(said(sae, "model_from_pretrained_kwargs") or {})


def _normalisation(sae: Any) -> str | None:
    return getattr(getattr(sae, "cfg", None), "normalize_activations", None)


def _any_value_bias(model: Any, layer: int) -> bool:
    bias = getattr(model.blocks[layer].attn, "b_V", None)
    return bias is not None and bool(bias.any())


def _begins_with_bos(model: Any) -> bool | None:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or tokenizer.bos_token_id is None:
        return None
    return tokenizer.bos_token_id in tokenizer("")["input_ids"]


def _short(name: str) -> str:
    """`"openai-community/gpt2"` and `"gpt2-small"` alike: the last part of a name, in small letters."""
    short = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return {"gpt2-small": "gpt2"}.get(short, short)
