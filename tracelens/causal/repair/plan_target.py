"""What a plan is to reach: `Target`, and the search for the cheapest set that reaches it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float64
from torch import Tensor

from tracelens.behaviour.refusal import decisions
from tracelens.causal.repair.choosing import by_rate, fewest_bytes
from tracelens.causal.repair.plan_measure import recovery
from tracelens.errors import PlanError

KINDS = ("recovery", "flips")
Reading = Callable[[Sequence[int]], Float64[Tensor, "prompt"]]
"""Which units are restored → the metric of each prompt."""


@dataclass(frozen=True)
class Target:
    """What must hold: a recovery (Σ n d / Σ d²) of at least `value`, or a share of flipped prompts of at most `value`."""

    kind: str
    value: float

    @classmethod
    def parse(cls, target: Any) -> "Target":
        """A number is a recovery; {"flips": .02} and {"recovery": .9} say which. Raises `PlanError` for anything else."""
        if isinstance(target, Target):
            return target
        given = target if isinstance(target, Mapping) else {"recovery": target}
        if len(given) == 1:
            kind, value = next(iter(given.items()))
            if kind in KINDS and isinstance(value, int | float) and not isinstance(value, bool):
                positive = value > 0 if kind == "recovery" else value >= 0
                if positive and value <= 1:
                    return cls(kind, float(value))
        raise PlanError(
            f"target is {target!r}; give a recovery above 0 and at most 1 (target=0.9), or the largest share of prompts that "
            "may be decided otherwise (target={'flips': 0.02})"
        )

    def met(
        self,
        values: Float64[Tensor, "prompt"],
        start: Float64[Tensor, "prompt"],
        goal: Float64[Tensor, "prompt"],
    ) -> bool:
        """Whether these values of the metric reach it; the value counts, not the end of an interval."""
        if self.kind == "flips":
            return float((decisions(values) != decisions(goal)).double().mean()) <= self.value
        return recovery(values, start, goal).value >= self.value

    def __str__(self) -> str:
        return (
            f"recovery of at least {self.value:g}" if self.kind == "recovery" else f"flips of at most {self.value:.1%}"
        )


def cheapest(
    target: Target,
    scores: Sequence[float],
    costs: Sequence[int],
    measure: Reading,
    start: Float64[Tensor, "prompt"],
    goal: Float64[Tensor, "prompt"],
    predicted: Reading | None,
) -> list[int]:
    """Units, ascending, that reach the target as it is measured on the prompts that are chosen on.

    It begins with the cheapest set that is predicted to reach it (none where nothing is predicted), adds by score per byte
    until the measured target is met, and then leaves out again, the lowest score per byte first, what is not needed. Where
    no set on the way meets it, all units are returned.
    """
    chosen = _predicted(target, scores, costs, start, goal, predicted)
    rest = by_rate([i for i in range(len(scores)) if i not in chosen], scores, costs)
    while not target.met(measure(chosen), start, goal):
        if not rest:
            return sorted(chosen)
        chosen.append(rest.pop(0))
    for unit in reversed(by_rate(chosen, scores, costs)):
        without = [i for i in chosen if i != unit]
        if target.met(measure(without), start, goal):
            chosen = without
    return sorted(chosen)


def _predicted(
    target: Target,
    scores: Sequence[float],
    costs: Sequence[int],
    start: Float64[Tensor, "prompt"],
    goal: Float64[Tensor, "prompt"],
    predicted: Reading | None,
) -> list[int]:
    if predicted is None:
        return []
    if target.kind == "recovery":
        return fewest_bytes(scores, costs, target.value)
    chosen: list[int] = []
    for unit in by_rate([i for i, score in enumerate(scores) if score > 0], scores, costs):
        if target.met(predicted(chosen), start, goal):
            break
        chosen.append(unit)
    return chosen
