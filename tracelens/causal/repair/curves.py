"""`curve`: how much of a behaviour comes back as more and more of the reference is put into the quantized model."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from tracelens.causal.components import Features
from tracelens.causal.matrices import matrices
from tracelens.causal.places import Place, Where
from tracelens.causal.prompts import Spans
from tracelens.causal.repair import activation_repair, weight_repair
from tracelens.causal.repair.activation_repair import ActivationRepair, repair_places
from tracelens.causal.repair.curve_result import RepairCurve
from tracelens.causal.repair.halves import Part, parts
from tracelens.causal.repair.orders import DEFAULT_ORDERS, Repairs, checked_orders, ranked, spaced_counts
from tracelens.causal.repair.runs import Gradient, Runs
from tracelens.causal.repair.weight_repair import WeightRepair
from tracelens.chat import Chat
from tracelens.errors import PrecisionSpecError, UnknownNameError
from tracelens.features.saes import check_saes, normalise_saes

GRAINS = {"matrices": "matrix", "rows": "row", "layers": "layer"}


def curve(
    pair: Any,
    prompts: Any,
    *,
    restore: Literal["weights", "activations"] = "weights",
    components: str | Sequence[str | Place] | None = None,
    by: str | Sequence[str] = DEFAULT_ORDERS,
    counts: Sequence[int] | None = None,
    at: Sequence[Where] = (None,),
    metric: Any = None,
    choose_on: Any = None,
    gradient: Gradient = "reference",
    n_random: int = 20,
    bits_per_weight: float | None = None,
    saes: Any = None,
    features: Features | None = None,
    spans: Spans | None = None,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> RepairCurve:
    """Restores components in several orders, the first k of each together, and measures what comes back.

    Orders are chosen on some prompts and recovery is measured on others: half of `prompts` each, after a shuffle, unless
    `choose_on` gives the first. Random orders and the order by size of the error are always among them.

    What a curve does not say: that components restored early are those that quantization broke. Restoring is sufficient for what it
    brings back, not necessary (others might do as well), and restoring some of a circuit can do worse than none of it, since
    two quantized parts may have errors that cancel. And a head's `z` restored is still read by a quantized W_O: heads and MLPs
    together do not give 1; `attn` and `mlp` do.

    Args:
        pair: a `PrecisionPair`.
        restore: weights (what a mixed-precision build can keep) or activations (a probe of where the damage is: a deployed
            model has no reference run to take them from).
        components: of weights, "matrices" (default), "rows" (output channels) or "layers". Of activations, kinds ("head", "mlp",
            "attn", "feature"), names of sites ("resid_post") or places; heads and MLPs by default.
        by: any of, each but "random" also with " per byte" behind it:
            "importance": mean |Δ metric| under mean ablation in the reference (`ablation.importance`);
            "drift": relative L2 change of the activation, mean over prompts; "importance×drift";
            "attribution": first-order recovery Σ d ∇m·δ / Σ d², signed: first all that moves the metric one way, which overshoots
            where errors cancel; "attribution size", the same without its sign;
            "magnitude": ‖W_quant − W_ref‖_F, or ‖a_quant − a_ref‖; "relative magnitude", of weights, over ‖W_ref‖_F;
            "alone": the measured recovery of each restored by itself, one run for each; "random".
            A weight's importance is that of the heads and MLPs it is part of, added up; its drift their mean.
        counts: how many to restore; 0 and all are always among them; by default about 1.4 times more each time.
        at: of activations, groups of positions or positions, each of which makes components of its own.
        metric: what `as_metric` takes; None is the margin of the prompts' behaviours.
        gradient: where attribution takes the gradient; "both" is the mean of reference and quantized.
        n_random: random orders.
        bits_per_weight: of the quantized model, scales included; by default what its `.precision` says, if anything.
        saes, features: for components that are features; the SAE's error stays.

    The quantized model's weights are put back as they were, whatever happens in between.
    Raises `UnknownNameError` for orders, components or positions that do not exist, `PromptError`, `MemoryBudgetError`,
    `MetricInputError` where a gradient would say nothing.
    """
    if restore not in ("weights", "activations"):
        raise UnknownNameError.of("kind of repair", restore, ("weights", "activations"))
    if n_random < 1:
        raise UnknownNameError(
            f"n_random is {n_random}; there is no saying what an order is worth without a random one"
        )
    saes = None if saes is None else normalise_saes(saes)
    if saes is not None:
        check_saes(saes, pair.reference)
    known = (weight_repair if restore == "weights" else activation_repair).ORDERS
    wanted = checked_orders(by, known)
    choose, held = parts(
        pair, prompts, choose_on, metric=metric, spans=spans, chat=chat, tokenizer=tokenizer, seed=seed
    )
    runs = Runs(pair, saes, batch_size, memory_budget, progress)
    precision = getattr(pair.quantized, "precision", None)
    if bits_per_weight is not None and not 0 < bits_per_weight < 16:
        raise PrecisionSpecError(
            f"bits_per_weight is {bits_per_weight:g}; there is something to keep in 16 bit from above 0 to below 16"
        )
    if restore == "weights":
        bits = _bits(precision) if bits_per_weight is None else bits_per_weight
        repairs = _weights(components, runs, choose, bits, gradient, seed)
    else:
        kinds = ("head", "mlp") if components is None else (components,) if isinstance(components, str) else components
        places = repair_places(pair.reference, kinds, at, features, saes)
        repairs = ActivationRepair(places, runs, choose, gradient, seed)
    costs = repairs.bytes(held.prompts)
    names, order, scores = ranked(repairs, wanted, costs, n_random, seed)
    steps = _steps(counts, len(repairs.names))
    start, goal = (runs.plain(name, held.prompts, held.metric) for name in ("quantized", "reference"))
    return RepairCurve(
        restore=restore,
        metric=held.metric.name,
        unit=held.metric.unit,
        names=repairs.names,
        layers=repairs.layers,
        bytes=costs,
        bytes_note=repairs.bytes_note,
        orders=names,
        order=order,
        scores=scores,
        counts=steps,
        measured=_measured(repairs, order, steps, held, start),
        start=start,
        goal=goal,
        prompts=held.prompts.texts,
        n_chosen_on=len(choose.prompts),
        settings={
            "precision": None if precision is None else str(precision),
            "rounds_activations": precision is not None and precision.rounds_activations,
            "gradient": gradient,
            "seed": seed,
            "halved": choose_on is None,
        }
        | (
            {}
            if not isinstance(repairs, WeightRepair)
            else {"bits_per_weight": repairs.bits, "components": repairs.grain}
        ),
    )


def _weights(
    components: Any, runs: Runs, choose: Part, bits: float | None, gradient: Gradient, seed: int
) -> WeightRepair:
    name = "matrices" if components is None else components
    if not isinstance(name, str) or name not in GRAINS:
        raise UnknownNameError.of("kind of weights", name, GRAINS)
    found = matrices(runs.pair.reference, runs.pair.quantized)
    if not found:
        raise UnknownNameError("the models have no weight matrices inside their blocks that could be restored")
    heads = ActivationRepair(
        repair_places(runs.pair.reference, ("head", "mlp"), (None,), None, None), runs, choose, seed=seed
    )
    grain: Any = GRAINS[name]
    return WeightRepair(found, grain, runs, choose, bits, gradient, heads)


def _bits(precision: Any) -> float | None:
    """Bits of a quantized weight, where that is less than the 16 it is kept in."""
    return precision.bits_per_weight if precision is not None and precision.bits_per_weight < 16 else None


def _steps(counts: Sequence[int] | None, n: int) -> tuple[int, ...]:
    given = spaced_counts(n) if counts is None else tuple(int(count) for count in counts)
    for count in given:
        if not 0 <= count <= n:
            raise UnknownNameError(f"{count} components cannot be restored; there are {n}")
    return tuple(sorted({0, n, *given}))


def _measured(
    repairs: Repairs,
    order: Int[Tensor, "order component"],
    counts: Sequence[int],
    held: Part,
    start: Float64[Tensor, "prompt"],
) -> Float64[Tensor, "order count prompt"]:
    """The metric after every step of every order; sets that several orders come to are run once."""
    sets = [[frozenset(row[:count]) for count in counts] for row in order.tolist()]
    known: dict[frozenset[int], Tensor] = {frozenset(): start}
    # Each order's steps in a row: growing sets are the cheapest to go through.
    new = list(dict.fromkeys(state for row in sets for state in row if state not in known))
    known |= dict(zip(new, repairs.measure([tuple(sorted(state)) for state in new], held), strict=True))
    return torch.stack([torch.stack([known[state] for state in row]) for row in sets])
