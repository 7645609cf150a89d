"""`PromptExplorer`: type a prompt and see what both models of a pair make of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tracelens.auditing.prompt_look import look
from tracelens.auditing.prompt_result import PromptLook
from tracelens.behaviour.refusal import AnswerTokens
from tracelens.chat import Chat
from tracelens.errors import MissingLibraryError
from tracelens.features.saes import normalise_saes
from tracelens.pair import PrecisionPair
from tracelens.views.escaping import in_html, visible
from tracelens.views.prompt_figures import look_figure, next_tokens_figure
from tracelens.views.widgets import prompt_html
from tracelens.views.widgets.prompt_bar import prompt_bar
from tracelens.views.widgets.prompt_examples import example_prompts, placeholder
from tracelens.views.widgets.prompt_features import FeaturePanel
from tracelens.views.widgets.prompt_running import Runner, said
from tracelens.views.widgets.shell import Explorer

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.audit_report import AuditReport

KEPT = 20
"""Prompts that one can go back to."""
COMPACT = {"title": None, "margin": {"l": 8, "r": 8, "t": 30, "b": 44}, "width": 400, "height": 320}
"""The figure beside the table: what its title says stands in the text."""
ATTENTION = 2
"""The tab of attention patterns, which are sent to the page when it is opened: they are large."""


class PromptExplorer(Explorer):
    """Both models of an audit on prompts that are typed: answers, margins, next tokens, features and attention.

    The one widget that runs models: in a thread, one run at a time. Numbers are those of an audit of the same prompt. One prompt is an
    anecdote: whether a change is systematic, an audit says. While a run is under way, leave its models alone in other cells.

    Args:
        source: an `Audit`, or a `PrecisionPair`.
        saes: in place of the audit's own.
        report: of an audit of these models: says which features carry a behaviour, and has their cards.
        chat: whether prompts are put into the tokenizer's chat template; see `tracelens.chat.as_chat`.
        answer_tokens: behaviour → first tokens of answers, beside those that the tokenizer's vocabulary suggests.
        max_new_tokens: of each answer, at first.

    Raises `SAEError` if the report's fingerprint is of other SAEs.

    Attributes:
        look: the `PromptLook` that is shown; None before the first.
        looks: the last ones, newest first.
        text, max_new_tokens, examples, history, tabs: the controls.
        features: the panel of features, with its controls `site`, `ranking` and `list`.
        attention: the `AttentionPair`; None without CircuitsVis.
    """

    def __init__(
        self,
        source: Any,
        saes: Any = None,
        *,
        report: "AuditReport | None" = None,
        chat: Chat = "auto",
        answer_tokens: Mapping[str, AnswerTokens] | None = None,
        max_new_tokens: int = 24,
    ) -> None:
        super().__init__()
        self.pair: PrecisionPair = getattr(source, "pair", source)
        self.saes = normalise_saes(saes) if saes else dict(getattr(source, "saes", {}))
        self.report, self.answer_tokens = report, answer_tokens
        self.chat: Chat = chat
        self.look: PromptLook | None = None
        self.looks: list[PromptLook] = []
        if report is not None and self.saes:
            report.fingerprint.check(self.saes)
        self._runner = Runner(self._work, progress=self._progress, done=self._done)
        self._quiet, self._attended = False, None
        self._controls(max_new_tokens)
        self._panels()
        self._arrange()
        self._show(None)

    def __str__(self) -> str:
        if self.look is None:
            return "PromptExplorer: no prompt has been run"
        margins = "; ".join(f"{m.behaviour} {m.reference:+.2f} → {m.quantized:+.2f} nats" for m in self.look.margins)
        return f"{visible(self.look.reading.text, 80)!r}: {margins}; KL {self.look.kl_answer:.3g} nats at the answer"

    def run(self, text: str) -> PromptLook:
        """Runs a prompt, and blocks until it is shown. Raises what is wrong with it (`PromptError`, `NonFiniteError`), after showing it."""
        self.text.value = text
        self._begin(text)
        return self._runner.now(text)

    def start(self, text: str | None = None) -> None:
        """Runs a prompt (what is typed, by default) in the background; a run under way is given up."""
        typed = str(self.text.value) if text is None else text
        self.text.value = typed
        self._begin(typed)
        self._runner.start(typed)

    def stop(self) -> None:
        """Stops after the current step; what is there is shown."""
        self._runner.stop()

    def wait(self, seconds: float | int | None = None) -> None:
        """Until the run in the background has ended, or so many seconds."""
        self._runner.wait(seconds)

    @property
    def running(self) -> bool:
        return self._runner.running

    def still(self) -> "go.Figure":
        return look_figure(self.look)

    # What runs.

    def _work(self, text: str, tick: Any) -> PromptLook:
        return look(
            self.pair,
            self.saes,
            text,
            chat=self.chat,
            answer_tokens=self.answer_tokens,
            fingerprint=self.report.fingerprint if self.report is not None else None,
            max_new_tokens=self._asked,
            tick=tick,
        )

    def _begin(self, text: str) -> None:
        self._asked = int(self.max_new_tokens.value)
        self.text.running = True
        self._status(f"Running both models on {visible(text, 60)!r} …")

    def _progress(self, found: PromptLook, n: int) -> None:
        self._status(f"{n} tokens generated, up to {2 * self._asked} …")
        if n == 0:
            self._show(found)
        else:
            self._answers.value = prompt_html.answers_html(found)

    def _done(self, text: str, result: PromptLook | Exception) -> None:
        self.text.running = False
        if isinstance(result, Exception):
            self._say(said(result))
            return
        self._say("")
        self.looks = [result, *self.looks][:KEPT]
        self._list_history()
        self._show(result)

    # What is shown.

    def _show(self, found: PromptLook | None) -> None:
        """Everything about a prompt."""
        self.look = found
        if found is None:
            self._answers.value = "<p>Type a request and press Enter.</p>"
            return
        self._answers.value = prompt_html.answers_html(found)
        self._tokens.value = prompt_html.tokens_html(found)
        self._margins.value = "".join(part(found) for part in (prompt_html.margins_html, prompt_html.truth_html))
        self._notes.value = prompt_html.notes_html(found)
        self._draw_next(found)
        self.features.show(found)
        self._attend()

    def _draw_next(self, found: PromptLook) -> None:
        drawn: Any = next_tokens_figure(found)
        with self.figure.batch_update():
            for live, made in zip(self.figure.data, drawn.data, strict=True):
                live.update({name: value for name, value in made.to_plotly_json().items() if name != "type"})

    def _attend(self) -> None:
        """Draws the attention patterns, if their tab is open and they are not there yet."""
        found = self.look
        if self.tabs.selected_index != ATTENTION or found is None or found is self._attended:
            return
        self._attended = found
        shown = found.patterns is not None and self.attention is not None
        self._attention_note.value = (
            "" if shown else self._no_attention or "No attention patterns were kept of this prompt."
        )
        if self.attention is not None:
            self.attention.box.layout.display = "" if shown else "none"
        if found.patterns is not None and self.attention is not None:
            self.attention.show(found.reading.tokens, *found.patterns)

    def _list_history(self) -> None:
        self._quiet = True
        try:
            rows = [(f"{i + 1}. {visible(found.reading.text, 60)}", i) for i, found in enumerate(self.looks)]
            self.history.options = rows
            self.history.index = 0
            self.history.disabled = False
        finally:
            self._quiet = False

    def _go_back(self) -> None:
        if self._quiet or self.history.value is None:
            return
        found = self.looks[self.history.value]
        self.text.value = found.reading.text
        self._say("")
        self._show(found)

    def _status(self, text: str) -> None:
        self._state.value = f'<span role="status">{in_html(text)}</span>' if text else ""

    def _say(self, text: str) -> None:
        """What is wrong, right below the prompt."""
        self._state.value = f'<span class="tl-error" role="alert">{in_html(text)}</span>' if text else ""

    # How it is built.

    def _controls(self, max_new_tokens: int) -> None:
        import ipywidgets as widgets

        self.text = prompt_bar(placeholder=placeholder(self.pair.tokenizer))
        self.text.on_msg(lambda _, content, buffers: self._asked_for(content))
        tip = "Tokens of each answer at most"
        self.max_new_tokens = widgets.IntSlider(
            value=max_new_tokens, min=0, max=max(128, max_new_tokens), description="tokens", tooltip=tip
        )
        self.max_new_tokens.add_class("tracelens-max-tokens")
        examples = example_prompts(self.pair.tokenizer)
        self.examples = widgets.Dropdown(options=[("choose an example …", ""), *examples], description="examples")
        self.examples.add_class("tracelens-examples")
        self.examples.layout.display = "" if examples else "none"
        self.examples.observe(lambda change: self.start(change["new"]) if change["new"] else None, "value")
        self.history = widgets.Dropdown(options=[("nothing yet", None)], description="history", disabled=True)
        self.history.add_class("tracelens-history")
        self.history.observe(lambda _: self._go_back(), "value")
        for control in (self.max_new_tokens, self.examples, self.history):
            control.style.description_width = "72px"
            control.layout.min_width, control.layout.width, control.layout.flex = "0", "auto", "1 1 0"

    def _asked_for(self, content: Mapping[str, Any]) -> None:
        if "run" in content:
            self.start(str(content["run"]))
        elif "stop" in content:
            self.stop()

    def _panels(self) -> None:
        import ipywidgets as widgets

        self._state, self._answers, self._tokens, self._margins, self._notes = (widgets.HTML() for _ in range(5))
        self._state.add_class("tracelens-status")
        self._answers.add_class("tracelens-answers")
        self._tokens.add_class("tracelens-tokens")
        self._margins.add_class("tracelens-margins")
        self.figure = self._live(next_tokens_figure(_nothing()).update_layout(COMPACT))
        self.features = FeaturePanel(self.report)
        self._attention_note = widgets.HTML()
        self._no_attention = ""
        try:
            from tracelens.views.widgets.attention import AttentionPair

            self.attention: Any = AttentionPair()
        except MissingLibraryError as error:
            self.attention, self._no_attention = None, in_html(error)

    def _arrange(self) -> None:
        import ipywidgets as widgets

        narrow = widgets.Layout(width="100%", min_width="0", overflow="hidden")
        left = widgets.VBox([self._margins, self._tokens], layout=widgets.Layout(width="54%", min_width="0"))
        right = widgets.VBox([self.figure], layout=widgets.Layout(width="46%", min_width="0", overflow="hidden"))
        answer = widgets.VBox([self._answers, widgets.HBox([left, right], layout=narrow), self._notes], layout=narrow)
        attention = [self._attention_note, *([self.attention.box] if self.attention is not None else [])]
        self.tabs = widgets.Tab([answer, self.features.box, widgets.VBox(attention, layout=narrow)])
        self.tabs.titles = ("Answers", "Features", "Attention")
        self.tabs.observe(lambda _: self._attend(), "selected_index")
        menus = widgets.HBox([self.examples, self.history, self.max_new_tokens], layout=narrow)
        style = widgets.HTML(prompt_html.STYLE + prompt_html.token_html.css(), layout=widgets.Layout(display="none"))
        self._assemble(style, self.text, menus, self._state, self.tabs)
        self.box.add_class("tracelens-prompt")


def _nothing() -> Any:
    """A look without next tokens, for the empty figure."""
    from types import SimpleNamespace

    return SimpleNamespace(next_tokens=(), kl_answer=float("nan"))
