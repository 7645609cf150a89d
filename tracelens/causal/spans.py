"""Where in a prompt's tokens the words lie that somebody names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracelens.errors import PromptError

Spans = Mapping[str, str | Sequence[Any]]
"""Name → what it means: one word for all prompts, or for each prompt a word, words, a position, positions, or None.

Positions are those of the tokens that the model reads, BOS and chat template counted; negative ones count from the end.
A word is any stretch of text; `find` says which of its occurrences is meant.
"""

Positions = tuple[int, ...]
Characters = tuple[int, int]
"""First character, and the one after the last."""


@dataclass(frozen=True)
class Reading:
    """One prompt as the tokenizer reads it.

    Attributes:
        index: of the prompt, for messages.
        text: what was tokenized.
        tokens: its token ids.
        offsets: the characters of each token; None where the tokenizer cannot say (it is a slow one, or ids were given).
        content: the tokens of the user's own words, where that is known.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    offsets: tuple[Characters, ...] | None = None
    content: Positions | None = None

    @classmethod
    def of(cls, index: int, text: str, tokens: Sequence[int], tokenizer: Any) -> "Reading":
        return cls(index, text, tuple(tokens), offsets_of(text, tokens, tokenizer))

    def holding(self, start: int, end: int) -> Positions:
        """Tokens that hold any of the characters, white space aside; a token that holds others too is one of them."""
        while start < end and self.text[start].isspace():
            start += 1
        return tuple(i for i, (a, b) in enumerate(self.offsets or ()) if a < end and b > start)


def offsets_of(text: str, tokens: Sequence[int], tokenizer: Any) -> tuple[Characters, ...] | None:
    """The characters of each token; None where the tokenizer cannot say, or reads the text as other tokens."""
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    if list(encoded["input_ids"]) != list(tokens):
        return None
    return tuple((int(a), int(b)) for a, b in encoded["offset_mapping"])


def resolve(
    name: str, parts: str | Sequence[Any], readings: Sequence[Reading], tokenizer: Any
) -> tuple[Positions, ...]:
    """The positions that a span has in each prompt; raises `PromptError`, with prompt and fix, where it has none."""
    if isinstance(parts, str):
        parts = [parts] * len(readings)
    if len(parts) != len(readings):
        raise PromptError(
            f"span {name!r} has {len(parts)} entries for {len(readings)} prompts; give one for each (None where a prompt "
            "has none), or one word for all"
        )
    return tuple(_one(name, part, reading, tokenizer) for part, reading in zip(parts, readings, strict=True))


def _one(name: str, part: Any, reading: Reading, tokenizer: Any) -> Positions:
    if part is None:
        return ()
    if isinstance(part, str):
        return find(name, part, reading, tokenizer)
    several = [part] if not isinstance(part, Sequence) and not hasattr(part, "tolist") else list(part)
    found: set[int] = set()
    for item in several:
        found |= set(
            find(name, item, reading, tokenizer) if isinstance(item, str) else [_position(name, item, reading)]
        )
    return tuple(sorted(found))


def _position(name: str, item: Any, reading: Reading) -> int:
    length = len(reading.tokens)
    try:
        position = int(item.__index__())
    except (AttributeError, TypeError):
        raise PromptError(
            f"span {name!r} of prompt {reading.index} holds {item!r}; give words of the prompt, or positions of tokens"
        ) from None
    if not -length <= position < length:
        raise PromptError(
            f"span {name!r} of prompt {reading.index} names position {position}, but the prompt has {length} tokens "
            f"(0 to {length - 1}, BOS and chat template counted)"
        )
    return position % length


def find(name: str, word: str, reading: Reading, tokenizer: Any) -> Positions:
    """Tokens of a word's last occurrence.

    Occurrences in the user's own words come before those in the chat template, those that are whole words before those
    inside longer ones ("art" in "party"), and those in the given case before others. A token that holds the word's
    characters and others (white space aside) counts as the word's. Where the tokenizer does not say which characters its
    tokens hold, the word must be whole tokens.
    """
    if not word.strip():
        return ()
    if reading.offsets is None:
        candidates = [_as_tokens(word, reading, tokenizer, case) for case in (True, False)]
    else:
        inside, whole = re.escape(word.strip()), rf"(?<!\w){re.escape(word.strip())}(?!\w)"
        candidates = [
            [reading.holding(*match.span()) for match in re.finditer(pattern, reading.text, flags)]
            for pattern, flags in ((whole, 0), (whole, re.I), (inside, 0), (inside, re.I))
        ]
    own = [[hit for hit in hits if set(hit) <= set(reading.content or ())] for hits in candidates]
    for hits in [*own, *candidates]:
        if hits and hits[-1]:
            return hits[-1]
    raise PromptError(_not_found(name, word, reading))


def _as_tokens(word: str, reading: Reading, tokenizer: Any, case: bool) -> list[Positions]:
    """Runs of whole tokens that spell the word."""

    def plain(text: str) -> str:
        return text.strip() if case else text.strip().casefold()

    if tokenizer is None:
        raise PromptError(
            f"prompt {reading.index} is token ids and there is no tokenizer to find {word!r} in them; pass tokenizer=..., "
            "or give the span as positions"
        )
    hits: list[Positions] = []
    for start in range(len(reading.tokens)):
        for end in range(start + 1, len(reading.tokens) + 1):
            text = plain(tokenizer.decode(list(reading.tokens[start:end])))
            if text == plain(word):
                hits.append(tuple(range(start, end)))
                break
            if len(text) > len(word) + 8:
                break
    return hits


def _not_found(name: str, word: str, reading: Reading) -> str:
    text = reading.text if len(reading.text) <= 120 else reading.text[:119] + "…"
    if reading.offsets is None and word.casefold() in reading.text.casefold():
        why = "is not made of whole tokens, and the tokenizer does not say which characters its tokens hold"
        return f"span {name!r}: {word!r} in prompt {reading.index} {why}; give positions instead: {text!r}"
    return (
        f"span {name!r}: {word!r} does not occur in prompt {reading.index}; give words as they stand in it, positions, or "
        f"None: {text!r}"
    )
