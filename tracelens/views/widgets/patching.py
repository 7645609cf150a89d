"""`PatchingExplorer`: what replacing activations does, place by place, and to which prompts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tracelens.errors import UnknownNameError
from tracelens.views.escaping import in_figure, in_html, visible
from tracelens.views.numbers import NOTHING
from tracelens.views.patching_map import HEIGHT, Map, patching_map, prompt_order, prompts_figure, ring_xy
from tracelens.views.patching_panels import directions
from tracelens.views.patching_words import place_of, where_of
from tracelens.views.widgets.patching_card import card, caveat, prompt_line, title
from tracelens.views.widgets.patching_choice import Entry, entries, named, nearest, offered
from tracelens.views.widgets.patching_layout import (
    ALL,
    Quiet,
    arranged,
    buttons,
    controls_of,
    offer,
    options_of_prompts,
)
from tracelens.views.widgets.patching_table import Shown, further_axes, listed
from tracelens.views.widgets.redraw import redraw
from tracelens.views.widgets.shell import Explorer

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.causal.patching_result import PatchingResult

LISTED = 50
"""Replacements in the list."""


class PatchingExplorer(Explorer):
    """Effects of replacing activations over layers, positions, heads, ...; of one of them, what it did to every prompt.

    Args:
        results: of the same prompts: repair and damage, several metrics, sites, axes; one alone works too. Or one mapping name → result.

    What the results have in common is not offered as a choice; a choice that rules out others moves to the nearest that there is.

    Attributes:
        facets: "direction", "metric", "site", "sweep", "precision", "result" → its control, as far as the results differ there.
        measure, test, mask: what the colours say, against what a replacement is tested, and whether all else is hidden.
        panel: the value of further axes, where a sweep has more than two.
        top: the replacements, largest first; previous, next: its buttons; prompt: all prompts, or one.
        figure: the heatmap, or points over a single axis; strip: the prompts behind the chosen replacement.
        arm: the chosen row of `result.rows`.

    Raises `MetricInputError` without any result, or for one that replaced nothing.
    """

    def __init__(self, *results: "PatchingResult | Mapping[str, PatchingResult]") -> None:
        super().__init__()
        import ipywidgets as widgets

        self._entries = entries(named(results))
        # All that takes long (resampling) happens here, and not when something is clicked.
        self._shown = {id(entry.result): Shown(entry.result) for entry in self._entries}
        self.entry = self._entries[0]
        self.arm = self.entry.arms[0]
        self._quiet = False
        self._map: Map
        self._rows: list[int] = []
        self._drawn_of: tuple[int, int] | None = None
        self.facets, other = controls_of(offered(self._entries), self.entry)
        self.measure, self.test, self.mask, self.panel, self.top, self.prompt = other
        self.previous, self.next = buttons()
        self.card, self.line = widgets.HTML(), widgets.HTML()
        self._enter(self.entry)
        self.figure = self._live(self._make_map().figure)
        self.strip = self._live(self._make_strip())
        self._assemble(*arranged(self))
        self.box.add_class("tracelens-patching")
        self._watch()
        self._describe()

    @property
    def result(self) -> "PatchingResult":
        """The one that is looked at."""
        return self.entry.result

    @property
    def shown(self) -> Shown:
        return self._shown[id(self.result)]

    def select(self, arm: int | None = None, **where: Any) -> None:
        """Chooses a replacement by its row in `result.rows`, or by what it replaced: `select(layer=2, group="object")`.

        Raises `UnknownNameError` if the site and sweep that are looked at have no such replacement.
        """
        if arm is None:
            rows = self.result.rows
            found = [i for i in self.entry.arms if all(rows[i].get(key) == value for key, value in where.items())]
            if not found:
                raise UnknownNameError(
                    f"nothing was replaced at {where}; one of the rows is {rows[self.entry.arms[0]]}"
                )
            arm = found[0]
        if arm not in self.entry.arms:
            raise UnknownNameError(
                f"row {arm} is not of the sweep that is shown; its rows are {self.entry.arms[0]} to {self.entry.arms[-1]}"
            )
        self.arm = arm
        with Quiet(self):
            panel = self._panel_of(arm)
            if moved := bool(self._panels) and panel != self.panel.value:
                self.panel.value = panel
            self._show_in_list()
        if moved:
            redraw(self.figure, self._make_map().figure)
        else:
            with self.figure.batch_update():
                self.figure.data[-1].update(ring_xy(self._map.rings.get(arm)), overwrite=True)
        redraw(self.strip, self._make_strip())
        self._describe()

    def step(self, by: int) -> None:
        """Chooses the next one of the list (or the one before, with -1)."""
        arms = [arm for _, arm in self.top.options]
        at = arms.index(self.arm) + by if self.arm in arms else 0
        self.select(arms[min(len(arms) - 1, max(0, at))])

    def show_prompt(self, prompt: int | None) -> None:
        """One prompt alone, with its own tokens; None for all together. Raises `UnknownNameError` for one that there is not."""
        n = len(self.result.start)
        if prompt is not None and not 0 <= prompt < n:
            raise UnknownNameError(f"there is no prompt {prompt}; give 0 to {n - 1}, or None for all")
        self.prompt.value = ALL if prompt is None else prompt

    @property
    def alone(self) -> int | None:
        """The prompt that is shown alone; None for all together."""
        return None if self.prompt.value == ALL else self.prompt.value

    def still(self) -> "go.Figure":
        """The heatmap as it stands."""
        import plotly.graph_objects as go

        above = {"text": in_figure(title(self.entry)), "font": {"size": 15}}
        return go.Figure(self.figure.to_dict()).update_layout(title=above, margin_t=80, width=None)

    def __str__(self) -> str:
        return f"{title(self.entry)}. {where_of(self.result.rows[self.arm], self.result)}: {self._value()}"

    # What is shown.

    def _enter(self, entry: Entry) -> None:
        """Makes an entry the one that is looked at, with what its controls then offer."""
        previous = None if entry is self.entry and not self._rows else self.result.rows[self.arm]
        kept = self.prompt.value
        self.entry = entry
        with Quiet(self):
            for facet, control in self.facets.items():
                control.value = entry.facets[facet]
            offer(self.measure, [(name, name) for name in self.shown.measures])
            against = {"placebo": "placebo", "0": "0"}
            offer(self.test, [(against[test], test) for test in self.shown.tests])
            offer(self.prompt, options_of_prompts(self.result, self.shown.usable), kept)
            self._panels = self._panel_options()
            offer(self.panel, [(label, key) for key, label in self._panels.items()])
            self.panel.layout.display = "" if len(self._panels) > 1 else "none"
        alike = [
            i
            for i in entry.arms
            if previous and all(self.result.rows[i].get(k) == v for k, v in previous.items() if k != "site")
        ]
        self._list()
        self.arm = alike[0] if alike else self.top.options[0][1]
        with Quiet(self):
            if self._panels:
                self.panel.value = self._panel_of(self.arm)
            self._show_in_list()

    def _table(self) -> "pd.DataFrame":
        prompt = self.alone
        if prompt is None:
            table = self.shown.of(self.entry, self.measure.value, self.test.value, hide=self.mask.value)
        else:
            table = self.shown.of_prompt(self.entry, self.measure.value, prompt)
        if len(self._panels) > 1:
            found = [i for i, arm in enumerate(table["arm"]) if self._panel_of(arm) == self.panel.value]
            table = table.iloc[found].reset_index(drop=True) if found else table
        return table

    def _make_map(self) -> Map:
        axes = self._drawn_axes()
        unit = self.result.unit if self.measure.value == "change" else ""
        self._map = patching_map(
            self._table(), axes, self.result, measure=self.measure.value, unit=unit, prompt=self.alone, chosen=self.arm
        )
        return self._map

    def _make_strip(self) -> "go.Figure":
        self._rows = prompt_order(self.result, self.arm)
        return prompts_figure(self.result, self.arm, chosen=self.alone, height=HEIGHT, order=self._rows)

    def _draw(self) -> None:
        redraw(self.figure, self._make_map().figure)
        redraw(self.strip, self._make_strip())
        self._describe()

    def _describe(self) -> None:
        prompt = self.alone
        line = "" if prompt is None else prompt_line(self.shown, self.arm, prompt)
        self.card.value = line + card(self.shown, self.arm)
        self.line.value = (
            f'<span class="tl-line">{in_html(title(self.entry))}. {in_html(caveat(self.result, self.alone))}</span>'
        )

    def _value(self) -> str:
        value = self.shown.table["effect"].iloc[self.arm]
        return f"effect {value:.3f}" if value == value else f"effect {NOTHING} (0/0)"

    def _list(self) -> None:
        """Fills the list of replacements, largest by the measure first, undetermined ones last."""
        options = listed(self.shown, self.entry, self.measure.value, self.test.value, self.alone)[:LISTED]
        with Quiet(self):
            offer(self.top, options)

    def _show_in_list(self) -> None:
        arms = [arm for _, arm in self.top.options]
        self.top.value = self.arm if self.arm in arms else None
        self.previous.disabled, self.next.disabled = self.arm == arms[0], self.arm == arms[-1]

    def _drawn_axes(self) -> tuple[str, ...]:
        axes = self.entry.axes
        return axes if len(self._panels) < 2 else tuple(directions(self.shown.of(self.entry, "effect", "0"), axes))

    def _panel_options(self) -> dict[tuple[Any, ...], str]:
        """Values of the axes that no panel has room for → what they are called; one, if there is room for all."""
        self._others = further_axes(self.shown, self.entry)
        keys = dict.fromkeys(self._panel_of(arm) for arm in self.entry.arms) if self._others else {}
        return {
            key: visible(" · ".join(place_of(a, v) for a, v in zip(self._others, key, strict=True))) for key in keys
        }

    def _panel_of(self, arm: int) -> tuple[Any, ...]:
        return tuple(self.result.rows[arm][axis] for axis in self._others)

    # What the user does.

    def _watch(self) -> None:
        for facet, control in self.facets.items():
            control.observe(lambda change, facet=facet: self._on(lambda: self._choose(facet)), "value")
        self.measure.observe(lambda change: self._on(self._relist), "value")
        self.test.observe(lambda change: self._on(self._relist), "value")
        self.mask.observe(lambda change: self._on(self._draw), "value")
        self.panel.observe(lambda change: self._on(self._draw), "value")
        self.prompt.observe(lambda change: self._on(self._relist), "value")
        self.top.observe(lambda change: self._on(self._listed), "value")
        self.previous.on_click(lambda button: self.step(-1))
        self.next.on_click(lambda button: self.step(1))
        for trace in self.figure.data[:2]:
            trace.on_click(lambda trace, points, state: self._clicked(points.point_inds, self._map.cells.get))
        for trace in self.figure.data[4:6]:
            trace.on_click(lambda trace, points, state: self._clicked(points.point_inds, self._map.points.__getitem__))
        for trace in self.strip.data[2:6]:
            trace.on_click(lambda trace, points, state: self._picked(points.point_inds))

    def _on(self, change: Any) -> None:
        if not self._quiet:
            self._guarded(change)

    def _choose(self, facet: str) -> None:
        wanted = {name: control.value for name, control in self.facets.items()}
        entry = nearest(self._entries, wanted, facet)
        moved = [f"{name} {entry.facets[name]}" for name in wanted if entry.facets[name] != wanted[name]]
        self._enter(entry)
        self._draw()
        if moved:
            self._say(f"There is no such result for {wanted[facet]}; shown: {', '.join(moved)}.")

    def _relist(self) -> None:
        self._list()
        with Quiet(self):
            self._show_in_list()
        self._draw()

    def _listed(self) -> None:
        if self.top.value is not None:
            self.select(self.top.value)

    def _clicked(self, at: list[Any], arm_of: Any) -> None:
        if at and (arm := arm_of(tuple(at[0]) if isinstance(at[0], list | tuple) else at[0])) is not None:
            self._guarded(lambda: self.select(arm))

    def _picked(self, at: list[int]) -> None:
        if at:
            prompt = self._rows[at[0]]
            self._guarded(lambda: self.show_prompt(None if prompt == self.alone else prompt))
