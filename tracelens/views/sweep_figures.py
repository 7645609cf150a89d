"""One measure of a sweep against bits or bytes, its controls as bands: what the sweep explorer draws."""

from collections.abc import Collection
from math import isnan
from typing import TYPE_CHECKING, Any, Literal, get_args

from tracelens.errors import UnknownNameError
from tracelens.views.bands import column_bands, line
from tracelens.views.escaping import brief, in_figure
from tracelens.views.numbers import CONTROLS, interval
from tracelens.views.style import REFERENCE, template
from tracelens.views.sweep_series import Series, series

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.sweep_result import SweepResult

Measure = Literal["CPFR", "flips", "KL", "perplexity", "smeared", "muted", "degraded", "damaged"]
Axis = Literal["bits", "bytes", "in order"]
TITLES: dict[str, str] = {
    "CPFR": "CPFR (1 = unchanged)",
    "flips": "flipped decisions (%)",
    "KL": "KL divergence (nats per token)",
    "perplexity": "perplexity",
    "smeared": "smeared pairs",
    "muted": "muted features (%)",
    "degraded": "degraded features (%)",
    "damaged": "damaged features (%)",
}
DEFINITIONS: dict[str, str] = {
    "CPFR": "mean fidelity of a set of features: Σrq / max(Σr², Σq²) of each, 1 only if it is unchanged",
    "flips": "prompts whose decision differs, both ways and each way (of those the reference refuses, and complies with); Wilson intervals",
    "KL": "KL(reference ‖ quantized) of the next-token distributions, summed over the vocabulary, mean over tokens",
    "perplexity": "exp of the mean negative log likelihood of the prompts' tokens",
    "smeared": "pairs of features whose cosine over tokens rose by δ or more to τ or more",
    "muted": "live features that stay silent on 90 % or more of the tokens on which the reference fires them",
    "degraded": "live features whose fidelity is below the threshold of the audit",
    "damaged": "live features whose activations correlate with the reference's by less than the audit's threshold",
}
AXES: dict[str, str] = {
    "bits": "bits per weight, scales included",
    "bytes": "bytes of the linear layers' weights",
    "in order": "precision, the largest first",
}
PASSES, FAILS = "#009E73", "#8A8F98"
CHOSEN = "#E69F00"
HEIGHT = 268
FROM_ZERO = ("flips", "KL", "smeared", "muted", "degraded", "damaged")
"""Measures of which 0 is nothing, and is on the axis."""
NAMED_FROM = 0.085
"""Share of an axis's length from which on points are apart far enough to be named."""
SPARE = 0.14
"""Share of it by which entries of unknown size stand apart."""


def sweep_panel(
    sweep: "SweepResult",
    measure: Measure,
    *,
    behaviour: str | None = None,
    axis: Axis = "bits",
    threshold: float | None = None,
    passing: Collection[str] | None = None,
    chosen: str | None = None,
) -> "go.Figure":
    """A measure of every entry with its interval, against its size; bands: the same in the controls.

    Args:
        behaviour: in place of all safety features, those of one behaviour; flips of its prompts.
        threshold: a line across, in the panel's units.
        passing: entries that are marked ✓, the others ✗; None for no marks.
        chosen: the entry that is ringed.

    Raises `UnknownNameError` for a measure or an axis that there is not.
    """
    import plotly.graph_objects as go

    if measure not in TITLES:
        raise UnknownNameError.of("measure", measure, TITLES)
    x, xaxis, _ = places(sweep, axis)
    entries = sorted(sweep.reports, key=x.__getitem__)
    found = series(sweep, measure, behaviour)
    traces: list[Any] = []
    # One set of bands: those of what is asked about.
    for control, estimates in found[0].controls.items() if found else ():
        names = [name for name in entries if name in estimates and not isnan(estimates[name].value)]
        for trace in column_bands([(x[name], estimates[name]) for name in names], control, CONTROLS[control]):
            trace.showlegend = False
            if trace.name:
                trace.customdata = names
            traces.append(trace)
    for one in reversed(found):
        names = [name for name in entries if name in one.of and not isnan(one.of[name].value)]
        trace = line([(x[name], one.of[name]) for name in names], in_figure(one.name), one.colour, one.symbol)
        labels = [
            f"<b>{in_figure(sweep.reports[name].label)}</b><br>{in_figure(one.name)}: {interval(one.of[name])}"
            for name in names
        ]
        traces.append(trace.update(customdata=names, text=labels, hovertemplate="%{text}<extra></extra>"))
    traces.insert(0, _ring(*ring_at(x, found, chosen)))
    layout = marks(sweep, measure, axis=axis, threshold=threshold, passing=passing)
    if not any(one.of for one in found):
        where = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
        layout["annotations"] = [*layout["annotations"], {"text": _nothing(measure, behaviour), **where}]
    layout |= {"template": template(), "height": HEIGHT, "margin": {"l": 58, "r": 14, "t": 40, "b": 46}, "xaxis": xaxis}
    layout["yaxis"] = {"title": {"text": TITLES[measure]}, "rangemode": "tozero" if measure in FROM_ZERO else "normal"}
    layout["legend"] = {"x": 0, "y": 1.06, "yanchor": "bottom", "font": {"size": 11}, "traceorder": "reversed"}
    return go.Figure(traces, layout)


def places(sweep: "SweepResult", axis: Axis) -> tuple[dict[str, float], dict[str, Any], float | None]:
    """Where entries stand, the axis, and where the line lies beyond which those of unknown size are (None if there are none).

    Larger ones are to the left.
    """
    if axis not in get_args(Axis):
        raise UnknownNameError.of("axis", axis, get_args(Axis))
    sizes = sweep.bytes if axis == "bytes" else sweep.bits
    order = sorted(sizes, key=lambda name: (isnan(sizes[name]), -sizes[name]))
    title: dict[str, Any] = {"title": {"text": AXES[axis]}}
    known = [name for name in order if not isnan(sizes[name])]
    if axis == "in order" or not known:
        ticks = [_tick(sweep, name, sizes[name], axis) for name in order]
        along = {"tickvals": list(range(len(order))), "ticktext": ticks, "range": [-0.5, len(order) - 0.5]}
        return {name: float(i) for i, name in enumerate(order)}, title | along, None
    most, least = sizes[known[0]], sizes[known[-1]]
    length = (most - least) or most or 1.0
    x = {name: sizes[name] for name in known}
    unknown = order[len(known) :]
    x |= {name: least - SPARE * length * (i + 1) for i, name in enumerate(unknown)}
    low, high = least - SPARE * length * len(unknown) - 0.07 * length, most + 0.07 * length
    steps = [(a - b) / (high - low) for a, b in zip(list(x.values()), list(x.values())[1:], strict=False)]
    layout: dict[str, Any] = title | {"range": [high, low]}
    if all(step >= NAMED_FROM for step in steps) and len(order) <= 9:
        ticks = [_tick(sweep, name, sizes[name], axis) for name in order]
        # A size smaller than elsewhere, so that names such as INT4-g32 have room beside one another.
        layout |= {"tickvals": list(x.values()), "ticktext": ticks, "tickfont": {"size": 11}}
    elif unknown:
        numbers = sorted({x[name] for name in known})
        layout |= {
            "tickvals": [*(x[name] for name in unknown), *numbers],
            "ticktext": [*("?" for _ in unknown), *(_size(number, axis) for number in numbers)],
        }
    return x, layout, least - SPARE * length / 2 if unknown else None


def marks(
    sweep: "SweepResult",
    measure: str,
    *,
    axis: Axis = "bits",
    threshold: float | None = None,
    passing: Collection[str] | None = None,
) -> dict[str, Any]:
    """Lines and signs of a panel, as its layout's "shapes" and "annotations"."""
    x, _, apart = places(sweep, axis)
    shapes, said = [], []
    if threshold is not None:
        shapes.append(_across(threshold, PASSES, "dash"))
    if apart is not None:
        up = {"yref": "paper", "y0": 0, "y1": 1, "x0": apart, "x1": apart}
        shapes.append({"type": "line", **up, "line": {"color": FAILS, "width": 1, "dash": "dot"}})
    if measure == "perplexity":
        first = next(iter(sweep.reports.values())).divergence.perplexity_reference.value
        if not isnan(first):
            shapes.append(_across(first, REFERENCE, "dot"))
            at = {"x": 1, "xref": "paper", "y": first, "xanchor": "right", "yanchor": "bottom"}
            said.append({"text": "reference", "font": {"size": 11}, **at})
    for name in sweep.reports if passing is not None else ():
        ok = name in (passing or ())
        sign = {"text": "✓" if ok else "✗", "font": {"size": 13, "color": PASSES if ok else FAILS}}
        said.append({"x": x[name], "y": 1.0, "yref": "paper", "yanchor": "bottom", **sign})
    return {"shapes": shapes, "annotations": said}


def ring_at(x: dict[str, float], found: list[Series], chosen: str | None) -> tuple[list[Any], list[Any]]:
    """Where an entry's points are."""
    at = [one.of[chosen].value for one in found if chosen in one.of and not isnan(one.of[chosen].value)]
    return ([x[chosen]] * len(at), at) if chosen and at else ([None], [None])


def _across(y: float, colour: str, dash: str) -> dict[str, Any]:
    along = {"xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
    return {"type": "line", **along, "line": {"color": colour, "width": 1.5, "dash": dash}}


def _ring(x: list[Any], y: list[Any]) -> "go.Scatter":
    import plotly.graph_objects as go

    marker = {"symbol": "circle-open", "size": 19, "color": CHOSEN, "line": {"width": 3, "color": CHOSEN}}
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, hoverinfo="skip", showlegend=False, cliponaxis=False)


def _tick(sweep: "SweepResult", name: str, size: float, axis: str) -> str:
    return f"{in_figure(brief(sweep.reports[name].label))}<br>{'?' if isnan(size) else _size(size, axis)}"


def _size(size: float, axis: str) -> str:
    if axis != "bytes":
        return f"{size:.3g}"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def _nothing(measure: str, behaviour: str | None) -> str:
    if measure == "flips":
        return "no prompt's decision can be read" + (f" for {in_figure(behaviour)}" if behaviour else "")
    return "the reports hold no such numbers" + (f" for {in_figure(behaviour)}" if behaviour else "")
