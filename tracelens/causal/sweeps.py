"""What a sweep goes through: sites, layers, positions, heads, ... as one arm for each combination."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from tracelens.causal.patching_result import Row, row_of
from tracelens.causal.places import PATTERNS, UNITS, Arm, Place, Where, check_places, n_units
from tracelens.causal.prompts import PromptSet
from tracelens.errors import PromptError, UnknownNameError
from tracelens.sites import HOOKS, Site

Axis = Literal["layer", "position", "group", "head", "neuron", "feature", "key"]
"""What `by` may say."""
Sites = str | Site | Sequence[str | Site]
"""Short names ("resid_post": at the chosen layers), hook names or `Site`s (at their own layer)."""
Features = Sequence[int] | Mapping[Site, Sequence[int]]
"""Features of the SAE at every site, or of each."""
Choice = Any
"""Values of an axis: a list, array or tensor of integers or names; None is all. What is none is refused by name."""

_EXCLUSIVE = (("position", "group"), ("head", "neuron", "feature"))


@dataclass(frozen=True)
class Sweep:
    """Arms, in the order of `axes`, and what the table says of each.

    Attributes:
        arms: what is replaced, one or more places at a time.
        rows: one dictionary an arm, all with the same keys: "layer", "site", and the other axes.
        axes: the keys of `rows` that vary, outermost first.
    """

    arms: tuple[Arm, ...]
    rows: tuple[Row, ...]
    axes: tuple[str, ...]

    def present(self, prompts: PromptSet) -> Bool[Tensor, "arm prompt"]:
        """Which prompts have any of an arm's positions; in the others the arm replaces nothing."""
        known: dict[Where, Tensor] = {}

        def has(where: Where) -> Tensor:
            if where not in known:
                known[where] = torch.tensor([bool(prompts.positions(i, where)) for i in range(len(prompts))])
            return known[where]

        found = torch.zeros(len(self.arms), len(prompts), dtype=torch.bool)
        for row, arm in zip(found, self.arms, strict=True):
            for place in arm:
                row |= has(place.where) & has(place.key)
        return found


def sweep(
    model: Any,
    prompts: PromptSet,
    *,
    sites: Sites = "resid_post",
    by: str | Sequence[str] = "layer",
    layers: Choice = None,
    positions: Choice = None,
    groups: Choice = None,
    heads: Choice = None,
    neurons: Choice = None,
    features: Choice = None,
    keys: Choice = None,
    saes: Mapping[Site, Any] | None = None,
    cumulative: bool = False,
    pairs: bool = False,
) -> Sweep:
    """One arm for each combination of a site, a layer and the values of the axes in `by`.

    Args:
        sites: where; several go one after another, under an axis "site".
        by: what is replaced at a time. "layer": all of a site; "position", "group" (of positions, by name): the site
            there; "head", "neuron", "feature": that part; "key" (of patterns, beside "position" or "group", which then
            are the queries): attention from there to that key. Several go together: ("head", "position").
        layers: of sites named without one; negative counts from the last, None is all (those with an SAE, by "feature").
        positions: which, BOS counted, negative from the prompt's end. "start": 0, 1, ... to the end of the longest
            prompt; "end": ..., −2, −1; None: "start" if all prompts are equally long, else "end", where answers are
            aligned. A prompt that lacks a position is not patched there and does not enter its effect (`Sweep.present`).
        groups: names of groups; None is all that the prompts have, without "bos", "content" and "template".
        heads: of `k` and `v` these are key-value heads; None is all.
        neurons: None is all.
        features: None is all of the SAEs.
        keys: key positions or groups; None is the values of "position" or "group". Keys after their query are left out.
        cumulative: an arm at layer l replaces the site at all chosen layers ≤ l. Of a residual stream at all positions
            that is the same as layer l alone.
        pairs: an arm for every two layers, together; "layer" ≤ "other_layer", and one layer alone where both are equal.

    Raises `UnknownNameError` for names, layers, heads, ... that the model, its SAEs or the prompts do not have, and
    `PromptError` for positions that no prompt has.
    """
    axes = _axes(by)
    layers = _listed("layers", layers)
    chosen = {
        "position": positions if isinstance(positions, str) else _listed("positions", positions),
        "group": _listed("groups", groups),
        "head": _listed("heads", heads),
        "neuron": _listed("neurons", neurons),
        "feature": features if isinstance(features, Mapping) else _listed("features", features),
        "key": _listed("keys", keys),
    }
    for axis, values in chosen.items():
        if values is not None and axis not in axes:
            raise UnknownNameError(
                f"{axis}s={values!r} chooses among what by={axis!r} goes through; by is {by!r}: add it"
            )
    if cumulative and pairs:
        raise UnknownNameError("cumulative=True and pairs=True exclude each other: choose one")
    if (cumulative or pairs) and (parts := [axis for axis in axes if axis in _EXCLUSIVE[1]]):
        raise UnknownNameError(
            f"layers cannot be replaced together by {parts[0]!r}: {parts[0]} 0 of one layer has nothing to do with {parts[0]} "
            "0 of another; go by layer, position or group"
        )
    where = _where(prompts, axes, chosen["position"], chosen["group"])
    arms: list[Arm] = []
    by_name = _sites(sites, layers, model.cfg.n_layers, saes if "feature" in axes else None)
    for name, found in by_name.items():
        _check_axes(name, axes, found, saes)
        values = {layer: _places(model, Site(layer, name), axes, where, chosen, saes) for layer in found}
        arms += _together(values, cumulative, pairs)
    if not arms:
        raise UnknownNameError(
            f"nothing to replace at {sites!r} by {by!r}: the choices of layers, heads, ... are empty"
        )
    check_places(arms, model, saes)
    varying = ("layer", "other_layer", *axes) if pairs else ("layer", *axes)
    found = [row_of(arm[:1], other_layer=arm[-1].site.layer) if pairs else row_of(arm) for arm in arms]
    rows = tuple({name: row[name] for name in dict.fromkeys(("layer", "site", *varying))} for row in found)
    return Sweep(tuple(arms), rows, (("site", *varying) if len(by_name) > 1 else varying))


def _listed(name: str, values: Any) -> list[Any] | None:
    """Values as names and plain integers, those of arrays and tensors too."""
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UnknownNameError(f"{name}={values!r} is a single value; give a list: {name}=[{values!r}]")
    return [
        value if isinstance(value, str) or not hasattr(value, "__index__") else value.__index__() for value in values
    ]


def _axes(by: str | Sequence[str]) -> tuple[Axis, ...]:
    """The axes beside "layer"."""
    given: tuple[Any, ...] = (by,) if isinstance(by, str) else tuple(by)
    for axis in given:
        if axis not in get_args(Axis):
            raise UnknownNameError.of("axis", axis, get_args(Axis))
    for group in _EXCLUSIVE:
        if len(both := [axis for axis in given if axis in group]) > 1:
            raise UnknownNameError(f"by={by!r}: {' and '.join(map(repr, both))} exclude each other; choose one")
    if len(set(given)) < len(given):
        raise UnknownNameError(f"by={by!r} names an axis twice")
    return tuple(axis for axis in given if axis != "layer")


def _sites(
    sites: Sites, layers: Sequence[int] | None, n_layers: int, saes: Mapping[Site, Any] | None
) -> dict[str, list[int]]:
    """Name → layers. `saes`: where these are, if they are what is swept."""
    found: dict[str, list[int]] = {}
    for site in [sites] if isinstance(sites, str | Site) else sites:
        if isinstance(site, str) and site in HOOKS:
            if layers is not None:
                found[site] = [_layer(site, layer, n_layers) for layer in layers]
            elif saes is not None:
                found[site] = sorted(at.layer for at in saes if at.name == site)
            else:
                found[site] = list(range(n_layers))
        else:
            at = Site.parse(site) if isinstance(site, Site) or "." in site else Site(0, site)
            at.check(n_layers)
            if layers is not None:
                raise UnknownNameError(f"{at} has its own layer; give layers= only with names such as {at.name!r}")
            found.setdefault(at.name, []).append(at.layer)
    return {name: list(dict.fromkeys(values)) for name, values in found.items()}


def _layer(name: str, layer: int, n_layers: int) -> int:
    if not -n_layers <= layer < n_layers:
        raise UnknownNameError(
            f"layer {layer} of site {name!r} is out of range; the model has {n_layers} layers (0 to {n_layers - 1}, or "
            f"{-n_layers} to -1 from the last)"
        )
    return layer % n_layers


def _check_axes(name: str, axes: Sequence[str], layers: Sequence[int], saes: Mapping[Site, Any] | None) -> None:
    """That a site has what is asked of it."""
    for axis in ("head", "neuron"):
        if axis in axes and UNITS.get(name) != axis:
            known = ", ".join(site for site, unit in UNITS.items() if unit == axis)
            raise UnknownNameError(f"{name} has no {axis}s; by={axis!r} goes with the sites {known}")
    if "key" in axes and name not in PATTERNS:
        raise UnknownNameError(f"{name} has no keys; by='key' goes with the sites {', '.join(PATTERNS)}")
    if "feature" in axes and not layers:
        known = ", ".join(map(str, saes or ())) or "none"
        raise UnknownNameError(f"by='feature' at {name!r} needs SAEs there (saes=...); SAEs given: {known}")


def _where(
    prompts: PromptSet,
    axes: Sequence[str],
    positions: Sequence[int] | str | None,
    groups: Sequence[str] | None,
) -> list[Where]:
    """Values of "position" or "group"; all positions as one if neither is asked for."""
    lengths = [len(ids) for ids in prompts.tokens]
    longest = max(lengths)
    if "position" in axes:
        if isinstance(positions, str) and positions not in ("start", "end"):
            raise UnknownNameError(f"positions={positions!r}; give 'start', 'end', or positions as integers")
        if positions is None:
            positions = "start" if min(lengths) == longest else "end"
        if isinstance(positions, str):
            return list(range(longest) if positions == "start" else range(-longest, 0))
        for position in positions:
            if not -longest <= position < longest:
                index = lengths.index(longest)
                raise PromptError(
                    f"position {position} is in no prompt; the longest, prompt {index}, has {longest} tokens (0 to "
                    f"{longest - 1}, or {-longest} to -1 from its end)"
                )
        return list(positions)
    if "group" in axes:
        known = prompts.frame | prompts.groups
        names = list(prompts.groups) if groups is None else list(groups)
        for name in names:
            if name not in known:
                raise UnknownNameError.of("group of positions", name, [*prompts.groups, *prompts.frame])
        if groups is not None and (empty := [name for name in names if not any(known[name])]):
            raise PromptError(f"no prompt has positions in group {empty[0]!r}; drop it, or say where it is with spans=")
        return [name for name in names if any(known[name])]
    return [None]


def _places(
    model: Any,
    site: Site,
    axes: Sequence[Axis],
    where: Sequence[Where],
    chosen: Mapping[str, Any],
    saes: Mapping[Site, Any] | None,
) -> list[Place]:
    """Every place at one site, in the order of the axes."""
    values: dict[str, Sequence[Any]] = {}
    for axis in axes:
        if axis in ("position", "group"):
            values[axis] = where
        elif axis == "key":
            values[axis] = chosen["key"] if chosen["key"] is not None else where
        elif axis == "feature":
            values[axis] = _features(site, chosen["feature"], saes)
        else:
            values[axis] = chosen[axis] if chosen[axis] is not None else range(n_units(model.cfg, site))
    found: list[Place] = []
    for combination in product(*(values[axis] for axis in axes)):
        at: dict[str, Any] = dict(zip(axes, combination, strict=True))
        unit = at.get("head", at.get("neuron"))
        place = Place(site, at.get("position", at.get("group")), unit, at.get("feature"), at.get("key"))
        if not _unseen(place):
            found.append(place)
    return found


def _features(site: Site, features: Features | None, saes: Mapping[Site, Any] | None) -> Sequence[int]:
    if saes is None or site not in saes:
        known = ", ".join(map(str, saes or ())) or "none"
        raise UnknownNameError(f"by='feature' needs an SAE at {site} (saes=...); SAEs given: {known}")
    if features is None:
        return range(saes[site].W_dec.shape[0])
    return list(features.get(site, ())) if isinstance(features, Mapping) else list(features)


def _unseen(place: Place) -> bool:
    """Whether its key comes after its query, where nothing is attended to."""
    query, key = place.where, place.key
    return isinstance(query, int) and isinstance(key, int) and (query < 0) == (key < 0) and key > query


def _together(places: Mapping[int, Sequence[Place]], cumulative: bool, pairs: bool) -> list[Arm]:
    """Places of one name by layer, as arms of one layer, of all up to one, or of two."""
    layers = sorted(places) if cumulative or pairs else list(places)
    if not cumulative and not pairs:
        return [(place,) for layer in layers for place in places[layer]]
    if cumulative:
        return [tuple(at) for i in range(len(layers)) for at in zip(*(places[m] for m in layers[: i + 1]), strict=True)]
    return [
        (one,) if layer == other else (one, two)
        for i, layer in enumerate(layers)
        for other in layers[i:]
        for one, two in zip(places[layer], places[other], strict=True)
    ]
