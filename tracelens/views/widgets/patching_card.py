"""The card of one replacement: its numbers with intervals, beside its placebo's, and how many prompts they rest on."""

from math import isnan
from typing import TYPE_CHECKING, Any

from tracelens.stats import Estimate
from tracelens.views.escaping import in_html
from tracelens.views.numbers import interval
from tracelens.views.patching_words import PITFALL, RUNS, where_of
from tracelens.views.widgets.patching_choice import Entry
from tracelens.views.widgets.patching_table import DEFINITIONS, Shown

if TYPE_CHECKING:
    from tracelens.causal.patching_result import PatchingResult

STYLE = """<style>
.tracelens-patching .tl-card, .tracelens-patching .tl-line { color: var(--jp-ui-font-color1, inherit); font-size: 12px; line-height: 1.45;
  overflow-wrap: anywhere; white-space: normal; }
.tracelens-patching .tl-card h3 { font-size: 14px; margin: 0 0 .2em; } .tracelens-patching .tl-card p { margin: .2em 0; }
.tracelens-patching .tl-card table { width: auto; border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums;
  margin: .2em 0; }
.tracelens-patching .tl-card th, .tracelens-patching .tl-card td { padding: .1em .5em .1em 0; border: 0; background: none; color: inherit;
  text-align: left; font-weight: 400; white-space: nowrap; }
.tracelens-patching .tl-card th[title] { cursor: help; border-bottom: 1px dotted var(--jp-ui-font-color2, #888); }
.tracelens-patching .tracelens-card { max-height: 150px; overflow-y: auto; overflow-x: auto; }
.tracelens-patching .tl-line { display: block; }
.tracelens-patching .widget-html, .tracelens-patching .widget-html-content { min-width: 0; max-width: 100%; white-space: normal; }
.tracelens-patching .tracelens-top select { font-size: 12px; height: 100%; }
</style>"""


def title(entry: Entry) -> str:
    """What is looked at: which activations, which metric, what 0 and 1 are, how many prompts."""
    result, facets = entry.result, entry.facets
    start, goal = RUNS.get(result.direction, ("unpatched", "other"))
    n, lost = len(result.start), result.n_undetermined
    undetermined = f", {lost} of them undetermined (their two runs are equal, 0/0) and left out" if lost else ""
    what = " ".join(filter(None, (facets["direction"], facets["precision"])))
    unit = f" ({result.unit})" if result.unit else ""
    return f"{what}, {facets['site']}: {result.metric}{unit}, 0 = the {start} run, 1 = the {goal} run; {n} prompts{undetermined}"


def caveat(result: "PatchingResult", alone: int | None) -> str:
    """How not to read it, as a sentence; "" if there is nothing to say."""
    if alone is not None:
        return "One prompt has no interval and no test."
    text = PITFALL.get(result.direction, "")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def card(shown: Shown, arm: int) -> str:
    """HTML of an arm over all prompts."""
    result, row = shown.result, shown.table.iloc[arm].to_dict()
    title = f"<h3>{in_html(where_of(result.rows[arm], result))}</h3>"
    usable, there = int(row["n_usable"]), int(row["n_prompts"])
    prompts = f"<p>{usable} of {there} prompts usable{_why(result, usable, there)}.</p>"
    if isnan(row["effect"]):
        return f'<div class="tl-card">{title}<p>No effect can be said: the two runs are equal (0/0).</p>{prompts}</div>'
    unit = f" {in_html(result.unit)}" if result.unit else ""
    rows = [
        ("effect", _number(row, "effect"), _p(row, "p_adjusted")),
        ("closed", _number(row, "closed"), ""),
        ("change", _number(row, "change") + unit, ""),
        ("ratio of means", _plain(row["ratio_of_means"]), ""),
    ]
    if result.placebo is not None:
        rows += [
            ("placebo", _number(row, "placebo_effect"), ""),
            ("versus placebo", _number(row, "versus placebo"), _p(row, "p_versus_placebo_adjusted")),
        ]
    half = (len(rows) + 1) // 2
    lines = "".join(
        "<tr>" + "".join(_cells(*found) for found in rows[i::half]) + "</tr>" for i in range(half)
    )  # two columns of rows: the card is wide and low
    return f'<div class="tl-card">{title}<table>{lines}</table>{prompts}</div>'


def prompt_line(shown: Shown, arm: int, prompt: int) -> str:
    """One sentence on what the arm did to one prompt, as HTML."""
    result = shown.result
    text = result.prompts[prompt] if prompt < len(result.prompts) else f"prompt {prompt}"
    names = RUNS.get(result.direction, ("unpatched", "other"))
    effect = float(result.per_prompt()[arm, prompt])
    there = result.present is None or bool(result.present[arm, prompt])
    equal = not shown.usable[prompt]
    said = (
        f"effect {effect:.3f}"
        if not isnan(effect)
        else "0/0: its two runs are equal"
        if equal
        else "it has no such tokens"
    )
    ends = f"{names[0]} {result.start[prompt]:.3f}, {names[1]} {result.goal[prompt]:.3f} {in_html(result.unit)}"
    patched = f" → patched {result.patched[arm, prompt]:.3f}" if there else ""
    return (
        f'<div class="tl-card"><p>One prompt: <bdi dir="auto">{in_html(text)}</bdi>: {ends}{patched}; {said}.</p></div>'
    )


def _why(result: "PatchingResult", usable: int, there: int) -> str:
    reasons = []
    if lost := there - usable:
        reasons.append(f"{lost} undetermined (the two runs differ by less than {result.min_difference:g}, 0/0)")
    if absent := len(result.start) - there:
        reasons.append(f"{absent} more lack these positions")
    return f"; {'; '.join(reasons)}" if reasons else ""


def _cells(name: str, number: str, p: str) -> str:
    tip = in_html(DEFINITIONS[name])
    return f'<th title="{tip}">{name}</th><td><b>{number}</b></td><td title="{in_html(DEFINITIONS["p"])}">{p}</td>'


def _number(row: dict[str, Any], name: str) -> str:
    nan = float("nan")
    ends = (row[f"{name}_low"], row[f"{name}_high"]) if row["n_usable"] > 1 else (nan, nan)
    return interval(Estimate(row[name], *ends))


def _plain(value: float) -> str:
    return "—" if isnan(value) else f"{value:.3f}"


def _p(row: dict[str, Any], name: str) -> str:
    return "" if isnan(row[name]) else f"p {row[name]:.2g}"
