"""The whole of a sweep before its first pass: batches of prompts, their runs, and whether they fit into memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jaxtyping import Bool
from torch import Tensor

from tracelens.causal.memory import kept_bytes, limit_of, max_tokens, rows_in_memory, run_bytes
from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.rerun import Rerunner
from tracelens.causal.schedule import STEPS, ArmTable, Positions, Runs, live_places, parts_of, passes
from tracelens.sites import Site

_WORTH = 0.15
"""Share of a batch's positions that must be spared before keys and values are kept for it."""
_FOR_PROMPTS = 0.5
"""Share of the memory that what is kept of a batch of prompts may take; the runs need the rest."""


@dataclass(frozen=True)
class Plan:
    """One batch of prompts."""

    batch: Batch
    table: ArmTable = field(repr=False)
    positions: Positions = field(repr=False)
    live: Bool[Tensor, "place prompt"] = field(repr=False)
    runs: Runs = field(repr=False)
    keep: list[Site]
    """Sites whose values are kept of the unpatched run."""
    split: bool
    """Whether runs begin at the position that they change first."""
    rows: int
    """The most runs of a pass."""
    tokens: int
    """The most tokens of a pass."""
    bytes: int
    """Estimate of the memory that it takes at its height."""

    def passes(self) -> Iterator[tuple[int, Runs]]:
        """Runs that go side by side, with the position from which on they are computed."""
        return passes(self.runs, self.positions.length, self.rows, self.tokens, split=self.split)


@dataclass(frozen=True)
class Cost:
    """What a sweep takes.

    Attributes:
        runs: interventions that are run; those that cannot change the metric are not.
        passes: of the model, unpatched ones included.
        work: tokens times blocks that are computed.
        full: what they would be if every intervention were a run of its own from the tokens.
        bytes: estimate of the memory that the sweep takes beside the models, at its height.
        budget: what it may take.
    """

    runs: int
    passes: int
    work: int
    full: int
    bytes: int
    budget: int


def plan_of(
    table: ArmTable, prompts: PromptSet, runner: Rerunner, *, batch_size: int, memory_budget: int | None, whole: bool
) -> list[Plan]:
    """Plans of all batches; raises `MemoryBudgetError`, with an estimate, if one of them does not fit."""
    limit = limit_of(memory_budget, runner.device)
    plans = []
    for batch in prompts.batches(batch_size):
        plans += _plans(batch, table, prompts, runner, limit, whole)
    return plans


def _plans(
    batch: Batch, table: ArmTable, prompts: PromptSet, runner: Rerunner, limit: int, whole: bool
) -> Iterator[Plan]:
    cfg, length = runner.model.cfg, batch.tokens.shape[1]
    positions = Positions.of(prompts, batch, table.wheres)
    live = live_places(table, positions, runner, whole=whole)
    runs = Runs.of(table, positions, runner, whole=whole)
    keep = dict.fromkeys(table.sites)
    for begin in runs.begin.unique().tolist():
        keep |= dict.fromkeys(parts_of(begin, table.sites, runner))
    spared = float(runs.first.sum()) / (length * len(runs)) if len(runs) else 0.0
    split = runner.continues and not whole and spared >= _WORTH
    row = run_bytes(cfg, length, table.sites, whole=whole)
    n_features = sum(map(len, table.features.values()))
    each = kept_bytes(cfg, length, list(keep), table.sites, past=split, n_features=n_features, whole=whole)
    # The unpatched run is as large as a pass of as many rows.
    most = max(1, min(int(_FOR_PROMPTS * limit) // each, (limit - row) // (each + row)))
    if most < len(batch):
        for i in range(0, len(batch), most):
            part = Batch(batch.prompt[i : i + most], batch.tokens[i : i + most])
            yield from _plans(part, table, prompts, runner, limit, whole)
        return
    fixed = len(batch) * each
    rows = rows_in_memory(limit, fixed, row, length)
    at_once = max(len(batch), min(rows, len(runs), max_tokens(runner.device) // length))
    yield Plan(
        batch, table, positions, live, runs, list(keep), split, rows, max_tokens(runner.device), fixed + at_once * row
    )


def cost_of(plans: Sequence[Plan], runner: Rerunner, limit: int) -> Cost:
    """What plans add up to."""
    n, n_passes, work, full = runner.n_layers, 0, 0, 0
    for item in plans:
        length = item.positions.length
        n_passes += 1
        work += len(item.batch) * length * n
        full += (item.table.n_arms + 1) * len(item.batch) * length * n
        for first, runs in item.passes():
            n_passes += 1
            begin = (runs.begin // STEPS).clamp(max=n) if runner.resumes else runs.begin * 0
            work += int((n - begin).sum()) * (length - first)
    size = max((item.bytes for item in plans), default=0)
    return Cost(sum(len(item.runs) for item in plans), n_passes, work, full, size, limit)
