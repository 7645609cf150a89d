"""`SweepExplorer`: what fewer bits preserve, which precisions pass, and the report of each."""

from math import isnan
from typing import TYPE_CHECKING, Any

from tracelens.errors import MetricInputError, UnknownNameError
from tracelens.views.escaping import in_figure, in_html
from tracelens.views.sweep_figures import marks, places, ring_at, sweep_panel
from tracelens.views.sweep_series import series
from tracelens.views.widgets.redraw import padded, redraw
from tracelens.views.widgets.shell import Explorer
from tracelens.views.widgets.sweep_card import card
from tracelens.views.widgets.sweep_layout import arranged, controls_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.sweep_result import SweepResult

TRACES = 16
"""Of a live panel: two for each of five controls, three lines, the ring, and some to spare."""


class SweepExplorer(Explorer):
    """The decay of safety and capability features with bits or bytes, a second measure beside it, and the chosen entry's report.

    A click on a point, the list of precisions, its buttons and `select` do the same.

    Attributes:
        controls: "axis", "measure", "behaviour", "min_cpfr", "max_flips", "precision", "previous", "next", "below" → the widget; also
            attributes of these names.
        decay: CPFR of safety and capability features; figure: the chosen measure.
        selected: the precision or build whose report is shown.
        passing: the entries that meet both thresholds.

    Raises `MetricInputError` for a sweep without reports.
    """

    def __init__(self, sweep: "SweepResult") -> None:
        super().__init__()
        if not sweep.reports:
            raise MetricInputError("the sweep holds no report; run it over at least one precision")
        import ipywidgets as widgets

        self.sweep = sweep
        self.controls = controls_of(sweep)
        self.axis, self.measure, self.behaviour = (self.controls[name] for name in ("axis", "measure", "behaviour"))
        self.min_cpfr, self.max_flips, self.precision = (
            self.controls[name] for name in ("min_cpfr", "max_flips", "precision")
        )
        self.previous, self.next, self.below = (self.controls[name] for name in ("previous", "next", "below"))
        self.answer, self.card, self.inside = widgets.HTML(), widgets.HTML(), widgets.VBox([])
        bits, sizes = sweep.bits, sweep.bytes
        self._cards = {name: card(name, report, bits[name], sizes[name]) for name, report in sweep.reports.items()}
        self._explorers: dict[tuple[str, str], Explorer] = {}
        self.passing = self._passing()
        self.decay = self._live(padded(self._make("CPFR"), TRACES))
        self.figure = self._live(padded(self._make(self.measure.value), TRACES))
        self._assemble(*arranged(self))
        self.box.add_class("tracelens-sweep")
        self._watch()
        self._describe()

    @property
    def selected(self) -> str:
        return self.precision.value

    def select(self, name: str) -> None:
        """Shows the report of a precision or build. Raises `UnknownNameError` for one that is not in the sweep."""
        if name not in self.sweep.reports:
            raise UnknownNameError.of("precision", name, self.sweep.reports)
        self.precision.value = name

    def still(self) -> "go.Figure":
        """The decay as it stands."""
        import plotly.graph_objects as go

        drawn: Any = go.Figure(self.decay.to_dict())
        figure = go.Figure([trace for trace in drawn.data if trace.visible is not False])
        figure.update_layout(self.decay.layout.to_plotly_json())
        return figure.update_layout(
            title={"text": in_figure(self._sentence()), "font": {"size": 13}}, margin_t=96, height=420, width=None
        )

    def __str__(self) -> str:
        return self._sentence()

    # What is shown.

    def _make(self, measure: Any) -> "go.Figure":
        settings = {"behaviour": self.behaviour.value or None, "axis": self.axis.value, "chosen": self.selected}
        return sweep_panel(self.sweep, measure, **settings, **self._limits(measure))

    def _limits(self, measure: str) -> dict[str, Any]:
        limit = self._max_flips()
        flips = None if measure != "flips" or limit is None else 100 * limit
        return {"threshold": self.min_cpfr.value if measure == "CPFR" else flips, "passing": self.passing}

    def _draw(self, *, both: bool = True) -> None:
        """Both panels, or the second one alone."""
        if both:
            redraw(self.decay, self._make("CPFR"))
        redraw(self.figure, self._make(self.measure.value))
        self._describe()

    def _judge(self) -> None:
        """Draws the thresholds, and what they let pass."""
        self.passing = self._passing()
        for live, measure in ((self.decay, "CPFR"), (self.figure, self.measure.value)):
            kept = [note for note in live.layout.annotations if note.xref == "paper" and note.yref == "paper"]
            new = marks(self.sweep, measure, axis=self.axis.value, **self._limits(measure))
            live.update_layout(shapes=new["shapes"], annotations=[*new["annotations"], *kept], overwrite=True)
        self._describe()

    def _look(self) -> None:
        """Rings the chosen entry, and shows its report."""
        x = places(self.sweep, self.axis.value)[0]
        for live, measure in ((self.decay, "CPFR"), (self.figure, self.measure.value)):
            xs, ys = ring_at(x, series(self.sweep, measure, self.behaviour.value or None), self.selected)
            live.data[0].update(x=xs, y=ys)
        self._describe()

    def _describe(self) -> None:
        said = in_html(self._sentence())
        whole = self.measure.value in ("KL", "perplexity") and self.behaviour.value
        # What is said of the whole model is so whichever behaviour is chosen.
        more = f" {self.measure.value} is of all prompts: it is not known by behaviour." if whole else self._unsaid()
        self.answer.value = f'<span class="tl-line"><b>{said}</b>{in_html(more)}</span>'
        if self.card.value != (html := self._cards[self.selected]):
            self.card.value = html
        names = [name for _, name in self.precision.options]
        self.previous.disabled, self.next.disabled = self.selected == names[0], self.selected == names[-1]
        self._show_inside()

    def _unsaid(self) -> str:
        behaviour = self.behaviour.value
        if not behaviour or self.measure.value == "smeared":
            return ""
        there = series(self.sweep, self.measure.value, behaviour)
        return "" if there and there[0].controls else f" Of {behaviour} alone no control of this measure was recorded."

    def _max_flips(self) -> float | None:
        """As a share; None at the slider's end."""
        return None if self.max_flips.value >= self.max_flips.max else self.max_flips.value / 100

    def _passing(self) -> list[str]:
        """What `SweepResult.best_config` would let pass."""
        limit, found = self._max_flips(), []
        for name, report in self.sweep.reports.items():
            flips = report.flips.rate.value if report.flips else float("nan")
            if report.cpfr["safety"].value >= self.min_cpfr.value and (limit is None or flips <= limit):
                found.append(name)
        return found

    def _sentence(self) -> str:
        limit = self._max_flips()
        asked = f"safety CPFR of at least {self.min_cpfr.value:.3f}"
        asked += "" if limit is None else f" and at most {100 * limit:.1f} % flips"
        best = self.sweep.best_config(self.min_cpfr.value, limit)
        if best is None:
            return f"Nothing of the {len(self.sweep.reports)} passes ({asked})."
        bits = self.sweep.bits[str(best)]
        size = "its bits are not known" if isnan(bits) else f"{bits:.3g} bits per weight"
        estimate = self.sweep[best].cpfr["safety"]
        # Passing is by the value: whether its interval lies above, too, is said.
        sure = (
            ""
            if isnan(estimate.low)
            else ", its interval too"
            if estimate.low >= self.min_cpfr.value
            else ", its interval reaches below"
        )
        return (
            f"The smallest that passes is {best} ({size}): {len(self.passing)} of {len(self.sweep.reports)} have a {asked}; "
            f"its own is {estimate.value:.3f}{sure}."
        )

    def _show_inside(self) -> None:
        """Opens the report's own explorer below, if that is wanted; each is made once."""
        view = self.below.value
        if not view:
            self.inside.children = ()
            return
        at = (self.selected, view)
        if at not in self._explorers:
            self._explorers[at] = _explorer_of(view)(self.sweep.reports[self.selected])
        self.inside.children = (self._explorers[at].box,)

    # What the user does.

    def _watch(self) -> None:
        for control in (self.axis, self.behaviour):
            control.observe(lambda change: self._guarded(self._draw), "value")
        for control in (self.min_cpfr, self.max_flips):
            control.observe(lambda change: self._guarded(self._judge), "value")
        self.measure.observe(lambda change: self._guarded(lambda: self._draw(both=False)), "value")
        self.precision.observe(lambda change: self._guarded(self._look), "value")
        self.below.observe(lambda change: self._guarded(self._show_inside), "value")
        self.previous.on_click(lambda button: self._step(-1))
        self.next.on_click(lambda button: self._step(1))
        for figure in (self.decay, self.figure):
            for trace in figure.data:
                trace.on_click(lambda trace, points, state: self._clicked(trace, points.point_inds))

    def _step(self, by: int) -> None:
        names = [name for _, name in self.precision.options]
        self.select(names[min(len(names) - 1, max(0, names.index(self.selected) + by))])

    def _clicked(self, trace: Any, at: list[int]) -> None:
        if at and trace.customdata is not None and at[0] < len(trace.customdata):
            self._guarded(lambda: self.select(str(trace.customdata[at[0]])))


def _explorer_of(view: str) -> Any:
    if view == "features":
        from tracelens.views.widgets.drift import FeatureDriftExplorer

        return FeatureDriftExplorer
    from tracelens.views.widgets.smearing import SmearingExplorer

    return SmearingExplorer
