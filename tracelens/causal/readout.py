"""What is measured of a run: one number per prompt, read off the logits where the answer begins."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracelens.behaviour import OPENERS, AnswerTokens, answer_tokens_for, margin
from tracelens.causal.answers import first_tokens, single_tokens
from tracelens.causal.prompts import PromptSet
from tracelens.errors import MetricInputError, PromptError, UnknownNameError


@dataclass(frozen=True)
class Context:
    """What a metric may need beside the logits of its rows."""

    prompt: Int[Tensor, "row"]
    """Which prompt each row runs; on the logits' device."""
    baseline: Callable[[str], Float[Tensor, "row d_vocab"]]
    """Name of an unpatched run ("clean", "corrupted", "reference", "quantized") → its logits, by row."""


class Metric:
    """A number per run: called with logits [row, d_vocab] (of all positions, [row, pos, d_vocab], if `whole`) and a
    `Context`, it gives [row].
    """

    name: str = "metric"
    unit: str = ""
    whole: bool = False
    """Whether it reads the logits of all positions; unembedding the last alone is much cheaper."""
    baselines: tuple[str, ...] = ()
    """Names of the unpatched runs whose logits it reads."""

    def bound(self, prompts: PromptSet, d_vocab: int) -> "Metric":
        """The metric for these prompts; raises `PromptError` if it cannot be read of them."""
        return self

    def select(self, indices: Sequence[int]) -> "Metric":
        """The metric for a selection of the prompts, as `PromptSet.select` makes it."""
        return self

    def __call__(self, logits: Float[Tensor, "row *pos d_vocab"], context: Context) -> Float[Tensor, "row"]:
        raise NotImplementedError


def _ids(d_vocab: int, prompts: PromptSet, *columns: Any) -> None:
    for ids in columns:
        if len(ids) != len(prompts):
            raise PromptError(f"{len(ids)} answers for {len(prompts)} prompts; give one token id for each")
        for index, token in enumerate(ids):
            if not 0 <= token < d_vocab:
                raise PromptError(
                    f"the answer of prompt {index} is token {token}; the vocabulary is 0 to {d_vocab - 1}"
                )


@dataclass(frozen=True)
class Margin(Metric):
    """Log-odds of the behaviour's first tokens over the others', in nats: `tracelens.behaviour.margin`.

    Attributes:
        answer_tokens: for all prompts, or by the prompts' behaviour.
    """

    answer_tokens: AnswerTokens | Mapping[str, AnswerTokens]
    behaviours: tuple[str, ...] = ()
    """Of each prompt, where `answer_tokens` is a mapping; by default those that the prompts bring."""
    name = "margin"
    unit = "nats"

    def bound(self, prompts: PromptSet, d_vocab: int) -> "Margin":
        if isinstance(self.answer_tokens, AnswerTokens):
            return self
        behaviours = self.behaviours or prompts.behaviours
        for index, behaviour in enumerate(behaviours):
            if behaviour not in self.answer_tokens:
                raise PromptError(
                    f"prompt {index} is of behaviour {behaviour!r}, for which there are no answer tokens; there are for "
                    f"{', '.join(self.answer_tokens)}"
                )
        if len(behaviours) != len(prompts):
            raise PromptError(f"{len(behaviours)} behaviours for {len(prompts)} prompts; give one for each")
        return Margin(self.answer_tokens, tuple(behaviours))

    def select(self, indices: Sequence[int]) -> "Margin":
        return Margin(self.answer_tokens, tuple(self.behaviours[i] for i in indices) if self.behaviours else ())

    def __call__(self, logits: Float[Tensor, "row d_vocab"], context: Context) -> Float[Tensor, "row"]:
        if isinstance(self.answer_tokens, AnswerTokens):
            return margin(logits, self.answer_tokens)
        out = logits.new_zeros(len(logits), dtype=torch.float32)
        kinds = [self.behaviours[i] for i in context.prompt.tolist()]
        for behaviour in dict.fromkeys(kinds):
            rows = torch.tensor([kind == behaviour for kind in kinds], device=logits.device)
            out[rows] = margin(logits[rows], self.answer_tokens[behaviour])
        return out


@dataclass(frozen=True)
class LogitDifference(Metric):
    """Logit of each prompt's right answer less that of its wrong one: the log of their odds, in nats."""

    correct: tuple[int, ...]
    """Token id of each prompt."""
    wrong: tuple[int, ...]
    name = "logit difference"
    unit = "logits"

    @classmethod
    def of(cls, tokenizer: Any, correct: Sequence[str | int], wrong: Sequence[str | int]) -> "LogitDifference":
        """From answers as texts, each of which must be one token as it stands, a space before it included (" Paris").

        Raises `PromptError` with the prompt, the tokens that an answer splits into, and what would be one token.
        """
        return cls(single_tokens(tokenizer, correct, "correct"), single_tokens(tokenizer, wrong, "wrong"))

    def bound(self, prompts: PromptSet, d_vocab: int) -> "LogitDifference":
        _ids(d_vocab, prompts, self.correct, self.wrong)
        for index, (right, wrong) in enumerate(zip(self.correct, self.wrong, strict=True)):
            if right == wrong:
                raise PromptError(f"the correct and the wrong answer of prompt {index} are the same token, {right}")
        return self

    def select(self, indices: Sequence[int]) -> "LogitDifference":
        return LogitDifference(tuple(self.correct[i] for i in indices), tuple(self.wrong[i] for i in indices))

    def __call__(self, logits: Float[Tensor, "row d_vocab"], context: Context) -> Float[Tensor, "row"]:
        right, wrong = (wide(_of_rows(logits, ids, context)) for ids in (self.correct, self.wrong))
        return right - wrong


@dataclass(frozen=True)
class LogProb(Metric):
    """Log-probability of each prompt's answer, in nats, ≤ 0."""

    answer: tuple[int, ...]
    """Token id of each prompt."""
    name = "log-probability"
    unit = "nats"

    @classmethod
    def of(cls, tokenizer: Any, answer: Sequence[str | int]) -> "LogProb":
        """From answers as texts; see `LogitDifference.of`."""
        return cls(single_tokens(tokenizer, answer, "expected"))

    def bound(self, prompts: PromptSet, d_vocab: int) -> "LogProb":
        _ids(d_vocab, prompts, self.answer)
        return self

    def select(self, indices: Sequence[int]) -> "LogProb":
        return LogProb(tuple(self.answer[i] for i in indices))

    def __call__(self, logits: Float[Tensor, "row d_vocab"], context: Context) -> Float[Tensor, "row"]:
        return _of_rows(wide(logits).log_softmax(-1), self.answer, context)


@dataclass(frozen=True)
class KL(Metric):
    """KL(run `of` ‖ this run) at the answer, in nats, ≥ 0: how far a run is from an unpatched one.

    `of`: "clean" or "corrupted" within a model, "reference" or "quantized" across precisions. Summed over the vocabulary.
    """

    of: str = "reference"
    unit = "nats"

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"KL({self.of} ‖ run)"

    @property
    def baselines(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.of,)

    def __call__(self, logits: Float[Tensor, "row d_vocab"], context: Context) -> Float[Tensor, "row"]:
        expected, found = (wide(x).log_softmax(-1) for x in (context.baseline(self.of), logits))
        p = expected.exp()
        # Tokens that the model rules out (logits of −∞) add nothing.
        return (p * torch.where(p > 0, expected - found, 0)).sum(-1).clamp(min=0)


@dataclass(frozen=True)
class Function(Metric):
    """Any function of logits: [row, d_vocab] → [row]; of [row, pos, d_vocab], all prompts of a call being equally long, if `whole`.

    It is called with rows of several prompts and interventions at a time and must treat each alone. Logits come in float32,
    or wider if the model's are.
    """

    function: Callable[[Tensor], Tensor]
    name: str = "metric"
    unit: str = ""
    whole: bool = False

    def __call__(self, logits: Float[Tensor, "row *pos d_vocab"], context: Context) -> Any:
        return self.function(wide(logits))


@dataclass(frozen=True)
class Loss(Metric):
    """Mean negative log-likelihood of a prompt's own next tokens, in nats a token, ≥ 0; the first token is not predicted.

    It reads the logits of all positions: sweeps with it cost more time and memory than with a metric of the answer alone.
    """

    tokens: tuple[tuple[int, ...], ...] = ()
    """Of each prompt; those of the prompts that it is bound to."""
    name = "loss"
    unit = "nats"
    whole = True

    def bound(self, prompts: PromptSet, d_vocab: int) -> "Loss":
        for index, ids in enumerate(prompts.tokens):
            if len(ids) < 2:
                raise PromptError(f"prompt {index} has one token, so no next token to predict; drop it")
        return Loss(prompts.tokens)

    def select(self, indices: Sequence[int]) -> "Loss":
        return Loss(tuple(self.tokens[i] for i in indices) if self.tokens else ())

    def __call__(self, logits: Float[Tensor, "row pos d_vocab"], context: Context) -> Float[Tensor, "row"]:
        ids = torch.tensor([self.tokens[i] for i in context.prompt.tolist()], device=logits.device)
        predicted = wide(logits[:, :-1])
        chosen = predicted.gather(2, ids[:, 1:, None]).squeeze(2)
        return (predicted.logsumexp(-1) - chosen).mean(1)


def as_metric(metric: Any) -> Metric:
    """A `Metric` from what users give: one, `AnswerTokens` (their margin), or a function of logits [row, d_vocab]."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, AnswerTokens | Mapping):
        return Margin(metric)
    if callable(metric):
        return Function(cast(Any, metric), getattr(metric, "__name__", "metric"))
    raise MetricInputError(
        f"metric is a {type(metric).__name__}; give a Metric (Margin, LogitDifference, LogProb, KL), AnswerTokens, or a "
        "function from logits [row, d_vocab] to [row]"
    )


def default_metric(prompts: PromptSet, tokenizer: Any) -> Metric:
    """What is measured where the user does not say.

    The margin of the prompts' behaviours where there are openers for them (refusal where none is known), and the
    log-probability of the first token of the expected answer where the prompts bring answers and no such behaviour.
    Raises `PromptError` for prompts of other behaviours without answers, and where the tokenizer has no opener as a token.
    """
    kinds = dict.fromkeys(behaviour or "refusal" for behaviour in prompts.behaviours)
    if tokenizer is None:
        raise PromptError("there is no tokenizer to find the answers' tokens with; pass tokenizer=... or metric=...")
    if all(kind in OPENERS for kind in kinds):
        tokens = {kind: answer_tokens_for(tokenizer, kind) for kind in kinds}
        return Margin(tokens, tuple(behaviour or "refusal" for behaviour in prompts.behaviours))
    if not any(kind in OPENERS for kind in kinds) and prompts.answers and all(prompts.answers):
        return LogProb(first_tokens(tokenizer, prompts.answers))
    raise PromptError(
        f"there is no metric that fits all of these prompts' behaviours, {', '.join(kinds)} (there are openers for "
        f"{', '.join(OPENERS)}); pass metric=... (Margin, LogitDifference, LogProb, KL), or prompts of one kind at a time"
    )


def check_baselines(metric: Metric, known: Sequence[str]) -> None:
    """Raises `UnknownNameError` if a metric reads an unpatched run that the analysis has not, such as another model's."""
    if missing := [name for name in metric.baselines if name not in known]:
        runs = ", ".join(known) or "none"
        raise UnknownNameError(
            f"metric {metric.name!r} needs the run {missing[0]!r}; the runs of this analysis: {runs}"
        )


def wide(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Logits in float32, or as they are if they are wider: differences of bfloat16 logits would be rounded to 2 or 3 digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _of_rows(values: Float[Tensor, "row d_vocab"], ids: Sequence[int], context: Context) -> Float[Tensor, "row"]:
    chosen = torch.tensor(ids, device=values.device)[context.prompt.to(values.device)]
    return values.gather(1, chosen[:, None]).squeeze(1)


def checked(
    metric: Metric, values: Any, logits: Tensor, context: Context, replaced: Callable[[int], str] | None = None
) -> Float[Tensor, "row"]:
    """A metric's values; raises `MetricInputError`, with the prompt and what a row's run had `replaced`, for another shape
    than [row], NaN and infinity."""
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise MetricInputError(
            f"metric {metric.name!r} gave {shape} for logits of shape {list(logits.shape)}; it must give one number per "
            f"row, [{len(logits)}]"
        )
    if (bad := ~values.isfinite()).any():
        row = int(bad.nonzero()[0])
        what = "NaN" if values[row].isnan() else "infinite"
        where = f" with {replaced(row)} replaced" if replaced else ""
        raise MetricInputError(
            f"metric {metric.name!r} is {what} for prompt {int(context.prompt[row])}{where}; check its answer tokens, and the "
            f"logits ({int(logits[row].isnan().sum())} of them are NaN, {int(logits[row].isinf().sum())} infinite)"
        )
    return values
