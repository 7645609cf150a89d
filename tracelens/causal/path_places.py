"""Senders and receivers of paths: what users name, as places; which pairs there are, and what they are called."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tracelens.causal.patching_result import Row
from tracelens.causal.path_arms import Path, is_parallel, reads_at, writes_at
from tracelens.causal.places import Arm, Place, Where, check_places, n_units
from tracelens.causal.prompts import PromptSet
from tracelens.errors import UnknownNameError
from tracelens.sites import Site

Components = str | Place | Sequence[Any]
"""A kind of component ("head": every one of them), a place, or a list of these and of tuples of places that go together."""

SENDERS = ("embedding", "head", "attn", "mlp")
RECEIVERS = ("logits", "head", "q", "k", "v", "mlp")


def all_paths(
    model: Any, senders: Components, receivers: Components, at: Sequence[Where]
) -> tuple[list[Path], list[Row]]:
    """Every path from a sender to a receiver that comes after it, from the first layer up, and what the table says of it.

    Raises `UnknownNameError` for components that do not exist or cannot send or receive, and for a sender or a receiver
    that is on no path.
    """
    sending = _arms(model, senders, "sender", SENDERS)
    heard = _arms(model, receivers, "receiver", RECEIVERS)
    check_places([*sending, *heard], model)
    step = {"parallel": is_parallel(model)}
    begin = {arm: min(writes_at(place, **step) for place in arm) for arm in sending}
    end = {arm: max(reads_at(place, **step) for place in arm) for arm in heard}
    paths: list[Path] = []
    for sender in sorted(sending, key=begin.__getitem__):
        for arm, where in product(sorted(heard, key=end.__getitem__), at):
            if begin[sender] <= end[arm]:
                paths.append(Path(sender, arm if where is None else tuple(replace(p, where=where) for p in arm)))
    _check_ends(model, sending, heard, paths)
    return paths, _rows(model, paths)


def present(paths: Sequence[Path], prompts: PromptSet) -> Bool[Tensor, "path prompt"]:
    """Which prompts have positions of both ends of a path; in the others nothing is patched."""

    def has(arm: Arm, prompt: int) -> bool:
        return any(prompts.positions(prompt, place.where) for place in arm)

    found = [[has(path.sender, i) and has(path.receiver, i) for i in range(len(prompts))] for path in paths]
    return torch.tensor(found, dtype=torch.bool)


def name_of(arm: Arm, model: Any) -> str:
    """ "L2H1", "L2 MLP", "L2 attention", "embedding", "logits"; "L4H0 q" for one input of a head, "L4KV0 k" where heads share
    it; " + " between several.
    """
    return " + ".join(dict.fromkeys(_name(place, model) for place in arm))


def _name(place: Place, model: Any) -> str:
    layer, name = place.site.layer, place.site.name
    plain = {
        "resid_pre": "embedding",
        "resid_post": "logits",
        "mlp_out": f"L{layer} MLP",
        "attn_out": f"L{layer} attention",
    }
    if name in plain:
        return plain[name]
    shared = name in ("k", "v") and n_units(model.cfg, place.site) < model.cfg.n_heads
    head = " heads" if place.unit is None else f"{'KV' if shared else 'H'}{place.unit}"
    return f"L{layer}{head}" + ("" if name == "z" else f" {name}")


def _at(sender: Arm) -> str:
    return "".join(f" at {where}" for where in dict.fromkeys(place.where for place in sender) if where is not None)


def _rows(model: Any, paths: Sequence[Path]) -> list[Row]:
    rows: list[Row] = [
        {
            "layer": path.sender[-1].site.layer,
            "site": path.sender[-1].site.name,
            "sender_layer": path.sender[-1].site.layer,
            "sender": name_of(path.sender, model) + _at(path.sender),
            "receiver_layer": path.receiver[-1].site.layer,
            "receiver": name_of(path.receiver, model),
        }
        for path in paths
    ]
    wheres = [path.receiver[-1].where for path in paths]
    if all(isinstance(where, int) for where in wheres):
        rows = [row | {"position": where} for row, where in zip(rows, wheres, strict=True)]
    elif any(where is not None for where in wheres):
        names = ["all" if where is None else str(where) for where in wheres]
        rows = [row | {"group": name} for row, name in zip(rows, names, strict=True)]
    return rows


def _arms(model: Any, given: Components, end: str, kinds: Sequence[str]) -> dict[Arm, bool]:
    """Arms, and whether each was named itself and not only its kind."""
    items = [given] if isinstance(given, str | Place) else list(given)
    if not items:
        raise UnknownNameError(f"no {end} is given; known kinds: {', '.join(kinds)}")
    arms: dict[Arm, bool] = {}
    for item in items:
        if isinstance(item, str):
            if item not in kinds:
                raise UnknownNameError.of(end, item, kinds)
            arms |= dict.fromkeys(_kind(model, item), False)
        else:
            arms[(item,) if isinstance(item, Place) else tuple(item)] = True
    for arm in arms:
        _check_sites(arm, end, model.cfg.n_layers)
    return arms


def _kind(model: Any, kind: str) -> Iterable[Arm]:
    cfg = model.cfg
    layers = range(cfg.n_layers)
    if kind == "embedding":
        return [(Place(Site(0, "resid_pre")),)]
    if kind == "logits":
        return [(Place(Site(cfg.n_layers - 1, "resid_post")),)]
    if kind in ("mlp", "attn"):
        sites = [Site(layer, f"{kind}_out") for layer in layers]
        # A model of attention alone has no MLP among its components; one that is asked for by its place is an error.
        return [(Place(site),) for site in sites if str(site) in getattr(model, "hook_dict", {str(site)})]
    name = "z" if kind == "head" else kind
    return [(Place(Site(i, name), unit=head),) for i in layers for head in range(n_units(cfg, Site(i, name)))]


def _check_sites(arm: Arm, end: str, n_layers: int) -> None:
    known = {
        "sender": "z, attn_out, mlp_out, or resid_pre of layer 0",
        "receiver": f"q, k, v, z, mlp_out, or resid_post of layer {n_layers - 1}, which is what the logits read",
    }
    names = {"sender": ("z", "attn_out", "mlp_out"), "receiver": ("q", "k", "v", "z", "mlp_out")}[end]
    outer = Site(0, "resid_pre") if end == "sender" else Site(n_layers - 1, "resid_post")
    if not arm:
        raise UnknownNameError(f"a {end} has no places; give places at {known[end]}")
    for place in arm:
        if (place.site.name not in names and place.site != outer) or place.feature is not None:
            raise UnknownNameError(f"{place} is no {end} of paths; {end}s are places at {known[end]}")


def _check_ends(model: Any, senders: dict[Arm, bool], receivers: dict[Arm, bool], paths: Sequence[Path]) -> None:
    """Every end that was named is on a path, and there is one."""
    sent = {path.sender for path in paths}
    heard = {_parts(path.receiver) for path in paths}
    names = [" or ".join(name_of(arm, model) for arm in list(ends)[:3]) for ends in (senders, receivers)]
    for sender, named in senders.items():
        if sender not in sent and (named or not paths):
            raise _no_path(name_of(sender, model), names[1])
    for receiver, named in receivers.items():
        if _parts(receiver) not in heard and (named or not paths):
            raise _no_path(names[0], name_of(receiver, model))


def _parts(arm: Arm) -> frozenset[Any]:
    return frozenset((place.site, place.unit) for place in arm)


def _no_path(sender: str, receiver: str) -> UnknownNameError:
    return UnknownNameError(
        f"there is no path from {sender} to {receiver}: a sender must come before its receiver, which reads the residual "
        "stream before it computes; choose an earlier sender or a later receiver"
    )
