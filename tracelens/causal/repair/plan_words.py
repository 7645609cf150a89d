"""What a plan comes to, in words."""

from typing import TYPE_CHECKING

from tracelens.loading.description import size
from tracelens.stats import Estimate

if TYPE_CHECKING:
    from tracelens.causal.repair.plan_result import RepairPlan

NOUNS = {"module": "linear layers", "fused": "groups of linear layers", "layer": "blocks"}
SIZES = {"magnitude": "size of the error", "relative magnitude": "relative size of the error"}


def verdict_of(plan: "RepairPlan") -> str:
    """What was kept, what it brought back, whether chance and size of the error do as well, and whether the target holds."""
    if not plan.units:
        return (
            f"Nothing to repair: all weight matrices of {plan.quantized} are those of the reference. What differs, if anything "
            "does, is not weights inside the blocks."
        )
    if plan.recovery.value != plan.recovery.value and plan.outcome("plan") is not None:
        return (
            f"Nothing to repair: {plan.metric} is the same in both models on all {_held(plan)} held-out prompts (0/0)."
        )
    if plan.outcome("plan") is None:
        return f"Nothing is kept: {_why_nothing(plan)}"
    predicted = "" if plan.predicted is None else f" (predicted: {_number(plan.predicted)})"
    sentences = [
        f"Keeping {len(plan.kept)} of {len(plan.units)} {NOUNS[plan.granularity]} in 16 bit ({size(plan.bytes)} more) brings back "
        f"{_number(plan.recovery)} of what quantization moved {plan.metric}, measured on {_held(plan)} held-out prompts{predicted}.",
        *_beside(plan),
    ]
    if plan.target is not None:
        sentences.append(_target(plan))
    return " ".join(sentences)


def _held(plan: "RepairPlan") -> int:
    return len(plan.held_out.tokens)


def _why_nothing(plan: "RepairPlan") -> str:
    if plan.target is not None and plan.target_holds is not None:
        held = "and on" if plan.target_holds else "but does NOT on"
        return (
            f"the quantized model meets the target ({plan.target}) as it is on the {plan.n_choosing} prompts to choose on, {held} "
            f"the {_held(plan)} held-out ones."
        )
    if plan.chosen_measured.value != plan.chosen_measured.value:
        return f"{plan.metric} is the same in both models on all {plan.n_choosing} prompts to choose on (0/0)."
    return f"by {plan.by}, no matrix that fits into {size(plan.budget_bytes or 0)} is predicted to bring anything back."


def _beside(plan: "RepairPlan") -> list[str]:
    if len(plan.kept) == len(plan.units):
        return ["Everything is kept, so there is nothing to compare the choice with."]
    n, kept = len(plan.random), {unit.name for unit in plan.keep}
    sentences = [_versus(plan, "random", f"{n} random choices of the same bytes", plan.random_recovery)]
    for name, what in SIZES.items():
        other = plan.outcome(name)
        assert other is not None
        if set(other.units) == kept:
            sentences.append(f"The choice by {what} is the same one.")
        else:
            sentences.append(_versus(plan, name, f"the choice of the same bytes by {what}", other.recovery))
    return sentences


def _versus(plan: "RepairPlan", name: str, what: str, other: Estimate) -> str:
    gain = plan.advantages[name]
    said = f"{_number(other)}; difference {gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
    if name == "random":
        said += f"; {plan.as_good} of them bring back as much or more"
    if plan.beats[name]:
        return f"It beats {what} ({said})."
    if name == "random" and gain.low > 0:
        why = "that many are as good" if plan.as_good else "one more would be as good too often for so few"
        return (
            f"It beats the mean of {what}, and is NOT told from a lucky one ({said}; {why}: p = {plan.random_p:.2g})."
        )
    if gain.high < 0:
        return f"It is WORSE than {what} ({said})."
    return f"It does NOT beat {what} ({said})."


def _target(plan: "RepairPlan") -> str:
    if not plan.target_met:
        return f"The target, {plan.target}, is not met on the prompts to choose on even with all of them kept."
    held = "and holds" if plan.target_holds else "but does NOT hold"
    return (
        f"The target, {plan.target}, is met on the {plan.n_choosing} prompts to choose on {held} on the held-out ones."
    )


def _number(e: Estimate) -> str:
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"
