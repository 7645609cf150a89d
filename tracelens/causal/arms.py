"""The engine of everything causal: many interventions on many prompts, each begun at the layer it changes first.

An intervention (`Arm`) replaces activations at its places by those that a `Source` gives. Prompts of one length go
together, arms are rows of the same pass, and nothing that an arm leaves as it was is computed again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tracelens.causal.edits import FeatureValues, PassEdits, read_features
from tracelens.causal.measuring import Measure
from tracelens.causal.memory import limit_of
from tracelens.causal.past import Past
from tracelens.causal.places import Arm, Place, check_places
from tracelens.causal.planning import Cost, Plan, cost_of, plan_of
from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.readout import Metric, check_baselines
from tracelens.causal.rerun import Edit, Rerunner
from tracelens.causal.schedule import MID, POST, STEPS, ArmTable, Runs, entry_site, parts_of
from tracelens.errors import UnknownNameError
from tracelens.sites import Site

Values = dict[Site, Tensor]
"""Site → what it holds, [prompt, pos, ...]."""


@runtime_checkable
class Source(Protocol):
    """Where the values come from that an intervention puts in place of the target's own."""

    def values(self, batch: Batch, sites: Sequence[Site], target: Values) -> Values:
        """Replacements at `sites`, in the shape of what the target itself holds there (`target`)."""
        ...


@runtime_checkable
class FeatureSource(Source, Protocol):
    """A source that says what features shall be; of any other, its values are encoded."""

    def features(
        self, batch: Batch, site: Site, features: Sequence[int], own: Float[Tensor, "prompt pos feature"]
    ) -> Float[Tensor, "prompt pos feature"]:
        """Activations of these features of the site's SAE, in the shape of the target's own (`own`)."""
        ...


@dataclass(frozen=True)
class OtherRun:
    """Values of another run: of another model, or of the same model on other tokens (`prompts`, row for row as long)."""

    runner: Rerunner
    prompts: PromptSet | None = None
    edits: Callable[[Batch], Mapping[str, Edit]] | None = None
    """Hook edits of that run, such as noise on the embedding."""

    def values(self, batch: Batch, sites: Sequence[Site], target: Values) -> Values:
        tokens = batch.tokens if self.prompts is None else _tokens_of(self.prompts, batch)
        stop = max((site.layer for site in sites), default=0) + 1
        edits = self.edits(batch) if self.edits else None
        return self.runner.run(tokens, edits=edits, keep=sites, stop=min(stop, self.runner.n_layers))[1]


def _tokens_of(prompts: PromptSet, batch: Batch) -> Int[Tensor, "prompt pos"]:
    return torch.tensor([prompts.tokens[i] for i in batch.prompt.tolist()])


@dataclass
class ArmRunner:
    """Runs arms on the target.

    A run begins where its arm first changes something and joins those that began before it; it computes the positions from
    the first that is changed on, beside the keys and values that the unpatched run has left; of the last block it computes
    what the last position needs. Runs that cannot change the metric are not run. Rows of a pass do not know of each other:
    every format that `tracelens.apply_precision` simulates rounds activations by a row's own numbers or a fixed scale. Yet
    sums of floats depend in their last bits on how many rows go together, and such a bit can move a code where activations
    are rounded; int8 and int4 per token put the largest number of a row between two codes, where it often does. There
    numbers agree between batch sizes to about a code's effect, some thousandths of a nat for int8, and not to 1e-5.

    Attributes:
        target: the model that is intervened on.
        prompts: what it is run on.
        metric: what is read.
        saes: by site, for places that are features.
        memory_budget: bytes; None is a share of what is free.
        batch_size: prompts whose own values are held together; fewer where the budget asks for it.
        base_edits: hook edits of the target's own run (a corrupted embedding).
        baselines: name → logits [prompt, d_vocab] of an unpatched run for a batch, for metrics that need them.
    """

    target: Any
    prompts: PromptSet
    metric: Metric
    saes: Mapping[Site, Any] | None = None
    memory_budget: int | None = None
    batch_size: int = 32
    progress: bool = False
    base_edits: Callable[[Batch], Mapping[str, Edit]] | None = None
    baselines: Mapping[str, Callable[[Batch], Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runner = Rerunner(self.target)
        self.metric = self.metric.bound(self.prompts, self.target.cfg.d_vocab)
        check_baselines(self.metric, list(self.baselines))

    def unpatched(self) -> Float64[Tensor, "prompt"]:
        """The metric of the target's own runs."""
        return self.run([], _Nothing())[0]

    def estimate(self, arms: Sequence[Arm]) -> Cost:
        """What `run` would take, without a pass. Raises as `run` does before its first."""
        with torch.no_grad(), evaluating(self.target):
            return cost_of(self._plans(arms), self.runner, limit_of(self.memory_budget, self.runner.device))

    def run(self, arms: Sequence[Arm], source: Source, what: str = "patching") -> tuple[Tensor, Tensor]:
        """The metric of each prompt as it is, float64 [prompt], and with each arm, float64 [arm, prompt].

        Features of one site are moved together, each measured before the others have moved.
        Raises `UnknownNameError` for places that do not exist, `MemoryBudgetError` before the first pass.
        """
        from tqdm.auto import tqdm

        plain = torch.full((len(self.prompts),), torch.nan, dtype=torch.float64)
        patched = torch.full((len(arms), len(self.prompts)), torch.nan, dtype=torch.float64)
        with torch.no_grad(), evaluating(self.target):
            plans = self._plans(arms)
            with tqdm(total=patched.numel(), desc=what, unit="run", disable=not (self.progress and arms)) as bar:
                for plan in plans:
                    prompt = plan.batch.prompt
                    work = _BatchWork(self, plan, source, arms)
                    plain[prompt] = work.plain.double().cpu()
                    patched[:, prompt] = plain[prompt]
                    bar.update(patched.shape[0] * len(prompt) - len(plan.runs))
                    for runs, values in work.outcomes():
                        patched[runs.arm, prompt[runs.prompt]] = values.double().cpu()
                        bar.update(len(values))
        return plain, patched

    def _plans(self, arms: Sequence[Arm]) -> list[Plan]:
        check_places(arms, self.target, self.saes)
        return plan_of(
            ArmTable.of(arms),
            self.prompts,
            self.runner,
            batch_size=self.batch_size,
            memory_budget=self.memory_budget,
            whole=self.metric.whole,
        )


class _Nothing:
    def values(self, batch: Batch, sites: Sequence[Site], target: Values) -> Values:
        return {}


def start_of(place: Place) -> int:
    """The first layer that has to be computed when this place is replaced."""
    return place.site.layer + (place.site.name == "resid_post")


class _BatchWork:
    """One batch of prompts: its unpatched run, and what the arms make of it."""

    def __init__(self, job: ArmRunner, plan: Plan, source: Source, arms: Sequence[Arm]) -> None:
        self.job, self.plan, self.batch, self.arms = job, plan, plan.batch, arms
        runner, table = job.runner, plan.table
        cache = runner.new_cache(len(self.batch)) if plan.split else None
        logits, self.own = runner.run(
            self.batch.tokens,
            edits=job.base_edits(self.batch) if job.base_edits else None,
            keep=plan.keep,
            whole=job.metric.whole,
            cache=cache,
        )
        assert logits is not None
        if missing := [str(site) for site in plan.keep if site not in self.own]:
            raise UnknownNameError(f"a run of the model does not come to {', '.join(missing)}; choose other sites")
        self._past = None if cache is None else Past.of(cache)
        self._measure = Measure(job.metric, self.batch, job.baselines)
        self.plain = self._measure(logits)
        self.new = source.values(self.batch, table.sites, {s: self.own[s] for s in table.sites}) if table.sites else {}
        self._features = {site: self._of_features(source, site) for site in table.features}

    def _of_features(self, source: Source, site: Site) -> FeatureValues:
        assert self.job.saes is not None
        sae, features = self.job.saes[site], self.plan.table.features[site]
        own = read_features(sae, self.own[site], features)
        if isinstance(source, FeatureSource):
            wanted = source.features(self.batch, site, features, own)
        else:
            wanted = read_features(sae, self.new[site], features)
        return FeatureValues(sae, torch.tensor(features), wanted, own)

    def outcomes(self) -> Iterator[tuple[Runs, Tensor]]:
        """Runs and their metric, a pass at a time."""
        for first, runs in self.plan.passes():
            yield runs, self._pass(first, runs)

    def _pass(self, first: int, runs: Runs) -> Tensor:
        plan, runner = self.plan, self.job.runner
        edits = PassEdits(
            plan.table, plan.positions, runs, plan.live, self.new, self._features, int(self.job.target.cfg.n_heads)
        )
        begins, counts = runs.begin.unique_consecutive(return_counts=True)
        stops = counts.cumsum(0).tolist()
        entries: list[tuple[Site, Tensor]] = []
        for begin, count, stop in zip(begins.tolist(), counts.tolist(), stops, strict=True):
            rows = slice(stop - count, stop)
            entries.append((entry_site(begin, runner), self._entering(begin, first, rows, runs, edits)))
        logits = runner.resume(
            self.batch.tokens[runs.prompt],
            entries,
            edits=edits.late(),
            past=None if self._past is None or not first else (self._past, first, runs.prompt),
            whole=self.job.metric.whole,
        )
        return self._measure(logits, runs.prompt, lambda row: " and ".join(map(str, self.arms[int(runs.arm[row])])))

    def _entering(self, begin: int, first: int, rows: slice, runs: Runs, edits: PassEdits) -> Tensor:
        """What the runs `rows` hold where they begin: kept values, and the new ones in them that come before."""
        runner, prompt = self.job.runner, runs.prompt[rows]

        def edited(site: Site, value: Tensor) -> Tensor:
            edit = edits.early(site, rows)
            return value if edit is None else edit(value)

        parts = parts_of(begin, self.plan.table.sites, runner)
        held = [edited(site, self.own[site][prompt.to(self.own[site].device), first:]) for site in parts]
        value = held[0]
        for other in held[1:]:
            value = value + other
        layer, step = divmod(begin, STEPS)
        if len(parts) > 1:
            behind = Site(layer, "resid_mid" if step == MID else "resid_post")
            value = runner.through(behind, value)
            value = edited(behind, value) if step == POST else value
        if step == POST and layer + 1 < runner.n_layers:
            value = runner.through(Site(layer + 1, "resid_pre"), value)
        return value


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """The models in evaluation mode; those that were training go back to it."""
    with ExitStack() as stack:
        for model in models:
            if getattr(model, "training", False):
                stack.callback(model.train)
                model.eval()
        yield
