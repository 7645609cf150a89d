"""`PromptSet`: prompts as tokens, with the positions in them that mean something."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tracelens.causal.given_prompts import Given, frame_of, given, ground_truth
from tracelens.causal.places import Where
from tracelens.causal.spans import Positions, Reading, Spans, resolve
from tracelens.chat import Chat
from tracelens.errors import PromptError, UnknownNameError
from tracelens.pair import tokenize

Groups = dict[str, tuple[Positions, ...]]

RESERVED = ("answer", "bos", "content", "template", "changed")
"""Groups that are made here or by `Contrasts`, and no span may be called."""


@dataclass(frozen=True)
class PromptSet:
    """Tokenized prompts. Their last token is where the answer begins.

    Attributes:
        texts: what was tokenized, or what the tokens say, for messages and plots.
        tokens: token ids of each prompt, BOS included if the tokenizer puts one.
        groups: name → positions of each prompt, BOS counted; empty where a prompt has none. "answer" is always there.
        behaviours: what each prompt probes, where that is known; "" where not.
        answers: the answer that is expected of each prompt, where that is known; "" where not.
        pieces: the text of each token, for plots; empty if there is no tokenizer.
        frame: groups that part all of a prompt: "bos"; "content", the user's own words; "template", what the chat format puts
            around them, special tokens included. Without those that cannot be told.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...] = field(repr=False)
    groups: Groups = field(repr=False)
    behaviours: tuple[str, ...] = field(repr=False)
    answers: tuple[str, ...] = field(default=(), repr=False)
    pieces: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    frame: Groups = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(
        cls, prompts: Any, model: Any, *, tokenizer: Any = None, spans: Spans | None = None, chat: Chat = "auto"
    ) -> "PromptSet":
        """Prompts as the model reads them.

        Args:
            prompts: texts; objects with `.prompt`, whose `.positions`, `.behaviour` and `.answer` are used if they have
                them; rows of token ids; a tokenizer's output (`input_ids` with its `attention_mask`: padding on either side
                is taken off); a `Dataset`, the name of one, its file, or behaviour → prompts: its safety prompts, then its
                baseline prompts; or a `PromptSet`, which passes through.
            spans: groups of positions beyond those that the prompts bring: see `Spans`.
            chat: texts are wrapped in the chat template where there is one, as `as_chat` says. Token ids are left as they are.

        The tokenizer's default call decides about BOS before texts; token ids are run as they are.
        Positions that prompts bring count the tokens of their own text. Where a chat template is put around it they are moved
        along; where they cannot be, and where the tokens there are not the words that the prompt brings (`.words`), this raises.
        Raises `PromptError` as `stream_aligned` does, and for spans and positions that do not fit the prompts.
        """
        tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        if isinstance(prompts, PromptSet):
            tokenize([list(ids) for ids in prompts.tokens], None, model.cfg.n_ctx, model.cfg.d_vocab)
            return prompts.with_spans(spans, tokenizer) if spans else prompts
        found = given(prompts, tokenizer, chat)
        rows = tokenize([one.read for one in found], tokenizer, model.cfg.n_ctx, model.cfg.d_vocab)
        tokens = tuple(map(tuple, rows))
        texts = tuple(_text_of(one, ids, tokenizer) for one, ids in zip(found, tokens, strict=True))
        readings = _readings(texts, tokens, found, tokenizer)
        groups = ground_truth(found, readings, tokenizer)
        groups["answer"] = tuple((len(ids) - 1,) for ids in tokens)
        made = cls(
            texts=texts,
            tokens=tokens,
            groups=groups,
            behaviours=tuple(one.behaviour for one in found),
            answers=tuple(one.answer for one in found) if any(one.answer for one in found) else (),
            pieces=_pieces(tokens, tokenizer),
            frame=frame_of(found, readings, tokenizer),
        )
        return made.with_spans(spans, tokenizer) if spans else made

    def with_spans(self, spans: Spans, tokenizer: Any = None) -> "PromptSet":
        """The same prompts with further groups; a tokenizer is needed for spans given as words."""
        if taken := [name for name in spans if name in RESERVED]:
            raise PromptError(
                f"a span cannot be called {taken[0]!r}; {', '.join(RESERVED)} have a meaning of their own"
            )
        content = self.frame.get("content")
        readings = [
            replace(
                Reading.of(index, self.texts[index], ids, tokenizer),
                content=None if content is None else content[index],
            )
            for index, ids in enumerate(self.tokens)
        ]
        return self.with_groups({name: resolve(name, parts, readings, tokenizer) for name, parts in spans.items()})

    def with_groups(self, groups: Mapping[str, Sequence[Sequence[int]]]) -> "PromptSet":
        """The same prompts with further groups of positions, which replace those of the same name."""
        more = {name: tuple(tuple(map(int, row)) for row in rows) for name, rows in groups.items()}
        for name, rows in more.items():
            if len(rows) != len(self):
                raise PromptError(f"group {name!r} has {len(rows)} entries for {len(self)} prompts; give one for each")
            for index, (row, ids) in enumerate(zip(rows, self.tokens, strict=True)):
                if any(not 0 <= position < len(ids) for position in row):
                    raise PromptError(
                        f"group {name!r} of prompt {index} holds {row}, but the prompt has {len(ids)} tokens (0 to "
                        f"{len(ids) - 1})"
                    )
        return replace(self, groups=self.groups | more)

    def select(self, indices: Iterable[int]) -> "PromptSet":
        """Some of the prompts, in the order given."""
        rows = [int(index) for index in indices]

        def chosen(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[row] for row in rows) if values else ()

        return PromptSet(
            texts=chosen(self.texts),
            tokens=chosen(self.tokens),
            groups={name: chosen(values) for name, values in self.groups.items()},
            behaviours=chosen(self.behaviours),
            answers=chosen(self.answers),
            pieces=chosen(self.pieces),
            frame={name: chosen(values) for name, values in self.frame.items()},
        )

    def positions(self, prompt: int, where: Where) -> tuple[int, ...]:
        """Positions in a prompt; none if its group is empty or the prompt has no such position."""
        length = len(self.tokens[prompt])
        if where is None:
            return tuple(range(length))
        if isinstance(where, int):
            place = where + length if where < 0 else where
            return (place,) if 0 <= place < length else ()
        if where in self.groups:
            return self.groups[where][prompt]
        if where in self.frame:
            return self.frame[where][prompt]
        raise UnknownNameError.of("group of positions", where, [*self.groups, *self.frame])

    def batches(self, size: int) -> list["Batch"]:
        """Prompts of equal length together, at most `size`: nothing is ever padded."""
        if size < 1:
            raise ValueError(f"batch_size is {size}; it must be at least 1")
        alike: dict[int, list[int]] = defaultdict(list)
        for index, ids in enumerate(self.tokens):
            alike[len(ids)].append(index)
        return [
            Batch(torch.tensor(rows[i : i + size]), torch.tensor([self.tokens[row] for row in rows[i : i + size]]))
            for _, rows in sorted(alike.items())
            for i in range(0, len(rows), size)
        ]


@dataclass(frozen=True)
class Batch:
    """Prompts of one length."""

    prompt: Int[Tensor, "prompt"]
    """Indices in the `PromptSet`; on the CPU."""
    tokens: Int[Tensor, "prompt pos"]

    def __len__(self) -> int:
        return len(self.prompt)


def _text_of(one: Given, ids: Sequence[int], tokenizer: Any) -> str:
    if isinstance(one.read, str):
        return one.read
    return str(list(ids)) if tokenizer is None else tokenizer.decode(list(ids))


def _readings(
    texts: Sequence[str], tokens: Sequence[tuple[int, ...]], found: Sequence[Given], tokenizer: Any
) -> list[Reading]:
    return [
        Reading.of(index, text, ids, tokenizer if isinstance(one.read, str) else None)
        for index, (text, ids, one) in enumerate(zip(texts, tokens, found, strict=True))
    ]


def _pieces(tokens: Sequence[Sequence[int]], tokenizer: Any) -> tuple[tuple[str, ...], ...]:
    if tokenizer is None:
        return ()
    text = {token: tokenizer.decode([token]) for token in {token for ids in tokens for token in ids}}
    return tuple(tuple(text[token] for token in ids) for ids in tokens)
