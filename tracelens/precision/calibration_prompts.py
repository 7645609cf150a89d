"""The prompts that a calibrated quantization is fitted to, as token ids."""

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.chat import Chat, as_chat
from tracelens.errors import PromptError, UnknownNameError

if TYPE_CHECKING:
    from tracelens.loading import Checkpoint

LONGEST = 2048
"""Tokens of a prompt that are kept unless another number is asked for."""
MOST = 256
"""Prompts that are used unless another number is asked for; the papers take 128."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Tokenized prompts, and what a reader has to know to make them again."""

    ids: list[list[int]]
    source: str
    available: int
    """Prompts that the source holds."""
    truncated: int
    """Prompts of which the end was cut off."""
    max_length: int
    chat: Chat

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.ids))

    def to_dict(self) -> dict[str, Any]:
        """Counts, settings and the sha256 of the token ids as JSON; not the prompts."""
        digest = hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()
        return {
            "source": self.source,
            "sha256_token_ids": digest,
            "prompts": len(self.ids),
            "available": self.available,
            "tokens": self.n_tokens,
            "truncated": self.truncated,
            "max_length": self.max_length,
            "chat": self.chat,
        }


def read_calibration(
    source: Any,
    checkpoint: "Checkpoint",
    *,
    tokenizer: Any = None,
    n_samples: int | None = None,
    max_length: int | None = None,
    chat: Chat = "auto",
    seed: int = 0,
) -> Calibration:
    """Prompts of a source, drawn, put into the chat template, tokenized and cut.

    Args:
        source: a list of prompts (strings or objects with `.prompt`), a `Dataset`, the name of a registered one, a
            `.jsonl` or `.csv` file of prompts, or a `.txt` file with a prompt on each line.
        checkpoint: of the model that the prompts are for.
        tokenizer: instead of the checkpoint's own.
        n_samples: how many prompts, drawn without repetition; by default all, and at most `MOST`.
        max_length: tokens of a prompt that are kept; by default as many as the model has positions, at most `LONGEST`.

    Raises `PromptError` for no prompts, fewer than `n_samples`, and prompts in words that the tokenizer does not know.
    """
    from tracelens.datasets import check_vocabulary

    name, texts = _read(source)
    tokenizer, n_ctx = tokenizer or checkpoint.tokenizer, _positions(checkpoint.config)
    vocabulary = _text_config(checkpoint.config).get("vocab_size", 2**31)
    if max_length is not None and not 1 < max_length <= n_ctx:
        raise PromptError(f"max_length is {max_length}; the model takes prompts of 2 to {n_ctx} tokens")
    if n_samples is not None and not 0 < n_samples <= len(texts):
        raise PromptError(f"{n_samples} calibration prompts are asked for, and {name} holds {len(texts)}")
    available, longest = len(texts), max_length or min(n_ctx, LONGEST)
    chosen = sorted(random.Random(seed).sample(range(available), n_samples or min(available, MOST)))
    texts = [getattr(texts[i], "prompt", texts[i]) for i in chosen]
    check_vocabulary(texts, tokenizer)  # before the template, whose words are not the user's
    texts = as_chat(texts, tokenizer, chat)
    whole = tokenizer(texts, verbose=False)["input_ids"]
    if (largest := max((i for ids in whole for i in ids), default=0)) >= vocabulary:
        raise PromptError(
            f"the tokenizer gives token {largest}, and the model has {vocabulary}; give the model's own tokenizer"
        )
    ids = [list(row[:longest]) for row in whole]
    truncated = sum(len(row) > longest for row in whole)
    if truncated:
        logger.warning("%d of %d calibration prompts are cut to %d tokens", truncated, len(ids), longest)
    if not all(ids):
        raise PromptError(f"prompt {texts[ids.index([])]!r} of {name} has no tokens; remove it")
    return Calibration(ids, name, available, truncated, longest, chat)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, **(config.get("text_config") or {})}


def _positions(config: dict[str, Any]) -> int:
    text = _text_config(config)
    known = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return next((text[name] for name in known if text.get(name)), 2**31)


def _read(source: Any) -> tuple[str, list[Any]]:
    """What to call the source, and its prompts."""
    from tracelens.datasets import Dataset, get_dataset, list_datasets, load_prompts

    if isinstance(source, str) and source in list_datasets():
        source = get_dataset(source)
    if isinstance(source, Dataset):
        return source.name, list(source.prompts)
    if isinstance(source, str | PathLike):
        path = Path(source)
        if path.suffix.lower() == ".txt":
            return path.name, _lines(path)
        if not path.suffix:
            unknown = UnknownNameError.of("data set", source, list_datasets())
            raise UnknownNameError(f"{unknown}. A file of prompts ends in .jsonl, .csv or .txt")
        return path.name, list(load_prompts(path).prompts)
    if not isinstance(source, Sequence):
        raise PromptError(f"calibration is a {type(source).__name__}; give a list of prompts, a data set or a file")
    wrong = [p for p in source if not isinstance(getattr(p, "prompt", p), str) or not getattr(p, "prompt", p).strip()]
    if not source or wrong:
        fault = f"{wrong[0]!r} is not a prompt" if wrong else "there are none"
        raise PromptError(f"calibration prompts: {fault}; give texts that are like what the model will be asked")
    return "prompts", list(source)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise PromptError(f"no prompt file at {path}; give the path of a .txt, .jsonl or .csv file")
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if not lines:
        raise PromptError(f"{path}: no lines; the file holds no prompts")
    return lines
