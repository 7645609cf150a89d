"""A plan made real: quantized by a library that leaves the plan's modules alone, read back, and checked tensor by tensor.

That a library was told to leave a layer alone does not mean that it did: some writers pack ignored layers all the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tracelens.causal.arms import ArmRunner
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import Metric, default_metric
from tracelens.causal.repair.plan_measure import Outcome, is_margin, summarised, token_losses
from tracelens.errors import PlanError, QuantizeError, UnknownNameError
from tracelens.loading import Checkpoint, load, open_checkpoint
from tracelens.output import encode, replaced
from tracelens.stats import Estimate

if TYPE_CHECKING:
    from tracelens.causal.repair.plan_result import RepairPlan

BITSANDBYTES = ("bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8")
RECORD = "tracelens_plan.json"
"""In a folder that bitsandbytes wrote for a plan: the plan."""
_KEPT = ("exact", "rounded")


@dataclass(frozen=True)
class Verification:
    """What a build holds, against the checkpoint that it was made from.

    Attributes:
        build: the folder. format: how its weights are stored.
        kept: module of the plan → "exact" (the source's numbers, bit for bit), "rounded" (the source's numbers rounded to the
            16-bit dtype that the build is stored in), "changed" (stored in full precision, with other numbers), or
            "quantized".
        not_quantized: linear modules that the plan does not keep and that the build does not quantize, or whose numbers are
            those of the source all the same.
        n_quantized: those that it does.
        rescales: whether the recipe moves factors from one layer to the next (AWQ, SmoothQuant), so that kept layers may rightly
            hold other numbers.
        outcome: measured of the build, reloaded, on the plan's held-out prompts; None if there was no metric.
        simulated: the plan's own recovery on them.
    """

    build: str
    format: str
    kept: dict[str, str]
    not_quantized: tuple[str, ...]
    n_quantized: int
    rescales: bool
    outcome: Outcome | None = field(repr=False)
    simulated: Estimate

    @property
    def wrong(self) -> dict[str, str]:
        """Modules of the plan that are not as they should be → what they are."""
        allowed = (*_KEPT, "changed") if self.rescales else _KEPT
        return {module: status for module, status in self.kept.items() if status not in allowed}

    @property
    def ok(self) -> bool:
        """Whether all of the plan is kept and all else is quantized."""
        return not self.wrong and not self.not_quantized

    def check(self) -> "Verification":
        """Raises `QuantizeError` that names the modules, unless the build is what the plan says."""
        if self.wrong:
            packed = ", ".join(f"{module} ({status})" for module, status in self.wrong.items())
            raise QuantizeError(
                f"{self.build} does not keep {len(self.wrong)} of the {len(self.kept)} modules of the plan in 16 bit: {packed}; the "
                "quantizer did not leave them alone, so do not ship this build as the plan"
            )
        if self.not_quantized:
            raise QuantizeError(
                f"{self.build} leaves {len(self.not_quantized)} modules in full precision that the plan quantizes: "
                f"{', '.join(self.not_quantized[:8])}; it takes more bytes than planned"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return encode({name: getattr(self, name) for name in self.__dataclass_fields__})

    def __str__(self) -> str:
        counts = {status: list(self.kept.values()).count(status) for status in dict.fromkeys(self.kept.values())}
        kept = ", ".join(f"{n} {status}" for status, n in counts.items())
        lines = [
            f"{self.build} ({self.format}): {'as planned' if self.ok else 'NOT as planned'}; kept: {kept or 'none'}; "
            f"quantized: {self.n_quantized}" + (f"; neither: {len(self.not_quantized)}" if self.not_quantized else "")
        ]
        if self.outcome is not None:
            lines.append(f"recovery of the build: {self.outcome.recovery}; of the simulated plan: {self.simulated}")
        return "\n".join(lines)


def apply(
    plan: "RepairPlan",
    source: Any,
    out: str | PathLike[str],
    recipe: str,
    calibration: Any = None,
    *,
    metric: Any = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Verification:
    """Quantizes a full-precision checkpoint with the plan's modules left in 16 bit, reloads it and verifies it.

    Args:
        source: the checkpoint that the plan's reference was loaded from.
        out: folder for the build.
        recipe: of llm-compressor, as `tracelens.quantize` takes it ("gptq-int4-g128"), with `calibration`; or of bitsandbytes,
            "bnb-nf4", "bnb-nf4-dq", "bnb-fp4" or "bnb-int8", which rounds without prompts.
        metric: as for `verify`.
        options: further arguments of `tracelens.quantize`.

    What else a recipe does (errors that GPTQ passes on from layer to layer, factors that AWQ moves) is part of the build and
    not of the simulated plan; the recovery of both is in the result.

    Raises `QuantizeError` if the build is not what the plan says (it is left where it is, to be looked at), and as `quantize`.
    """
    if recipe in BITSANDBYTES:
        if options:
            raise PlanError(f"{recipe} takes no {', '.join(options)}: bitsandbytes rounds without prompts")
        _quantize_bitsandbytes(plan, open_checkpoint(source), Path(out), recipe)
    elif recipe.startswith("bnb"):
        raise UnknownNameError.of("recipe of bitsandbytes", recipe, BITSANDBYTES)
    else:
        from tracelens.precision.calibrated import quantize

        plan.export("llm-compressor")  # refuses what has no name of its own
        quantize(source, recipe, calibration, out, ignore=[*plan.modules, "lm_head"], device=device, **options)
    rescales = "awq" in recipe or "smoothquant" in recipe
    return verify(plan, out, source, metric=metric, device=device, rescales=rescales).check()


def verify(
    plan: "RepairPlan",
    build: Any,
    source: Any,
    *,
    metric: Any = None,
    device: str | torch.device | None = None,
    rescales: bool = False,
    measure: bool = True,
) -> Verification:
    """Compares a build with the checkpoint that it was made from, one linear layer at a time, and measures it.

    Args:
        build: a folder. source: what it was made from.
        metric: to measure the build with; by default the plan's own, which a plan that was read from a file has only if
            it was the default for its prompts.
        rescales: whether layers in full precision may hold other numbers than the source's.
        measure: whether to load the build and measure it.
    """
    quantized, original = open_checkpoint(build), open_checkpoint(source)
    status = {module: _status(module, quantized, original) for module in plan.linear_modules}
    kept = {module: status[module] for module in plan.modules}
    others = {module: found for module, found in status.items() if module not in kept}
    return Verification(
        build=str(build),
        format=quantized.format,
        kept=kept,
        not_quantized=tuple(module for module, found in others.items() if found != "quantized"),
        n_quantized=sum(found == "quantized" for found in others.values()),
        rescales=rescales,
        outcome=_measured(plan, quantized, metric, device) if measure else None,
        simulated=plan.recovery,
    )


def _status(module: str, build: Checkpoint, source: Checkpoint) -> str:
    name = f"{module}.weight" if f"{module}.weight" in source else module
    theirs, ours = build.tensor(name), source.tensor(name)
    if build.quantized(name) is not None:
        return "exact" if torch.equal(theirs, ours) else "quantized"
    if torch.equal(theirs, ours):
        return "exact"
    stored = build.stored.dtype(build.parts(name)[0])
    return "rounded" if torch.equal(theirs, ours.to(stored).to(ours.dtype)) else "changed"


def _measured(plan: "RepairPlan", build: Checkpoint, metric: Any, device: Any) -> Outcome | None:
    """What the build does on the held-out prompts; None for a plan that was read from a file and whose metric is not known."""
    held = plan.held_out
    prompts = PromptSet(held.texts, held.tokens, {}, held.behaviours, held.answers)
    if plan.outcome("quantized") is None or (metric is None and plan.measuring is None and plan.metric != "margin"):
        return None
    model = load(build, device=device)
    read = metric or plan.measuring or default_metric(prompts, model.tokenizer)
    if not isinstance(read, Metric) or read.baselines:
        return None
    values = ArmRunner(model, prompts, read).unpatched()
    ends = (plan._values("quantized"), plan._values("reference"))
    losses = token_losses(model, [list(ids) for ids in held.tokens], model.tokenizer, 32)
    rows = held.rows if is_margin(read) else None
    return summarised("build", [unit.name for unit in plan.keep], plan.bytes, values, ends, losses, rows=rows)


def _quantize_bitsandbytes(plan: "RepairPlan", source: Checkpoint, out: Path, recipe: str) -> None:
    """Writes a build of bitsandbytes, through transformers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    skip = plan.export("bitsandbytes")
    if recipe == "bnb-int8":
        options: Mapping[str, Any] = {"load_in_8bit": True}
    else:
        dtype = {torch.float16: torch.float16, torch.bfloat16: torch.bfloat16}.get(_dtype(source), torch.float32)
        options = {
            **{"load_in_4bit": True, "bnb_4bit_quant_type": recipe.split("-")[1], "bnb_4bit_compute_dtype": dtype},
            "bnb_4bit_use_double_quant": recipe.endswith("-dq"),
        }
    with replaced(out, RECORD) as folder:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.path,
                quantization_config=BitsAndBytesConfig(**options, llm_int8_skip_modules=skip),
                dtype="auto",
                device_map="cpu" if not torch.cuda.is_available() else "cuda",
                local_files_only=True,
                trust_remote_code=False,
            )
            model.save_pretrained(folder)
        except Exception as error:
            raise QuantizeError(f"bitsandbytes could not make {recipe!r} of {source.name}: {error}") from error
        from tracelens.precision.calibrated import copy_beside

        copy_beside(source.path, folder, None)
        plan.save(folder / RECORD)


def _dtype(source: Checkpoint) -> torch.dtype:
    name = next(name for name in source.names() if name.endswith(".weight"))
    return source.stored.dtype(source.parts(name)[0])
