"""What a repair curve says, in words."""

from typing import TYPE_CHECKING, Any

from tracelens.causal.repair.areas import CONTROLS, Axis
from tracelens.causal.repair.measures import LEVEL, rank_p

if TYPE_CHECKING:
    from tracelens.causal.repair.curve_result import RepairCurve

REMAINS = 1e-3
"""Share of the squared gap beyond which something is said to remain."""
OVERSHOOT = 1.1
"""Recovery beyond which a line is said to overshoot."""


def verdict_of(curve: "RepairCurve") -> str:
    """What the full restoration brings back, what remains, and which orders, if any, beat random and magnitude."""
    if not curve.n_usable:
        return (
            f"The two models give the same {curve.metric} on all {len(curve.prompts)} prompts (0/0): there is nothing to repair, and "
            "no order can be told from another."
        )
    table: Any = curve.table
    closed = float(table.loc[table["count"] == len(curve.names), "closed"].iloc[0])
    said = [f"Restoring all {len(curve.names)} components brings back {curve.full} of the {curve.metric}."]
    if closed < 1 - REMAINS:
        said.append(f"What remains, {1 - closed:.3f} of the squared gap, is not in these components: {_why(curve)}.")
    said.append(_by(curve, "components"))
    said.append(_by(curve, "bytes") if curve.bytes.sum() > 0 else "Nothing that is restored costs bytes.")
    far = {name: float(table.loc[table["order"] == name, "recovery"].max()) for name in curve.lines}
    if beyond := [f"{name} (up to {value:.2f})" for name, value in far.items() if value > OVERSHOOT]:
        said.append(f"Overshooting the reference on the way: {', '.join(beyond)}; that is recovery, and no repair.")
    said.append(
        f"{len(curve.prompts)} held-out prompts, {curve.n_usable} on which the models differ; orders chosen on {curve.n_chosen_on} "
        "others; p over prompts, adjusted over the orders (Benjamini & Hochberg)."
    )
    return " ".join(said)


def _by(curve: "RepairCurve", axis: Axis) -> str:
    """Orders that win in both measures, or in one; the areas are those of the closed gap."""
    table: Any = curve.areas(axis, "closed")
    recovery: Any = curve.areas(axis, "recovery")
    versus = table["versus"].iloc[0]
    area = float(table.loc[table["order"] == versus, "area"].iloc[0])
    against = f"{versus} ({area:.3f} in area of the closed gap), the better of random and magnitude,"
    won = set(curve.winners(axis))
    if not won:
        n = len([name for name in table["order"] if name not in CONTROLS])
        few = (
            " (so few random orders can tell nothing: give n_random=20)"
            if rank_p(0, len(curve.rows("random"))) > LEVEL
            else ""
        )
        said = f"By {axis}, none of {n} orders beats {against} both in recovery and in the closed gap{few}"
        said = said if n else f"By {axis}, there is no order beside {against.rstrip(',')}"
    else:
        ordered = table[table["order"].isin(list(won))].sort_values("area", ascending=False)
        names = [f"{row['order']} ({row['area']:.3f}, p = {row['p_adjusted']:.2g})" for _, row in ordered.iterrows()]
        said = f"By {axis}, {', '.join(names)} beat{'s' if len(names) == 1 else ''} {against.rstrip(',')}"
    ones = {"the closed gap": table, "recovery, which overshooting adds to": recovery}
    for measure, areas in ones.items():
        if half := sorted(set(areas[areas["wins"]]["order"]) - won):
            said += f"; {', '.join(half)} only in {measure}"
    return f"{said}."


def _why(curve: "RepairCurve") -> str:
    if curve.settings.get("rounds_activations"):
        return "the quantized model rounds its activations, and goes on doing so"
    if curve.restore == "activations":
        return "what reads them, such as W_O behind restored heads, is still quantized"
    return "the models differ in something else too"
