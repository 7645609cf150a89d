"""Components of a model: heads, MLPs, attention layers, whole layers and SAE features, each named by a `Place`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tracelens.causal.places import Arm, Place, Where, check_places, n_units
from tracelens.errors import UnknownNameError
from tracelens.sites import Site

Kind = Literal["head", "mlp", "attn", "layer", "feature"]
KINDS: tuple[Kind, ...] = ("head", "mlp", "attn", "layer", "feature")
_SITE = {"head": "z", "mlp": "mlp_out", "attn": "attn_out", "layer": "resid_post"}
_KIND: dict[str, str] = {"mlp_out": "mlp", "attn_out": "attn", "resid_post": "layer"}
Features = Mapping[Any, Iterable[int]]
"""Site (or its hook name) → features of the SAE there."""


def components_of(
    model: Any,
    components: Sequence[str | Place],
    *,
    features: Features | None = None,
    saes: Mapping[Site, Any] | None = None,
    layers: Iterable[int] | None = None,
    where: Where = None,
) -> tuple[Place, ...]:
    """Places of whole kinds of components, layer by layer; places that are given pass through.

    A head is its `z`, an MLP its `mlp_out`, an attention layer its `attn_out`. A whole layer is named by its `resid_post`
    and means what the block adds: its `attn_out` and `mlp_out` together.

    Args:
        components: of `KINDS`, or places.
        features: for "feature".
        layers: of whole kinds; all by default.
        where: positions, for whole kinds.

    Raises `UnknownNameError` for unknown kinds, places the model does not have, and for "feature" without `features`.
    """
    if isinstance(components, str):
        components = (components,)
    wanted = range(model.cfg.n_layers) if layers is None else sorted(set(layers))
    found: list[Place] = []
    for component in components:
        if isinstance(component, Place):
            found.append(component)
        elif component == "feature":
            found += _features(features, where, None if layers is None else set(wanted))
        elif component in _SITE:
            for site in (Site(layer, _SITE[component]).check(model.cfg.n_layers) for layer in wanted):
                units = range(n_units(model.cfg, site)) if component == "head" else (None,)
                found += [Place(site, where, unit) for unit in units]
        else:
            raise UnknownNameError.of("kind of component", component, KINDS)
    places = tuple(dict.fromkeys(found))
    if not places:
        raise UnknownNameError(f"there are no components: {components!r} with layers {list(wanted)} names none")
    check_places([arm_of(place) for place in places], model, saes)
    return places


def kind_of(place: Place) -> str:
    """One of `KINDS` for the components above; for other places the name of what they are ("neuron", "resid_pre", ...)."""
    return place.kind or _KIND.get(place.site.name, place.site.name)


def arm_of(place: Place) -> Arm:
    """What is ablated of a component: itself, or a layer's attention and MLP."""
    if kind_of(place) != "layer":
        return (place,)
    return tuple(Place(Site(place.site.layer, name), place.where) for name in ("attn_out", "mlp_out"))


def name_of(place: Place) -> str:
    """Short, for figures: "L3H1", "L3 MLP", "L3 #17"."""
    layer = f"L{place.site.layer}"
    kind = kind_of(place)
    if kind == "head":
        return f"{layer}{'H' if place.site.name == 'z' else f' {place.site.name}'}{place.unit}"
    if kind == "feature":
        return f"{layer} #{place.feature}"
    return {"mlp": f"{layer} MLP", "attn": f"{layer} attention", "layer": f"layer {place.site.layer}"}.get(
        kind, f"{layer} {kind}{'' if place.unit is None else f' {place.unit}'}"
    )


def described(place: Place) -> dict[str, Any]:
    """What tables say of a component: name, kind, layer, site, and its index (-1 if it is the whole site)."""
    index = place.feature if place.unit is None else place.unit
    return {
        "component": name_of(place),
        "kind": kind_of(place),
        "layer": place.site.layer,
        "site": place.site.name,
        "index": -1 if index is None else index,
    }


def to_dict(place: Place) -> dict[str, Any]:
    """As JSON can hold it."""
    return {"site": str(place.site), **{name: getattr(place, name) for name in ("where", "unit", "feature", "key")}}


def from_dict(data: Mapping[str, Any]) -> Place:
    """What `to_dict` gave."""
    return Place(**{**data, "site": Site.parse(data["site"])})


def _features(features: Features | None, where: Where, layers: set[int] | None) -> list[Place]:
    if features is None:
        raise UnknownNameError(
            "components of kind 'feature' need features={site: indices}; active_features(...) gives those that fire"
        )
    by_site = {Site.parse(site): sorted(set(indices)) for site, indices in features.items()}
    return [
        Place(site, where, feature=int(index))
        for site, indices in sorted(by_site.items())
        if layers is None or site.layer in layers
        for index in indices
    ]
