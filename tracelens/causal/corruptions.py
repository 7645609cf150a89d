"""Ways to spoil a prompt's embedding, so that the same tokens make a corrupted run.

Each acts on `hook_embed`, the token embeddings before positions are added, at one group of positions. What is put there is
measured at that hook of the model that is run, so that it fits whatever scale the model gives its embeddings; the tokens
themselves, and what later layers know of positions, stay. Embeddings like these never occur in a real prompt (a token of
another prompt, by `ResampleEmbedding`, aside): effects may run through what the model does with odd input. Where a pair of
real prompts can be had, it says more. `where=None` corrupts every token, BOS and chat template with them; "content" is the
user's own words.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.causal.places import Where
from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.rerun import Edit, Rerunner
from tracelens.errors import PromptError, UnknownNameError

HOOK = "hook_embed"


@runtime_checkable
@runtime_checkable
class Corruption(Protocol):
    """What makes a corrupted run of the same tokens."""

    @property
    def where(self) -> Where:
        """Which positions it touches."""
        ...

    def edits(self, batch: Batch, prompts: PromptSet, model: Any) -> Mapping[str, Edit]:
        """Hook edits that corrupt a batch of the prompts; rows in the batch's order.

        Raises `PromptError` if a prompt cannot be corrupted so, `UnknownNameError` for a group that the prompts do not have.
        """
        ...


@dataclass(frozen=True)
class EmbeddingNoise:
    """Gaussian noise added to the embeddings, of standard deviation `scale` × that of the embeddings (Meng et al., 2202.05262).

    The standard deviation is over all entries of the embeddings of the tokens at those positions of all the prompts, each
    token counted as often as it stands there. A prompt's noise depends on the seed and on its place among the prompts alone:
    it is the same in batches of any size, on any device and in both models of a pair, up to that scale. One draw a prompt:
    for the mean over several, repeat with other seeds.
    """

    where: Where = "object"
    scale: float = 3.0
    seed: int = 0

    def edits(self, batch: Batch, prompts: PromptSet, model: Any) -> dict[str, Edit]:
        cells = _cells(batch, prompts, self.where)
        sd = self.standard_deviation(prompts, model)
        width = int(model.cfg.d_model)
        noise = [
            torch.randn(len(where), width, generator=_generator(self.seed, int(prompt)))
            for prompt, where in zip(batch.prompt, cells, strict=True)
        ]
        return _edit(cells, [self.scale * sd * one for one in noise], add=True)

    def standard_deviation(self, prompts: PromptSet, model: Any) -> float:
        """Of all entries of the embeddings that are corrupted; in the units of the model's residual stream."""
        tokens = [prompts.tokens[i][p] for i in range(len(prompts)) for p in _positions(prompts, i, self.where)]
        if not tokens:
            raise _nowhere(self.where)
        return float(embeddings(model, tokens).cpu().double().std(correction=0))


@dataclass(frozen=True)
class ZeroEmbedding:
    """Embeddings set to zero: no token at all, which no model has met in training."""

    where: Where = "object"

    def edits(self, batch: Batch, prompts: PromptSet, model: Any) -> dict[str, Edit]:
        cells = _cells(batch, prompts, self.where)
        return _edit(cells, [torch.zeros(len(where), int(model.cfg.d_model)) for where in cells])


@dataclass(frozen=True)
class MeanEmbedding:
    """Embeddings set to their mean over a set of prompts.

    Attributes:
        over: the prompts whose mean it is; by default those that are corrupted.
        per_position: the mean is taken by place in the group: its first token is set to the mean of first tokens, and so on
            (for `where=None`, by position in the prompt). Otherwise one mean over all tokens of the group.
    """

    where: Where = "object"
    over: PromptSet | None = field(default=None, repr=False)
    per_position: bool = False

    def edits(self, batch: Batch, prompts: PromptSet, model: Any) -> dict[str, Edit]:
        over = self.over or prompts
        rows = [[over.tokens[i][p] for p in _positions(over, i, self.where)] for i in range(len(over))]
        if not any(rows):
            raise _nowhere(self.where)
        cells = _cells(batch, prompts, self.where)
        if not self.per_position:
            mean = embeddings(model, [token for row in rows for token in row]).float().mean(0)
            return _edit(cells, [mean.expand(len(where), -1) for where in cells])
        means: list[Tensor] = []
        for place in range(max(map(len, cells), default=0)):
            tokens = [row[place] for row in rows if len(row) > place]
            if not tokens:
                raise PromptError(
                    f"no prompt of the set has {place + 1} tokens in {_name(self.where)}, but a prompt to corrupt has; give a "
                    "larger set (over=...), or per_position=False"
                )
            means.append(embeddings(model, tokens).float().mean(0))
        width = int(model.cfg.d_model)
        return _edit(cells, [torch.stack(means[: len(w)]) if w else torch.zeros(0, width) for w in cells])


@dataclass(frozen=True)
class ResampleEmbedding:
    """Embeddings taken from the same group of another prompt, which has as many tokens there and other ones.

    Attributes:
        source: the prompts that embeddings are drawn from; by default those that are corrupted, each from another.
        seed: which prompt each one draws; the draw depends on the seed and the prompt's place among the prompts alone.
    """

    where: Where = "object"
    source: PromptSet | None = field(default=None, repr=False)
    seed: int = 0

    def edits(self, batch: Batch, prompts: PromptSet, model: Any) -> dict[str, Edit]:
        cells = _cells(batch, prompts, self.where)
        donors = self._donors(prompts)
        return _edit(
            cells,
            [
                embeddings(model, self.tokens(prompts, int(prompt), donors)).float()
                if where
                else torch.zeros(0, int(model.cfg.d_model))
                for prompt, where in zip(batch.prompt, cells, strict=True)
            ],
        )

    def tokens(
        self, prompts: PromptSet, prompt: int, donors: Mapping[int, Sequence[tuple[int, ...]]] | None = None
    ) -> tuple[int, ...]:
        """The tokens that one prompt's group is given."""
        own = tuple(prompts.tokens[prompt][p] for p in _positions(prompts, prompt, self.where))
        others = [row for row in (donors or self._donors(prompts)).get(len(own), ()) if row != own]
        if not others:
            raise PromptError(
                f"no other prompt has {len(own)} tokens in {_name(self.where)} to give to prompt {prompt}; give more prompts "
                "(source=...), or another corruption"
            )
        return random.Random(f"resample:{self.seed}:{prompt}").choice(others)

    def _donors(self, prompts: PromptSet) -> dict[int, list[tuple[int, ...]]]:
        source = self.source or prompts
        found: dict[int, list[tuple[int, ...]]] = {}
        for i in range(len(source)):
            row = tuple(source.tokens[i][p] for p in _positions(source, i, self.where))
            found.setdefault(len(row), []).append(row)
        return found


def embeddings(model: Any, tokens: Sequence[int]) -> Float[Tensor, "token d_model"]:
    """What `hook_embed` holds for each token, on the model's device."""
    if HOOK not in getattr(model, "hook_dict", (HOOK,)):
        raise UnknownNameError(f"the model has no hook point {HOOK!r}, so its embeddings cannot be corrupted")
    unique = sorted(set(tokens))
    runner = Rerunner(model)
    found: list[Tensor] = []

    def read(value: Tensor) -> Tensor:
        found.append(value[0])
        return value

    with torch.no_grad():
        for i in range(0, len(unique), int(model.cfg.n_ctx)):
            runner.run(torch.tensor([unique[i : i + int(model.cfg.n_ctx)]]), edits={HOOK: read}, stop=0)
    row = {token: index for index, token in enumerate(unique)}
    return torch.cat(found)[[row[token] for token in tokens]]


def _positions(prompts: PromptSet, prompt: int, where: Where) -> tuple[int, ...]:
    return prompts.positions(prompt, where)


def _cells(batch: Batch, prompts: PromptSet, where: Where) -> list[tuple[int, ...]]:
    return [_positions(prompts, prompt, where) for prompt in batch.prompt.tolist()]


def _edit(
    cells: Sequence[tuple[int, ...]], values: Sequence[Float[Tensor, "_ d_model"]], *, add: bool = False
) -> dict[str, Edit]:
    """An edit that writes (or adds) each row's values at its cells."""
    row = torch.tensor([i for i, where in enumerate(cells) for _ in where], dtype=torch.long)
    position = torch.tensor([p for where in cells for p in where], dtype=torch.long)
    if not len(row):
        return {}
    new = torch.cat([value.to("cpu") for value in values])

    def edit(value: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        if len(value) != len(cells):
            raise PromptError(f"a corruption of {len(cells)} prompts was put on {len(value)} rows")
        at = row.to(value.device), position.to(value.device)
        out = value.clone()
        added = new.to(value.device)
        out[at] = (value[at].to(added) + added if add else added).to(value)
        return out

    return {HOOK: edit}


def _generator(seed: int, prompt: int) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(f"noise:{seed}:{prompt}").getrandbits(63))


def _name(where: Where) -> str:
    return "them" if where is None else repr(where) if isinstance(where, str) else f"position {where}"


def _nowhere(where: Where) -> PromptError:
    return PromptError(f"no prompt has tokens in {_name(where)}, so there is nothing to corrupt; give another group")
