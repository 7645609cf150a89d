"""Contrasts of a data set: each safety prompt beside a baseline prompt of as many tokens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tracelens.causal.contrasts import Contrasts
from tracelens.causal.given_prompts import dataset_of
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import as_metric, default_metric
from tracelens.chat import Chat
from tracelens.errors import PromptError, UnknownNameError

PAIRINGS = ("matched", "nearest")
Pair = tuple[int, int]
"""Index of a clean prompt, and of its corrupted one."""


def dataset_contrasts(
    dataset: Any,
    model: Any,
    *,
    pairing: str = "matched",
    max_changed: int | None = None,
    metric: Any = None,
    chat: Chat = "auto",
    tokenizer: Any = None,
) -> Contrasts:
    """Pairs of a safety prompt (clean) and a baseline prompt (corrupted) that are equally long in this model's tokens.

    Args:
        dataset: what `resolve_dataset` takes: the name of a data set, one, or {"refusal": [...], "baseline": [...]}.
        pairing: "matched" takes the i-th safety prompt with the i-th baseline prompt, which in the built-in sets for real
            models has the same form; "nearest" pairs prompts of the same behaviour (of any, where the baseline's are not known) so that the
            fewest tokens differ, each used once, which is what sets without such a match need (the organism's among them).
        max_changed: pairs that differ in more tokens are dropped.
        metric: by default the margin of the prompts' behaviours.

    What is dropped is counted, by reason, in `.dropped`. Prompts of equal length need not run parallel: where a word is one
    token on one side and two on the other, all that follows is moved and counts as changed, and the same position is another
    word. `max_changed` keeps such pairs out, `n_changed` shows them.
    Raises `PromptError` if no pair is left, with the reasons, and as `PromptSet.of`.
    """
    if pairing not in PAIRINGS:
        raise UnknownNameError.of("pairing", pairing, PAIRINGS)
    source = dataset_of(dataset, need_baseline=True)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    prompts = PromptSet.of(source, model, tokenizer=tokenizer, chat=chat)
    n = len(source.safety_prompts)
    clean, corrupted = prompts.select(range(n)), prompts.select(range(n, len(prompts)))
    if pairing == "matched" and len(clean) != len(corrupted):
        raise PromptError(
            f"data set {source.name!r} has {len(clean)} safety prompts and {len(corrupted)} baseline prompts, so the i-th do "
            "not match; use pairing='nearest'"
        )
    pairs, dropped = _matched(clean, corrupted) if pairing == "matched" else _nearest(clean, corrupted)
    if max_changed is not None:
        close = [pair for pair in pairs if _distance(clean, corrupted, pair) <= max_changed]
        dropped |= {f"more than {max_changed} tokens differ": len(pairs) - len(close)}
        pairs = close
    dropped = {why: count for why, count in dropped.items() if count}
    if not pairs:
        raise PromptError(_nothing_left(source.name, clean, corrupted, dropped, pairing))
    ours = clean.select(a for a, _ in pairs)
    # Baseline prompts probe what their partners do.
    theirs = replace(corrupted.select(b for _, b in pairs), behaviours=ours.behaviours)
    chosen = default_metric(ours, tokenizer) if metric is None else as_metric(metric)
    return Contrasts(ours, theirs, metric=chosen, dropped=dropped)


def _matched(clean: PromptSet, corrupted: PromptSet) -> tuple[list[Pair], dict[str, int]]:
    pairs = [(i, i) for i in range(len(clean)) if len(clean.tokens[i]) == len(corrupted.tokens[i])]
    differing = [pair for pair in pairs if _distance(clean, corrupted, pair)]
    return differing, {
        "not the same number of tokens": len(clean) - len(pairs),
        "the same tokens": len(pairs) - len(differing),
    }


def _nearest(clean: PromptSet, corrupted: PromptSet) -> tuple[list[Pair], dict[str, int]]:
    """Within each behaviour and length, the one-to-one pairing in which the fewest tokens differ."""
    from scipy.optimize import linear_sum_assignment

    pairs: list[Pair] = []
    known = all(corrupted.behaviours)
    ours, theirs = _alike(clean, known), _alike(corrupted, known)
    for kind, rows in ours.items():
        if columns := theirs.get(kind):
            a, b = (
                np.array([side.tokens[i] for i in chosen]) for side, chosen in ((clean, rows), (corrupted, columns))
            )
            cost = (a[:, None] != b[None]).sum(-1)
            # Equal tokens make no contrast: dearer than any other pair.
            taken = linear_sum_assignment(np.where(cost == 0, cost.max() * len(rows) + 1, cost))
            pairs += [(rows[i], columns[j]) for i, j in zip(*taken, strict=True) if cost[i, j]]
    return sorted(pairs), {"no baseline prompt of as many tokens is left": len(clean) - len(pairs)}


def _alike(prompts: PromptSet, by_behaviour: bool) -> dict[tuple[str, int], list[int]]:
    groups: dict[tuple[str, int], list[int]] = {}
    for index, (behaviour, ids) in enumerate(zip(prompts.behaviours, prompts.tokens, strict=True)):
        groups.setdefault((behaviour if by_behaviour else "", len(ids)), []).append(index)
    return groups


def _distance(clean: PromptSet, corrupted: PromptSet, pair: Pair) -> int:
    return sum(a != b for a, b in zip(clean.tokens[pair[0]], corrupted.tokens[pair[1]], strict=True))


def _nothing_left(name: str, clean: PromptSet, corrupted: PromptSet, dropped: dict[str, int], pairing: str) -> str:
    reasons = "; ".join(f"{why}: {count}" for why, count in dropped.items())
    other = "pairing='nearest', or " if pairing == "matched" else ""
    return (
        f"none of the {len(clean)} pairs of data set {name!r} can be contrasted ({reasons}; safety prompts have "
        f"{_lengths(clean.tokens)} tokens, baseline prompts {_lengths(corrupted.tokens)}); use {other}a larger max_changed, "
        "Contrasts.of with pairs of your own, or Contrasts.of_corruption, which needs no second prompt"
    )


def _lengths(tokens: Sequence[Sequence[int]]) -> str:
    counts = Counter(map(len, tokens))
    return f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts)
