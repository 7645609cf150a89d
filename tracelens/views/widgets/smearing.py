"""`SmearingExplorer`: which features merge, at thresholds that can be moved, in which groups, and on which tokens."""

from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.auditing.tables import CAPABILITY
from tracelens.views.escaping import in_figure, in_html, visible
from tracelens.views.smearing_figures import overview_panel, threshold_edge, threshold_shapes
from tracelens.views.smearing_group_figures import group_panel
from tracelens.views.style import CONTROL
from tracelens.views.widgets.choosing import short
from tracelens.views.widgets.redraw import redraw
from tracelens.views.widgets.shell import Explorer
from tracelens.views.widgets.smearing_card import NO_EVIDENCE, counts_html, noise_sentence, pair_card
from tracelens.views.widgets.smearing_layout import arranged, controls_of
from tracelens.views.widgets.smearing_pairs import Group, StoredPairs, drawn

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.audit_report import AuditReport

LISTED, GROUPS = 200, 60
"""Pairs in the list, groups in the dropdown."""
IN_GRAPH, IN_MATRIX = 40, 150
"""Features of a group that are drawn; beyond, those with the most and the strongest pairs."""
IN_LINES = 400
"""Pairs of a graph that are drawn, those that rose most."""


class SmearingExplorer(Explorer):
    """Pairs of features that the quantized model tells apart less than the reference, and the groups that they form.

    The sliders start at the audit's own thresholds and go down to those at which pairs were stored; nothing is measured again. A click on a
    point, on a mark of the graph or on a cell of the matrix, the list, its buttons and `select` do the same.

    Attributes:
        controls: "tau", "delta", "site", "which", "reset", "group", "how", "list", "previous", "next" → the widget; also attributes of
            these names.
        pairs: the stored pairs.
        figure: cosine before against cosine after; groups_figure: the chosen group.
        rows: rows of `pairs` that are smeared at these thresholds and pass the filters, worst first.
        groups: connected components of these: site, features, rows.
        selected: row of the pair whose card is shown; None if there is none.
    """

    def __init__(self, report: "AuditReport") -> None:
        super().__init__()
        import ipywidgets as widgets

        self.report, self.pairs = report, StoredPairs(report)
        self.controls = c = controls_of(self.pairs)
        self.tau, self.delta, self.site, self.which, self.reset = (
            c[n] for n in ("tau", "delta", "site", "which", "reset")
        )
        self.group, self.how, self.list, self.previous, self.next = (
            c[n] for n in ("group", "how", "list", "previous", "next")
        )
        self.summary, self.card, self.place = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.rows: np.ndarray = np.zeros(0, int)
        self.groups: list[Group] = []
        self.selected: int | None = None
        self._quiet = False
        self._drawn = drawn(self.pairs)
        self._safe = self._safety_by_site()
        self.figure = self._live(overview_panel(self.pairs, self._drawn, self.tau.value, self.delta.value))
        self.groups_figure = self._live(group_panel(self.pairs, np.zeros(0, int), np.zeros(0, int)))
        self._recount()
        self._assemble(*arranged(self))
        self.box.add_class("tracelens-smearing")
        self._watch()

    def select(self, site: str, feature_i: int, feature_j: int) -> None:
        """Shows the card of a stored pair, in either order. Raises `UnknownNameError` if it was not stored."""
        self._look_at(self.pairs.row(site, feature_i, feature_j))

    def still(self) -> "go.Figure":
        """The scatter as it stands."""
        import plotly.graph_objects as go

        figure: Any = go.Figure(self.figure.to_dict())
        figure.data = tuple(trace for trace in figure.data if trace.x is not None and len(trace.x))
        x, y = threshold_edge(self.tau.value, self.delta.value, figure.layout.xaxis.range, figure.layout.yaxis.range)
        edge = {"color": CONTROL["noise"], "width": 2, "dash": "dot"}
        figure.add_scatter(x=x, y=y, mode="lines", name="smeared: above", line=edge)
        # What stands in for the widget draws lines, not paths.
        figure.layout.shapes = ()
        heading = {"text": in_figure(str(self)), "font": {"size": 13}}
        return figure.update_layout(title=heading, margin_t=96, height=420, width=None)

    def __str__(self) -> str:
        kinds = f" of {len(self.pairs):,} stored" if self.report.evidence else ""
        groups = f"{len(self.groups):,} group{'s' * (len(self.groups) != 1)}"
        return (
            f"{len(self.rows):,}{kinds} pairs of features of {visible(self.report.label, 60)} have a cosine of at least "
            f"{self.tau.value:.2f} that rose by {self.delta.value:.2f} or more; they form {groups}."
        )

    # What is shown.

    def _recount(self) -> None:
        """After a threshold or a filter moved."""
        self.rows = np.flatnonzero(
            self.pairs.smeared(self.tau.value, self.delta.value) & self.pairs.among(self.site.value, self.which.value)
        )
        # First what the eye follows.
        self._veil()
        self.groups = self.pairs.groups(self.rows)
        self._quiet = True
        try:
            self._fill_groups()
            self._fill_list()
        finally:
            self._quiet = False
        self._describe()
        if self.selected is None and len(self.rows):
            self._look_at(int(self.rows[0]))
        else:
            self._draw_group()
            self._show_card()

    def _filter(self) -> None:
        """Other pairs are looked at: the card is of one of them."""
        passing = self.pairs.among(self.site.value, self.which.value)
        if self.selected is not None and not passing[self.selected]:
            self.selected = None
        self._recount()

    def _fill_groups(self) -> None:
        options = [
            (
                f"{len(members):,} features, {len(rows):,} pairs"
                + (", safety" if (self.pairs.kind[rows] < 2).any() else ""),
                k,
            )
            for k, (_, members, rows) in enumerate(self.groups[:GROUPS])
        ]
        self.group.options = [(f"{k + 1}: {text}", k) for text, k in options]
        self.group.value = self._group_of(self.selected) if options else None

    def _fill_list(self) -> None:
        shown = self.rows[:LISTED].tolist()
        self.list.options = [(self._label(row), row) for row in shown]
        self.list.value = self.selected if self.selected in shown else None

    def _label(self, row: int) -> str:
        p = self.pairs
        kinds = " + ".join(visible(str(b), 24) for b in (p.behaviour_i[row], p.behaviour_j[row]))
        return (
            f"#{p.feature_i[row]} + #{p.feature_j[row]} · {p.cos_ref[row]:.2f} → {p.cos_quant[row]:.2f} · {kinds} · "
            f"{p.n_active[row]:,.0f} tokens · {visible(short(str(p.site[row])), 40)}"
        )

    def _group_of(self, row: int | None) -> int:
        """Index of the listed group that holds the pair; 0 if none does."""
        return next((k for k, (*_, rows) in enumerate(self.groups[:GROUPS]) if row is not None and row in rows), 0)

    def _veil(self) -> None:
        layout: Any = self.figure.layout
        self.figure.layout.shapes = threshold_shapes(
            self.tau.value, self.delta.value, layout.xaxis.range, layout.yaxis.range, dark=self.dark
        )

    def _describe(self) -> None:
        p, own = self.pairs, self.pairs.own
        smeared = p.smeared(self.tau.value, self.delta.value) & p.among(self.site.value, self.which.value)
        notes = [
            f"<b>{in_html(str(self))}</b> {counts_html(p, smeared, self.site.value)}. {in_html(noise_sentence(self.report))}"
        ]
        if self.tau.value < own[0] - 1e-9 or self.delta.value < own[1] - 1e-9:
            notes.append("The control was counted at the audit's thresholds only, not at these lower ones.")
            if p.left_out:
                notes.append(
                    f"{p.left_out:,} pairs with smaller rises were too many to be stored: at these thresholds some are missing."
                )
        if self.report.evidence is None:
            notes.append(f"The thresholds can only be raised. {NO_EVIDENCE}")
        if self.site.value or self.which.value != "all":
            notes.append("The points are those of all pairs.")
        if len(self._drawn) < len(p):
            notes.append(
                f"{len(self._drawn):,} of {len(p):,} points are drawn: all with safety features, the worst, others at random."
            )
        if len(self.rows) > LISTED:
            notes.append(f"The list holds the worst {LISTED}.")
        if len(self.groups) > GROUPS:
            notes.append(f"{GROUPS} of the groups can be chosen, those with safety features and the largest first.")
        self.summary.value = f'<span class="tl-line">{" ".join(notes)}</span>'

    def _draw_group(self) -> None:
        chosen, how = self.group.value, self.how.value
        if chosen is None or not self.groups:
            nothing = np.zeros(0, int)
            redraw(self.groups_figure, group_panel(self.pairs, nothing, nothing, how, title="no pair is smeared"))
            return
        site, members, rows = self.groups[chosen]
        shown, kept = self._strongest(members, rows, IN_GRAPH if how == "graph" else IN_MATRIX)
        title = f"{len(members):,} features"
        if len(shown) < len(members) or len(kept) < len(rows):
            title += f"; drawn {len(shown)} with the strongest {len(kept):,} of {len(rows):,} pairs"
        safe = self._safe.get(site, frozenset())
        title += f"; {visible(site, 40)}"
        redraw(
            self.groups_figure,
            group_panel(self.pairs, shown, kept, how, safety=safe, chosen=self.selected, title=title),
        )

    def _strongest(self, members: np.ndarray, rows: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """At most so many features of a group, safety features first, then those with most pairs; the chosen pair's always among them."""
        p, most = self.pairs, IN_LINES if self.how.value == "graph" else len(rows)
        if len(members) > limit:
            flat = np.searchsorted(members, np.concatenate([p.feature_i[rows], p.feature_j[rows]]))
            worth = np.bincount(flat, np.tile(p.increase[rows], 2), minlength=len(members))
            safe = np.concatenate([p.behaviour_i[rows], p.behaviour_j[rows]]) != CAPABILITY
            worth[flat[safe]] += 1e6
            if self.selected is not None and self.selected in rows:
                ends = (p.feature_i[self.selected], p.feature_j[self.selected])
                worth[np.searchsorted(members, ends)] += 1e9
            members = np.sort(members[np.argsort(-worth, kind="stable")[:limit]])
            rows = rows[np.isin(p.feature_i[rows], members) & np.isin(p.feature_j[rows], members)]
        kept = rows[:most]
        if self.selected is not None and self.selected in rows and self.selected not in kept:
            kept = np.append(kept[:-1], self.selected)
        return members, kept

    def _show_card(self) -> None:
        row = self.selected
        ring: Any = self.figure.data[-1]
        if row is None:
            ring.update(x=[], y=[])
            self.card.value = '<div class="tl-card"><p>No pair is chosen.</p></div>'
            self.place.value = ""
            return
        self.card.value = pair_card(self.report, self.pairs, row, self.tau.value, self.delta.value)
        ring.update(x=[float(self.pairs.cos_ref[row])], y=[float(self.pairs.cos_quant[row])])
        at = np.flatnonzero(self.rows == row)
        where = f"{at[0] + 1:,} of {len(self.rows):,}" if len(at) else "not among the pairs listed"
        self.place.value = f'<span class="tl-line">{where}</span>'

    def _look_at(self, row: int) -> None:
        self.selected = row
        self._quiet = True
        try:
            listed = [value for _, value in self.list.options]
            self.list.value = row if row in listed else None
            if self.groups:
                self.group.value = self._group_of(row)
        finally:
            self._quiet = False
        # The card first: the picture of a large group takes the browser longer.
        self._show_card()
        self._draw_group()

    # What the user does.

    def _watch(self) -> None:
        for control in (self.tau, self.delta):
            control.observe(lambda _: self._react(self._recount), "value")
        for control in (self.site, self.which):
            control.observe(lambda _: self._react(self._filter), "value")
        for control in (self.group, self.how):
            control.observe(lambda _: self._react(self._draw_group), "value")
        self.list.observe(
            lambda change: self._react(lambda: self._look_at(change["new"])) if change["new"] is not None else None,
            "value",
        )
        self.reset.on_click(lambda _: self._reset())
        self.previous.on_click(lambda _: self._step(-1))
        self.next.on_click(lambda _: self._step(1))
        for trace in self.figure.data[:-1]:
            trace.on_click(lambda trace, points, state: self._clicked(trace.customdata, points.point_inds))
        for trace in (self.groups_figure.data[2], self.groups_figure.data[3]):
            trace.on_click(lambda trace, points, state: self._clicked(trace.customdata, points.point_inds))

    def _react(self, change: Any) -> None:
        if not self._quiet:
            self._guarded(change)

    def _reset(self) -> None:
        self.tau.value, self.delta.value = max(self.pairs.own[0], self.tau.min), max(self.pairs.own[1], self.delta.min)

    def _step(self, by: int) -> None:
        if not len(self.rows):
            return
        at = np.flatnonzero(self.rows == self.selected)
        to = 0 if not len(at) else min(len(self.rows) - 1, max(0, int(at[0]) + by))
        self._guarded(lambda: self._look_at(int(self.rows[to])))

    def _clicked(self, rows: Any, at: Any) -> None:
        if not at or rows is None:
            return
        found = np.asarray(rows)
        # Of a matrix: (row, column).
        value = found[tuple(at[0])] if found.ndim == 2 else found[at[0]]
        if value >= 0:
            self._guarded(lambda: self._look_at(int(value)))

    def _wear(self, dark: bool) -> None:
        super()._wear(dark)
        self._veil()

    def _safety_by_site(self) -> dict[str, frozenset[int]]:
        p, found = self.pairs, {}
        for features, behaviours in ((p.feature_i, p.behaviour_i), (p.feature_j, p.behaviour_j)):
            for k in np.flatnonzero(behaviours != CAPABILITY):
                found.setdefault(str(p.site[k]), set()).add(int(features[k]))
        return {site: frozenset(members) for site, members in found.items()}
