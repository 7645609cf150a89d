"""Which sweep is looked at: direction, metric, precision, axes and site, as far as the results hold them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracelens.errors import MetricInputError
from tracelens.views.escaping import visible

if TYPE_CHECKING:
    from tracelens.causal.patching_result import PatchingResult

FACETS = ("direction", "metric", "site", "sweep", "precision", "result")
"""In the order in which they are kept when a choice rules out the others."""
LONGEST = 48


@dataclass(frozen=True)
class Entry:
    """One site of one result."""

    result: "PatchingResult"
    arms: tuple[int, ...]
    """Rows of the result's table."""
    axes: tuple[str, ...]
    """Those that vary, the site aside."""
    facets: Mapping[str, str]
    """`FACETS` → what this one is."""


def named(results: Sequence["PatchingResult | Mapping[str, PatchingResult]"]) -> dict[str, "PatchingResult"]:
    """Results by name: that of the one mapping that there is, or their place."""
    if len(results) == 1 and isinstance(results[0], Mapping):
        return {str(name): result for name, result in results[0].items()}
    return {str(i + 1): result for i, result in enumerate(results) if not isinstance(result, Mapping)}


def entries(results: Mapping[str, "PatchingResult"]) -> list[Entry]:
    """All that can be looked at. Raises `MetricInputError` if there is no result, or one that replaced nothing."""
    if not results:
        raise MetricInputError("there is nothing to explore; give at least one PatchingResult")
    found = []
    for name, result in results.items():
        if not result.rows:
            raise MetricInputError(f"the result {name!r} has no arms; patch at least one place")
        found += [_entry(name, result, site) for site in _sites(result)]
    return found


def offered(found: list[Entry]) -> dict[str, list[str]]:
    """Facets in which the entries differ → the values that they have. Results' names are offered where nothing else tells them apart."""
    options = {facet: list(dict.fromkeys(entry.facets[facet] for entry in found)) for facet in FACETS}
    rest = [tuple(entry.facets[facet] for facet in FACETS if facet != "result") for entry in found]
    if len(set(rest)) == len(rest):
        options["result"] = options["result"][:1]
    return {facet: values for facet, values in options.items() if len(values) > 1}


def nearest(found: list[Entry], wanted: Mapping[str, str], must: str) -> Entry:
    """The entry that has what `must` is wanted to be, and as much as there is of the others, the first facets first."""

    def agreement(entry: Entry) -> tuple[bool, ...]:
        return tuple(entry.facets[facet] == wanted.get(facet, entry.facets[facet]) for facet in (must, *FACETS))

    return max(found, key=agreement)


def _sites(result: "PatchingResult") -> list[str]:
    sites = list(dict.fromkeys(str(row.get("site", "")) for row in result.rows))
    return sites if "site" in result.axes else [", ".join(sites)]


def _entry(name: str, result: "PatchingResult", site: str) -> Entry:
    split = "site" in result.axes
    arms = tuple(i for i, row in enumerate(result.rows) if not split or str(row["site"]) == site)
    axes = tuple(axis for axis in result.axes if axis != "site" and len({result.rows[i][axis] for i in arms}) > 1)
    settings: Mapping[str, Any] = result.settings
    how = ", up to each layer" if settings.get("cumulative") else ", in pairs" if settings.get("pairs") else ""
    facets = {
        "direction": result.direction or "patching",
        "metric": result.metric,
        "site": "paths" if settings.get("paths") else site,
        "sweep": " × ".join(axes or result.axes[:1]) + how,
        "precision": str(settings.get("precision") or "one model"),
        "result": name,
    }
    return Entry(
        result, arms, axes or result.axes[:1], {facet: visible(text, LONGEST) for facet, text in facets.items()}
    )
