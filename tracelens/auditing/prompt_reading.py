"""A typed text as the models of a pair read it, or what is wrong with it."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from tracelens.auditing.token_text import TokenText
from tracelens.chat import Chat, as_chat
from tracelens.errors import PromptError
from tracelens.pair import PrecisionPair

SUGGESTIONS = 3
WORDS_NAMED = 5


@dataclass(frozen=True)
class PromptReading:
    """A text as tokens.

    Attributes:
        text: as typed.
        prompt: as it is tokenized, in the chat template if there is one.
        ids: the tokens.
        tokens: the text of each.
        start: tokens at the beginning that are BOS, which audits leave out.
        templated: whether the text was put into a chat template.
    """

    text: str
    prompt: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    start: int
    templated: bool


def read_prompt(pair: PrecisionPair, text: str, *, chat: Chat = "auto") -> PromptReading:
    """The tokens that an audit of this prompt runs on, chat template and BOS included.

    Raises `PromptError` for an empty text, words that the tokenizer does not know (an audit lets a few pass: here they would be all that
    one looks at), a text beyond the context, and models without a tokenizer.
    """
    tokenizer = pair.tokenizer
    if tokenizer is None:
        raise PromptError("the models have no tokenizer, so no text can be typed; pass tokenizer=... to the audit")
    if not text.strip():
        raise PromptError("the prompt is empty; type a request")
    (prompt,) = as_chat([text], tokenizer, chat)
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    _check_words(text, ids, tokenizer)
    n_ctx = min(model.cfg.n_ctx for model in (pair.reference, pair.quantized))
    if len(ids) > n_ctx:
        raise PromptError(
            f"the prompt has {len(ids):,} tokens, but the models' context holds {n_ctx:,} (n_ctx): "
            f"make it {len(ids) - n_ctx:,} tokens shorter"
        )
    start = next((i for i, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
    if start == len(ids):
        raise PromptError("the prompt is empty (no token besides BOS); type a request")
    show = TokenText(tokenizer)
    return PromptReading(text, prompt, tuple(ids), tuple(map(show, ids)), start, prompt != text)


def _check_words(text: str, ids: list[int], tokenizer: Any) -> None:
    unknown = tokenizer.unk_token_id
    # Byte-level tokenizers name their end of text as unknown token, and have no unknown words.
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id) or unknown not in ids:
        return
    words = unknown_words(text, tokenizer)
    if not words:  # it is typed as such, or in the template
        raise PromptError(f"the prompt holds {tokenizer.unk_token!r}, the sign for unknown words; leave it out")
    known = _plain_words(tokenizer)
    named = []
    for word in words[:WORDS_NAMED]:
        close = get_close_matches(word.lower(), known, n=SUGGESTIONS, cutoff=0.7)
        named.append(f"{word!r}" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""))
    more = f" and {len(words) - WORDS_NAMED} more" if len(words) > WORDS_NAMED else ""
    one = len(words) == 1
    raise PromptError(
        f"the models do not know the word{'' if one else 's'} {', '.join(named)}{more}; "
        f"use {'another' if one else 'others'}: {'it' if one else 'they'} would be read as {tokenizer.unk_token!r}"
    )


def unknown_words(text: str, tokenizer: Any) -> list[str]:
    """Words of a text that hold a token unknown to the tokenizer, each once, in order."""

    def is_unknown(piece: str) -> bool:
        return tokenizer.unk_token_id in tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]

    found = []
    for chunk in text.split():
        if is_unknown(chunk):
            # Without the marks around it; a chunk that has no letters (an emoji) is named whole.
            inner = [word for word in re.findall(r"\w[\w'-]*", chunk) if is_unknown(word)]
            found += inner or [chunk]
    return list(dict.fromkeys(found))


def _plain_words(tokenizer: Any) -> list[str]:
    """What may be suggested: tokens that are whole words."""
    special = set(tokenizer.all_special_tokens)
    known = (token.removeprefix("▁") for token in tokenizer.get_vocab() if token not in special)
    return sorted({word for word in known if len(word) > 1 and word.isalpha()})
