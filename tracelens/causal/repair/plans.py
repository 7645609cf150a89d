"""`plan`: which linear layers of a quantized build to keep in 16 bit so that a behaviour comes back."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float64
from torch import Tensor

from tracelens.behaviour import Flips
from tracelens.causal.attribution import At
from tracelens.causal.matrices import Matrix, matrices
from tracelens.causal.repair.choosing import at_random, most_gain
from tracelens.causal.repair.halves import parts
from tracelens.causal.repair.plan_choice import BY, Choice
from tracelens.causal.repair.plan_measure import Bench, Outcome, is_margin, recovery
from tracelens.causal.repair.plan_perplexity import predicted_perplexity
from tracelens.causal.repair.plan_result import HeldOut, RepairPlan
from tracelens.causal.repair.plan_target import Target
from tracelens.causal.repair.plan_units import sizes_of, units_of
from tracelens.causal.repair.runs import Runs
from tracelens.chat import Chat
from tracelens.errors import PlanError, UnknownNameError
from tracelens.features.saes import check_saes, normalise_saes
from tracelens.loading.description import size


def plan(
    pair: Any,
    prompts: Any,
    metric: Any = None,
    *,
    budget_bytes: int | None = None,
    target: float | Mapping[str, float] | None = None,
    by: str = "attribution",
    granularity: str = "module",
    held_out: Any = None,
    texts: Sequence[Any] | None = None,
    saes: Any = None,
    fingerprint: Any = None,
    min_active: int = 10,
    bits: float | None = None,
    quantized_checkpoint: Any = None,
    gradient: At = "quantized",
    n_random: int = 20,
    chat: Chat = "auto",
    tokenizer: Any = None,
    batch_size: int = 32,
    memory_budget: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> RepairPlan:
    """Chooses linear layers to keep in 16 bit on some prompts, and measures on others what that brings back.

    With a budget it takes the set with the largest predicted recovery that fits (0/1 knapsack). With a target it takes the cheapest
    set that is predicted to reach it, and then adds, and leaves out again, until the target is met as *measured* on the
    prompts to choose on; whether it holds on the held-out prompts is measured once, afterwards. The same bytes spent at random
    and on the largest ‖error‖² are always measured too, and `verdict` says where the plan is no better.

    A prediction is a sum over layers of what each brings back alone. It leaves out what two of them do together and, by
    attribution, all that is not first order, so at 2 or 3 bits expect it to be off; the measured number is the one to use.
    That a choice brings the behaviour back does not show that quantization broke it there.

    Args:
        pair: a `PrecisionPair`.
        prompts: to choose on; without `held_out` they are shuffled (by `seed`) and halved, and the second half is measured on.
        metric: what `as_metric` takes; None is the margin of the prompts' behaviours. Flips need a margin.
        budget_bytes: bytes that the kept layers may add to the quantized build. Or else
        target: a recovery (0.9), or {"flips": 0.02}, the largest share of prompts decided otherwise than by the reference.
        by: "attribution" (first-order recovery Σ d ∇W·(W_ref − W_quant) / Σ d²), "alone" (the recovery measured with each unit
            restored by itself: one run of the prompts each, and exact for a single unit), "magnitude" (‖error‖²),
            "relative magnitude" (‖error‖²/‖W‖²), or "random".
        granularity: "module"; "fused": queries, keys and values together, gate and up together, all experts of a layer
            together, as vLLM and SGLang, which fuse them, can load them; or "layer".
        held_out: other prompts to measure on. Prompts to choose on that are among them are left out of the choice.
        texts: for perplexity; by default the held-out prompts themselves.
        saes, fingerprint: for CPFR; both or neither. min_active: tokens on which the reference must fire a feature.
        bits: that a quantized weight takes, scales included, if the quantized model's `.precision` does not say.
        quantized_checkpoint: folder of the quantized build, which knows it exactly.
        gradient: where attribution takes the gradient; "quantized" is the end from which one repairs.
        n_random: random choices of the same bytes; with fewer than 19 no plan can be told from a lucky one.

    Raises `PlanError` for a budget that nothing fits into, a target that is none, both or neither; `PromptError`;
    `UnknownNameError` for another `by` or granularity; and as `attribute_weights`.
    """
    wanted = _check(budget_bytes, target, by, n_random, saes, fingerprint)
    found = matrices(pair.reference, pair.quantized)
    architecture = str(getattr(pair.reference.cfg, "original_architecture", None) or "")
    units, by_name = units_of(found, architecture, granularity, sizes := sizes_of(pair, bits, quantized_checkpoint))
    if units and budget_bytes is not None and budget_bytes < (least := min(units, key=lambda unit: unit.bytes)).bytes:
        raise PlanError(
            f"a budget of {size(budget_bytes)} holds nothing: the smallest, {least.name}, takes {size(least.bytes)} "
            f"({sizes.basis}); give at least that"
        )
    options: dict[str, Any] = {"metric": metric, "chat": chat, "tokenizer": tokenizer, "seed": seed}
    if held_out is None:
        choose, held = parts(pair, prompts, **options)
    else:
        choose, held = parts(pair, held_out, prompts, **options)
    if saes is not None:
        check_saes(saes := normalise_saes(saes), pair.reference)
        fingerprint.check(saes)
    runs = Runs(pair, None, batch_size, memory_budget, progress)
    bench = Bench(pair, runs, held, texts, saes, fingerprint, min_active, seed)
    job = Choice(pair, runs, units, by_name, choose, held, by, gradient, seed)
    kept = job.within(budget_bytes) if wanted is None else job.reaching(wanted)
    measured, ends = job.measured(kept), (job.start, job.goal)
    predicted = job.predicted(kept, "held")
    return RepairPlan(
        reference=str(pair.reference.cfg.model_name),
        quantized=_label(pair),
        architecture=architecture,
        metric=held.metric.name,
        unit=held.metric.unit,
        by=by,
        granularity=granularity,
        units=tuple(job.units),
        kept=tuple(kept),
        linear_modules=tuple(dict.fromkeys(_modules(by_name, architecture))),
        budget_bytes=budget_bytes,
        target=wanted,
        target_met=None if wanted is None else wanted.met(measured, *ends),
        bytes_basis=sizes.basis,
        outcomes=_outcomes(bench, job, kept, budget_bytes, n_random),
        predicted=None if predicted is None else bench.recovery(predicted),
        predicted_flips=None if predicted is None else _flips(bench, predicted),
        predicted_perplexity=_perplexity(job, bench, kept) if by == "attribution" and kept else None,
        chosen_predicted=None if (own := job.predicted(kept, "choose")) is None else recovery(own, *ends, seed),
        chosen_measured=recovery(measured, *ends, seed),
        n_choosing=len(choose.prompts),
        held_out=HeldOut(
            held.prompts.texts, held.prompts.tokens, held.prompts.behaviours, held.prompts.answers, held.rows
        ),
        settings={
            **{"seed": seed, "gradient": gradient if by == "attribution" else "", "halved": held_out is None},
            **{"precision": str(getattr(pair.quantized, "precision", "") or ""), "pair": pair.settings},
        },
        measuring=held.metric,
    )


def _check(budget: int | None, target: Any, by: str, n_random: int, saes: Any, fingerprint: Any) -> Target | None:
    if by not in BY:
        raise UnknownNameError.of("way to choose", by, BY)
    if n_random < 1:
        raise PlanError(f"n_random is {n_random}; there is no saying what a choice is worth without a random one")
    if (budget is None) == (target is None):
        given = "neither is given" if budget is None else "both are given"
        raise PlanError(f"a plan has either a budget (budget_bytes=2_000_000) or a target (target=0.9); {given}")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise PlanError(f"budget_bytes is {budget!r}; give a positive whole number of bytes")
    if (saes is None) != (fingerprint is None):
        raise PlanError("CPFR needs both saes= and fingerprint=, which says what their safety features are")
    return None if target is None else Target.parse(target)


def _outcomes(bench: Bench, job: Choice, kept: list[int], budget: int | None, n_random: int) -> tuple[Outcome, ...]:
    found = [bench.outcome("reference", model=bench.pair.reference), bench.outcome("quantized")]
    if not kept:
        return tuple(found)
    # A choice may leave some of its budget; what it is compared with may not fill it less well.
    spend = sum(job.costs[i] for i in kept) if budget is None else budget
    sizes = {"magnitude": "error", "relative magnitude": "relative_error"}
    choices = {"plan": kept} | {
        name: most_gain([getattr(unit, error) ** 2 for unit in job.units], job.costs, spend)
        for name, error in sizes.items()
    }
    choices |= {f"random {i + 1}": at_random(job.costs, spend, job.seed + i) for i in range(n_random)}
    for name, chosen in choices.items():
        units = [job.units[i] for i in chosen]
        n_bytes = sum(unit.bytes for unit in units)
        found.append(bench.outcome(name, [unit.name for unit in units], job.held_matrices(chosen), n_bytes))
    return tuple(found)


def _perplexity(job: Choice, bench: Bench, kept: list[int]) -> float:
    names = [matrix.name for matrix in job.held_matrices(kept)]
    return predicted_perplexity(job.pair, bench.texts_read, names, job.runs, job.gradient)


def _flips(bench: Bench, predicted: Float64[Tensor, "prompt"]) -> Flips | None:
    if not is_margin(bench.held.metric):
        return None
    return Flips.from_margins(bench.goal, predicted, prompts=list(bench.held.rows), seed=bench.seed)


def _modules(by_name: Mapping[str, Matrix], architecture: str) -> list[str]:
    from tracelens.causal.repair.module_names import modules_of

    return list(modules_of(by_name, architecture).values()) if architecture else []


def _label(pair: Any) -> str:
    precision = getattr(pair.quantized, "precision", None)
    return str(precision) if precision is not None else str(pair.quantized.cfg.model_name)
