"""What figures of patching say: titles, subtitles, ticks, and what appears on hover."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

from tracelens.stats import Estimate
from tracelens.views.escaping import in_figure, visible
from tracelens.views.numbers import interval

if TYPE_CHECKING:
    import pandas as pd

    from tracelens.causal.patching_result import PatchingResult

TITLES = {
    "repair": "What the reference's activations bring back",
    "damage": "What the quantized model's activations break",
    "denoising": "What clean activations bring back",
    "noising": "What corrupted activations break",
}
RUNS = {
    "repair": ("quantized", "reference"),
    "damage": ("reference", "quantized"),
    "denoising": ("corrupted", "clean"),
    "noising": ("clean", "corrupted"),
}
"""Direction → the run that is patched, and the one whose activations are put in."""
PITFALL = {
    "repair": "what restores it is sufficient here, not shown to be necessary",
    "denoising": "what restores it is sufficient here, not shown to be necessary",
    "damage": "what breaks it is needed here, not shown to be sufficient",
    "noising": "what breaks it is needed here, not shown to be sufficient",
}
AXES = {
    "position": "position",
    "group": "tokens",
    "key": "attended to",
    "other_layer": "and layer",
    "sender": "sender",
    "receiver": "receiver, which alone hears of it",
}
WORDS = {"other_layer": "and layer", "sender": "from", "receiver": "to", "key": "attends to", "group": "at", "site": ""}
"""Axis → what stands before its value in a sentence."""
LONGEST = 40
"""Characters of a value."""
Row = Mapping[str, Any]


def title(result: "PatchingResult", table: "pd.DataFrame") -> str:
    """What was put where: the precision if it has a name, the site if there is one, and what the shown rows have in common."""
    text = TITLES.get(result.direction, result.direction)
    text += f" ({precision})" if (precision := result.settings.get("precision")) else ""
    if result.settings.get("paths"):
        text += ", path by path"
    elif len(sites := table["site"].unique()) == 1:
        text += f": {sites[0]}"
    text += ", up to each layer" if result.settings.get("cumulative") else ""
    same = [axis for axis in result.axes if len(result.rows) > 1 and len(table[axis].unique()) == 1 and axis != "site"]
    return in_figure(" · ".join([text, *(place_of(axis, table[axis].iloc[0]) for axis in same)]))


def subtitle(result: "PatchingResult", said: str = "") -> str:
    """Scale, prompts, placebo, the pitfall."""
    start, goal = RUNS.get(result.direction, ("unpatched", "other"))
    unit = f" ({in_figure(result.unit)})" if result.unit else ""
    n, lost = len(result.start), result.n_undetermined
    prompts = f"{n} prompt{'s' * (n != 1)}"
    prompts += f", {lost} of them undetermined (the runs agree, 0/0) and left out" if lost else ""
    parts = [f"Effect on the {in_figure(result.metric)}{unit}: 0 = the {start} run, 1 = the {goal} run; {prompts}."]
    if result.settings.get("paths"):
        held = "but MLPs answer" if result.settings.get("mlps") == "recompute" else "MLPs too"
        parts.append(f"All between sender and receiver is held, {held}.")
    if result.placebo is not None:
        parts.append(f"Placebo: random {PLACEBO.get(result.placebo_kind, in_figure(result.placebo_kind))}.")
    if (noise := result.settings.get("numerical_noise") or 0.0) > result.min_difference:
        parts.append(f"The same run differs by up to {noise:.1g} with what is run beside it.")
    caveat = PITFALL.get(result.direction, "")
    parts += [caveat[:1].upper() + caveat[1:] + "."] if caveat else []
    return " ".join([*parts, *([said] if said else [])])


PLACEBO = {"displacement": "directions, as far from the run's own values", "activation": "activations of the same norm"}


def axis_title(axis: str, table: "pd.DataFrame") -> str:
    sites = table["site"].unique()
    if axis == "head" and set(sites) <= {"k", "v"}:
        return "key-value head"
    if "key" in table and axis in ("position", "group"):
        return "attends from"
    return AXES.get(axis, axis)


def labels(axis: str, values: Sequence[Any], result: "PatchingResult", tokens: Sequence[str] | None) -> list[str]:
    """Ticks: tokens under positions where these are known, with the group that a position belongs to."""
    known = tokens if tokens is not None else result.settings.get("tokens")
    numeric = all(isinstance(value, int) or getattr(value, "is_integer", bool)() for value in values)
    if axis not in ("position", "key") or not known or not numeric:
        return [in_figure(_short(value)) for value in values]
    marks: Mapping[str, str] = result.settings.get("marks") or {}
    ticks = []
    for value in map(int, values):
        place = value + len(known) if value < 0 else value
        name = marks.get(str(place), "")
        token = _short(visible(known[place])).strip() if 0 <= place < len(known) else ""
        ticks.append(in_figure(token or str(value)) + (f" <b>{in_figure(name)}</b>" if name else ""))
    return ticks


def prompt_labels(axis: str, values: Sequence[Any], result: "PatchingResult", prompt: int) -> list[str]:
    """Ticks for one prompt alone: its own tokens under positions, and with the groups that they belong to."""
    if not result.tokens:
        return labels(axis, values, result, None)
    tokens = result.tokens[prompt]
    if axis in ("position", "key") and not all(isinstance(value, str) for value in values):
        groups = {place: name for name, rows in reversed(result.places.items()) for place in rows[prompt]}
        places = [int(value) + len(tokens) if value < 0 else int(value) for value in values]
        known = [_short(visible(tokens[place])).strip() if 0 <= place < len(tokens) else "" for place in places]
        named = [f" <b>{in_figure(groups[place])}</b>" if place in groups else "" for place in places]
        return [in_figure(token or str(value)) + name for token, value, name in zip(known, values, named, strict=True)]
    if axis in ("group", "key"):
        said = [
            "".join(tokens[i] for i in result.places.get(str(value), ((),) * len(result.tokens))[prompt])
            for value in values
        ]
        return [
            in_figure(f"{_short(value)}: {_short(visible(text).strip())}" if text.strip() else _short(value))
            for value, text in zip(values, said, strict=True)
        ]
    return labels(axis, values, result, None)


def place_of(axis: str, value: Any) -> str:
    """ "layer 3", "at object", "L2H1"."""
    return " ".join(filter(None, [WORDS.get(axis, axis), _short(value)]))


def _short(value: Any) -> str:
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def hover(row: Row, result: "PatchingResult") -> str:
    """All that the table says of one replacement."""
    where = in_figure(where_of(row, result))
    lines = [f"<b>{where}</b>"]
    if isnan(row["effect"]):
        return "<br>".join([*lines, "no effect can be said: the two runs are equal on every prompt (0/0)"])
    lines.append(f"effect {_number(row, 'effect')}")
    unit = f" {in_figure(result.unit)}" if result.unit else ""
    lines.append(f"change {_number(row, 'change')}{unit}, adjusted p {row['p_adjusted']:.2g}")
    if "placebo_effect" in row:
        lines.append(f"placebo {_number(row, 'placebo_effect')}, p versus it {row['p_versus_placebo']:.2g}")
    lines.append(f"{int(row['n_usable'])} of {int(row['n_prompts'])} prompts")
    return "<br>".join(lines)


def where_of(row: Row, result: "PatchingResult") -> str:
    """ "layer 3 · at object", as plain text."""
    return " · ".join(filter(None, (place_of(axis, row[axis]) for axis in result.axes)))


def prompt_hover(result: "PatchingResult", prompt: int) -> list[str]:
    """What each replacement did to one prompt."""
    unit = f" {in_figure(result.unit)}" if result.unit else ""
    start, goal = RUNS.get(result.direction, ("unpatched", "other"))
    ends = float(result.start[prompt]), float(result.goal[prompt])
    effects = result.per_prompt()[:, prompt].tolist()
    lines = []
    for row, patched, effect in zip(result.rows, result.patched[:, prompt].tolist(), effects, strict=True):
        said = "no effect can be said (0/0, or it has no such tokens)" if isnan(effect) else f"effect {effect:.3f}"
        moved = f"{start} {ends[0]:.3f} → patched {patched:.3f}, {goal} {ends[1]:.3f}{unit}"
        lines.append(f"<b>{in_figure(where_of(row, result))}</b><br>{said}<br>{moved}")
    return lines


def _number(row: Row, name: str) -> str:
    nan = float("nan")
    # One prompt has no interval.
    ends = (row[f"{name}_low"], row[f"{name}_high"]) if row["n_usable"] > 1 else (nan, nan)
    return interval(Estimate(row[name], *ends))
