"""Prompts in two parts: on one it is chosen what to restore, on the other it is measured what that brought back.

Whoever chooses and measures on the same prompts measures his luck too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import Context, Metric, as_metric
from tracelens.errors import PromptError


@dataclass(frozen=True)
class Part:
    """Some of the prompts, and the metric of them.

    Attributes:
        prompts: these prompts alone.
        metric: bound to them.
        rows: where they stood among all that were given.
    """

    prompts: PromptSet
    metric: Metric
    rows: tuple[int, ...]


@dataclass(frozen=True)
class MetricOf(Metric):
    """A metric that is bound to many prompts, read of some of them: `rows` says which."""

    inner: Metric
    rows: tuple[int, ...]

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.name

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.unit

    @property
    def whole(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.whole

    @property
    def baselines(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.baselines

    def bound(self, prompts: PromptSet, d_vocab: int) -> "MetricOf":
        if len(prompts) != len(self.rows):
            raise PromptError(f"the metric is that of {len(self.rows)} prompts, and there are {len(prompts)}")
        return self

    def __call__(self, logits: Float[Tensor, "row *pos d_vocab"], context: Context) -> Float[Tensor, "row"]:
        rows = torch.tensor(self.rows, device=context.prompt.device)[context.prompt]
        return self.inner(logits, Context(rows, context.baseline))


def parts(
    pair: Any,
    prompts: Any,
    choose_on: Any = None,
    *,
    metric: Any = None,
    spans: Any = None,
    chat: Any = "auto",
    tokenizer: Any = None,
    seed: int = 0,
) -> tuple[Part, Part]:
    """The prompts to choose on and those to measure on.

    Without `choose_on`, `prompts` are shuffled (by `seed`) and halved; with it, all of `prompts` are measured on. A prompt that is
    to be measured on (token for token: some are given twice) is not chosen on.
    Raises `PromptError` for a single prompt, where none is left to choose on, for a metric with answers of its own for each prompt
    beside `choose_on`, and as `PromptSet.of`.
    """
    tokenizer = pair.tokenizer if tokenizer is None else tokenizer
    options: dict[str, Any] = {"tokenizer": tokenizer, "chat": chat}
    given = PromptSet.of(prompts, pair.reference, spans=spans, **options)
    read = _metric(metric, given, tokenizer)
    d_vocab = int(pair.reference.cfg.d_vocab)
    if choose_on is not None:
        if metric is not None and read.select(()) != read:
            raise PromptError(
                f"metric {read.name!r} has something of its own for each prompt, and there are two sets of prompts; give one set, which "
                "is halved, or a metric that is read of any prompt alike"
            )
        # Spans are given by prompt, and these are other prompts.
        other = PromptSet.of(choose_on, pair.reference, **options)
        both = ((other, read if metric is not None else _metric(None, other, tokenizer)), (given, read))
        chosen, held = (Part(p, m.bound(p, d_vocab), tuple(range(len(p)))) for p, m in both)
        return _without(chosen, held), held
    if len(given) < 2:
        raise PromptError(
            "one prompt cannot be halved into one to choose on and one to measure on; give more, or choose_on="
        )
    order = np.random.default_rng(seed).permutation(len(given)).tolist()
    half = len(order) // 2
    bound = read.bound(given, d_vocab)
    chosen, held = (
        Part(given.select(rows), MetricOf(bound, rows), rows)
        for rows in (tuple(sorted(order[:half])), tuple(sorted(order[half:])))
    )
    return _without(chosen, held), held


def _without(choose: Part, held: Part) -> Part:
    """The prompts to choose on less those that are measured on."""
    seen = set(held.prompts.tokens)
    keep = tuple(i for i, ids in enumerate(choose.prompts.tokens) if ids not in seen)
    if not keep:
        raise PromptError(
            "all prompts to choose on are among the held-out ones, so nothing could be measured that was not chosen for; "
            "give more prompts"
        )
    if len(keep) == len(choose.prompts):
        return choose
    return Part(choose.prompts.select(keep), MetricOf(choose.metric, keep), tuple(choose.rows[i] for i in keep))


def _metric(metric: Any, prompts: PromptSet, tokenizer: Any) -> Metric:
    if metric is not None:
        return as_metric(metric)
    from tracelens.causal.readout import default_metric

    return default_metric(prompts, tokenizer)
