"""The engine of path patching: what a sender says to a receiver along the residual stream and nothing else.

Two passes. The first moves the sender and holds everything after it at the target's own values, so that a receiver reads
the target's residual stream plus the sender's direct contribution; what the receiver then computes is written down. The
second is an ordinary run of the target with the receiver's new value in its place. Senders, receivers and prompts are rows.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from tracelens.causal.arms import ArmRunner, Source, Values, evaluating
from tracelens.causal.measuring import Measure
from tracelens.causal.memory import rows_that_fit, run_bytes, site_bytes
from tracelens.causal.places import Arm, Place, check_places
from tracelens.causal.prompts import Batch
from tracelens.causal.rerun import Edit
from tracelens.sites import Site

MLPs = Literal["frozen", "recompute"]
"""Whether the MLPs between sender and receiver keep the target's values or answer to the sender."""


@dataclass(frozen=True)
class Path:
    """From a sender to a receiver: places that move together, and places that hear of it together."""

    sender: Arm
    receiver: Arm


def is_parallel(model: Any) -> bool:
    """Whether attention and MLP of a block both read its input, so that a head does not reach its own layer's MLP."""
    return bool(getattr(model.cfg, "parallel_attn_mlp", False))


def writes_at(place: Place, *, parallel: bool) -> int:
    """When a sender writes into the residual stream: two steps a layer, attention and MLP."""
    if place.site.name == "resid_pre":
        return 2 * place.site.layer
    return 2 * place.site.layer + (1 if place.site.name in ("z", "attn_out") and not parallel else 2)


def reads_at(place: Place, *, parallel: bool) -> int:
    """When a receiver reads it; it hears senders that have written by then."""
    after = {"resid_post": 2, "mlp_out": 0 if parallel else 1}
    return 2 * place.site.layer + after.get(place.site.name, 0)


@dataclass
class PathRunner:
    """Runs paths on the target of `job`."""

    job: ArmRunner
    mlps: str = "frozen"

    def run(
        self, paths: Sequence[Path], source: Source, what: str = "path patching"
    ) -> tuple[Float64[Tensor, "prompt"], Float64[Tensor, "path prompt"]]:
        """The metric of each prompt as it is, and with each path.

        Raises as `ArmRunner.run` does.
        """
        from tqdm.auto import tqdm

        job = self.job
        check_places([arm for path in paths for arm in (path.sender, path.receiver)], job.target)
        batches = job.prompts.batches(job.batch_size)
        plans = [_Plan.of(self, batch, paths) for batch in batches]
        plain = torch.full((len(job.prompts),), torch.nan, dtype=torch.float64)
        patched = torch.full((len(paths), len(job.prompts)), torch.nan, dtype=torch.float64)
        with (
            torch.no_grad(),
            evaluating(job.target),
            tqdm(total=patched.numel(), desc=what, unit="run", disable=not job.progress) as bar,
        ):
            for batch, plan in zip(batches, plans, strict=True):
                work = _BatchOfPaths(self, batch, plan, source)
                plain[batch.prompt] = work.plain.double().cpu()
                for path, prompt, values in work.outcomes():
                    patched[path, batch.prompt[prompt]] = values.double().cpu()
                    bar.update(len(values))
        return plain, patched


@dataclass(frozen=True)
class _Plan:
    """Which values of a batch are kept, and how many runs go side by side."""

    paths: Sequence[Path]
    by_sender: dict[Arm, list[int]]
    """Sender → indices of its paths; senders that begin early come first."""
    moved: list[Site]
    """Sites at which senders stand."""
    heard: list[Site]
    """Sites at which receivers stand."""
    held: list[Site]
    """Sites whose values are the target's own in the first pass."""
    entries: dict[int, Site]
    """Layer at which runs begin → the site that holds the residual stream there."""
    last: int
    """The layer after which no receiver reads."""
    rows: int

    @classmethod
    def of(cls, runner: PathRunner, batch: Batch, paths: Sequence[Path]) -> "_Plan":
        job = runner.job
        cfg, n, pos = job.target.cfg, job.runner.n_layers, batch.tokens.shape[1]
        by_sender: dict[Arm, list[int]] = defaultdict(list)
        for index, path in enumerate(paths):
            by_sender[path.sender].append(index)
        moved = list(dict.fromkeys(place.site for path in paths for place in path.sender))
        heard = list(dict.fromkeys(place.site for path in paths for place in path.receiver))
        starts = {_start(arm) for path in paths for arm in (path.sender, path.receiver)}
        last = max((site.layer for site in heard), default=0)
        hooks = getattr(job.target, "hook_dict", {})
        names = ("z", "mlp_out") if runner.mlps == "frozen" else ("z",)
        held = [Site(layer, name) for layer in range(min(starts, default=0), last + 1) for name in names]
        held = [site for site in held if not hooks or str(site) in hooks]
        entries = {start: Site(start, "resid_pre") if start < n else Site(n - 1, "resid_post") for start in starts}
        kept = sum(site_bytes(cfg, site, pos) for site in [*{*held, *moved, *entries.values()}, *moved])
        row = run_bytes(cfg, pos, heard, whole=job.metric.whole) + sum(site_bytes(cfg, site, pos) for site in heard)
        rows = rows_that_fit(job.memory_budget, len(batch) * kept, row, pos, job.runner.device)
        ordered = dict(sorted(by_sender.items(), key=lambda item: _start(item[0])))
        return cls(paths, ordered, moved, heard, held, entries, last, rows)


def _start(arm: Arm) -> int:
    """The first layer that has to be computed when an arm is replaced."""
    return min(place.site.layer + (place.site.name == "resid_post") for place in arm)


class _BatchOfPaths:
    """One batch of prompts: its unpatched run, and what the paths make of it."""

    def __init__(self, runner: PathRunner, batch: Batch, plan: _Plan, source: Source) -> None:
        self.job, self.batch, self.plan, self.mlps = runner.job, batch, plan, runner.mlps
        keep = list(dict.fromkeys([*plan.held, *plan.moved, *plan.entries.values()]))
        edits = self.job.base_edits(batch) if self.job.base_edits else None
        logits, self.own = self.job.runner.run(batch.tokens, edits=edits, keep=keep, whole=self.job.metric.whole)
        assert logits is not None
        self._measure = Measure(self.job.metric, batch, self.job.baselines)
        self.plain = self._measure(logits)
        self.new = source.values(batch, plan.moved, {site: self.own[site] for site in plan.moved}) if plan.moved else {}

    def outcomes(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(path, prompt of the batch, metric) of every run, some rows at a time."""
        by_start: dict[int, list[tuple[Arm, int]]] = defaultdict(list)
        for sender in self.plan.by_sender:
            by_start[_start(sender)] += [(sender, prompt) for prompt in range(len(self.batch))]
        for start, rows in by_start.items():
            for i in range(0, len(rows), self.plan.rows):
                yield from self._through(start, rows[i : i + self.plan.rows])

    def _through(self, start: int, rows: Sequence[tuple[Arm, int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Both passes of some senders that begin at one layer."""
        prompt = torch.tensor([prompt for _, prompt in rows])
        heard = self._listen(start, [sender for sender, _ in rows], prompt)
        by_start: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for row, (sender, _) in enumerate(rows):
            for path in self.plan.by_sender[sender]:
                by_start[_start(self.plan.paths[path].receiver)].append((row, path))
        for begin, members in by_start.items():
            for i in range(0, len(members), self.plan.rows):
                row, path = torch.tensor(members[i : i + self.plan.rows]).T
                values = {site: value[row.to(value.device)] for site, value in heard.items()}
                arms = [self.plan.paths[index].receiver for index in path.tolist()]
                yield path, prompt[row], self._answer(begin, arms, values, prompt[row])

    def _listen(self, start: int, senders: Sequence[Arm], prompt: Int[Tensor, "row"]) -> Values:
        """What the receivers' sites compute when the senders move and all else is held: the first pass."""
        new = {site: value[prompt.to(value.device)] for site, value in self.new.items()}
        heard: Values = {}
        edits: dict[str, Edit] = {}
        for layer in range(start, self.plan.last + 1):
            for site in (Site(layer, name) for name in ("z", "attn_out", "mlp_out")):
                if site in self.plan.held or site in new or site in self.plan.heard:
                    edits[str(site)] = self._holding(site, senders, new, prompt, heard)
        entry = self.plan.entries[start]
        residual = self._own(entry, prompt)
        if entry in new:
            residual = self._write(entry, residual, senders, new[entry], prompt)
        # What a head or an MLP computes is written down before its site is held.
        keep = [site for site in self.plan.heard if str(site) not in edits and site.layer >= start]
        tokens = self.batch.tokens[prompt]
        stop = self.plan.last + 1
        _, kept = self.job.runner.run(tokens, edits=edits, keep=keep, start=start, residual=residual, stop=stop)
        return heard | kept

    def _holding(
        self, site: Site, senders: Sequence[Arm], new: Values, prompt: Int[Tensor, "row"], heard: Values
    ) -> Edit:
        """Writes down what a site computes, holds it at the target's own value, and moves the senders that stand there."""

        def edit(value: Tensor) -> Tensor:
            if site in self.plan.heard:
                heard[site] = value
            if site in self.plan.held:
                value = self._own(site, prompt)
            return self._write(site, value, senders, new[site], prompt) if site in new else value

        return edit

    def _answer(self, start: int, receivers: Sequence[Arm], heard: Values, prompt: Int[Tensor, "row"]) -> Tensor:
        """The metric when the receivers hold what they heard in an ordinary run: the second pass."""
        residual = self._own(self.plan.entries[start], prompt)
        edits: dict[str, Edit] = {}
        for site in dict.fromkeys(place.site for arm in receivers for place in arm if place.site in heard):
            edit = partial(self._receive, site, receivers, heard[site], prompt)
            if site == self.plan.entries[start]:
                residual = edit(residual)
            else:
                edits[str(site)] = edit
        whole = self.job.metric.whole
        tokens = self.batch.tokens[prompt]
        logits, _ = self.job.runner.run(tokens, edits=edits, start=start, residual=residual, whole=whole)
        assert logits is not None
        return self._measure(logits, prompt, lambda row: " and ".join(map(str, receivers[row])))

    def _receive(
        self, site: Site, receivers: Sequence[Arm], heard: Tensor, prompt: Int[Tensor, "row"], value: Tensor
    ) -> Tensor:
        # The unembedding reads a sum: what other receivers of the arm add to it stays.
        new = value + (heard - self._own(site, prompt)).to(value) if site.name == "resid_post" else heard
        return self._write(site, value, receivers, new, prompt)

    def _own(self, site: Site, prompt: Int[Tensor, "row"]) -> Tensor:
        own = self.own[site]
        return own[prompt.to(own.device)]

    def _write(self, site: Site, value: Tensor, arms: Sequence[Arm], new: Tensor, prompt: Int[Tensor, "row"]) -> Tensor:
        """`value` with `new` in the places of each row's arm."""
        cells: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}
        for row, (arm, index) in enumerate(zip(arms, self.batch.prompt[prompt].tolist(), strict=True)):
            for place in arm:
                if place.site == site:
                    unit = () if place.unit is None else (place.unit,)
                    where = self.job.prompts.positions(index, place.where)
                    cells[bool(unit)] += [(row, position, *unit) for position in where]
        value = value.clone()
        for members in filter(None, cells.values()):
            at = tuple(torch.tensor(members, device=value.device).T)
            value[at] = new.to(value)[at]
        return value
