"""What traces look like in a still picture."""

from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np

from tracelens.views.widgets.svg_axes import Panel, array, bounds, coordinates

PLAIN = "#5B6470"


def number(value: float | int) -> str:
    """To a tenth of a pixel, as short as it can be written."""
    return f"{value:.1f}".removesuffix(".0")


def _colours(marker: dict[str, Any], n: int, otherwise: str) -> list[str]:
    """Each point's colour."""
    colour = marker.get("color")
    if colour is None or isinstance(colour, str):
        return [colour or otherwise] * n
    values = array(colour)
    if values.dtype.kind in "OUS":
        return [str(v) for v in values]
    low, high = (marker.get(end) for end in ("cmin", "cmax"))
    return scaled(values.astype(float), marker.get("colorscale"), low, high)


def scaled(values: np.ndarray, scale: Any, low: float | int | None, high: float | int | None) -> list[str]:
    """Numbers as colours of a scale; grey for NaN."""
    from plotly.colors import get_colorscale, sample_colorscale

    fine = np.isfinite(values)
    low = float(values[fine].min(initial=np.inf)) if low is None else low
    high = float(values[fine].max(initial=-np.inf)) if high is None else high
    share = np.clip((values - low) / ((high - low) or 1), 0, 1)
    steps = np.where(fine, np.round(np.nan_to_num(share) * 63), 0).astype(int)
    scale = get_colorscale(scale) if isinstance(scale, str) else scale or get_colorscale("RdBu_r")
    table = sample_colorscale([[float(at), str(c)] for at, c in scale], np.linspace(0, 1, 64).tolist())
    return [table[s] if f else "#C8CCD2" for s, f in zip(steps.tolist(), fine.tolist(), strict=True)]


def points_and_lines(trace: dict[str, Any], panel: Panel) -> str:
    """A scatter trace: what is filled, lines, error bars, markers."""
    x, y = panel.x.pixels(coordinates(trace, "x")), panel.y.pixels(coordinates(trace, "y"))
    n = min(len(x), len(y))
    x, y = x[:n], y[:n]
    fine = np.isfinite(x) & np.isfinite(y)
    mode = trace.get("mode") or ("lines+markers" if n < 20 else "lines")
    line, marker = trace.get("line") or {}, trace.get("marker") or {}
    own = marker.get("color") if isinstance(marker.get("color"), str) else None
    colour = line.get("color") or own or PLAIN
    parts = []
    if trace.get("fill") in ("toself", "tozeroy", "tonexty"):
        outline = list(zip(x[fine], y[fine], strict=True))
        if trace["fill"] == "tozeroy" and outline:
            outline += [(outline[-1][0], panel.y(0)), (outline[0][0], panel.y(0))]
        elif trace["fill"] == "tonexty" and (before := _before(trace, panel)) is not None:
            outline += before[::-1]
        parts.append(
            f'<path d="{_path(outline)}Z" fill="{escape(trace.get("fillcolor") or colour)}" fill-opacity="{_faint(trace)}"/>'
        )
    if "lines" in mode and line.get("width") != 0:
        dash = {"dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3"}.get(line.get("dash") or "", "")
        style = f'stroke="{escape(colour)}" stroke-width="{line.get("width") or 2}" stroke-dasharray="{dash}"'
        parts += [f'<path d="{_path(run)}" fill="none" {style}/>' for run in _runs(x, y, fine)]
    parts.append(_errors(trace, panel, x, y, colour))
    if "markers" in mode:
        parts.append(_markers(marker, x, y, fine, colour, trace.get("opacity")))
    return "".join(parts)


def _faint(trace: dict[str, Any]) -> float | int:
    # A fill without a colour of its own is half transparent in plotly.
    return 1 if trace.get("fillcolor") else 0.5


def _before(trace: dict[str, Any], panel: Panel) -> list[tuple[float, float]] | None:
    """The line of the trace before, up to which this one is filled."""
    at = next(i for i, other in enumerate(panel.traces) if other is trace)
    if not at:
        return None
    other = panel.traces[at - 1]
    x, y = panel.x.pixels(coordinates(other, "x")), panel.y.pixels(coordinates(other, "y"))
    return [(a, b) for a, b in zip(x, y, strict=False) if np.isfinite(a) and np.isfinite(b)]


def _path(run: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{number(a)} {number(b)}" for a, b in run) if run else "M0 0"


def _runs(x: np.ndarray, y: np.ndarray, fine: np.ndarray) -> list[list[tuple[float, float]]]:
    """Stretches of a line between gaps."""
    ends = np.flatnonzero(~fine)
    return [
        run
        for part_x, part_y, part in zip(np.split(x, ends), np.split(y, ends), np.split(fine, ends), strict=True)
        if (run := list(zip(part_x[part], part_y[part], strict=True)))
    ]


def _errors(trace: dict[str, Any], panel: Panel, x: np.ndarray, y: np.ndarray, colour: str) -> str:
    parts = []
    for which, axis in (("x", panel.x), ("y", panel.y)):
        error = trace.get(f"error_{which}") or {}
        if error.get("array") is None or error.get("visible") is False:
            continue
        low, high = (axis.pixels(end) for end in bounds(trace, which))
        ends = zip(low, y, high, y, strict=False) if which == "x" else zip(x, low, x, high, strict=False)
        path = "".join(
            f"M{number(a)} {number(b)}L{number(c)} {number(d)}"
            for a, b, c, d in ends
            if np.isfinite([a, b, c, d]).all()
        )
        parts.append(f'<path d="{path}" stroke="{escape(error.get("color") or colour)}"/>' if path else "")
    return "".join(parts)


def _markers(
    marker: dict[str, Any], x: np.ndarray, y: np.ndarray, fine: np.ndarray, colour: str, faint: float | None
) -> str:
    """Points of one colour and size as one path of dots, whatever their symbol; those that fall on the same pixel once."""
    size = marker.get("size")
    sizes = np.broadcast_to(array(6 if size is None else size).astype(float), x.shape)
    groups: dict[tuple[str, str], set[tuple[int, int]]] = {}
    colours = _colours(marker, len(x), colour)
    for i in np.flatnonzero(fine & np.isfinite(sizes)):
        groups.setdefault((colours[i], number(float(sizes[i]))), set()).add((round(x[i]), round(y[i])))
    said = marker.get("opacity")
    opacity = (said if isinstance(said, int | float) else 1) * (1 if faint is None else faint)
    hollow = str(marker.get("symbol") or "").endswith("open")
    parts = []
    for (ink, wide), places in groups.items():
        if hollow:
            style = f'fill="none" stroke="{escape(ink)}" stroke-width="1.5" opacity="{opacity}"'
            parts += [f'<circle cx="{a}" cy="{b}" r="{number(float(wide) / 2)}" {style}/>' for a, b in sorted(places)]
            continue
        dots = "".join(f"M{a} {b}h0" for a, b in sorted(places))
        style = f'stroke="{escape(ink)}" stroke-width="{wide}" stroke-linecap="round" opacity="{opacity}"'
        parts.append(f'<path d="{dots}" {style}/>')
    return "".join(parts)


def bars(trace: dict[str, Any], panel: Panel) -> str:
    """A bar trace, beside the others of its panel, from its base or zero."""
    flat = trace.get("orientation") == "h"
    across, along = (panel.y, panel.x) if flat else (panel.x, panel.y)
    at = across.counted(coordinates(trace, "y" if flat else "x"))
    length = coordinates(trace, "x" if flat else "y").astype(float)
    others = [t for t in panel.traces if t["type"] == "bar"]
    step = np.diff(np.unique(at[np.isfinite(at)])).min(initial=np.inf)
    step = 1.0 if not np.isfinite(step) else step
    wide = step * 0.8 / len(others)
    shift = (next(i for i, t in enumerate(others) if t is trace) - len(others) / 2) * wide
    base = np.broadcast_to(array(0 if trace.get("base") is None else trace["base"]).astype(float), length.shape)
    scale = (across.end - across.start) / (across.high - across.low)
    colours = _colours(trace.get("marker") or {}, len(length), PLAIN)
    parts = []
    for place, low, high, ink in zip(at, base, base + length, colours, strict=True):
        a, b = (across.start + (place + shift + w - across.low) * scale for w in (0, wide))
        c, d = along(low), along(high)
        if np.isfinite([a, b, c, d]).all():
            (x0, x1), (y0, y1) = (sorted(ends) for ends in (((c, d), (a, b)) if flat else ((a, b), (c, d))))
            place_of = f'x="{number(x0)}" y="{number(y0)}" width="{number(x1 - x0)}" height="{number(y1 - y0)}"'
            parts.append(f'<rect {place_of} fill="{escape(ink)}"/>')
    middle = np.array([across.start + (p + shift + wide / 2 - across.low) * scale for p in at])
    tips = along.pixels(base + length)
    return "".join(parts) + _errors(trace, panel, tips if flat else middle, middle if flat else tips, PLAIN)


def cells(trace: dict[str, Any], panel: Panel) -> str:
    """A heatmap; cells without a number are left white."""
    z = array(trace["z"]).astype(float)
    if not z.size:
        return ""
    xs, ys = (panel.x.counted(coordinates(trace, "x")), panel.y.counted(coordinates(trace, "y")))
    low, high, middle = (trace.get(name) for name in ("zmin", "zmax", "zmid"))
    if middle is not None and low is None and np.isfinite(z).any():
        far = float(np.nanmax(np.abs(z - middle)))
        low, high = middle - far, middle + far
    colours = scaled(z.ravel(), trace.get("colorscale"), low, high)

    def edges(at: np.ndarray, axis: Any) -> list[tuple[float, float]]:
        half = abs(at[1] - at[0]) / 2 if len(at) > 1 else 0.5
        scale = (axis.end - axis.start) / (axis.high - axis.low)
        ends = [
            sorted((axis.start + (v - half - axis.low) * scale, axis.start + (v + half - axis.low) * scale)) for v in at
        ]
        return [(a, b) for a, b in ends]

    columns, rows = edges(xs, panel.x), edges(ys, panel.y)
    parts = []
    for i, value in enumerate(z.ravel()):
        if np.isfinite(value):
            (x0, x1), (y0, y1) = columns[i % z.shape[1]], rows[i // z.shape[1]]
            place = (
                f'x="{number(x0)}" y="{number(y0)}" width="{number(x1 - x0 + 0.2)}" height="{number(y1 - y0 + 0.2)}"'
            )
            parts.append(f'<rect {place} fill="{escape(colours[i])}"/>')
    return "".join(parts)


MARKS: dict[str, Callable[[dict[str, Any], Panel], str]] = {
    "scatter": points_and_lines,
    "scattergl": points_and_lines,
    "bar": bars,
    "heatmap": cells,
}
