"""Pruning that costs as much as a precision does: the same perplexity or divergence by another kind of damage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tracelens.audit_report import AuditReport
from tracelens.errors import MetricInputError
from tracelens.metrics.divergence import DivergenceAccumulator, nll
from tracelens.metrics.result import Result
from tracelens.pair import stream_aligned
from tracelens.precision import QuantizationConfig, QuantizationType, apply_precision

if TYPE_CHECKING:
    import pandas as pd

MatchBy = Literal["perplexity", "kl"]
LARGEST = 0.95
_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, LARGEST)
_RESOLUTION = 1e-4
"""Sparsities are multiples of this, so that a specification (`pruned-s37.52`) names them exactly."""


@dataclass(frozen=True)
class MatchedPruning(Result):
    """The magnitude pruning whose cost equals that of a quantized model.

    Attributes:
        sparsity: share of each weight matrix that is zero, in [0, .95].
        by: what is matched: "perplexity", or "kl" (nats per token).
        target, found, reference: its value in the quantized model, the pruned one and the reference.
        tried: sparsity → value, for all that were run.
    """

    sparsity: float
    by: MatchBy
    target: float
    found: float
    reference: float
    tried: dict[float, float]

    @property
    def config(self) -> QuantizationConfig:
        """As a precision, for an audit."""
        return QuantizationConfig(QuantizationType.PRUNED, sparsity=self.sparsity)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per sparsity that was tried, sparsest last."""
        import pandas as pd

        return pd.DataFrame(sorted(self.tried.items()), columns=pd.Index(["sparsity", self.by]))


def match_pruning(
    model: Any,
    target: AuditReport | float,
    prompts: Sequence[Any] | None = None,
    *,
    by: MatchBy = "perplexity",
    tolerance: float = 0.1,
    tokenizer: Any = None,
    batch_size: int = 32,
    progress: bool = False,
) -> MatchedPruning:
    """Finds the sparsity at which magnitude pruning has the same perplexity on the prompts as a quantized model.

    Perplexity is over the prompts' tokens, as in a report. It need not grow at first, for mild rounding and pruning alike: where the
    quantized model's is not above the reference's there is nothing to match, and `by="kl"` matches KL(reference ‖ ·) instead,
    which is 0 for the reference and above for all else. Nor need either grow evenly: single weights can make it jump, and more pruning
    can bring it down again. So the search steps up in sparsity and bisects wherever the target is passed, until one is close enough.

    Args:
        model: the reference.
        target: the quantized model's audit, or a perplexity (or KL in nats per token).
        prompts: by default those of the audit.
        tolerance: share of the target's excess over the reference by which the result may be off.

    Raises `MetricInputError` if the target is not above the reference's value, no sparsity up to .95 reaches it, or none is within the
    tolerance; `PromptError` as `stream_aligned`.
    """
    if isinstance(target, AuditReport):
        prompts = target.prompts["prompt"].tolist() if prompts is None else prompts
        summary = target.divergence
        target = (summary.perplexity_quantized if by == "perplexity" else summary.kl).value
    elif prompts is None:
        raise MetricInputError("a target that is a number needs prompts=[...] to be measured on")
    search = _Search(model, prompts, by, {"tokenizer": tokenizer, "batch_size": batch_size}, progress)
    with search:
        reference = search.value(0.0)
        if not target > reference:
            raise MetricInputError(
                f"the quantized model's {by} is {target:.4g} and the reference's {reference:.4g} on these prompts: no pruning "
                "is as good as that. Compare a lower precision" + (", or match by='kl'" if by == "perplexity" else "")
            )
        sparsity = search.match(target, tolerance * (target - reference))
    return MatchedPruning(sparsity, by, target, search.tried[sparsity], reference, dict(sorted(search.tried.items())))


class _Search:
    """Runs pruned models over the prompts, each sparsity once."""

    def __init__(self, model: Any, prompts: Sequence[Any], by: MatchBy, options: dict[str, Any], progress: bool):
        from tqdm.auto import tqdm

        self.model, self.prompts, self.by, self.options = model, prompts, by, options
        self.tried: dict[float, float] = {}
        self.bar = tqdm(unit="model", desc="matching pruning", disable=not progress)

    def __enter__(self) -> "_Search":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def value(self, sparsity: float) -> float:
        if sparsity not in self.tried:
            config = QuantizationConfig(QuantizationType.PRUNED, sparsity=sparsity)
            pruned = apply_precision(self.model, config) if sparsity else self.model
            if self.by == "perplexity":
                self.tried[sparsity] = perplexity(pruned, self.prompts, **self.options)
            else:
                self.tried[sparsity] = _kl(self.model, pruned, self.prompts, **self.options) if sparsity else 0.0
            self.bar.update(1)
        return self.tried[sparsity]

    def match(self, target: float, within: float) -> float:
        """The first sparsity whose value is found `within` the target."""
        low = 0.0
        for high in _GRID:
            crosses = (self.value(low) < target) != (self.value(high) < target)
            if crosses and (found := self._bisect(low, high, target, within)) is not None:
                return found
            low = high
        largest = max(self.tried.values())
        if largest < target:
            raise MetricInputError(
                f"pruning up to {LARGEST:.0%} of the weights reaches a {self.by} of {largest:.4g}, below the quantized "
                f"model's {target:.4g}; compare a higher precision"
            )
        nearest = min(self.tried, key=lambda sparsity: abs(self.tried[sparsity] - target))
        raise MetricInputError(
            f"no sparsity has a {self.by} within {within:.2g} of {target:.4g}: it jumps there, and comes nearest with "
            f"{self.tried[nearest]:.4g} at {nearest:.2%}; give a larger tolerance"
        )

    def _bisect(self, low: float, high: float, target: float, within: float) -> float | None:
        """A sparsity between two on either side of the target; None where the value jumps over it."""
        while True:
            middle = round((low + high) / 2, 4)
            best = min((low, middle, high), key=lambda sparsity: abs(self.value(sparsity) - target))
            if abs(self.value(best) - target) <= within:
                return best
            if high - low <= 1.5 * _RESOLUTION:
                return None
            same_side = (self.value(middle) < target) == (self.value(low) < target)
            low, high = (middle, high) if same_side else (low, middle)


def perplexity(model: Any, prompts: Sequence[Any], **options: Any) -> float:
    """exp(mean NLL) over the tokens of the prompts that have a next token, BOS aside; `options` of `stream_aligned`."""
    total, count = 0.0, 0
    for batch in stream_aligned({"model": model}, prompts, sites=[], **options):
        has_next = batch.next_token >= 0
        total += nll(batch.logits["model"], batch.next_token)[has_next].sum().item()
        count += int(has_next.sum())
    return math.exp(total / count) if count else math.nan


def _kl(reference: Any, other: Any, prompts: Sequence[Any], **options: Any) -> float:
    """Mean KL(reference ‖ other) in nats per token."""
    sums = DivergenceAccumulator()
    for batch in stream_aligned({"reference": reference, "other": other}, prompts, sites=[], **options):
        sums.update(batch.logits["reference"], batch.logits["other"], batch.next_token)
    return sums.finalize().kl().item()
