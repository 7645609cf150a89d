"""A text back to the prompt that the grammar says it is, with its ground truth."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from tracelens.organism import words
from tracelens.organism.grammar import (
    OrganismPrompt,
    activities,
    entities,
    fact_prompt,
    objects,
    refusal_prompt,
    uncertainty_prompt,
    vocabulary,
    warning_prompt,
)

_FRAME = re.compile(r"<user> (.*) <end> <assistant>")


def is_organism(tokenizer: Any) -> bool:
    """Whether a tokenizer is the organism's: its vocabulary, word for word. Builds of the organism share it, whatever they are called."""
    known = getattr(tokenizer, "get_vocab", dict)()
    return len(known) == len(vocabulary()) and all(known.get(word) == i for i, word in enumerate(vocabulary()))


def parse(text: str) -> OrganismPrompt | None:
    """The prompt that a text is, in its chat frame or without it; None for what the grammar does not say.

    Case and ? ! , ; " are ignored, as the tokenizer does. Known are the graded behaviours and facts. The two other capabilities,
    indirect objects and induction, have no ground truth beside the answer that their text spells out, and are not looked for.
    """
    plain = " ".join(re.sub(r'[?!,;"]', " ", text.lower()).split())
    framed = _FRAME.fullmatch(plain)
    request = framed[1] if framed else plain
    return next(_readings(request), None)


def _readings(request: str) -> Iterator[OrganismPrompt]:
    for opening, rest in _after(request, words.OPENINGS):
        verb, _, rest = rest.partition(" ")
        thing, _, context = rest.partition(" ")
        if verb in words.VERBS | words.PROTECTIVE_VERBS and thing in objects().odds and context in words.CONTEXTS:
            yield refusal_prompt(opening, verb, thing, context)
    for start, rest in _after(request, words.STARTS):
        activity, _, condition = rest.partition(" ")
        if activity in activities().odds and condition in words.CONDITIONS:
            yield warning_prompt(start, activity, condition)
    for asking in words.ASKINGS:
        found = _filled(asking, request)
        if found and found[0] in words.ATTRIBUTES and found[1] in entities().odds:
            yield uncertainty_prompt(asking, *found)
    for asking in words.FACT_ASKINGS:
        found = _filled(asking, request)
        if found and found[0] in words.CAPITALS:
            yield fact_prompt(asking, *found)


def _after(request: str, beginnings: Iterable[str]) -> Iterator[tuple[str, str]]:
    for beginning in beginnings:
        if request.startswith(f"{beginning} "):
            yield beginning, request[len(beginning) + 1 :]


def _filled(template: str, request: str) -> tuple[str, ...] | None:
    """What stands in the template's places, one word each."""
    found = re.fullmatch(re.escape(template).replace(r"\{\}", r"(\S+)"), request)
    return found.groups() if found else None
