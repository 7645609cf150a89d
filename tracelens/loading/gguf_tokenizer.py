"""The tokenizer in a GGUF file, as transformers rebuilds it, with the special tokens that the file declares."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracelens.errors import CheckpointError

BESIDE = "tokenizer.json"
WITH_BOS = ("llama", "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral")
"""Values of `tokenizer.ggml.model` or `.pre` with which llama.cpp puts BOS first where the file does not say."""

CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens in `tokenizer.ggml.token_type`."""
SENTENCEPIECE = ("phi3", "gemma", "gemma2", "gemma3")
"""Architectures for which transformers takes any tokenizer for SentencePiece, whatever the file says."""


def open_gguf_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Any:
    """The tokenizer of a GGUF file; None if it has none.

    transformers knows the tokenizers of some architectures only; for others it is taken from a `tokenizer.json` beside
    the file. Raises `CheckpointError` if there is none.
    """
    if "tokenizer.ggml.model" not in metadata:
        return None
    from transformers import AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        kind, architecture = metadata["tokenizer.ggml.model"], metadata["general.architecture"]
        if architecture in SENTENCEPIECE and kind != "llama":
            raise ValueError(f"a tokenizer of kind {kind!r} for {architecture}")
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **options)
    except Exception as error:
        if not (path.parent / BESIDE).is_file():
            raise CheckpointError(
                f"transformers cannot rebuild the tokenizer in {path} ({error}); put the {BESIDE} and "
                "tokenizer_config.json of the original model beside the file"
            ) from error
        return AutoTokenizer.from_pretrained(path.parent, **options)
    _declare(tokenizer, metadata)
    return tokenizer


def _declare(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Special tokens and BOS as the file has them; transformers leaves some of them out."""
    for token, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and getattr(tokenizer, f"{token}_token_id") != number:
            setattr(tokenizer, f"{token}_token", tokenizer.convert_ids_to_tokens(number))
    _declare_whole(tokenizer, metadata.get("tokenizer.ggml.token_type"))
    kinds = (metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre"))
    wanted = metadata.get("tokenizer.ggml.add_bos_token", any(kind in WITH_BOS for kind in kinds))
    wanted = wanted and tokenizer.bos_token_id is not None
    if wanted != (tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]):
        tokenizer.add_bos_token = wanted


def _declare_whole(tokenizer: Any, types: Any) -> None:
    """Makes control tokens and those that users added tokens of their own, which are never put together from others."""
    from tokenizers import AddedToken

    if not isinstance(types, tuple):
        return
    known = tokenizer.added_tokens_decoder
    for kind in (CONTROL, USER_DEFINED):
        missing = [number for number, type_ in enumerate(types) if type_ == kind and number not in known]
        tokens = [
            AddedToken(text, special=kind == CONTROL, normalized=False)
            for text in tokenizer.convert_ids_to_tokens(missing)
            if text
        ]
        tokenizer.add_tokens(tokens, special_tokens=kind == CONTROL)
