"""Direct-path patching: how much of an effect goes from one component straight to another.

A sender (a head, an MLP, the embedding) is moved from the target run's value to the source run's. What it writes into the
residual stream is added to what a receiver (the queries, keys or values of a head, an MLP, the logits) reads, everything
between them being held; what the receiver then computes is put into an ordinary run of the target. Wang et al., 2211.00593;
Goldowsky-Dill et al., 2304.05969.

What is held: the output of every head after the sender, at the target's values, norms answering to what they read; and

- with mlps="frozen" the MLPs between sender and receiver too: the path is the residual stream alone, and effects on logits
  that are linear in it add up over all senders;
- with mlps="recompute" these MLPs answer to the sender, as in Wang et al.: paths through MLPs count as direct.

Pitfalls: a receiver that hears nothing may still depend on the sender through others (paths, not components, are cut);
backup heads change what they do once an earlier head is patched, which a held run does not show and the second run does;
and what is sufficient here need not be necessary. The source's value goes through the target's own output projection; give
"attn" instead of "head" where the projection's change is to be carried along.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch

from tracelens.causal.arms import ArmRunner, OtherRun, evaluating
from tracelens.causal.effects import MIN_DIFFERENCE
from tracelens.causal.patching_result import PatchingResult, Row, of_pair
from tracelens.causal.path_arms import MLPs, Path, PathRunner
from tracelens.causal.path_places import Components, all_paths, present
from tracelens.causal.placebo import Placebo, PlaceboKind
from tracelens.causal.places import Where
from tracelens.causal.prompts import PromptSet, Spans
from tracelens.causal.readout import Metric, as_metric, default_metric
from tracelens.causal.rerun import Rerunner
from tracelens.causal.sides import Side
from tracelens.causal.token_labels import token_labels
from tracelens.chat import Chat
from tracelens.errors import UnknownNameError
from tracelens.pair import PrecisionPair

if TYPE_CHECKING:
    from tracelens.causal.contrasts import Contrasts


def path_patching(
    model: Any,
    contrasts: "Contrasts",
    *,
    senders: Components = ("head", "mlp"),
    receivers: Components = "logits",
    at: Sequence[Where] = (None,),
    mlps: str = "frozen",
    metric: Any = None,
    direction: str = "denoising",
    placebo: PlaceboKind | None = "displacement",
    n_placebo: int = 1,
    min_difference: float = MIN_DIFFERENCE,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> PatchingResult:
    """Path patching within one model, between clean and corrupted prompts.

    Args:
        contrasts: clean and corrupted prompts, row for row of equal length.
        senders: kinds ("embedding", "head", "attn": all heads of a layer, "mlp"), places at `z`, `attn_out`, `mlp_out` or
            `resid_pre` of layer 0, and tuples of places that move together; at all positions unless the place says.
        receivers: kinds ("logits", "head": whatever a head reads, through its output `z`, "q", "k", "v": one input of it,
            "mlp"), places at `z`, `q`, `k`, `v`, `mlp_out` or `resid_post` of the last layer (the logits), and tuples of
            places that hear together. Keys and values are those of key-value heads, which several heads may share.
        at: positions or groups of positions at which a receiver's new value is put in, one row each; None is all.
        mlps: whether MLPs between the two are held too ("frozen") or not ("recompute"); see the module.
        metric: a `Metric`, `AnswerTokens` or a function of logits; by default that of the contrasts, or else the margin of
            the prompts' behaviours.
        direction: "denoising" moves the sender to its clean value in the corrupted run, "noising" the other way round.
        placebo: what the sender is moved to beside, see `Placebo`; None halves the runs. n_placebo: draws of it.
        min_difference: prompts whose two metrics differ by less are counted and left out.
        batch_size: prompts at a time. memory_budget: bytes; by default a share of what is free.

    Returns:
        A result with a row for each sender, receiver and `at`, and axes "sender" and "receiver". Pairs of which the sender
        is not before the receiver are left out. "layer" and "site" are the sender's.

    Raises `UnknownNameError` for components that the model does not have, and for a sender that comes before none of the
    receivers or a receiver after none of the senders; `MetricInputError` for a metric that gives NaN or the wrong shape;
    `MemoryBudgetError` before the first patched run.
    """
    sides = {
        "clean": Side(model, contrasts.clean),
        "corrupted": Side(model, contrasts.corrupted, contrasts.edits(model)),
    }
    start, goal = _ends(direction, {"denoising": ("corrupted", "clean"), "noising": ("clean", "corrupted")})
    metric = contrasts.metric if metric is None else metric
    found = _metric(metric, contrasts.clean, getattr(model, "tokenizer", None))
    job = _PathPatching(sides, start, goal, found.bound(contrasts.clean, model.cfg.d_vocab), mlps)
    job.limits |= {"batch_size": batch_size, "memory_budget": memory_budget, "progress": progress}
    paths, rows = all_paths(model, senders, receivers, at)
    return replace(
        job.result(paths, rows, placebo, n_placebo, seed), direction=direction, min_difference=min_difference
    )


def cross_precision_path_patching(
    pair: PrecisionPair,
    prompts: Any,
    *,
    senders: Components = ("head", "mlp"),
    receivers: Components = "logits",
    at: Sequence[Where] = (None,),
    mlps: str = "frozen",
    metric: Any = None,
    direction: str = "repair",
    placebo: PlaceboKind | None = "displacement",
    n_placebo: int = 1,
    min_difference: float = MIN_DIFFERENCE,
    spans: Spans | None = None,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> PatchingResult:
    """Path patching across precisions, on the same prompts: by which paths a quantized component does its harm.

    Args:
        prompts: whatever `PromptSet.of` takes, with `spans`, `chat` and `tokenizer`.
        senders: as in `path_patching`. A head's value goes through the target's own output projection; "attn" carries
            what quantization did to that projection along. "embedding" moves only if the embedding is quantized.
        metric: a `Metric`, `AnswerTokens` or a function of logits; by default the margin of the prompts' behaviours.
        direction: "repair" moves the sender to the reference's value inside the quantized run, "damage" the other way round.
        The rest is as in `path_patching`.

    Across an identical pair every effect is 0 / 0: NaN, all prompts `n_undetermined`. Raises as `path_patching`.
    """
    tokenizer = pair.tokenizer if tokenizer is None else tokenizer
    prompts = PromptSet.of(prompts, pair.reference, tokenizer=tokenizer, spans=spans, chat=chat)
    sides = {name: Side(getattr(pair, name), prompts) for name in ("reference", "quantized")}
    start, goal = _ends(direction, {"repair": ("quantized", "reference"), "damage": ("reference", "quantized")})
    job = _PathPatching(sides, start, goal, _metric(metric, prompts, tokenizer), mlps)
    job.limits |= {"batch_size": batch_size, "memory_budget": memory_budget, "progress": progress}
    job.settings |= of_pair(pair)
    paths, rows = all_paths(sides[start].model, senders, receivers, at)
    return replace(
        job.result(paths, rows, placebo, n_placebo, seed), direction=direction, min_difference=min_difference
    )


@dataclass
class _PathPatching:
    """Paths whose senders move from the run `start` to the run `goal`."""

    sides: Mapping[str, Side]
    start: str
    goal: str
    metric: Metric
    mlps: str
    limits: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def result(
        self, paths: Sequence[Path], rows: Sequence[Row], placebo: PlaceboKind | None, n_placebo: int, seed: int
    ) -> PatchingResult:
        if n_placebo < 1:
            raise UnknownNameError(f"n_placebo is {n_placebo}; it must be at least 1, or give placebo=None")
        if self.mlps not in get_args(MLPs):
            raise UnknownNameError.of("choice of mlps", self.mlps, get_args(MLPs))
        target, other = self.sides[self.start], self.sides[self.goal]
        source = OtherRun(Rerunner(other.model), other.prompts, other.edits)
        random = [] if placebo is None else [Placebo(source, placebo, seed + i) for i in range(n_placebo)]
        runner = PathRunner(self._runner(self.start), self.mlps)
        with evaluating(target.model, other.model):
            goal = self._runner(self.goal).unpatched()
            start, patched = runner.run(paths, source)
            draws = [runner.run(paths, one, "placebo")[1] for one in random]
        return PatchingResult(
            direction="",
            metric=self.metric.name,
            unit=self.metric.unit,
            rows=tuple(rows),
            axes=("sender", "receiver", *(key for key in ("group", "position") if key in rows[0])),
            patched=patched,
            start=start,
            goal=goal,
            placebo=torch.stack(draws).mean(0) if draws else None,
            placebo_kind=placebo or "",
            present=present(paths, target.prompts),
            prompts=target.prompts.texts,
            settings=self.settings
            | {"paths": True, "mlps": self.mlps, "seed": seed, "n_placebo": len(draws)}
            | {name: self.limits[name] for name in ("batch_size", "memory_budget")}
            | {"groups": list(target.prompts.groups)}
            | token_labels(target.prompts),
            tokens=target.prompts.pieces,
            places=target.prompts.groups | target.prompts.frame,
        )

    def _runner(self, name: str) -> ArmRunner:
        side = self.sides[name]
        baselines = {name: partial(other.logits, whole=self.metric.whole) for name, other in self.sides.items()}
        return ArmRunner(
            side.model, side.prompts, self.metric, base_edits=side.edits, baselines=baselines, **self.limits
        )


def _ends(direction: str, known: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """The run that is patched, and the one whose values are put in."""
    if direction not in known:
        raise UnknownNameError.of("direction", direction, known)
    return known[direction]


def _metric(metric: Any, prompts: PromptSet, tokenizer: Any) -> Metric:
    return default_metric(prompts, tokenizer) if metric is None else as_metric(metric)
