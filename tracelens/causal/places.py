"""`Place`: what one intervention replaces. A site, which positions of each prompt, and which head, neuron or feature."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tracelens.errors import UnknownNameError
from tracelens.sites import Site

Where = str | int | None
"""A group of positions by name ("object"), one position (negative: from the prompt's end), or None: all positions."""
Unit = Literal["head", "neuron"]

UNITS: dict[str, Unit] = {
    **dict.fromkeys(("q", "k", "v", "z", "pattern", "attn_scores"), "head"),
    **dict.fromkeys(("mlp_pre", "mlp_post"), "neuron"),
}
"""Sites that have parts of their own, and what these are called."""
PATTERNS = ("pattern", "attn_scores")
"""Sites of shape [batch, head, query position, key position]."""


@dataclass(frozen=True, order=True)
class Place:
    """One thing that an intervention replaces.

    Attributes:
        site: where in the model.
        where: which positions; of attention patterns, the query positions.
        unit: head or neuron; None is all of them. Heads of `k` and `v` count the model's key-value heads.
        feature: a feature of the SAE at the site; the SAE's error is left as it is. Excludes `unit`.
        key: of attention patterns, the key positions.
    """

    site: Site
    where: Where = None
    unit: int | None = None
    feature: int | None = None
    key: Where = None

    @property
    def kind(self) -> str:
        """ "feature", "head", "neuron", or "" for the whole site."""
        return "feature" if self.feature is not None else "" if self.unit is None else UNITS[self.site.name]

    def __str__(self) -> str:
        part = f" {self.kind} {self.feature if self.unit is None else self.unit}" if self.kind else ""
        where = (
            ""
            if self.where is None
            else f" at {self.where if isinstance(self.where, str) else f'position {self.where}'}"
        )
        key = "" if self.key is None else f" to {self.key}"
        return f"{self.site.name} of layer {self.site.layer}{part}{where}{key}"


Arm = tuple[Place, ...]
"""Places that are replaced together in one run."""


def n_units(cfg: Any, site: Site) -> int:
    """How many heads or neurons a site has; key-value heads for `k` and `v`."""
    if site.name in ("k", "v"):
        return int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
    return int(cfg.n_heads if UNITS[site.name] == "head" else cfg.d_mlp)


def check_places(arms: Sequence[Arm], model: Any, saes: Any = None) -> None:
    """Raises `UnknownNameError` for a site, layer, head, neuron or feature that the model or its SAEs do not have."""
    hooks = set(getattr(model, "hook_dict", ()))
    seen: set[tuple[Site, int | None, int | None]] = set()
    for place in (place for arm in arms for place in arm):
        what = (place.site, place.unit, place.feature)
        if what in seen:
            continue
        seen.add(what)
        place.site.check(model.cfg.n_layers)
        if hooks and str(place.site) not in hooks:
            raise UnknownNameError(
                f"the model has no hook point {place.site} (its blocks may have no {place.site.name!r})"
            )
        if place.unit is not None and place.feature is not None:
            raise UnknownNameError(f"a place is either a head or neuron, or a feature, not both: {what}")
        if place.unit is not None:
            if place.site.name not in UNITS:
                raise UnknownNameError(
                    f"{place.site.name} has no heads or neurons to choose from; sites that have: {', '.join(UNITS)}"
                )
            _check_index(place, place.unit, n_units(model.cfg, place.site), place.kind)
        if place.feature is not None:
            if saes is None or place.site not in saes:
                known = ", ".join(map(str, saes or ())) or "none"
                raise UnknownNameError(f"{place} needs an SAE at {place.site}; SAEs given: {known}")
            _check_index(place, place.feature, saes[place.site].W_dec.shape[0], "feature")


def _check_index(place: Place, index: int, count: int, what: str) -> None:
    if not 0 <= index < count:
        raise UnknownNameError(f"{place}: {what} {index} is out of range; there are {count} (0 to {count - 1})")
