"""`FeatureDriftExplorer`: every live feature of an audit in a scatter, and the card of the one that is looked at."""

from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.views.drift_figures import axes, changes, group_rows, ink, layers_of, ring, scatter
from tracelens.views.escaping import in_figure
from tracelens.views.widgets.card import card_style, feature_card, neighbour_rows
from tracelens.views.widgets.choosing import DRAWN_AT_MOST, comparison, listed, thinned
from tracelens.views.widgets.drift_controls import VIEWS, DriftControls, importance_axis
from tracelens.views.widgets.drift_table import AXES, LiveFeatures
from tracelens.views.widgets.shell import Explorer

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.audit_report import AuditReport

PAGE = 200
"""Features in the list at a time."""
FIGURE, LIST, STILL = 400, 112, 520
"""Heights in pixels."""
SENTENCE = 120
"""Characters of a line above the still figure."""


class FeatureDriftExplorer(Explorer):
    """Live features in a scatter with axes to choose, filters, a brush, a list (the worst first), and the card of one feature.

    All of it reads what the report holds; nothing runs a model. A click on a point, the list, its buttons and `select` do the same.

    Attributes:
        controls: axes and filters, each a widget: `view`, `x`, `y`, `log`, `behaviour`, `site`, `damage`, `min_tokens`, `search`.
        figure: the scatter.
        list, previous, next, jump, clear: the keyboard's way to a feature, to those like it, and out of a brush.
        selected: the row of the feature that is looked at, in `live`; None if there is none.
        live: the arrays it draws from.
    """

    def __init__(self, report: "AuditReport") -> None:
        super().__init__()
        self.report = report
        self.live = LiveFeatures(report)
        self.controls = DriftControls(self.live, report.settings.get("min_active", 0))
        self.layers = layers_of(self.live)
        self.selected: int | None = None
        self.brushed: np.ndarray | None = None
        self._order = np.arange(len(self.live))
        self._drawn = thinned(self.live, self._order)
        self._rows = group_rows(self.live, self.layers, self._drawn)
        self._shown = self.controls.choice().mask(self.live)
        self.selected = 0 if len(self.live) else None
        self._build()
        if self.selected is not None:
            self._show_card()
        self._relist()
        self._watch()

    def select(self, site: str, feature: int) -> None:
        """Looks at a feature: rings its point and shows its card. Raises `UnknownNameError` for a feature that is not live."""
        self._look_at(self.live.row(site, feature))

    def brush(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        """Takes the features between these ends of the axes, as a box drawn in the figure does."""
        inside = np.ones(len(self.live), bool)
        for name, (low, high) in ((self.controls.x.value, x), (self.controls.y.value, y)):
            values = self.live.values[name]
            inside &= (values >= low) & (values <= high)
        self._take(inside & self._shown, paint=True)

    def still(self) -> "go.Figure":
        """The scatter as it stands, as a static figure."""
        import plotly.graph_objects as go

        lines = "<br>".join(wrap(in_figure(str(self)), SENTENCE))
        title = {"text": lines, "font": {"size": 12}}
        margin = {"t": 64 + 16 * lines.count("<br>")}
        return go.Figure(self.figure).update_layout(
            title=title, margin=margin, height=STILL, width=None, dragmode="zoom"
        )

    def __str__(self) -> str:
        return f"{len(self.live):,} live features of {self.report.label}: {self._sentence()}"

    def _build(self) -> None:
        import ipywidgets as widgets

        from tracelens.views.widgets.drift_layout import arranged

        c = self.controls
        bare = scatter(self.live, self.layers, self._drawn, c.x.value, c.y.value, log=c.log.value)
        bare.update_layout(height=FIGURE, margin={"l": 64, "r": 12, "t": 44, "b": 48}, dragmode="select", autosize=True)
        # A browser that is still loading plotly loses what is changed: the figure is whole before it lives.
        bare.layout.shapes[0].update(self._ring())
        self.figure = self._live(bare)
        self.summary = widgets.HTML()
        self.card = widgets.HTML()
        self.list = widgets.Select(options=[], description="", layout={"width": "100%", "height": f"{LIST}px"})
        self.previous = widgets.Button(description="◀ previous", tooltip="the feature before in the list")
        self.next = widgets.Button(description="next ▶", tooltip="the feature after in the list")
        self.clear = widgets.Button(description="clear brush", tooltip="take all features again", disabled=True)
        self.jump = widgets.Dropdown(
            options=[("go to a related feature", "")], tooltip="features that merge with it, or write alike"
        )
        self.place = widgets.Label()
        self._assemble(*arranged(self, card_style()))
        self.box.add_class("tracelens-drift")

    def _watch(self) -> None:
        c = self.controls
        c.view.observe(lambda change: self._guarded(lambda: self._set_view(change["new"])), "value")
        for control in (c.x, c.y, c.log):
            control.observe(lambda change: self._guarded(self._move), "value")
        for control in (c.behaviour, c.site, c.damage, c.min_tokens, c.search):
            control.observe(lambda change: self._guarded(self._refresh), "value")
        self.list.observe(self._listed, "value")
        self.previous.on_click(lambda button: self._step(-1))
        self.next.on_click(lambda button: self._step(1))
        self.clear.on_click(lambda button: self._take(None, paint=True))
        self.jump.observe(self._jumped, "value")
        self._picked: dict[int, list[int]] = {}
        for i in range(len(self.layers.groups)):
            trace = self.figure.data[i]
            trace.on_click(lambda trace, points, state, i=i: self._clicked(i, points.point_inds))
            trace.on_selection(lambda trace, points, selector, i=i: self._picking(i, points.point_inds))
            trace.on_deselect(lambda trace, points, i=i: i or self._take(None))

    def _set_view(self, view: str) -> None:
        if view not in VIEWS:
            return
        self._quiet = True
        self.controls.x.value, self.controls.y.value = (
            importance_axis(self.live) if n == "importance" else n for n in VIEWS[view]
        )
        self._quiet = False
        self._move()

    _quiet = False
    """Whether controls are being set by the explorer itself."""

    def _move(self) -> None:
        """Draws the points at other axes."""
        if self._quiet:
            return
        c = self.controls
        c.show_definitions()
        self._quiet = True
        c.view.value = c.view_of(c.x.value, c.y.value)
        self._quiet = False
        self._draw(moved=True)

    def _refresh(self) -> None:
        """Chooses anew, and draws what is left."""
        self._shown = self.controls.choice().mask(self.live)
        self.brushed = None
        self._draw(moved=False)
        self._relist()

    def _draw(self, *, moved: bool) -> None:
        c = self.controls
        drawn = self._drawn
        if len(self.live) > DRAWN_AT_MOST:
            drawn = thinned(self.live, np.flatnonzero(self._shown & ~self._placeless()))
        text = drawn is not self._drawn
        self._drawn = drawn
        self._rows = group_rows(self.live, self.layers, drawn)
        new = changes(
            *(self.live, self.layers, drawn, c.x.value, c.y.value),
            log=c.log.value,
            shown=self._shown,
            text=text,
            ends=moved or text,
        )
        with self.figure.batch_update():
            for trace, change in zip(self.figure.data, new, strict=False):
                trace.update(change, overwrite=True)
                if trace.selectedpoints is not None:
                    trace.selectedpoints = None
            self.figure.layout.shapes[0].update(self._ring())
            self.figure.layout.selections = ()
            if moved:
                self.figure.update_layout(axes(self.live, c.x.value, c.y.value, log=c.log.value))
        self._tell()

    def _ring(self) -> dict[str, Any]:
        c = self.controls
        return ring(self.live, self.selected, c.x.value, c.y.value, log=c.log.value)

    def _look_at(self, row: int) -> None:
        self.selected = row
        self._show_card()
        # The shape alone: `update` would have the page draw all points anew.
        self.figure.plotly_relayout({f"shapes[0].{name}": value for name, value in self._ring().items()})
        self._quiet = True
        self._show_in_list()
        self._quiet = False

    def _show_card(self) -> None:
        site, feature = str(self.live.site[self.selected]), int(self.live.feature[self.selected])
        self.card.value = feature_card(self.report, site, feature, live=self.live)
        related = [(label, k) for label, other in neighbour_rows(self.report, site, feature) if (k := self.live.index.get((site, other)))
                   is not None]  # fmt: skip
        self._quiet = True
        self.jump.options = [("go to a related feature" if related else "no related feature is kept", ""), *related]
        self._quiet = False

    def _relist(self) -> None:
        mask = self._shown if self.brushed is None else self._shown & self.brushed
        self._order = np.flatnonzero(mask)
        self._page = -1
        self._quiet = True
        self._show_in_list()
        self._quiet = False
        self._tell()

    _page = -1

    def _show_in_list(self) -> None:
        """The page of the list that holds the selected feature, if the list has it; else its first."""
        place = int(np.searchsorted(self._order, self.selected)) if self.selected is not None else len(self._order)
        there = bool(place < len(self._order) and self._order[place] == self.selected)
        page = place // PAGE if there else max(0, self._page)
        if page != self._page:
            self._page = page
            self.list.options = listed(self.live, self._order[page * PAGE : (page + 1) * PAGE].tolist())
        self.list.value = self.selected if there else None
        n = len(self._order)
        self.place.value = f"{place + 1:,} of {n:,}, worst first" if there else f"{n:,}, worst first"
        self.previous.disabled = not n or (there and place == 0)
        self.next.disabled = not n or (there and place == n - 1)

    def _step(self, by: int) -> None:
        if not len(self._order):
            return
        place = int(np.searchsorted(self._order, -1 if self.selected is None else self.selected))
        there = bool(place < len(self._order) and self._order[place] == self.selected)
        # From a feature that the list does not have, the next is the first that is less bad.
        place += by if there else min(by, 0) if by < 0 else 0
        self._look_at(int(self._order[min(max(place, 0), len(self._order) - 1)]))

    def _listed(self, change: Any) -> None:
        if not self._quiet and change["new"] is not None:
            self._look_at(int(change["new"]))

    def _jumped(self, change: Any) -> None:
        if not self._quiet and change["new"] not in (None, ""):
            self._look_at(int(change["new"]))

    def _clicked(self, group: int, points: list[int]) -> None:
        if points:
            self._look_at(int(self._rows[group][points[0]]))

    def _picking(self, group: int, points: list[int]) -> None:
        """Gathers what the brush holds: plotly tells it trace by trace."""
        self._picked[group] = points
        if group == len(self.layers.groups) - 1:
            inside = np.zeros(len(self.live), bool)
            for i, found in self._picked.items():
                inside[self._rows[i][np.array(found, dtype=np.int64)]] = True
            self._picked = {}
            self._take(inside)

    def _take(self, inside: np.ndarray | None, *, paint: bool = False) -> None:
        """The brushed features, None for no brush; `paint` where the figure does not show it already."""
        self.brushed = inside if inside is not None and inside.any() else None
        self.clear.disabled = self.brushed is None
        if paint:
            with self.figure.batch_update():
                for i, rows in enumerate(self._rows):
                    self.figure.data[i].selectedpoints = (
                        None if self.brushed is None else np.flatnonzero(self.brushed[rows])
                    )
                self.figure.layout.selections = ()
        self._relist()

    def _sentence(self) -> str:
        mask = self._shown if self.brushed is None else self._shown & self.brushed
        how = "brushed" if self.brushed is not None else "chosen"
        sentence = comparison(self.live, mask, how)
        placeless = self._placeless()
        if missing := int((placeless & mask).sum()):
            sentence += f" {missing:,} of them have no number on an axis ({', '.join(self._gaps())}) and are not drawn."
        if int((self._shown & ~placeless).sum()) > len(self._drawn):
            sentence += f" {len(self._drawn):,} points are drawn: all safety features, the worst, others at random; the numbers are of all."
        return sentence

    def _placeless(self) -> np.ndarray:
        """Features that lack a number on one of the axes."""
        return np.isnan(self.live.values[self.controls.x.value]) | np.isnan(self.live.values[self.controls.y.value])

    def _gaps(self) -> list[str]:
        sides = dict.fromkeys((self.controls.x.value, self.controls.y.value))
        return [AXES[name].title for name in sides if np.isnan(self.live.values[name]).any()]

    def _tell(self) -> None:
        from html import escape

        self.summary.value = f'<div class="tl-summary" role="status">{escape(self._sentence())}</div>'

    def _wear(self, dark: bool) -> None:
        super()._wear(dark)
        self.figure.layout.shapes[0].line.color = ink(dark=dark)
