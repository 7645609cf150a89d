"""Answers as single tokens."""

from collections.abc import Sequence
from typing import Any

from tracelens.errors import PromptError


def single_tokens(tokenizer: Any, answers: Sequence[str | int], which: str = "expected") -> tuple[int, ...]:
    """The token id of each answer; ids pass through.

    A text must be one token exactly as it stands: " Paris" and "Paris" are different tokens to most tokenizers, and which of
    them an answer begins with depends on how the prompt ends.
    Raises `PromptError` with the prompt, the tokens that the answer splits into, and which spelling would be one token.
    """
    if isinstance(answers, str):
        raise PromptError(f"the {which} answers are one string; give a list, one answer for each prompt: [answer, ...]")
    return tuple(
        answer if isinstance(answer, int) else _single(tokenizer, answer, index, which)
        for index, answer in enumerate(answers)
    )


def _single(tokenizer: Any, answer: str, index: int, which: str) -> int:
    ids = _ids(tokenizer, answer)
    if len(ids) == 1 and not _unknown(tokenizer, answer, ids):
        return ids[0]
    if _unknown(tokenizer, answer, ids):
        raise PromptError(
            f"the {which} answer of prompt {index}, {answer!r}, is unknown to the tokenizer; use a word of its vocabulary, or "
            "a token id"
        )
    other = answer[1:] if answer.startswith(" ") else f" {answer}"
    alone = _ids(tokenizer, other) if other else []
    first = tokenizer.decode(ids[:1]) if ids else ""
    fix = (
        f"{other!r} is one token: use it if the prompt ends so that the answer begins like this"
        if len(alone) == 1 and not _unknown(tokenizer, other, alone)
        else f"use another word, or the id of its first token, {ids[0]} ({first!r}), if no other answer begins with it"
        if ids
        else "use a word, or a token id"
    )
    pieces = ", ".join(repr(tokenizer.decode([token])) for token in ids) or "none"
    raise PromptError(
        f"the {which} answer of prompt {index}, {answer!r}, is {len(ids)} tokens ({pieces}), not a single one; {fix}"
    )


def first_tokens(tokenizer: Any, answers: Sequence[str]) -> tuple[int, ...]:
    """The token that each answer begins with, no space before it.

    Raises `PromptError` for an answer that is empty or unknown to the tokenizer.
    """
    found: list[int] = []
    for index, answer in enumerate(answers):
        ids = _ids(tokenizer, answer)
        if not ids or _unknown(tokenizer, answer, ids[:1]):
            raise PromptError(
                f"the answer of prompt {index}, {answer!r}, begins with no token that the tokenizer knows"
            )
        found.append(ids[0])
    return tuple(found)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _unknown(tokenizer: Any, text: str, ids: Sequence[int]) -> bool:
    unknown = tokenizer.unk_token_id
    # Byte-level tokenizers name their end of text as unknown token, and have no unknown words.
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return unknown is not None and unknown not in special and unknown in ids and text.strip() != tokenizer.unk_token
