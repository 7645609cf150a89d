"""Which of several things to take: the most gain that a number of bytes buys, or the fewest bytes that bring a gain."""

from collections.abc import Sequence

import numpy as np

EXACT = 2000
"""Things up to which the choice is exact (an integer programme); more are taken greedily, by gain per byte."""
_NODES = 20_000
"""Of the search tree: a bound that, unlike seconds, gives the same answer on every machine."""


def most_gain(gains: Sequence[float], costs: Sequence[int], budget: int) -> list[int]:
    """Indices, ascending, of the set with the largest sum of gains whose costs are at most `budget` (the 0/1 knapsack).

    What gains nothing or does harm is not taken. Ties go to what the solver finds, which is the same each time.
    """
    useful = [i for i, (gain, cost) in enumerate(zip(gains, costs, strict=True)) if gain > 0 and cost <= budget]
    greedy = _fill(sorted(useful, key=lambda i: (-_rate(gains[i], costs[i]), i)), costs, budget)
    if not useful or len(useful) > EXACT or sum(costs[i] for i in useful) <= budget:
        return sorted(greedy)
    chosen = _programme(useful, gains, costs, most=budget)
    if chosen is None or sum(gains[i] for i in chosen) < sum(gains[i] for i in greedy):
        chosen = greedy
    return sorted(chosen)


def fewest_bytes(gains: Sequence[float], costs: Sequence[int], target: float) -> list[int]:
    """Indices, ascending, of the cheapest set whose gains add up to `target` at least.

    Where none does, all that gain anything.
    """
    useful = [i for i, gain in enumerate(gains) if gain > 0]
    if target <= 0:
        return []
    if sum(gains[i] for i in useful) <= target:
        return useful
    chosen = _programme(useful, gains, costs, least=target) if len(useful) <= EXACT else None
    if chosen is None:
        chosen, found = [], 0.0
        for i in by_rate(useful, gains, costs):
            if found >= target:
                break
            chosen.append(i)
            found += gains[i]
    return sorted(chosen)


def at_random(costs: Sequence[int], budget: int, seed: int) -> list[int]:
    """Indices, ascending, of things in a random order, each taken if it still fits."""
    order = np.random.default_rng(seed).permutation(len(costs)).tolist()
    return sorted(_fill(order, costs, budget))


def by_rate(which: Sequence[int], gains: Sequence[float], costs: Sequence[int]) -> list[int]:
    """Indices in the order of gain per byte, the largest first."""
    return sorted(which, key=lambda i: (-_rate(gains[i], costs[i]), i))


def _rate(gain: float, cost: int) -> float:
    return gain / max(cost, 1)


def _fill(order: Sequence[int], costs: Sequence[int], budget: int) -> list[int]:
    chosen, left = [], budget
    for i in order:
        if costs[i] <= left:
            chosen.append(i)
            left -= costs[i]
    return chosen


def _programme(
    which: Sequence[int],
    gains: Sequence[float],
    costs: Sequence[int],
    *,
    most: int | None = None,
    least: float | None = None,
) -> list[int] | None:
    """The 0/1 programme: the largest gain that costs at most `most`, or the smallest cost that gains at least `least`.

    None if the solver gave up, or gave something that does not keep to the bound after rounding.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    gain, cost = (np.array([values[i] for i in which], dtype=float) for values in (gains, costs))
    # Sizes near 1, since the solver's tolerances are absolute.
    gain_unit, cost_unit = float(np.abs(gain).max()), float(cost.max() or 1.0)
    if most is not None:
        objective, bound = -gain / gain_unit, LinearConstraint(cost[None] / cost_unit, ub=most / cost_unit)
    else:
        assert least is not None
        objective, bound = cost / cost_unit, LinearConstraint(gain[None] / gain_unit, lb=least / gain_unit)
    found = milp(
        objective,
        constraints=bound,
        integrality=np.ones(len(gain)),
        bounds=Bounds(0, 1),
        options={"node_limit": _NODES},
    )
    if found.x is None:
        return None
    chosen = [i for i, taken in zip(which, found.x, strict=True) if taken > 0.5]
    if most is not None and sum(costs[i] for i in chosen) > most:
        return None
    if least is not None and sum(gains[i] for i in chosen) < least * (1 - 1e-6):
        return None
    return chosen
