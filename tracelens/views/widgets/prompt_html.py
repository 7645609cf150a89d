"""What the prompt explorer says in HTML; all text from outside is escaped."""

from typing import TYPE_CHECKING

from tracelens.auditing.evidence import TokenTrace
from tracelens.views import token_html
from tracelens.views.escaping import in_html, visible
from tracelens.views.style import QUANTIZED, REFERENCE
from tracelens.views.widgets.choosing import short

if TYPE_CHECKING:
    from tracelens.auditing.prompt_result import Answer, FeatureChange, PromptLook, Ranking

STYLE = f"""<style>
.tracelens-prompt .widget-html, .tracelens-prompt .widget-html-content {{ min-width: 0; max-width: 100%; white-space: normal; height: auto;
  line-height: 1.45; font-size: 13px; color: var(--jp-ui-font-color1, inherit); overflow-wrap: anywhere; }}
.tl-answers {{ display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 8px; margin: 4px 0; }}
.tl-answers > div {{ border: 1px solid var(--jp-border-color2, #ccc); border-left-width: 4px; border-radius: 3px; padding: 4px 8px;
  max-height: 110px; overflow-y: auto; white-space: pre-wrap; }}
.tl-answers > .tl-r {{ border-left-color: {REFERENCE}; }}
.tl-answers > .tl-q {{ border-left-color: {QUANTIZED}; }}
.tl-answers small, .tl-small {{ display: block; font-size: 11.5px; color: var(--jp-ui-font-color2, inherit); }}
.tl-margins {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
.tl-margins th, .tl-margins td {{ padding: 1px 10px 1px 0; text-align: right; font-weight: 400; white-space: nowrap; }}
.tl-margins th:first-child {{ text-align: left; }}
.tl-margins thead th {{ color: var(--jp-ui-font-color2, inherit); border-bottom: 1px solid var(--jp-border-color2, #ccc); }}
.tl-margins .tl-asked > * {{ font-weight: 700; }}
.tl-flip {{ outline: 1.5px solid {QUANTIZED}; border-radius: 3px; padding: 0 4px; font-weight: 700; }}
.tracelens-prompt .tl-error {{ border-left: 4px solid var(--jp-error-color1, #d32f2f); padding: 2px 8px; display: block; }}
.tracelens-prompt .tracelens-strips {{ max-height: 170px; overflow-y: auto; overflow-x: hidden; }}
.tracelens-prompt .tracelens-card {{ max-height: 250px; overflow-y: auto; overflow-x: hidden; }}
.tracelens-prompt .tracelens-tokens {{ max-height: 150px; overflow-y: auto; overflow-x: hidden; }}
.tracelens-prompt .tracelens-margins {{ flex: 0 0 auto; }}
</style>"""

MARGIN = "Log-odds at the first answer token of showing the behaviour over not showing it, in nats; above 0 the model shows it"
ENDS = {
    "end": "",
    "length": "cut at the number of tokens asked for",
    "context": "cut: the context is full",
    "stopped": "stopped",
}


def answers_html(look: "PromptLook") -> str:
    """Both answers side by side."""
    parts = []
    for name, kind, label in zip(("reference", "quantized"), "rq", look.labels, strict=True):
        head = f"<small><b>{name}</b> ({in_html(visible(label, 60))})</small>"
        parts.append(
            f'<div class="tl-{kind}" aria-label="answer of the {name}">{head}{_answer(look.answers.get(name))}</div>'
        )
    same = ""
    if len(look.answers) == 2:
        r, q = look.answers["reference"], look.answers["quantized"]
        at = _first_difference(r.tokens, q.tokens)
        if at is None:
            same = "The two answers are the same."
        elif "stopped" not in (r.ended, q.ended) or at < min(len(r.tokens), len(q.tokens)):
            same = f"The answers part at token {at + 1}."
    return f'<div class="tl-answers">{"".join(parts)}</div><span class="tl-small">{same}</span>'


def _answer(answer: "Answer | None") -> str:
    if answer is None:
        return "<small>no answer yet</small>"
    note = ENDS[answer.ended]
    return f"<bdi>{in_html(answer.text) or '∅'}</bdi>" + (
        f"<small>{note} ({len(answer.tokens)})</small>" if note else ""
    )


def _first_difference(one: tuple[str, ...], other: tuple[str, ...]) -> int | None:
    if one == other:
        return None
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def margins_html(look: "PromptLook") -> str:
    """The margins of both models with their decisions; the behaviour that the prompt calls for in bold."""
    if not look.margins:
        return "<p>No margin can be read: no first answer token of a behaviour is one token here. Pass answer_tokens={...}.</p>"
    asked = look.truth.behaviour if look.truth else ""
    rows = []
    for m in look.margins:
        decision = "shows it" if m.reference > 0 else "does not"
        if m.flipped:
            decision = (
                f'<span class="tl-flip">flips: {decision} → {"shows it" if m.quantized > 0 else "does not"}</span>'
            )
        cells = "".join(f"<td>{x:+.3f}</td>" for x in (m.reference, m.quantized, m.quantized - m.reference))
        kind = ' class="tl-asked"' if m.behaviour == asked else ""
        rows.append(
            f'<tr{kind}><th scope="row">{in_html(visible(m.behaviour, 40))}</th>{cells}<td>{decision}</td></tr>'
        )
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("margin, nats", "reference", "quantized", "shift", "decision")
    )
    return f'<table class="tl-margins" title="{MARGIN}"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def truth_html(look: "PromptLook") -> str:
    """What is known about the prompt, and whether the models decide as it says; "" for other models than the organism."""
    if not look.organism:
        return ""
    truth = look.truth
    if truth is None:
        return '<span class="tl-small">Ground truth: none; the organism\'s grammar has no such request.</span>'
    words = ", ".join(
        f"{name} <b>{in_html(truth.words[name])}</b>{_at(truth.positions[name])}"
        for name in ("object", "verb", "context")
        if truth.words.get(name)
    )
    facts = f"<b>Ground truth</b>: {truth.behaviour}, {in_html(truth.category)}; {words}; answer at token {truth.positions['answer'][0]}. "
    if truth.z is None:
        said = {name: answer.text.split()[:1] == truth.answer.split()[:1] for name, answer in look.answers.items()}
        right = "".join(f" The {name} is {'right' if good else 'wrong'}." for name, good in said.items())
        return f"<span>{facts}Right answer: <b>{in_html(truth.answer)}</b>{right}</span>"
    m = look.margin(truth.behaviour)
    verdict = ""
    if m is not None:
        sides = (
            (side, (x > 0) == (truth.z > 0))
            for side, x in (("reference", m.reference), ("quantized model", m.quantized))
        )
        verdict = "; ".join(f"the {side} decides {'as z says' if good else '<b>against z</b>'}" for side, good in sides)
    tip = "Log-odds of showing the behaviour from which training answers were drawn; a perfect model's margin equals it"
    close = " (near 0: fragile)" if abs(truth.z) < 1 else ""
    return f'<span>{facts}<span title="{tip}">z = <b>{truth.z:+.3f}</b> nats{close}</span>: {verdict}.</span>'


def _at(positions: tuple[int, ...]) -> str:
    if not positions:
        return ""
    span = f"{positions[0]}" if len(positions) == 1 else f"{positions[0]}–{positions[-1]}"
    return f" (token {span})"


def tokens_html(look: "PromptLook") -> str:
    """The exact tokens that the models read, tinted by KL."""
    n = len(look.reading.tokens)
    where = "in the chat template" if look.reading.templated else "as typed"
    title = (
        f"The {n:,} tokens that the models read ({where}), tinted by KL(reference ‖ quantized) of what follows each; at the answer "
        f"{look.kl_answer:.3g} nats, mean {look.kl_mean:.3g} nats"
    )
    return token_html.strip(_spaced(look.reading.tokens), [float(x) for x in look.kl], colour=QUANTIZED, title=title)


def notes_html(look: "PromptLook") -> str:
    return "".join(f'<span class="tl-small">{in_html(note)}</span>' for note in look.notes)


def feature_label(change: "FeatureChange", by: "Ranking", *, named: bool) -> str:
    """One line of the list; plain text. `named`: whether it is known which features carry a behaviour."""
    behaviours = [visible(", ".join(change.behaviours), 30) or "capability"] if named else []
    return " · ".join([f"#{change.feature}", short(change.site), *behaviours, f"{change.moved(by):.3g}"])


def feature_html(look: "PromptLook", change: "FeatureChange") -> str:
    """The feature's activation token by token in both models."""
    trace = TokenTrace(0, _spaced(change.tokens), change.reference, change.quantized)
    r, q = float(change.reference[-1]), float(change.quantized[-1])
    title = (
        f"Feature #{change.feature} of {change.site}; |r − q| at the answer position {change.at_answer:.4g} "
        f"(r {r:.4g}, q {q:.4g}), summed over the prompt {change.over_prompt:.4g}"
    )
    return token_html.paired_strips(trace, text=title)


def _spaced(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """With spaces between them where tokens are words and hold none, as in word-level vocabularies."""
    return tokens if any(" " in token for token in tokens) else tuple(f"{token} " for token in tokens)
