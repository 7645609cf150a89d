"""`MutingExplorer`: features that fall silent as bits are taken away."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.views.escaping import in_figure, in_html, visible
from tracelens.views.muting_figures import STATES, at_bits, curve_panel, mosaic_panel, shares_panel
from tracelens.views.style import CAPABILITY, SAFETY
from tracelens.views.widgets.muting_card import NONE, feature_card, label
from tracelens.views.widgets.muting_layout import arranged, controls_of, filled
from tracelens.views.widgets.muting_table import MUTED, REFERENCE_BITS, MutedTable, listed
from tracelens.views.widgets.redraw import redraw
from tracelens.views.widgets.shell import Explorer

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.studies.muting import MutingThresholds
    from tracelens.studies.muting_causes import MutingTrace
    from tracelens.sweep_result import SweepResult

LISTED = 200
CHOSEN = list(STATES).index("chosen")


class MutingExplorer(Explorer):
    """One cell per live feature, which goes dark where a precision mutes it; the share that is muted, and the curve of one feature.

    Between measured precisions nothing is interpolated: shown is the measured one of fewest bits that has at least as many as the slider
    says, and above all of them the reference, in which every live feature fires. A click on a cell, the list, its buttons and `select` do
    the same.

    Args:
        sweep_or_thresholds: of a sweep, `studies.muting_thresholds(sweep)` is taken.
        causes: results of `studies.feature_muting`, each of one precision of the ladder: alone, several, or precision → result.

    Attributes:
        controls: "bits", "play", "order", "site", "who", "list", "previous", "next" → the widget; also attributes of these names.
        table: states and rates of all features.
        figure: the mosaic; shares: muted share against bits; curve: that of the chosen feature.
        shown: what the mosaic shows: a precision of the ladder or "reference".
        selected: row of `table` of the chosen feature; None if there is none.

    Raises as `muting_thresholds`, and `MetricInputError` for causes of neurons.
    """

    def __init__(
        self,
        sweep_or_thresholds: "SweepResult | MutingThresholds",
        causes: "MutingTrace | Sequence[MutingTrace] | Mapping[str, MutingTrace] | None" = None,
    ) -> None:
        super().__init__()
        import ipywidgets as widgets

        from tracelens.studies.muting import MutingThresholds, muting_thresholds

        given = sweep_or_thresholds
        self.thresholds = given if isinstance(given, MutingThresholds) else muting_thresholds(given)
        self.table = table = MutedTable(self.thresholds, listed(causes))
        self.controls = c = controls_of(table)
        self.bits, self.play, self.order, self.site = (c[name] for name in ("bits", "play", "order", "site"))
        self.who, self.list, self.previous, self.next = (c[name] for name in ("who", "list", "previous", "next"))
        self.summary, self.card, self.place = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.selected: int | None = None
        self._quiet = False
        self._rows: np.ndarray = np.zeros(0, int)
        self._arrange()
        self.figure = self._live(mosaic_panel(*self._cells()))
        self.shares = self._live(shares_panel(self.thresholds))
        self.curve = self._live(self._curve())
        self._fill_list()
        if len(self._rows):
            self._look_at(int(self._rows[0]))
        self._move()
        self._assemble(*arranged(self))
        self.box.add_class("tracelens-muting")
        self._watch()

    @property
    def shown(self) -> str:
        step = self.table.shown_at(self.bits.value)
        return self.table.precisions[step - 1] if step else "reference"

    def select(self, site: str, feature: int) -> None:
        """Shows a feature's curve. Raises `UnknownNameError` for one that is not live."""
        self._look_at(self.table.row(site, feature))

    def still(self) -> "go.Figure":
        """Muted share against bits, with the current bits."""
        import plotly.graph_objects as go

        figure = go.Figure(self.shares.to_dict())
        return figure.update_layout(
            title={"text": in_figure(str(self)), "font": {"size": 13}}, margin_t=110, height=420, width=None
        )

    def __str__(self) -> str:
        table, step = self.table, self.table.shown_at(self.bits.value)
        muted = table.state[step] >= MUTED
        sides = [
            f"{int(muted[mask].sum()):,} of {int(mask.sum()):,} {name} features"
            for name, mask in (("safety", table.safety), ("capability", ~table.safety))
        ]
        if not step:
            return f"At {self.bits.value:.4g} bits: the reference is shown, in which all {len(table):,} live features fire."
        at = f"{self.shown} ({table.bits[step - 1]:.4g} bits)"
        return f"At {self.bits.value:.4g} bits: {at} is shown, which mutes {' and '.join(sides)}."

    # What is shown.

    def _arrange(self) -> None:
        """Which feature stands in which cell."""
        table = self.table
        every = np.arange(len(table))
        if self.order.value == "by site" and len(table):
            every = np.lexsort((every, np.unique(table.site.astype(str), return_inverse=True)[1]))
        self._orders = [every[table.safety[every]], every[~table.safety[every]]]
        wide, high = 460, 285
        # As many columns as make the cells nearly square.
        self._widths = [
            max(1, int(np.ceil(np.sqrt(len(order) * wide / (high * part)))))
            for order, part in zip(self._orders, (0.3, 0.55), strict=True)
        ]

    def _cells(self) -> list[np.ndarray]:
        states = self.table.state[self.table.shown_at(self.bits.value)].copy()
        if self.selected is not None:
            # Whether the chosen one is silent is said on its card.
            states[self.selected] = CHOSEN
        return [filled(states, order, width) for order, width in zip(self._orders, self._widths, strict=True)]

    def _paint(self) -> None:
        with self.figure.batch_update():
            for trace, z in zip(self.figure.data, self._cells(), strict=True):
                trace.z = z

    def _move(self) -> None:
        """After the slider moved."""
        self._paint()
        for live in (self.shares, self.curve):
            live.layout.shapes = at_bits(self.bits.value)
        self._describe()
        self._show_card()

    def _describe(self) -> None:
        table, c = self.table, self.thresholds.comparison
        notes = [f"<b>{in_html(str(self))}</b> {self._beside()}"]
        lowest = min(table.bits, default=REFERENCE_BITS)
        if self.bits.value < lowest - 1e-9:
            notes.append(f"Nothing below {lowest:.4g} bits was measured.")
        notes.append(f"Muted: silent on at least {table.muted_at:.0%} of the tokens on which the reference fires it.")
        if not table.cause:
            notes.append("Causes are not known: give the results of studies.feature_muting as causes=.")
        elif self.shown != "reference" and self.shown not in table.cause:
            notes.append(f"Causes in {in_html(self.shown)} were not measured.")
        if table.unmatched:
            names = in_html(", ".join(table.unmatched))
            notes.append(
                f"Causes of {names} are left out: no precision of this ladder is called so; name it: causes={{'int4': ...}}."
            )
        if not isnan(c.earlier):
            notes.append(
                f'<span title="P that a safety feature needs more bits than a capability feature, ties counting half; .5 is no difference. '
                f'p: rank of the safety features among random capability features of the same sites and firing rates.">Safety falls silent '
                f"earlier with probability {c.earlier:.2f} (p = {c.p_matched:.2g} against matched random sets).</span>"
            )
        self.summary.value = f'<span class="tl-line">{" ".join(notes)}</span>'

    def _beside(self) -> str:
        """Intervals of the shares, and the control's."""
        shares: Any = self.thresholds.shares
        rows = shares[shares["precision"] == self.shown]
        said = [
            f"{in_html(name)} {share:.1%} ({low:.1%} to {high:.1%})"
            for name, share, low, high in zip(rows["set"], rows["share"], rows["low"], rows["high"], strict=True)
        ]
        return f"Shares with 95 % intervals: {'; '.join(said)}." if said else ""

    def _fill_list(self) -> None:
        table = self.table
        wanted = table.safety if self.who.value == "safety" else ~table.safety
        if self.site.value:
            wanted = wanted & (table.site == self.site.value)
        self._rows = table.first(np.flatnonzero(wanted))
        shown = self._rows[:LISTED].tolist()
        self._quiet = True
        try:
            self.list.options = [(label(self.table, row), row) for row in shown]
            self.list.value = self.selected if self.selected in shown else None
        finally:
            self._quiet = False
        silent = int((table.censored[self._rows] != "never muted").sum())
        kind = f"{self.who.value} features"
        if not len(self._rows):
            said = f"No live {kind} here."
        elif silent:
            said = f"{silent:,} of {len(self._rows):,} {kind} fall silent on this ladder, these first."
        elif not np.nan_to_num(table.rates[:, self._rows]).any():
            said = f"No {self.who.value} feature falls silent on any token at any precision."
        else:
            said = f"No {self.who.value} feature is muted at any precision; these come nearest."
        self._said = said + (f" The list holds {LISTED}." if len(self._rows) > LISTED else "")
        self._show_place()

    def _curve(self) -> "go.Figure":
        table, row = self.table, self.selected
        if row is None:
            nothing = np.zeros(0)
            return curve_panel("none", [], nothing, np.zeros((2, 0)), np.zeros((0, 0)), table.muted_at)
        colour = SAFETY if table.safety[row] else CAPABILITY
        name = f"#{table.feature[row]} {visible(str(table.behaviour[row]), 24)}"
        return curve_panel(
            name, table.bits, table.rates[:, row], table.interval(row), table.others(row), table.muted_at, colour=colour
        )

    def _look_at(self, row: int) -> None:
        self.selected = row
        self._quiet = True
        try:
            self.list.value = row if row in [value for _, value in self.list.options] else None
        finally:
            self._quiet = False
        redraw(self.curve, self._curve().update_layout(shapes=at_bits(self.bits.value)))
        self._paint()
        self._show_card()
        self._show_place()

    def _show_place(self) -> None:
        at = np.flatnonzero(self._rows == self.selected)
        where = f"{at[0] + 1:,} of {len(self._rows):,}. " if len(at) else ""
        self.place.value = f'<span class="tl-line">{where}{in_html(self._said)}</span>'

    def _show_card(self) -> None:
        step = self.table.shown_at(self.bits.value)
        self.card.value = NONE if self.selected is None else feature_card(self.table, self.selected, step)

    # What the user does.

    def _watch(self) -> None:
        from traitlets import link

        link((self.play, "value"), (self.bits, "index"))
        self.bits.observe(lambda _: self._guarded(self._move), "value")
        self.order.observe(lambda _: self._guarded(self._reorder), "value")
        for control in (self.who, self.site):
            control.observe(lambda _: self._guarded(self._fill_list), "value")
        self.list.observe(lambda change: self._chosen(change["new"]), "value")
        self.previous.on_click(lambda _: self._step(-1))
        self.next.on_click(lambda _: self._step(1))
        for part, trace in enumerate(self.figure.data):
            trace.on_click(lambda trace, points, state, part=part: self._clicked(part, points.point_inds))

    def _reorder(self) -> None:
        self._arrange()
        self._paint()

    def _chosen(self, row: int | None) -> None:
        if row is not None and not self._quiet:
            self._guarded(lambda: self._look_at(row))

    def _step(self, by: int) -> None:
        if not len(self._rows):
            return
        at = np.flatnonzero(self._rows == self.selected)
        to = 0 if not len(at) else min(len(self._rows) - 1, max(0, int(at[0]) + by))
        self._guarded(lambda: self._look_at(int(self._rows[to])))

    def _clicked(self, part: int, at: Any) -> None:
        if not at:
            return
        row, column = at[0]
        place = int(row) * self._widths[part] + int(column)
        if place < len(self._orders[part]):
            self._guarded(lambda: self._look_at(int(self._orders[part][place])))
