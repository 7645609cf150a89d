"""A repair plan made by hand: three layers, one kept, measured on four prompts."""

from tracelens.behaviour import Flips
from tracelens.causal.repair.plan_measure import Outcome
from tracelens.causal.repair.plan_result import HeldOut, RepairPlan
from tracelens.causal.repair.plan_units import Unit
from tracelens.stats import Estimate

EVIL = "<script>window.hacked=1</script>"


def made_up_plan() -> RepairPlan:
    units = tuple(
        Unit(
            f"model.layers.{layer}.self_attn.o_proj",
            (f"model.layers.{layer}.self_attn.o_proj",),
            (f"blocks.{layer}.attn.W_O",),
            layer,
            "self_attn.o_proj",
            1000,
            1625 + layer,
            0.5,
            0.125,
            gain,
        )
        for layer, gain in enumerate((0.6125, 0.0375, -0.0125))
    )
    values = {
        "reference": (1.0, 2.0, -1.0, 3.0),
        "quantized": (0.0, 1.5, 0.25, 2.0),
        "plan": (0.75, 1.9, -0.6, 2.8),
        "magnitude": (0.1, 1.6, 0.1, 2.1),
        "relative magnitude": (0.2, 1.55, 0.2, 2.05),
        "random 1": (0.05, 1.5, 0.2, 2.1),
        "random 2": (0.1, 1.6, 0.25, 2.0),
    }
    outcomes = tuple(_outcome(name, found) for name, found in values.items())
    held = HeldOut((EVIL, "b", "c", "d"), ((1,), (2,), (3,), (4,)), ("refusal",) * 4, ("",) * 4, (0, 1, 2, 3))
    return RepairPlan(
        reference="made-up",
        quantized="int4",
        architecture="LlamaForCausalLM",
        metric="margin",
        unit="nats",
        by="attribution",
        granularity="module",
        units=units,
        kept=(0,),
        linear_modules=tuple(unit.name for unit in units),
        budget_bytes=2000,
        target=None,
        target_met=None,
        bytes_basis="16 − 3 bits for each weight",
        outcomes=outcomes,
        predicted=Estimate(0.7, 0.6, 0.8, 4, "bootstrap"),
        predicted_flips=None,
        predicted_perplexity=None,
        chosen_predicted=None,
        chosen_measured=Estimate(0.72, 0.6, 0.8, 4, "bootstrap"),
        n_choosing=4,
        held_out=held,
    )


def _outcome(name: str, values: tuple[float, ...]) -> Outcome:
    import torch

    reference = torch.tensor([1.0, 2.0, -1.0, 3.0])
    flips = Flips.from_margins(reference, torch.tensor(values), n_resamples=50, n_permutations=50)
    recovery = {"reference": 1.0, "quantized": 0.0, "plan": 0.774}.get(name, 0.0625)
    kept = () if name in ("reference", "quantized") else ("model.layers.0.self_attn.o_proj",)
    return Outcome(
        name,
        kept,
        1625 * len(kept),
        values,
        Estimate(recovery, recovery - 0.05, recovery + 0.05, 4, "bootstrap"),
        Estimate(sum(values) / 4, -0.5, 2.75, 4, "bootstrap"),
        flips,
        Estimate(4.125, 4.0, 4.25, 4, "bootstrap"),
        {},
    )
