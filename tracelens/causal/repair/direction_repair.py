"""`direction`: the reference's refusal direction put right in the quantized model, and nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from tracelens.causal.arms import evaluating
from tracelens.causal.matrices import Matrix, matrices, restored
from tracelens.causal.matrices import Part as Restored
from tracelens.causal.memory import rows_that_fit, run_bytes
from tracelens.causal.places import Where
from tracelens.causal.prompts import Batch, PromptSet, Spans
from tracelens.causal.readout import Context
from tracelens.causal.repair.direction_result import DirectionRepair
from tracelens.causal.repair.direction_rows import Rows
from tracelens.causal.repair.directions import (
    AnswerStates,
    Directions,
    largest_difference,
    mean_difference,
    random_directions,
    shuffled_difference,
)
from tracelens.causal.repair.halves import Part, parts
from tracelens.causal.repair.roles import writes_to_the_residual
from tracelens.causal.repair.runs import Runs
from tracelens.causal.rerun import Rerunner
from tracelens.chat import Chat
from tracelens.errors import PromptError, UnknownNameError
from tracelens.sites import Site


def direction(
    pair: Any,
    prompts: Any,
    *,
    harmful: Any = None,
    harmless: Any = None,
    metric: Any = None,
    source: int | None = None,
    at: Where = None,
    choose_on: Any = None,
    by_layer: bool = True,
    n_random: int = 10,
    bits_per_weight: float | None = None,
    spans: Spans | None = None,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> DirectionRepair:
    """Brings the quantized model's projection on the reference's refusal direction back to that of the reference.

    After AIRD (Chhabra & Khalili, 2504.04215), which is known here from abstracts only: it finds refusal in compressed models to be
    carried by one direction, and repairs by orthogonalising weights towards the original model's. What follows is ours:

    - The direction d_l of a layer is the difference of means of `resid_post` at the answer position between harmful and harmless
      prompts in the reference, of length 1 (Arditi et al., 2406.11717, who take the best of several positions and one layer for all).
    - "activations": at every layer restored, x ← x + d (dᵀx_ref − dᵀx): the projection is the reference's, the rest the
      quantized model's. Costs one number by layer and token, which a deployed model does not have: a probe.
    - "weights": every matrix that writes into the residual stream (W_O, W_out) becomes W + d dᵀ(W_ref − W), rank one: of
      the same input it writes the reference's amount along d. Its input is still the quantized model's; embeddings are left
      as they are; where a norm stands between the matrix and the stream (Gemma 2), d is not what it writes along. Costs the vector
      dᵀ(W_ref − W) for each matrix, and d for each layer, in 16 bits.

    Beside it, in both versions: random directions; differences of means of shuffled labels, which lie where activations do; the
    direction of the largest error (of the states of a layer; of each matrix, its first left singular vector); and everything
    restored that the direction is a part of. Layer by layer, and at all layers together.

    A direction that recovers the margin need not be what quantization broke (any direction that the answer reads would do it: subspace
    illusion, Makelov et al., 2311.17030); the shuffled labels show how much of it is that.

    Args:
        prompts: halved as by `curve`: directions are found on one half, recovery is measured on the other.
        harmful, harmless: prompts to find the direction on. By default the choosing half, parted by whether the reference's metric is
            above 0: it must then be a margin.
        source: the layer whose direction is used at all layers; by default each layer's own.
        at: positions where activations are repaired; all by default.
        by_layer: repair each layer alone too, not only all together.
        n_random: random directions, and shuffles of the labels.

    Raises `PromptError` if a side has fewer than two prompts, `UnknownNameError` for layers and positions that do not exist and for
    models in which no matrix is known to write into the residual stream.
    """
    if (harmful is None) != (harmless is None):
        raise PromptError("harmful and harmless belong together; give both or neither")
    if n_random < 1:
        raise UnknownNameError(
            f"n_random is {n_random}; there is no saying what a direction is worth without a random one"
        )
    n_layers = int(pair.reference.cfg.n_layers)
    if source is not None:
        Site(source).check(n_layers)
    options: dict[str, Any] = {"chat": chat, "tokenizer": tokenizer}
    choose, held = parts(pair, prompts, choose_on, metric=metric, spans=spans, seed=seed, **options)
    runs = Runs(pair, batch_size=batch_size, memory_budget=memory_budget)
    if harmful is None:
        found_on, positive = choose.prompts, runs.plain("reference", choose.prompts, choose.metric) > 0
    else:
        found_on, positive = _labelled(pair, harmful, harmless, options)
    states = AnswerStates.of(pair, found_on, batch_size)
    named = _directions(states, positive, n_random, seed)
    if source is not None:
        named = {name: d[source].expand_as(d) for name, d in named.items()}
    theirs = mean_difference(states.quantized, positive)
    arms: list[tuple[int, ...]] = [(layer,) for layer in range(n_layers)] if by_layer and n_layers > 1 else []
    arms.append(tuple(range(n_layers)))
    job = _Job(runs, held, at, bits_per_weight)
    records, measured = job.all(named, arms, progress)
    start, goal = (runs.plain(name, held.prompts, held.metric) for name in ("quantized", "reference"))
    precision = getattr(pair.quantized, "precision", None)
    return DirectionRepair(
        metric=held.metric.name,
        unit=held.metric.unit,
        rows=tuple(records),
        measured=measured,
        start=start,
        goal=goal,
        cosine=tuple((mean_difference(states.reference, positive) * theirs).sum(1).tolist()),
        n_harmful=int(positive.sum()),
        n_harmless=int((~positive).sum()),
        prompts=held.prompts.texts,
        settings={"precision": None if precision is None else str(precision), "source": source, "at": at, "seed": seed},
    )


def _labelled(
    pair: Any, harmful: Any, harmless: Any, options: dict[str, Any]
) -> tuple[PromptSet, Bool[Tensor, "prompt"]]:
    tokenizer = pair.tokenizer if options["tokenizer"] is None else options["tokenizer"]
    one, two = (
        PromptSet.of(given, pair.reference, tokenizer=tokenizer, chat=options["chat"]) for given in (harmful, harmless)
    )
    both = PromptSet(one.texts + two.texts, one.tokens + two.tokens, {}, one.behaviours + two.behaviours)
    return both, torch.tensor([True] * len(one) + [False] * len(two))


def _directions(states: AnswerStates, positive: Bool[Tensor, "prompt"], n: int, seed: int) -> dict[str, Directions]:
    shape = (states.reference.shape[0], states.reference.shape[-1])
    seeds = range(seed, seed + n)
    return (
        {"refusal": mean_difference(states.reference, positive), "largest error": largest_difference(states)}
        | {f"random {i}": random_directions(shape, s, states.reference.device) for i, s in enumerate(seeds)}
        | {f"labels {i}": shuffled_difference(states.reference, positive, s) for i, s in enumerate(seeds)}
    )


@dataclass
class _Job:
    """All versions of the repair on the held-out prompts."""

    runs: Runs
    held: Part
    at: Where
    bits_per_weight: float | None

    def all(
        self, named: dict[str, Directions], arms: Sequence[tuple[int, ...]], progress: bool
    ) -> tuple[list[dict[str, Any]], Float64[Tensor, "row prompt"]]:
        from tqdm.auto import tqdm

        writers = self._writers()
        kinds: dict[str, Directions | None] = {**named, "everything": None}
        rows = [(kind, layers) for kind in kinds for layers in arms]
        records, measured = [], []
        with tqdm(total=2 * len(rows), desc="direction repair", unit="repair", disable=not progress) as bar:
            values, share = self._activations(kinds, arms)
            bar.update(len(rows))
            for kind, layers in rows:
                width = 1 if kinds[kind] is not None else int(self.runs.pair.reference.cfg.d_model)
                records.append(_record("activations", kind, layers, len(arms[-1]), 2.0 * width * share * len(layers)))
                measured.append(values[kind, layers])
            for kind, layers in rows:
                changed = [(layer, matrix) for layer in layers for matrix in writers[layer]]
                with restored(list(self._corrected(kind, kinds[kind], changed))):
                    measured.append(self.runs.plain("quantized", self.held.prompts, self.held.metric))
                records.append(_record("weights", kind, layers, len(arms[-1]), self._bytes(kind, changed, len(layers))))
                bar.update()
        return records, torch.stack(measured)

    def _writers(self) -> dict[int, list[Matrix]]:
        pair = self.runs.pair
        d_model = int(pair.reference.cfg.d_model)
        found: dict[int, list[Matrix]] = {layer: [] for layer in range(int(pair.reference.cfg.n_layers))}
        names = []
        for matrix in matrices(pair.reference, pair.quantized):
            names.append(matrix.name)
            if writes_to_the_residual(matrix, d_model):
                found[matrix.layer].append(matrix)
        if missing := [layer for layer, some in found.items() if not some]:
            raise UnknownNameError(
                f"no matrix of layer {missing[0]} is known to write into the residual stream; the model has {', '.join(names[:8])}"
            )
        return found

    def _bytes(self, kind: str, changed: Sequence[tuple[int, Matrix]], n_layers: int) -> float:
        if kind == "everything":
            precision = getattr(self.runs.pair.quantized, "precision", None)
            bits = self.bits_per_weight or (precision.bits_per_weight if precision else 0.0)
            return sum(m.n_weights for _, m in changed) * (16 - bits) / 8
        # Every matrix has a direction of its own where that of its error is taken.
        own = len(changed) if kind == "largest error" else n_layers
        return 2.0 * (sum(m.shape[1] for _, m in changed) + own * int(self.runs.pair.reference.cfg.d_model))

    def _corrected(self, kind: str, d: Directions | None, changed: Sequence[tuple[int, Matrix]]) -> Iterator[Restored]:
        for layer, matrix in changed:
            if d is None:
                yield Restored(matrix)
                continue
            error = -matrix.error
            along = (
                torch.linalg.svd(error, full_matrices=False).U[:, 0] if kind == "largest error" else d[layer].to(error)
            )
            new = matrix.flat(matrix.quantized.detach().float()) + torch.outer(along, along @ error)
            yield Restored(replace(matrix, reference=matrix.unflat(new).to(matrix.quantized)))

    @torch.no_grad()
    def _activations(
        self, kinds: dict[str, Directions | None], arms: Sequence[tuple[int, ...]]
    ) -> tuple[dict[tuple[str, tuple[int, ...]], Float64[Tensor, "prompt"]], float]:
        """The metric with projections of the reference's run in the quantized one, and the share of tokens they were put at.

        Directions are rows of one pass, which begins where the first is repaired; layers above see the change of those below.
        """
        prompts, metric, pair = self.held.prompts, self.held.metric, self.runs.pair
        self.runs.runner("quantized", prompts, metric)
        found = {(kind, arm): torch.empty(len(prompts), dtype=torch.float64) for kind in kinds for arm in arms}
        n_cells = 0
        sites = [Site(layer) for layer in range(int(pair.reference.cfg.n_layers))]
        with evaluating(pair.reference, pair.quantized):
            for batch in prompts.batches(self.runs.batch_size):
                cells = self._cells(batch)
                n_cells += int(cells.sum())
                ours, theirs = (
                    Rerunner(model).run(batch.tokens, keep=sites)[1] for model in (pair.reference, pair.quantized)
                )
                for arm in arms:
                    for some in self._chunks(list(kinds), batch):
                        rows = Rows(batch, len(some), cells, ours)
                        values = self._pass(arm, [kinds[kind] for kind in some], rows, theirs)
                        for kind, part in zip(some, values.reshape(len(some), -1), strict=True):
                            found[kind, arm][batch.prompt] = part
        return found, n_cells / sum(map(len, prompts.tokens))

    def _pass(
        self, arm: tuple[int, ...], along: Sequence[Directions | None], rows: Rows, theirs: dict[Site, Tensor]
    ) -> Float64[Tensor, "row"]:
        edits = {str(Site(layer)): rows.edit(layer, along) for layer in arm}
        first = Site(min(arm))
        residual = edits.pop(str(first))(rows.repeated(theirs[first]))
        batch, metric = rows.batch, self.held.metric
        logits, _ = Rerunner(self.runs.pair.quantized).run(
            rows.repeated(batch.tokens), edits=edits, start=first.layer + 1, residual=residual, whole=metric.whole
        )
        assert logits is not None
        context = Context(
            rows.repeated(batch.prompt).to(logits.device), lambda name: rows.repeated(self.runs.baselines[name](batch))
        )
        return metric(logits, context).double().cpu()

    def _chunks(self, kinds: list[str], batch: Batch) -> list[list[str]]:
        cfg, pos = self.runs.pair.quantized.cfg, batch.tokens.shape[1]
        row = run_bytes(cfg, pos, [Site(0)], whole=self.held.metric.whole)
        kept = 2 * int(cfg.n_layers) * len(batch) * pos * int(cfg.d_model) * cfg.dtype.itemsize
        most = rows_that_fit(self.runs.memory_budget, kept, row, pos, torch.device(cfg.device))
        size = max(1, most // len(batch))
        return [kinds[i : i + size] for i in range(0, len(kinds), size)]

    def _cells(self, batch: Batch) -> Bool[Tensor, "prompt pos"]:
        cells = torch.zeros(batch.tokens.shape, dtype=torch.bool)
        for row, prompt in enumerate(batch.prompt.tolist()):
            cells[row, list(self.held.prompts.positions(prompt, self.at))] = True
        return cells


def _record(version: str, kind: str, layers: tuple[int, ...], n_layers: int, cost: float) -> dict[str, Any]:
    where = "all" if len(layers) == n_layers else str(layers[0])
    return {"version": version, "direction": kind, "layers": where, "bytes": cost}
