"""Tokens one by one as the text that they stand for, spaces included."""

import re
from functools import cache
from typing import Any

_SPACE = "▁"
"""What sentencepiece writes for a space; no piece of a byte-level vocabulary holds it, whose letters stand for bytes."""


class TokenText:
    """Token id → its text; a token that is but a part of a character is written as its bytes: `<0xF0><0x9F>`.

    Decoding a token by itself goes wrong in two ways that this mends: decoders of sentencepiece vocabularies take a leading space away,
    and what is no whole character becomes the same replacement mark whatever it is.
    Without a tokenizer the text is the id: `#17`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._text(token)
        return self._known[token]

    def __len__(self) -> int:
        """Tokens that have a text; more than the tokenizer says where it does not say."""
        try:
            return len(self._tokenizer)
        except TypeError:
            return 2**31

    def _text(self, token: int) -> str:
        tokenizer = self._tokenizer
        piece = None if tokenizer is None else tokenizer.convert_ids_to_tokens(token)
        if tokenizer is None or piece is None:
            return f"#{token}"
        if isinstance(piece, bytes):
            return _readable(piece)
        if _SPACE in piece:
            return piece.replace(_SPACE, " ")
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text or re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
            return piece if "\ufffd" in text else text
        letters = _letters()
        return _readable(bytes(letters[c] for c in piece)) if all(c in letters for c in piece) else text


def _readable(raw: bytes) -> str:
    """The text, with bytes that are no whole character written out."""
    parts = raw.decode("utf-8", errors="surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in parts)


@cache
def _letters() -> dict[str, int]:
    """Letter → byte of byte-level vocabularies (Radford et al. 2019): printable Latin-1 as itself, the other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + k): byte for k, byte in enumerate(others)}
