"""A plotly figure as an SVG that needs no script: points, lines, bands, bars, heatmaps; axes, legend, titles. No more than that.

It stands in for a widget in a saved notebook, where neither kaleido nor a browser may be at hand. What a figure has besides (other kinds
of traces, arrows, colour bars, hover) is not in it.
"""

import re
from html import escape, unescape
from typing import TYPE_CHECKING, Any

from tracelens.views.widgets.svg_axes import LETTER, LONGEST, Axis, Panel, panels
from tracelens.views.widgets.svg_marks import MARKS, number

if TYPE_CHECKING:
    import plotly.graph_objects as go

WIDTH, HEIGHT = 860.0, 420.0
Pixel = float | int
INK, GRID = "#24292F", "#E6E9ED"
TAG = re.compile(r"</?[A-Za-z][^<>]*>")
NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def svg_of(figure: "go.Figure") -> str:
    """The figure as it would be drawn `WIDTH` pixels wide; "" if it has a kind of trace that is not drawn here."""
    data = [trace for trace in figure.to_plotly_json()["data"] if trace.get("visible", True) is True]
    layout: dict[str, Any] = figure.to_plotly_json()["layout"]
    if any(trace["type"] not in MARKS for trace in data):
        return ""
    height = float(layout.get("height") or HEIGHT)
    drawn = panels(data, layout, WIDTH, height)
    body = [_panel(panel) for panel in drawn]
    body += [_annotation(note, layout, drawn) for note in layout.get("annotations") or ()]
    body += [_title(layout), _legend(data, layout)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {number(WIDTH)} {number(height)}" '
        f'width="{number(WIDTH)}" height="{number(height)}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">'
        f'<rect width="100%" height="100%" fill="#FFFFFF"/>{"".join(body)}</svg>'
    )


def words(text: object) -> str:
    """What plotly would show of a text, for XML: its tags left out, its entities as characters, then escaped."""
    bare = unescape(TAG.sub("", re.sub("<br */?>", " ", str(text or ""))))
    return escape(NOT_XML.sub("\ufffd", bare))


def _text(x: Pixel, y: Pixel, text: object, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}" {more}>{words(text)}</text>'


def _panel(panel: Panel) -> str:
    left, top, width, height = panel.box
    frame = f'x="{number(left)}" y="{number(top)}" width="{number(width)}" height="{number(height)}"'
    parts = [f'<svg {frame} viewBox="{number(left)} {number(top)} {number(width)} {number(height)}">']
    for at in panel.x.ticks:
        parts.append(_line(panel.x(at), top, panel.x(at), top + height))
    for at in panel.y.ticks:
        parts.append(_line(left, panel.y(at), left + width, panel.y(at)))
    parts += [_shape(shape, panel) for shape in panel.shapes]
    parts += [MARKS[trace["type"]](trace, panel) for trace in panel.traces]
    parts.append(f'</svg><rect {frame} fill="none" stroke="{GRID}"/>')
    room = max(6, int(width / (len(panel.x.labelled()) or 1) / LETTER))
    parts += [_text(panel.x(at), top + height + 15, _short(label, room)) for at, label in panel.x.labelled()]
    parts += [_text(left - 6, panel.y(at) + 4, _short(label, LONGEST), "end") for at, label in panel.y.labelled()]
    parts.append(_text(left + width / 2, top + height + 34, _title_of(panel.x)))
    away = 24 + LETTER * min(LONGEST, max((len(label) for _, label in panel.y.labelled()), default=0))
    middle = f"{number(left - away)} {number(top + height / 2)}"
    parts.append(
        _text(left - away, top + height / 2, _title_of(panel.y), "middle", f'transform="rotate(-90 {middle})"')
    )
    return "".join(parts)


def _title_of(axis: Axis) -> str:
    title = axis.said.get("title") or ""
    return title.get("text") or "" if isinstance(title, dict) else title


def _short(label: str, most: int) -> str:
    label = unescape(TAG.sub("", re.sub("<br */?>", " ", label)))
    # Escaped as plotly's texts are: `_text` takes that back.
    return escape(label if len(label) <= most else label[: most - 1] + "…")


def _line(x0: Pixel, y0: Pixel, x1: Pixel, y1: Pixel, colour: str = GRID, more: str = "") -> str:
    ends = f'x1="{number(x0)}" y1="{number(y0)}" x2="{number(x1)}" y2="{number(y1)}"'
    return f'<line {ends} stroke="{escape(colour)}" {more}/>'


def _shape(shape: dict[str, Any], panel: Panel) -> str:
    """A line or a rectangle; others are left out."""
    if shape.get("visible") is False or shape.get("type") not in ("line", "rect"):
        return ""
    x0, x1 = (panel.place("x", shape.get("xref"), shape[end]) for end in ("x0", "x1"))
    y0, y1 = (panel.place("y", shape.get("yref"), shape[end]) for end in ("y0", "y1"))
    colour = (shape.get("line") or {}).get("color") or INK
    if shape.get("type") == "line":
        dashed = 'stroke-dasharray="5 4"' if (shape.get("line") or {}).get("dash", "solid") != "solid" else ""
        return _line(x0, y0, x1, y1, colour, dashed)
    place = f'x="{number(min(x0, x1))}" y="{number(min(y0, y1))}" width="{number(abs(x1 - x0))}" height="{number(abs(y1 - y0))}"'
    return f'<rect {place} fill="{escape(shape.get("fillcolor") or "none")}" opacity="{shape.get("opacity") or 1}"/>'


def _annotation(note: dict[str, Any], layout: dict[str, Any], drawn: list[Panel]) -> str:
    """A text; those on a panel's axes stand where they point to."""
    if note.get("visible") is False or not drawn:
        return ""
    panel = next((p for p in drawn if p.has(note.get("xref"), note.get("yref"))), drawn[0])
    x = panel.place("x", note.get("xref", "paper"), note.get("x", 0.5))
    y = panel.place("y", note.get("yref", "paper"), note.get("y", 0.5))
    anchor = {"left": "start", "right": "end"}.get(note.get("xanchor") or "", "middle")
    return _text(x, y + (12 if note.get("yanchor") == "top" else -3), note.get("text"), anchor, 'font-size="11"')


def _title(layout: dict[str, Any]) -> str:
    said: Any = layout.get("title") or {}
    title: dict[str, Any] = {"text": said} if isinstance(said, str) else said
    text = title.get("text") or ""
    # Nothing breaks its lines: a long one is set smaller.
    lines = [_text(20, 26, text, "start", f'font-size="{number(max(9.0, min(16.0, 1700 / (len(text) + 1))))}"')]
    subtitle = str((title.get("subtitle") or {}).get("text") or "").split("<br>")
    return "".join(lines + [_text(20, 46 + 16 * i, line, "start") for i, line in enumerate(subtitle) if line])


def _legend(data: list[dict[str, Any]], layout: dict[str, Any]) -> str:
    """The names of the traces in a row at the foot, smaller where they would not fit."""
    named = {
        t["name"]: t for t in data if t.get("name") and t.get("showlegend") is not False and t["type"] != "heatmap"
    }
    if layout.get("showlegend") is False or len(named) < 2:
        return ""
    parts, x, y = [], 20.0, float(layout.get("height") or HEIGHT) - 8
    wide = {name: 34 + LETTER * len(unescape(TAG.sub("", str(name)))) for name in named}
    squeeze = min(1.0, (WIDTH - 30) / sum(wide.values()))
    for name, trace in named.items():
        colour = (trace.get("marker") or {}).get("color") or (trace.get("line") or {}).get("color")
        colour = colour if isinstance(colour, str) else INK
        parts.append(
            f'<circle cx="{number(x)}" cy="{number(y - 4)}" r="5" fill="{escape(colour)}"/>'
            + _text(x + 10, y, name, "start")
        )
        x += wide[name]
    return f'<g transform="translate({number(20 - 20 * squeeze)} {number(y - y * squeeze)}) scale({squeeze:.3f})">{"".join(parts)}</g>'
