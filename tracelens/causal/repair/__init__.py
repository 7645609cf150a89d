"""What brings a behaviour back: reference activations or weights inside the quantized model, chosen and counted in bytes."""

from tracelens.causal.repair.curve_result import RepairCurve
from tracelens.causal.repair.curves import curve
from tracelens.causal.repair.direction_repair import direction
from tracelens.causal.repair.direction_result import DirectionRepair
from tracelens.causal.repair.plan_result import RepairPlan
from tracelens.causal.repair.plans import plan

__all__ = ["DirectionRepair", "RepairCurve", "RepairPlan", "curve", "direction", "plan"]
