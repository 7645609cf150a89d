"""Where things lie in a still picture: the panels of a figure and their axes."""

from base64 import b64decode
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import numpy as np

LEFT, RIGHT, TOP, BOTTOM = 72.0, 24.0, 34.0, 64.0
"""Room round the panels, in pixels; more at the top for a title and its subtitle, and on the left for the labels."""
LETTER = 6.4
"""Pixels of a letter, about."""
LONGEST = 26
"""Characters of the labels of a vertical axis."""


def array(values: Any) -> np.ndarray:
    """A trace's values, also where plotly keeps them as base64."""
    if isinstance(values, dict):
        flat = np.frombuffer(b64decode(values["bdata"]), dtype=values["dtype"])
        shape = values.get("shape")
        return flat.reshape([int(n) for n in str(shape).split(",")]) if shape else flat
    made = np.asarray([] if values is None else values)
    if made.dtype.kind in "OU" and all(isinstance(v, int | float | None) for v in made.ravel().tolist()):
        return made.astype(float)
    return made


class Axis:
    """From values to pixels.

    Attributes:
        said: what the layout says of the axis.
        kind: "linear", "log" or "category".
        low, high: its ends, in what the axis counts in (logarithms, or places of categories).
        ticks: values at which there are grid lines.
    """

    def __init__(self, said: dict[str, Any], values: list[np.ndarray], start: float, end: float, *, zero: bool) -> None:
        self.said = said
        text = any(v.dtype.kind in "OUS" for v in values)
        self.kind: str = said.get("type") or ("category" if text else "linear")
        self.categories: dict[str, int] = {}
        if self.kind == "category":
            asked = said.get("categoryarray")
            for value in [
                *(array(asked).tolist() if asked is not None else []),
                *(x for v in values for x in v.tolist()),
            ]:
                self.categories.setdefault(str(value), len(self.categories))
        self.low, self.high = self._ends(values, zero)
        self.start, self.end = start, end
        self.ticks = self._ticks()

    def __call__(self, value: Any) -> float:
        """A value's pixel."""
        at = float(self.counted(np.asarray([value]))[0])
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def pixels(self, values: np.ndarray) -> np.ndarray:
        return self.start + (self.counted(values) - self.low) / (self.high - self.low) * (self.end - self.start)

    def counted(self, values: np.ndarray) -> np.ndarray:
        """Values as the axis counts; NaN where it cannot."""
        if self.kind == "category":
            return np.array(
                [self.categories.get(str(v), v if isinstance(v, int | float) else np.nan) for v in values.tolist()],
                float,
            )
        numbers = np.asarray(values, float)
        if self.kind == "log":
            return np.log10(np.where(numbers > 0, numbers, np.nan))
        return numbers

    def labelled(self, most: int = 24) -> list[tuple[Any, str]]:
        """The ticks with their labels; of many categories only some."""
        if self.said.get("showticklabels") is False:
            return []
        if (texts := self.said.get("ticktext")) is not None:
            return list(zip(self.ticks, map(str, array(texts).tolist()), strict=False))
        step = ceil(len(self.ticks) / most) or 1
        return [(t, str(t) if self.kind == "category" else f"{t:g}") for t in self.ticks[::step]]

    def _ends(self, values: list[np.ndarray], zero: bool) -> tuple[float, float]:
        asked = self.said.get("range")
        if asked is not None and None not in list(asked):
            low, high = float(asked[0]), float(asked[1])
            return (low, high) if low != high else (low - 0.5, high + 0.5)
        if self.kind == "category":
            low, high = -0.5, max(len(self.categories), 1) - 0.5
        else:
            every = np.concatenate([self.counted(v.ravel()) for v in values]) if values else np.array([])
            every = every[np.isfinite(every)]
            low, high = (every.min(), every.max()) if len(every) else (0.0, 1.0)
            low, high = (min(low, 0.0), max(high, 0.0)) if zero and self.kind == "linear" else (low, high)
            space = (high - low) * 0.05 or 0.5
            low, high = float(low - space * (low != 0 or not zero)), float(high + space)
        return (high, low) if self.said.get("autorange") == "reversed" else (low, high)

    def _ticks(self) -> list[Any]:
        if (asked := self.said.get("tickvals")) is not None:
            return array(asked).tolist()
        if self.kind == "category":
            return list(self.categories)
        low, high = sorted((self.low, self.high))
        if self.kind == "log":
            decades = range(floor(low), floor(high) + 1)
            fine = [m * 10.0**e for e in decades for m in (1, 2, 5) if low <= log10(m * 10.0**e) <= high]
            return fine if len(fine) <= 6 else [t for t in fine if log10(t) % 1 == 0]
        rough = (high - low) / 6
        unit = 10.0 ** floor(log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
        return [round(i * step, 12) for i in range(ceil(low / step), floor(high / step) + 1)]


@dataclass(frozen=True)
class Panel:
    """A pair of axes with what is drawn on them. `box`: left, top, width, height; `paper`: the same of all panels together."""

    names: tuple[str, str]
    x: Axis
    y: Axis
    box: tuple[float, float, float, float]
    paper: tuple[float, float, float, float]
    traces: list[dict[str, Any]]
    shapes: list[dict[str, Any]]

    def has(self, xref: str | None, yref: str | None) -> bool:
        """Whether an annotation or shape with these references is of these axes."""
        return ((xref or "x").split()[0], (yref or "y").split()[0]) == self.names or (
            xref == "paper" and (yref or "y").split()[0] == self.names[1]
        )

    def place(self, which: str, ref: str | None, value: Any) -> float:
        """A pixel from a coordinate of an axis, of its domain ("x domain") or of the paper."""
        axis = self.x if which == "x" else self.y
        i = 0 if which == "x" else 1
        for name, box in (("paper", self.paper), ("domain", self.box)):
            if (ref or "").endswith(name):
                share = value if which == "x" else 1 - value
                return box[i] + share * box[i + 2]
        return axis(value)


def panels(data: list[dict[str, Any]], layout: dict[str, Any], width: float, height: float) -> list[Panel]:
    """The figure's pairs of axes, in the order in which its traces use them."""
    title = layout.get("title") or {}
    subtitle = title.get("subtitle") if isinstance(title, dict) else None
    lines = len(str((subtitle or {}).get("text") or "").split("<br>")) if subtitle else 0
    top = TOP + 16 * lines
    pairs = dict.fromkeys((t.get("xaxis") or "x", t.get("yaxis") or "y") for t in data)

    def all_of(left: float) -> list[Panel]:
        paper = (left, top, width - left - RIGHT, height - top - BOTTOM)
        return [_panel(names, data, layout, paper) for names in pairs]

    drawn = all_of(LEFT)
    letters = max((len(label) for panel in drawn for _, label in panel.y.labelled()), default=0)
    return drawn if letters < 6 else all_of(LEFT + LETTER * (min(letters, LONGEST) - 5))


def _panel(names: tuple[str, str], data: list[dict[str, Any]], layout: dict[str, Any], paper: Any) -> Panel:
    traces = [t for t in data if (t.get("xaxis") or "x", t.get("yaxis") or "y") == names]
    said = [layout.get(f"{name[0]}axis{name[1:]}") or {} for name in names]
    (x0, x1), (y0, y1) = (tuple(s.get("domain") or (0, 1)) for s in said)
    left, top, wide, high = paper
    box = (left + x0 * wide, top + (1 - y1) * high, (x1 - x0) * wide, (y1 - y0) * high)
    # An axis that other panels share spans their values too.
    alike = [
        [t for t in data if (t.get(f"{n[0]}axis") or n[0]) in {n, s.get("matches")}]
        for n, s in zip(names, said, strict=True)
    ]
    x = Axis(said[0], [_values(t, "x") for t in alike[0]], box[0], box[0] + box[2], zero=_from_zero(traces, "h"))
    y = Axis(said[1], [_values(t, "y") for t in alike[1]], box[1] + box[3], box[1], zero=_from_zero(traces, "v"))
    bare = Panel(names, x, y, box, paper, traces, [])
    shapes = [s for s in layout.get("shapes") or () if bare.has(s.get("xref"), s.get("yref"))]
    return Panel(names, x, y, box, paper, traces, shapes)


def _values(trace: dict[str, Any], which: str) -> np.ndarray:
    """A trace's values on an axis, its error bars' ends and, of a heatmap, its cells' edges among them."""
    values = coordinates(trace, which)
    if trace["type"] == "heatmap" and values.dtype.kind in "iuf" and len(values):
        half = (values[1] - values[0]) / 2 if len(values) > 1 else 0.5
        return np.array([values[0] - half, values[-1] + half])
    error = (trace.get(f"error_{which}") or {}).get("array")
    if error is None or values.dtype.kind in "OUS":
        return values
    low, high = bounds(trace, which)
    return np.concatenate([values, low, high])


def bounds(trace: dict[str, Any], which: str) -> tuple[np.ndarray, np.ndarray]:
    """The ends of a trace's error bars."""
    error, values = trace[f"error_{which}"], coordinates(trace, which)
    up = array(error["array"])
    down = up if error.get("arrayminus") is None else array(error["arrayminus"])
    return values - down, values + up


def coordinates(trace: dict[str, Any], which: str) -> np.ndarray:
    """A trace's x or y, counted up where it has none."""
    values = trace.get(which)
    if values is not None:
        return array(values)
    if trace["type"] == "heatmap":
        return np.arange(array(trace["z"]).shape[1 if which == "x" else 0])
    return np.arange(len(array(trace.get("y" if which == "x" else "x"))))


def _from_zero(traces: list[dict[str, Any]], orientation: str) -> bool:
    return any(t["type"] == "bar" and (t.get("orientation") or "v") == orientation for t in traces)
