"""What a model does on held-out prompts with some of its matrices put back: margin, flips, perplexity, CPFR."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.behaviour import Flips
from tracelens.causal.arms import ArmRunner
from tracelens.causal.effects import effects
from tracelens.causal.matrices import Matrix, restored
from tracelens.causal.matrices import Part as Restored
from tracelens.causal.readout import Margin, Metric
from tracelens.causal.repair.halves import Part
from tracelens.causal.repair.runs import Runs
from tracelens.features.survival import ReferencePass
from tracelens.metrics.cpfr import fidelity_of_sums
from tracelens.metrics.divergence import nll
from tracelens.metrics.moments import FeatureMoments
from tracelens.pair import stream_aligned
from tracelens.stats import Estimate, bootstrap_weights, percentile_interval

N_RESAMPLES = 1000
_CHUNK = 2048
"""Features whose CPFR is resampled at once."""


@dataclass(frozen=True)
class Outcome:
    """What was measured of one model on the held-out prompts.

    Attributes:
        name: "reference", "quantized", "plan", "magnitude", "random 1", ...
        units: what was kept in 16 bit.
        bytes: that this adds to the quantized build.
        values: the metric of each prompt.
        recovery: Σ n d / Σ d² with n = m − m_quantized and d = m_reference − m_quantized: 0 is the quantized model, 1 the
            reference; paired 95 % bootstrap over prompts.
        metric: its mean over prompts.
        flips: prompts decided otherwise than by the reference; None where the metric is no margin.
        perplexity: exp(mean NLL) over the tokens of the texts that have a next one, BOS left out.
        cpfr: of "safety" and "capability" features against the reference (`metrics.cpfr`); empty without SAEs.
    """

    name: str
    units: tuple[str, ...]
    bytes: int
    values: tuple[float, ...] = field(repr=False)
    recovery: Estimate
    metric: Estimate
    flips: Flips | None
    perplexity: Estimate
    cpfr: dict[str, Estimate]


@dataclass
class Bench:
    """The held-out prompts, and everything that is measured on them."""

    pair: Any
    runs: Runs
    held: Part
    texts: Sequence[Any] | None = None
    saes: Any = None
    fingerprint: Any = None
    min_active: int = 10
    seed: int = 0

    @cached_property
    def start(self) -> Float64[Tensor, "prompt"]:
        return self.runs.plain("quantized", self.held.prompts, self.held.metric)

    @cached_property
    def goal(self) -> Float64[Tensor, "prompt"]:
        return self.runs.plain("reference", self.held.prompts, self.held.metric)

    def recovery(self, values: Float64[Tensor, "prompt"]) -> Estimate:
        """That of some values of the metric."""
        return recovery(values, self.start, self.goal, self.seed)

    def outcome(
        self,
        name: str,
        units: Sequence[str] = (),
        matrices: Iterable[Matrix] = (),
        n_bytes: int = 0,
        *,
        model: Any = None,
    ) -> Outcome:
        """What the quantized model does with these matrices restored; or what another `model` does, which is given."""
        start, goal = self.start, self.goal  # while the quantized model is as it was given
        with restored(Restored(matrix) for matrix in matrices):
            model = self.pair.quantized if model is None else model
            values = metric_of(model, self.held, self.runs)
            losses, counts = token_losses(model, self.texts_read, self.pair.tokenizer, self.runs.batch_size)
            cpfr = self._cpfr(name, model)
        ends = (start, goal)
        losses = (losses, counts)
        rows = self.held.rows if is_margin(self.held.metric) else None
        return summarised(name, units, n_bytes, values, ends, losses, rows=rows, cpfr=cpfr, seed=self.seed)

    @property
    def texts_read(self) -> Sequence[Any]:
        """What perplexity is measured on."""
        return [list(ids) for ids in self.held.prompts.tokens] if self.texts is None else self.texts

    @cached_property
    def _pass(self) -> ReferencePass:
        rows = [list(ids) for ids in self.held.prompts.tokens]
        return ReferencePass(
            self.pair.reference,
            self.saes,
            rows,
            readout=lambda logits: logits[:, :1],
            tokenizer=self.pair.tokenizer,
            maxima=False,
            batch_size=self.runs.batch_size,
        )

    def _cpfr(self, name: str, model: Any) -> dict[str, Estimate]:
        if self.saes is None:
            return {}
        moments = self._pass.measure({name: lambda: model}).moments[name]
        safety = torch.cat(
            [
                self.fingerprint.mask(site, size)
                if site in self.fingerprint.saes
                else torch.zeros(size, dtype=torch.bool)
                for site, size in self._pass.sites.items()
            ]
        ).to(moments.n.device)
        live = moments.total().n_ref[0] >= max(1, self.min_active)
        weights = bootstrap_weights(len(moments.n), N_RESAMPLES, self.seed)
        sets = {"safety": safety & live, "capability": ~safety & live}
        return {kind: _cpfr_of(moments.select(mask), weights, len(self.held.prompts)) for kind, mask in sets.items()}


def summarised(
    name: str,
    units: Sequence[str],
    n_bytes: int,
    values: Float64[Tensor, "prompt"],
    ends: tuple[Float64[Tensor, "prompt"], Float64[Tensor, "prompt"]],
    losses: tuple[Float64[Tensor, "text"], Float64[Tensor, "text"]],
    *,
    rows: Sequence[int] | None,
    cpfr: dict[str, Estimate] | None = None,
    seed: int = 0,
) -> Outcome:
    """What was measured, with intervals. `ends`: the metric of the quantized model and of the reference. `rows`: numbers of
    the prompts, where the metric's sign is a decision.
    """
    flips = None if rows is None else Flips.from_margins(ends[1], values, prompts=list(rows), seed=seed)
    weights = bootstrap_weights(len(values), N_RESAMPLES, seed)
    loss, count = losses
    of_texts = bootstrap_weights(len(loss), N_RESAMPLES, seed)
    perplexities = ((of_texts @ loss) / (of_texts @ count)).exp()
    return Outcome(
        name=name,
        units=tuple(units),
        bytes=n_bytes,
        values=tuple(values.tolist()),
        recovery=recovery(values, *ends, seed),
        metric=percentile_interval(float(values.mean()), weights @ values / len(values), n=len(values)),
        flips=flips,
        perplexity=percentile_interval(float((loss.sum() / count.sum()).exp()), perplexities, n=len(loss)),
        cpfr=cpfr or {},
    )


def recovery(
    values: Float64[Tensor, "prompt"], start: Float64[Tensor, "prompt"], goal: Float64[Tensor, "prompt"], seed: int = 0
) -> Estimate:
    """Σ n d / Σ d² with its interval; NaN where no prompt's two models differ."""
    return effects(values[None], start, goal, n_permutations=1, seed=seed).effect[0]


def advantage(
    ours: Float64[Tensor, "prompt"],
    theirs: Float64[Tensor, "prompt"],
    start: Float64[Tensor, "prompt"],
    goal: Float64[Tensor, "prompt"],
    seed: int = 0,
) -> Estimate:
    """Recovery of one choice less that of another, paired over prompts."""
    # Recovery is linear in what a choice moves.
    return recovery(start + ours - theirs, start, goal, seed)


def metric_of(model: Any, part: Part, runs: Runs) -> Float64[Tensor, "prompt"]:
    """The metric of any model on a part of the prompts; `runs` has the baselines that a metric may read."""
    if model is runs.pair.quantized:
        return runs.plain("quantized", part.prompts, part.metric)
    runs.runner("reference", part.prompts, part.metric)  # remembers the baselines
    return ArmRunner(model, part.prompts, part.metric, batch_size=runs.batch_size, baselines=runs.baselines).unpatched()


def is_margin(metric: Metric) -> bool:
    """Whether a metric's sign is a decision."""
    while (inner := getattr(metric, "inner", None)) is not None:
        metric = inner
    return isinstance(metric, Margin)


def token_losses(
    model: Any, texts: Sequence[Any], tokenizer: Any, batch_size: int
) -> tuple[Float64[Tensor, "text"], Float64[Tensor, "text"]]:
    """Summed NLL of each text in nats, and how many tokens it is summed over."""
    losses = torch.zeros(len(texts), dtype=torch.float64)
    counts = torch.zeros_like(losses)
    for batch in stream_aligned({"model": model}, texts, sites=[], tokenizer=tokenizer, batch_size=batch_size):
        rows = (batch.next_token >= 0).nonzero()[:, 0]
        found = nll(batch.logits["model"][rows], batch.next_token[rows]).cpu()
        prompt = batch.prompt[rows].cpu()
        losses.index_add_(0, prompt, found)
        counts.index_add_(0, prompt, torch.ones_like(found))
    return losses, counts


def _cpfr_of(moments: FeatureMoments, weights: Float64[Tensor, "resample block"], n_prompts: int) -> Estimate:
    """Mean fidelity of features that are live in the reference; resamples leave out what they never fire."""
    columns = (moments.sum_cross, moments.sum_ref_sq, moments.sum_quant_sq)
    ones = torch.ones(1, len(weights[0]), dtype=weights.dtype)
    rows = torch.cat([ones, weights]).to(moments.n)
    total = torch.zeros(len(rows), dtype=torch.float64)
    fired = torch.zeros_like(total)
    for part in torch.arange(columns[0].shape[1]).split(_CHUNK):
        phi = fidelity_of_sums(*(rows @ column[:, part.to(column.device)] for column in columns))
        total += phi.nan_to_num().sum(1).cpu()
        fired += (~phi.isnan()).sum(1).cpu()
    values = total / fired
    return percentile_interval(float(values[0]), values[1:], n=n_prompts)
