"""Activation patching: put activations of one run in their places in another, and see what comes back.

Within one model the runs are of clean and corrupted prompts; across a pair they are of two models on the same prompts.

What an effect does and does not say:

- Putting clean (reference) activations in shows what is *enough* to bring the behaviour back, in that context; putting
  corrupted (quantized) ones in shows what it *needs*. Neither implies the other: of two redundant heads either is enough and
  neither is needed (Heimersheim & Nanda, 2024, arXiv 2404.15255). Run both directions.
- Later layers make up for what is broken before them, so that a component may matter and show no effect (McGrath et al.,
  2023, the Hydra effect, arXiv 2307.15771). Effects of single places need not add up; `cumulative` and `pairs` show it.
- A neuron or a feature is a direction, and a patch along a direction may work through a pathway that the model never uses,
  where the direction is part causal-but-constant and part varying-but-idle (Makelov et al., 2023, arXiv 2311.17030). Check
  that replacing the whole site does at least as much.
- Any change of the same size may do something: effects stand beside a placebo (`tracelens.causal.placebo`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.arms import ArmRunner, OtherRun, evaluating
from tracelens.causal.contrasts import Contrasts
from tracelens.causal.effects import MIN_DIFFERENCE
from tracelens.causal.numerical_noise import numerical_noise, rounds
from tracelens.causal.patching_result import PatchingResult, of_pair
from tracelens.causal.placebo import Placebo
from tracelens.causal.prompts import Batch, PromptSet, Spans
from tracelens.causal.readout import Metric, as_metric, default_metric
from tracelens.causal.rerun import Rerunner
from tracelens.causal.sides import Side
from tracelens.causal.sweeps import Features, Sites, Sweep, sweep
from tracelens.causal.token_labels import token_labels
from tracelens.chat import Chat
from tracelens.errors import UnknownNameError
from tracelens.pair import PrecisionPair
from tracelens.sites import Site


def activation_patching(
    model: Any,
    contrasts: Contrasts,
    *,
    sites: Sites = "resid_pre",
    by: str | Sequence[str] = "layer",
    metric: Any = None,
    direction: str = "denoising",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | str | None = None,
    groups: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    features: Features | None = None,
    keys: Sequence[int | str] | None = None,
    cumulative: bool = False,
    pairs: bool = False,
    saes: Mapping[Site, Any] | None = None,
    placebo: str | None = "displacement",
    n_placebo: int = 1,
    min_difference: float = MIN_DIFFERENCE,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> PatchingResult:
    """Patches between the clean and the corrupted run of each prompt.

    Args:
        contrasts: clean and corrupted prompts, row for row of equal length.
        sites, by, layers to pairs: what is replaced, as `tracelens.causal.sweeps.sweep` says; the positions in which
            a pair differs are its group "changed".
        metric: a `Metric`, `AnswerTokens` or a function of logits; by default that of the contrasts. `KL("clean")` and
            `KL("corrupted")` are from these runs.
        direction: "denoising" puts clean activations into the corrupted run: effect 0 is the corrupted metric, 1 the
            clean one. "noising" puts corrupted activations into the clean run: 0 is clean, 1 corrupted.
        saes: by site, for `by="feature"`. A feature is moved to the other run's activation along its decoder row; all
            else at the site, the SAE's error too, stays.
        placebo: what is put in beside every patch, see `Placebo`; None halves the runs.
        n_placebo: draws of it, whose metrics are averaged.
        min_difference: prompts whose two metrics differ by less are counted and left out.
        batch_size: prompts at a time. memory_budget: bytes; by default a share of what is free.

    Raises `UnknownNameError`, `PromptError` for what does not exist, `MetricInputError` for a metric that gives NaN or the
    wrong shape, `MemoryBudgetError` before the first patched run.
    """
    if direction not in ("denoising", "noising"):
        raise UnknownNameError.of("direction", direction, ("denoising", "noising"))
    clean, corrupted = contrasts.clean, contrasts.corrupted
    runs = {"clean": Side(model, clean), "corrupted": Side(model, corrupted, contrasts.edits(model))}
    start, goal = ("corrupted", "clean") if direction == "denoising" else ("clean", "corrupted")
    chosen = sweep(
        model,
        clean,
        sites=sites,
        by=by,
        layers=layers,
        positions=positions,
        groups=groups,
        heads=heads,
        neurons=neurons,
        features=features,
        keys=keys,
        saes=saes,
        cumulative=cumulative,
        pairs=pairs,
    )
    job = _Patching(
        runs,
        start,
        goal,
        contrasts.metric_for(model, metric).bound(clean, model.cfg.d_vocab),
        saes=saes,
        batch_size=batch_size,
        memory_budget=memory_budget,
        progress=progress,
    )
    settings = {"contrasts": repr(contrasts), "cumulative": cumulative, "pairs": pairs}
    return job.result(direction, chosen, placebo, n_placebo, min_difference, seed, settings)


def cross_precision_patching(
    pair: PrecisionPair,
    prompts: Any,
    *,
    sites: Sites = "resid_post",
    by: str | Sequence[str] = "layer",
    metric: Any = None,
    direction: str = "repair",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | str | None = None,
    groups: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    features: Features | None = None,
    keys: Sequence[int | str] | None = None,
    cumulative: bool = False,
    pairs: bool = False,
    saes: Mapping[Site, Any] | None = None,
    placebo: str | None = "displacement",
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
    """Patches between the two models of a pair on the same prompts.

    What is put in is not rounded at its place, and is by whatever activation rounding the target has after it: that is what
    keeping this component in full precision would do. The unembedding is the target's own, so where it is quantized too
    (bf16, unlike INT4) replacing everything gives nearly and not exactly 1.

    Args:
        prompts: whatever `PromptSet.of` takes, with `spans`, `chat` and `tokenizer`.
        sites, by, layers to pairs: what is replaced, as `tracelens.causal.sweeps.sweep` says.
        metric: a `Metric`, `AnswerTokens` or a function of logits; by default the margin of the prompts' behaviours.
            `KL("reference")` and `KL("quantized")` are from these runs.
        direction: "repair" puts reference activations into the quantized run: effect 0 is the quantized metric, 1 the
            reference's. "damage" puts quantized activations into the reference run: 0 is the reference, 1 quantized.
        The rest is as in `activation_patching`.

    Where the target rounds activations, its metric depends by some thousandths of a nat on what is run beside it: measured
    as `settings["numerical_noise"]`. Aggregated effects weigh prompts by their squared difference and hardly see it; effects
    of single prompts (`per_prompt`) do: give a `min_difference` some times larger to leave out those that it swamps.
    Across an identical pair every effect is 0 / 0: NaN, all prompts `n_undetermined`. Raises as `activation_patching`.
    """
    if direction not in ("repair", "damage"):
        raise UnknownNameError.of("direction", direction, ("repair", "damage"))
    tokenizer = pair.tokenizer if tokenizer is None else tokenizer
    prompts = PromptSet.of(prompts, pair.reference, tokenizer=tokenizer, spans=spans, chat=chat)
    runs = {name: Side(getattr(pair, name), prompts) for name in ("reference", "quantized")}
    start, goal = ("quantized", "reference") if direction == "repair" else ("reference", "quantized")
    chosen = sweep(
        runs[start].model,
        prompts,
        sites=sites,
        by=by,
        layers=layers,
        positions=positions,
        groups=groups,
        heads=heads,
        neurons=neurons,
        features=features,
        keys=keys,
        saes=saes,
        cumulative=cumulative,
        pairs=pairs,
    )
    job = _Patching(
        runs,
        start,
        goal,
        default_metric(prompts, tokenizer) if metric is None else as_metric(metric),
        saes=saes,
        batch_size=batch_size,
        memory_budget=memory_budget,
        progress=progress,
    )
    settings = of_pair(pair) | {"cumulative": cumulative, "pairs": pairs}
    return job.result(direction, chosen, placebo, n_placebo, min_difference, seed, settings)


@dataclass
class _Patching:
    """Patches from the run `goal` into the run `start`."""

    runs: Mapping[str, Side]
    start: str
    goal: str
    metric: Metric
    saes: Mapping[Site, Any] | None = None
    batch_size: int = 32
    memory_budget: int | None = None
    progress: bool = False
    baselines: dict[str, Callable[[Batch], Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.baselines = {name: partial(run.logits, whole=self.metric.whole) for name, run in self.runs.items()}

    def result(
        self,
        direction: str,
        chosen: Sweep,
        placebo: str | None,
        n_placebo: int,
        min_difference: float,
        seed: int,
        settings: dict[str, Any],
    ) -> PatchingResult:
        if n_placebo < 1:
            raise UnknownNameError(f"n_placebo is {n_placebo}; it must be at least 1, or give placebo=None")
        target, other = self.runs[self.start], self.runs[self.goal]
        source = OtherRun(Rerunner(other.model), other.prompts, other.edits)
        features = frozenset(place.site for arm in chosen.arms for place in arm if place.feature is not None)
        random = [Placebo(source, placebo, seed + i, features) for i in range(n_placebo)] if placebo else None
        with evaluating(target.model, other.model):
            goal = self._runner(self.goal).unpatched()
            start, patched = self._runner(self.start).run(chosen.arms, source)
            noise = self._placebo(chosen, random) if random else None
            settings |= self._numerical_noise(start)
        return PatchingResult(
            direction=direction,
            metric=self.metric.name,
            unit=self.metric.unit,
            rows=chosen.rows,
            axes=chosen.axes,
            patched=patched,
            start=start,
            goal=goal,
            placebo=noise,
            placebo_kind=placebo or "",
            present=chosen.present(target.prompts),
            prompts=target.prompts.texts,
            min_difference=min_difference,
            settings=settings
            | {"seed": seed, "n_placebo": n_placebo if placebo else 0, "batch_size": self.batch_size}
            | {"memory_budget": self.memory_budget, "groups": list(target.prompts.groups)}
            | token_labels(target.prompts),
            tokens=target.prompts.pieces,
            places=target.prompts.groups | target.prompts.frame,
        )

    def _numerical_noise(self, start: Float64[Tensor, "prompt"]) -> dict[str, float]:
        """Measured where activations are rounded: elsewhere it is far below any `min_difference`."""
        target = self.runs[self.start]
        if not rounds(target.model):
            return {}
        metric = self.metric.bound(target.prompts, target.model.cfg.d_vocab)
        logits = self.baselines[self.start]
        return {"numerical_noise": numerical_noise(logits, self.baselines, metric, target.prompts, start)}

    def _placebo(self, chosen: Sweep, random: Sequence[Placebo]) -> Float64[Tensor, "arm prompt"]:
        """Mean over the draws."""
        model = self.runs[self.start].model
        draws = [
            self._runner(self.start, one.saes(self.saes)).run(one.arms(chosen.arms, model), one, "placebo")[1]
            for one in random
        ]
        return torch.stack(draws).mean(0)

    def _runner(self, name: str, saes: Mapping[Site, Any] | None = None) -> ArmRunner:
        run = self.runs[name]
        return ArmRunner(
            run.model,
            run.prompts,
            self.metric,
            saes=self.saes if saes is None else saes,
            memory_budget=self.memory_budget,
            batch_size=self.batch_size,
            progress=self.progress,
            base_edits=run.edits,
            baselines=self.baselines,
        )
