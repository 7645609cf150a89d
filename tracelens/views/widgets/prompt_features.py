"""The features that a prompt moves: a list, and the chosen one token by token."""

from typing import TYPE_CHECKING, Any

from tracelens.errors import UnknownNameError
from tracelens.views.escaping import in_html
from tracelens.views.widgets import prompt_html
from tracelens.views.widgets.card import card_style, feature_card
from tracelens.views.widgets.choosing import short
from tracelens.views.widgets.drift_table import LiveFeatures

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport
    from tracelens.auditing.prompt_result import FeatureChange, PromptLook

LISTED = 40
RANKINGS = [("at the answer position", "answer"), ("summed over the prompt", "prompt")]


class FeaturePanel:
    """Controls and views of a look's features.

    Attributes:
        box: the ipywidgets box.
        site, ranking, list: which site, by what, and the chosen feature (site and number).
        card: the chosen feature's card, where there is a report.
    """

    def __init__(self, report: "AuditReport | None") -> None:
        import ipywidgets as widgets

        self.report = report
        self._live = LiveFeatures(report) if report is not None else None
        self._look: PromptLook | None = None
        self._quiet = False
        self.site = widgets.Dropdown(options=[("all sites", "")], description="site")
        self.ranking = widgets.Dropdown(
            options=RANKINGS,
            description="|r − q|",
            tooltip="Activation in the reference minus that in the quantized model, absolute: at the prompt's last token, or its sum",
        )
        self.list = widgets.Select(options=[], rows=15, layout=widgets.Layout(width="300px", min_width="0"))
        self.card = widgets.HTML()
        self._strips, self._said = widgets.HTML(), widgets.HTML()
        names = {
            "site": self.site,
            "ranking": self.ranking,
            "features": self.list,
            "strips": self._strips,
            "card": self.card,
        }
        for name, control in names.items():
            control.add_class(f"tracelens-{name}")
        for control in (self.site, self.ranking):
            control.style.description_width = "46px"
            control.layout.width = "300px"
            control.observe(lambda _: self._list_features(), "value")
        self.list.observe(lambda _: self._draw(), "value")
        shown = widgets.VBox(
            [self._strips, self.card], layout=widgets.Layout(flex="1 1 0", min_width="0", overflow="hidden")
        )
        narrow = widgets.Layout(width="100%", min_width="0", overflow="hidden")
        beside = widgets.HBox([self.list, shown], layout=narrow)
        style = [widgets.HTML(card_style(), layout=widgets.Layout(display="none"))] if report is not None else []
        menus = widgets.HBox([self.site, self.ranking], layout=narrow)
        self.box = widgets.VBox([*style, menus, self._said, beside], layout=narrow)

    def show(self, look: "PromptLook") -> None:
        """The features of another look; the chosen one stays chosen if it is among them."""
        self._look = look
        sites = [("all sites", ""), *((f"{short(site)} ({n:,} move)", site) for site, n in look.n_moved.items())]
        self._quiet = True
        try:
            chosen = self.site.value
            self.site.options = sites
            self.site.value = chosen if chosen in [site for _, site in sites] else ""
        finally:
            self._quiet = False
        self._list_features()

    def select(self, site: str, feature: int) -> None:
        """Chooses a feature; raises `UnknownNameError` if it is not listed."""
        key = (site, feature)
        known = [value for _, value in self.list.options]
        if key not in known:
            raise UnknownNameError.of("feature of the list", key, known)
        self.list.value = key

    @property
    def chosen(self) -> "FeatureChange | None":
        return self._look.feature(self.list.value) if self._look is not None and self.list.value else None

    def _list_features(self) -> None:
        if self._quiet or self._look is None:
            return
        by: Any = self.ranking.value
        rows = self._look.top_features(by, site=self.site.value or None, k=LISTED)
        chosen = self.list.value
        options = [
            (prompt_html.feature_label(row, by, named=self.report is not None), (row.site, row.feature)) for row in rows
        ]
        self._quiet = True
        try:
            self.list.options = options
            keys = [key for _, key in options]
            self.list.value = chosen if chosen in keys else keys[0] if keys else None
        finally:
            self._quiet = False
        self._said.value = self._sentence(by, len(rows))
        self._draw()

    def _sentence(self, by: str, n: int) -> str:
        assert self._look is not None
        sizes: dict[str, Any] = dict(self._look.n_moved)
        site = self.site.value
        moved = sizes[site] if site else sum(sizes.values())
        if not sizes:
            text = next((note for note in self._look.notes if "SAE" in note), "No features.")
        elif not moved:
            text = "No feature moves on this prompt."
        elif not n:
            text = "No feature moves at the answer position; see the sum over the prompt."
        else:
            text = f"{moved:,} features move on this prompt; the {n} that move most are listed."
        if sizes and self.report is None:
            text += " With report=... behaviours are named and each feature has its card."
        return f'<span class="tl-small">{in_html(text)}</span>'

    def _draw(self) -> None:
        if self._quiet:
            return
        change = self.chosen
        assert self._look is not None
        self._strips.value = prompt_html.feature_html(self._look, change) if change is not None else ""
        self.card.value = self._card(change) if change is not None else ""

    def _card(self, change: "FeatureChange") -> str:
        if self.report is None or change.site not in self.report.sites:
            return ""
        label = f"Feature #{change.feature} in the audit of {self.report.label}"
        inner = feature_card(self.report, change.site, change.feature, live=self._live)
        return f"<details open><summary>{in_html(label)}</summary>{inner}</details>"
