"""Whatever a user may give as prompts, one by one: what is read, what was wrapped around it, and what is known of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from tracelens.causal.spans import Positions, Reading, offsets_of
from tracelens.chat import Chat, as_chat
from tracelens.datasets import Dataset, get_dataset, list_datasets, resolve_dataset
from tracelens.errors import PromptError

_FILE = re.compile(r"\S+\.(jsonl|csv)")


@dataclass(frozen=True)
class Given:
    """One prompt.

    Attributes:
        read: what the model reads: a text, its chat template around it, or token ids.
        raw: the text alone; None if token ids were given.
        behaviour, answer: "" where not known.
        positions: name → positions in the tokens of `raw` (of `read`, if that is ids); None if the prompt brings none.
        words: name → what should stand there, where the prompt says so.
    """

    read: str | tuple[int, ...]
    raw: str | None
    behaviour: str = ""
    answer: str = ""
    positions: Mapping[str, Sequence[int]] | None = None
    words: Mapping[str, str] | None = None

    @property
    def wrapped(self) -> bool:
        """Whether a chat template was put around it."""
        return self.raw is not None and self.read != self.raw


def given(prompts: Any, tokenizer: Any, chat: Chat) -> list[Given]:
    """The prompts one by one; raises `PromptError` for what is none."""
    if isinstance(prompts, str) and not (prompts in list_datasets() or _FILE.fullmatch(prompts)):
        raise PromptError(
            "prompts is one string; give a list of prompts: [prompt], or the name of a data set: "
            f"{', '.join(list_datasets())}"
        )
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return [Given(tuple(row), None) for row in _without_padding(prompts, tokenizer)]
    if isinstance(prompts, Dataset | str | Mapping | PathLike):
        return _of_dataset(dataset_of(prompts, need_baseline=False), tokenizer, chat)
    if isinstance(prompts, torch.Tensor):
        return [Given(tuple(row), None) for row in _without_padding({"input_ids": prompts}, tokenizer)]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        raise PromptError("prompts is one row of token ids; give a list of rows: [ids]")
    plain = [getattr(item, "prompt", item) for item in items]
    as_text = [isinstance(item, str) for item in plain]
    if any(as_text) and not all(as_text):
        raise PromptError("some prompts are texts and some token ids; give either texts or token ids")
    if not all(as_text):
        return [
            _of_item(item, _ids(index, ids), None) for index, (item, ids) in enumerate(zip(items, plain, strict=True))
        ]
    wrapped = as_chat(items, tokenizer, chat)
    return [_of_item(item, read, raw) for item, read, raw in zip(items, wrapped, plain, strict=True)]


def _of_item(item: Any, read: str | tuple[int, ...], raw: str | None) -> Given:
    positions, words = getattr(item, "positions", None), getattr(item, "words", None)
    return Given(
        read,
        raw,
        behaviour=str(getattr(item, "behaviour", None) or ""),
        answer=str(getattr(item, "answer", None) or ""),
        positions=positions if isinstance(positions, Mapping) else None,
        words=words if isinstance(words, Mapping) else None,
    )


def _ids(index: int, row: Any) -> tuple[int, ...]:
    try:
        ids = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError):
        raise PromptError(
            f"prompt {index} is {row!r}; give texts, objects with .prompt, or rows of token ids"
        ) from None
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        if not ids.numel():
            return ()
        raise PromptError(
            f"prompt {index} has shape {list(ids.shape)} and dtype {ids.dtype}; rows of token ids are whole numbers, [pos]"
        )
    return tuple(ids.tolist())


def dataset_of(source: Any, *, need_baseline: bool) -> Dataset:
    """A `Dataset`, the name or the file of one, or behaviour → prompts; raises as `resolve_dataset`."""
    if isinstance(source, Dataset) and not need_baseline:
        return source
    return resolve_dataset(source, need_baseline=need_baseline)


def _of_dataset(dataset: Dataset, tokenizer: Any, chat: Chat) -> list[Given]:
    behaviours = [*dataset.behaviours, *baseline_behaviours(dataset)]
    wrapped = as_chat(dataset.prompts, tokenizer, chat)
    rows = zip(dataset.prompts, wrapped, behaviours, strict=True)
    return [Given(read, raw, behaviour) for raw, read, behaviour in rows]


def baseline_behaviours(dataset: Dataset) -> list[str]:
    """What each baseline prompt is the baseline of: the set's only behaviour, or, in a built-in set, its partner's; else ""."""
    n = len(dataset.baseline_prompts)
    only = set(dataset.behaviours)
    if len(only) == 1:
        return [*only] * n
    built_in = (
        dataset.name in list_datasets() and get_dataset(dataset.name).baseline_prompts == dataset.baseline_prompts
    )
    return list(dataset.behaviours) if built_in and len(dataset.behaviours) == n else [""] * n


def _without_padding(encoded: Mapping[str, Any], tokenizer: Any) -> list[list[int]]:
    rows = [_ids(index, row) for index, row in enumerate(encoded["input_ids"])]
    masks = encoded.get("attention_mask")
    if masks is None:
        for index, row in enumerate(rows):
            if _looks_padded(row, tokenizer):
                raise PromptError(
                    f"prompt {index} of the token ids seems padded (token {row[-1] if row[0] != row[1] else row[0]}), and there "
                    "is no attention_mask to say where; pass the tokenizer's whole output, or rows without padding"
                )
        return [list(row) for row in rows]
    kept: list[list[int]] = []
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        real = torch.as_tensor(mask).bool()
        if len(real) != len(row):
            raise PromptError(f"prompt {index} has {len(row)} token ids and an attention_mask of {len(real)}")
        at = real.nonzero().flatten().tolist()
        if at and at[-1] - at[0] + 1 != len(at):
            raise PromptError(
                f"the attention_mask of prompt {index} has holes; padding goes before or after a prompt, not into it"
            )
        kept.append([row[i] for i in at])
    return kept


def _looks_padded(row: Sequence[int], tokenizer: Any) -> bool:
    pad = getattr(tokenizer, "pad_token_id", None)
    # One pad token in front may be the BOS token of a tokenizer that uses the same for both.
    return pad is not None and len(row) > 1 and (row[-1] == pad or row[0] == row[1] == pad)


def ground_truth(
    found: Sequence[Given], readings: Sequence[Reading], tokenizer: Any
) -> dict[str, tuple[Positions, ...]]:
    """Groups that the prompts bring, in what the model reads; without those that are empty in all of them."""
    rows = [_moved(one, reading, tokenizer) for one, reading in zip(found, readings, strict=True)]
    names = dict.fromkeys(name for row in rows for name, where in row.items() if where)
    return {name: tuple(row.get(name, ()) for row in rows) for name in names}


def _moved(one: Given, reading: Reading, tokenizer: Any) -> dict[str, Positions]:
    """A prompt's own positions in what the model reads."""
    if one.positions is None:
        return {}
    length = len(reading.tokens)
    if not one.wrapped:
        groups = {name: tuple(map(int, where)) for name, where in one.positions.items()}
        if any(not 0 <= p < length for where in groups.values() for p in where):
            raise PromptError(
                f"prompt {reading.index} names positions beyond its {length} tokens; they are those of another tokenizer"
            )
    else:
        groups = _shifted(one, reading, tokenizer)
    for name, word in (one.words or {}).items():
        _check_word(name, word, groups.get(name, ()), reading)
    return groups


def _shifted(one: Given, reading: Reading, tokenizer: Any) -> dict[str, Positions]:
    assert one.raw is not None
    assert one.positions is not None
    ids = list(tokenizer(one.raw, verbose=False)["input_ids"])
    offsets = offsets_of(one.raw, ids, tokenizer)
    start = reading.text.find(one.raw)
    groups: dict[str, Positions] = {}
    for name, where in one.positions.items():
        if name == "answer":
            continue
        moved: list[int] = []
        for position in map(int, where):
            hits = ()
            if offsets and reading.offsets and start >= 0 and 0 <= position < len(ids):
                a, b = offsets[position]
                hits = tuple(i for i, (c, d) in enumerate(reading.offsets) if c < b + start and d > a + start and a < b)
            # A word at the edge may be another token beside the template: then what the prompt means is not known.
            if len(hits) != 1 or reading.tokens[hits[0]] != ids[position]:
                raise PromptError(
                    f"prompt {reading.index} brings positions ({name!r}: {position}) that cannot be followed into the chat "
                    "template; pass chat='never', or name the words with spans={...}"
                )
            moved.append(hits[0])
        groups[name] = tuple(moved)
    return groups


def _check_word(name: str, word: str, where: Positions, reading: Reading) -> None:
    if not where or reading.offsets is None:
        return
    a, b = reading.offsets[where[0]][0], reading.offsets[where[-1]][1]
    if reading.text[a:b].strip().casefold() != word.strip().casefold():
        raise PromptError(
            f"prompt {reading.index} says that its {name} is {word!r}, but the tokens at {list(where)} are "
            f"{reading.text[a:b]!r}; its positions are those of another tokenizer: name the words with spans={{...}} and give "
            "the texts alone"
        )


def frame_of(found: Sequence[Given], readings: Sequence[Reading], tokenizer: Any) -> dict[str, tuple[Positions, ...]]:
    """BOS, the user's own words, and what the chat format puts around them; nothing where the tokenizer cannot tell."""
    if tokenizer is None:
        return {}
    special = set(tokenizer.all_special_ids)
    bos = [
        (0,) if reading.tokens[:1] == (tokenizer.bos_token_id,) and len(reading.tokens) > 1 else ()
        for reading in readings
    ]
    content: list[Positions] = []
    for one, reading in zip(found, readings, strict=True):
        own = range(len(reading.tokens))
        if one.raw is not None and one.wrapped:
            raw = one.raw.strip()
            start = reading.text.find(raw)
            if start < 0 or reading.offsets is None:
                return {"bos": tuple(bos)}
            own = reading.holding(start, start + len(raw))
        content.append(tuple(i for i in own if reading.tokens[i] not in special))
    template = [
        tuple(i for i in range(len(reading.tokens)) if i not in set(own) and i not in first)
        for reading, own, first in zip(readings, content, bos, strict=True)
    ]
    return {"bos": tuple(bos), "content": tuple(content), "template": tuple(template)}
