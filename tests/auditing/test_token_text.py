"""Tokens as the text that they stand for."""

import pytest

from tests.tiny import tiny_tokenizer
from tracelens.auditing.token_text import TokenText

TEXT = "Hello  world\n\tdéjà vu 😀 שלום 漢字 <script>\"'</script>"


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["Hello world, hello all of the world"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece():
    """Pieces with ▁ for spaces, and bytes for what has no piece, as Llama's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "o", "r", "▁▁"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>"), vocabulary


def test_byte_level_tokens_make_up_the_text():
    tokenizer = byte_level()
    text = TokenText(tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    pieces = [text(token) for token in ids]
    # What is part of a character stands as its bytes; put together again they are the text.
    import re

    raw = b"".join(
        bytes([int(part[3:5], 16)]) if re.fullmatch(r"<0x[0-9A-F]{2}>", part) else part.encode()
        for piece in pieces
        for part in re.findall(r"<0x[0-9A-F]{2}>|(?s:.)", piece)
    )
    assert raw.decode() == TEXT
    assert "�" not in "".join(pieces)
    assert any(piece.startswith(" ") for piece in pieces)
    assert text(tokenizer.convert_tokens_to_ids("Ġworld")) == " world"
    assert text(tokenizer.convert_tokens_to_ids("Ċ")) == "\n"
    assert text(tokenizer.convert_tokens_to_ids("ð")) == "<0xF0>"


def test_sentencepiece_tokens_keep_their_spaces():
    tokenizer, vocabulary = sentencepiece()
    text = TokenText(tokenizer)
    assert tokenizer.decode([vocabulary["▁Hello"]]) == "Hello"  # what is mended here
    assert text(vocabulary["▁Hello"]) == " Hello"
    assert text(vocabulary["▁▁"]) == "  "
    assert text(vocabulary["o"]) == "o"
    assert text(vocabulary["<0x0A>"]) == "\n"
    assert text(vocabulary["<0xF0>"]) == "<0xF0>"
    assert text(vocabulary["<s>"]) == "<s>"


def test_words_and_ids():
    tokenizer = tiny_tokenizer()
    text = TokenText(tokenizer)
    assert [text(token) for token in tokenizer("the cat sat")["input_ids"]] == ["<s>", "the", "cat", "sat"]
    assert text(10_000) == "#10000"
    assert TokenText(None)(7) == "#7"
    assert len(text) == len(tokenizer)
    assert len(TokenText(None)) > 10**6


@pytest.mark.parametrize("token", ["<unk>", "<pad>", "</s>"])
def test_special_tokens_are_not_left_out(token):
    tokenizer = tiny_tokenizer()
    assert TokenText(tokenizer)(tokenizer.convert_tokens_to_ids(token)) == token
