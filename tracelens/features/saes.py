"""SAEs by site: from the ways in which people write them down, checked against a model."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tracelens.errors import SAEError, UnknownNameError
from tracelens.features.sae_encode import encode, reconstruct, splice
from tracelens.features.sae_processing import note_differences, processing_of, processing_problems, provenance_of
from tracelens.features.sae_sites import SAEs, SparseEncoder, own_site, refuse_unfit, said
from tracelens.features.sae_sources import load_saes
from tracelens.sites import Site

__all__ = [
    "SAEs",
    "SparseEncoder",
    "check_saes",
    "encode",
    "load_saes",
    "normalise_saes",
    "processing_of",
    "provenance_of",
    "reconstruct",
    "sae_hash",
    "splice",
]


def normalise_saes(sae_dict: Any) -> dict[Site, Any]:
    """SAEs by site, lowest layer first, from the ways in which people write them down.

    Args:
        sae_dict: a bare SAE, which then says itself where it belongs, or a mapping whose keys are `Site`s, hook names
            (`"blocks.3.hook_resid_post"`) or layers. A layer takes the site's name from the SAE, or else `resid_post`.

    Raises `SAEError`: nothing given, a value that is no SAE, a key that is no site, an SAE of another layer under a
    layer's number, two SAEs for one site, a bare SAE that names no site, an SAE that features here cannot be those of.
    """
    if not isinstance(sae_dict, Mapping):
        sae = _checked(sae_dict, "the SAE")
        return {own_site(sae): sae}
    if not sae_dict:
        raise SAEError("no SAEs given; load_saes(folder) reads some")
    saes = {}
    for key, sae in sae_dict.items():
        site = _site_of(key, _checked(sae, f"the value of {key!r}"))
        if site in saes:
            raise SAEError(f"two SAEs for {site}: keys that mean the same site were given; keep one of them")
        saes[site] = sae
    return dict(sorted(saes.items()))


def _checked(sae: Any, what: str) -> Any:
    if isinstance(sae, type) or not isinstance(sae, SparseEncoder):
        raise SAEError(
            f"{what} is a {type(sae).__name__}, not an SAE, which has .encode(x) and .W_dec; "
            "load_saes(folder) reads SAEs from disk"
        )
    refuse_unfit(sae)
    return sae


def _site_of(key: Any, sae: Any) -> Site:
    if isinstance(key, int) and not isinstance(key, bool):
        if not said(sae, "hook_name"):
            return Site(key)
        site = own_site(sae)
        if site.layer != key:
            raise SAEError(f"key {key} is not the layer of its SAE, which belongs at {site}; use that as the key")
        return site
    try:
        return Site.parse(key if isinstance(key, Site) else str(key))
    except UnknownNameError as error:
        raise SAEError(f"key {key!r} of the SAEs is no site: {error}") from error


def check_saes(saes: SAEs, model: Any) -> None:
    """Raises `SAEError`, listing all that is wrong, if the model lacks an SAE's site, has another width there, or has its
    weights processed in a way that contradicts the SAE's training (`processing_problems`).

    Logs a warning where an SAE was trained on a model of another name, or on prompts with BOS where the tokenizer adds
    none.
    """
    problems = []
    for site, sae in saes.items():
        if site.layer >= model.cfg.n_layers:
            n = model.cfg.n_layers
            problems.append(f"{site}: the model has only {n} layers (0 to {n - 1})")
        elif str(site) not in getattr(model, "hook_dict", (str(site),)):
            problems.append(f"{site}: the model has no such hook point")
        elif (d_in := _d_in(sae)) != (width := _width(model.cfg, site)):
            problems.append(f"{site}: the SAE's d_in is {d_in}, but the model is {width} wide there")
        else:
            problems += [f"{site}: {problem}" for problem in processing_problems(site, sae, model)]
    if problems:
        raise SAEError(
            "SAEs do not fit the model; load those that were trained on it. Wrong are:\n  " + "\n  ".join(problems)
        )
    note_differences(saes, model)


def _d_in(sae: Any) -> int:
    return int(getattr(getattr(sae, "cfg", None), "d_in", None) or sae.W_dec.shape[-1])


def _width(cfg: Any, site: Site) -> int | None:
    """Width of the activation at a site, heads flattened; None where it is not a vector per token."""
    if site.name in ("q", "z"):
        return cfg.n_heads * cfg.d_head
    if site.name in ("k", "v"):
        return (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) * cfg.d_head
    if site.name in ("mlp_pre", "mlp_post"):
        return cfg.d_mlp
    return None if site.name in ("pattern", "attn_scores") else cfg.d_model


def sae_hash(sae: SparseEncoder) -> str:
    """SHA-256 (hex) of an SAE's tensors: names, shapes, float32 values; device and storage dtype do not matter."""
    tensors = sae.state_dict() if isinstance(sae, nn.Module) else vars(sae)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
