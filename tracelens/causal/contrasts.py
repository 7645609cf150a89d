"""`Contrasts`: a clean and a corrupted run of each prompt, which differ in one thing."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.causal.arms import ArmRunner, evaluating
from tracelens.causal.contrast_check import ContrastCheck
from tracelens.causal.corruptions import Corruption
from tracelens.causal.effects import MIN_DIFFERENCE
from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.readout import Metric, as_metric, default_metric
from tracelens.causal.rerun import Edit, Rerunner
from tracelens.causal.spans import Positions, Spans
from tracelens.chat import Chat
from tracelens.errors import PromptError

if TYPE_CHECKING:
    import pandas as pd

RUNS = ("clean", "corrupted")


@dataclass(frozen=True)
class Contrasts:
    """Pairs of runs: the i-th clean prompt and the i-th corrupted one have the same number of tokens and differ in some.

    Attributes:
        clean: prompts as they should be.
        corrupted: other tokens; the clean prompts themselves if there is a `corruption`.
        corruption: what spoils the embedding of the corrupted run.
        metric: what is natural to measure of them; None if nothing is known.
        changed: positions in which the two differ. Both sets have them as their group "changed".
        dropped: why → how many pairs were left out where these were built.
    """

    clean: PromptSet
    corrupted: PromptSet
    corruption: Corruption | None = field(default=None)
    metric: Metric | None = field(default=None, repr=False)
    changed: tuple[Positions, ...] = field(default=(), repr=False)
    dropped: dict[str, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.corruption is None:
            changed = changed_positions(self.clean, self.corrupted)
        else:
            where = self.corruption.where
            changed = tuple(self.clean.positions(i, where) for i in range(len(self.clean)))
            if self.corrupted.tokens != self.clean.tokens:
                raise PromptError(
                    "a corruption of embeddings is put on the clean prompts; give them as `corrupted` too"
                )
            if empty := [i for i, where in enumerate(changed) if not where]:
                raise PromptError(
                    f"prompt {empty[0]} has no token in {where!r}, so {self.corruption} leaves it as it is ({len(empty)} of "
                    f"{len(changed)} such prompts); drop it or corrupt another group: {self.clean.texts[empty[0]]!r}"
                )
        object.__setattr__(self, "changed", changed)
        for name in RUNS:
            object.__setattr__(self, name, getattr(self, name).with_groups({"changed": changed}))

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        how = (
            f"by {self.corruption}"
            if self.corruption
            else f"by {_range([len(c) for c in self.changed])} changed token(s)"
        )
        dropped = "".join(f"; {n} dropped: {why}" for why, n in self.dropped.items())
        metric = f", {self.metric.name}" if self.metric else ""
        return f"Contrasts({len(self)} pairs of {_range([len(t) for t in self.clean.tokens])} tokens, {how}{metric}{dropped})"

    @classmethod
    def of(
        cls,
        clean: Any,
        corrupted: Any,
        model: Any,
        *,
        metric: Any = None,
        spans: Spans | None = None,
        chat: Chat = "auto",
        tokenizer: Any = None,
    ) -> "Contrasts":
        """From pairs of prompts of the user's own, each whatever `PromptSet.of` takes.

        `spans` are of the clean prompts; the corrupted ones have the same groups, being as long.
        Raises `PromptError` for pairs that are not as many tokens, or not different, and whatever `PromptSet.of` raises.
        """
        ours = PromptSet.of(clean, model, tokenizer=tokenizer, spans=spans, chat=chat)
        theirs = PromptSet.of(corrupted, model, tokenizer=tokenizer, chat=chat)
        changed_positions(ours, theirs)
        same = replace(theirs, groups=dict(ours.groups), frame=dict(ours.frame))
        return cls(ours, same, metric=None if metric is None else as_metric(metric))

    @classmethod
    def of_corruption(
        cls,
        prompts: Any,
        model: Any,
        corruption: Corruption,
        metric: Any = None,
        *,
        spans: Spans | None = None,
        chat: Chat = "auto",
        tokenizer: Any = None,
    ) -> "Contrasts":
        """The same prompts with their embeddings spoilt.

        Raises `PromptError` for prompts that have no token where the corruption acts.
        """
        made = PromptSet.of(prompts, model, tokenizer=tokenizer, spans=spans, chat=chat)
        return cls(made, made, corruption, None if metric is None else as_metric(metric))

    @property
    def n_changed(self) -> tuple[int, ...]:
        """In how many tokens each pair differs."""
        return tuple(map(len, self.changed))

    def swapped(self) -> "Contrasts":
        """Clean and corrupted exchanged; the metric is read the same way, so it changes its sign or falls with it."""
        if self.corruption is not None:
            raise PromptError(
                "embeddings spoilt by a corruption cannot be the clean run; for the other direction patch with "
                "direction='noising'"
            )
        return replace(self, clean=self.corrupted, corrupted=self.clean)

    def select(self, indices: Iterable[int]) -> "Contrasts":
        """Some of the pairs, in the order given.

        Noise and resampling are drawn by place among the prompts, and means are over them: a corruption is made anew.
        """
        rows = [int(i) for i in indices]
        metric = self.metric.select(rows) if self.metric else None
        return replace(self, clean=self.clean.select(rows), corrupted=self.corrupted.select(rows), metric=metric)

    def edits(self, model: Any) -> Callable[[Batch], Mapping[str, Edit]] | None:
        """What makes a model's run of `corrupted` the corrupted one, for `ArmRunner.base_edits` and `OtherRun.edits`."""
        if self.corruption is None:
            return None
        corruption = self.corruption
        return lambda batch: corruption.edits(batch, self.clean, model)

    def baselines(self, model: Any, *, whole: bool = False) -> dict[str, Callable[[Batch], Tensor]]:
        """The logits of the clean and of the corrupted run for a batch, for metrics that compare with them."""
        return {name: partial(self._logits, model, name, whole=whole) for name in RUNS}

    def _logits(self, model: Any, which: str, batch: Batch, *, whole: bool) -> Tensor:
        prompts = getattr(self, which)
        edits = self.edits(model) if which == "corrupted" else None
        tokens = torch.tensor([prompts.tokens[i] for i in batch.prompt.tolist()])
        with torch.no_grad(), evaluating(model):
            logits, _ = Rerunner(model).run(tokens, edits=edits(batch) if edits else None, whole=whole)
        assert logits is not None
        return logits

    def metric_for(self, model: Any, metric: Any = None, *, tokenizer: Any = None) -> Metric:
        """The metric given, the pairs' own, or the default one of the clean prompts."""
        if metric is not None:
            return as_metric(metric)
        return self.metric or default_metric(
            self.clean, getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        )

    def check(
        self,
        model: Any,
        metric: Any = None,
        *,
        min_difference: float = MIN_DIFFERENCE,
        batch_size: int = 32,
        memory_budget: int | None = None,
        progress: bool = False,
    ) -> ContrastCheck:
        """The metric of both runs of every pair: does the model tell them apart?"""
        measured = self.metric_for(model, metric)
        values: dict[str, Tensor] = {}
        for name in RUNS:
            job = ArmRunner(
                model,
                getattr(self, name),
                measured,
                memory_budget=memory_budget,
                batch_size=batch_size,
                progress=progress,
                base_edits=self.edits(model) if name == "corrupted" else None,
                baselines=self.baselines(model, whole=measured.whole),
            )
            values[name] = job.unpatched()
        return ContrastCheck(values["clean"], values["corrupted"], measured.name, measured.unit, min_difference)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a pair: clean, corrupted (texts), changed (how many tokens), positions, and the tokens before and after."""
        import pandas as pd

        rows = [
            {
                "clean": self.clean.texts[i],
                "corrupted": self.corrupted.texts[i] if self.corruption is None else str(self.corruption),
                "behaviour": self.clean.behaviours[i],
                "n_tokens": len(self.clean.tokens[i]),
                "n_changed": len(where),
                "positions": where,
                "from": tuple(_piece(self.clean, i, p) for p in where),
                "to": tuple(_piece(self.corrupted, i, p) for p in where) if self.corruption is None else (),
            }
            for i, where in enumerate(self.changed)
        ]
        return pd.DataFrame(rows)


def changed_positions(clean: PromptSet, corrupted: PromptSet) -> tuple[Positions, ...]:
    """Positions at which the tokens of each pair differ.

    Raises `PromptError`, with the pair, for another number of prompts, other lengths, and pairs that do not differ.
    """
    if len(clean) != len(corrupted):
        raise PromptError(f"{len(clean)} clean prompts, but {len(corrupted)} corrupted ones; give one for each")
    found: list[Positions] = []
    for i, (ours, theirs) in enumerate(zip(clean.tokens, corrupted.tokens, strict=True)):
        if len(ours) != len(theirs):
            raise PromptError(
                f"pair {i}: the clean prompt has {len(ours)} tokens, the corrupted one {len(theirs)}; they must have the same "
                "number, so that positions correspond: exchange words for words of as many tokens.\n"
                f"clean: {clean.texts[i]!r}\ncorrupted: {corrupted.texts[i]!r}"
            )
        where = tuple(p for p, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        if not where:
            raise PromptError(
                f"pair {i}: the clean and the corrupted prompt are the same tokens, so there is nothing to patch: "
                f"{clean.texts[i]!r}"
            )
        found.append(where)
    return tuple(found)


def _piece(prompts: PromptSet, prompt: int, position: int) -> str:
    return prompts.pieces[prompt][position] if prompts.pieces else str(prompts.tokens[prompt][position])


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"
