"""`RepairPlan`: which matrices to keep in 16 bit, what that is predicted and measured to bring back, and whether chance does as well."""

import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.behaviour import Flips
from tracelens.causal.effects import effects
from tracelens.causal.repair.exports import export
from tracelens.causal.repair.measures import LEVEL, rank_p
from tracelens.causal.repair.plan_measure import Outcome, advantage, recovery
from tracelens.causal.repair.plan_target import Target
from tracelens.causal.repair.plan_units import Unit
from tracelens.causal.repair.plan_words import verdict_of
from tracelens.errors import PlanError, ResultFileError
from tracelens.output import decode, encode, reading, write_atomically
from tracelens.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.causal.repair.applying import Verification

MAGNITUDES = ("magnitude", "relative magnitude")
KIND, VERSION = "tracelens_repair_plan", 1


@dataclass(frozen=True)
class HeldOut:
    """The prompts that a plan was measured on."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...] = field(repr=False)
    behaviours: tuple[str, ...] = field(repr=False)
    answers: tuple[str, ...] = field(repr=False)
    rows: tuple[int, ...] = field(repr=False)
    """Where they stood among the prompts that were given."""


@dataclass(frozen=True)
class RepairPlan:
    """Which linear layers of a quantized build to keep in 16 bit.

    All that is measured is measured with the reference's weights put into the quantized model (as the reference holds them,
    which may be more than 16 bit); `apply` makes the real build.

    Attributes:
        reference, quantized: the models' names.
        architecture: transformers' name of it; "" if the model does not say.
        metric, unit: what recovery is of.
        by: how units were chosen.
        granularity: what was kept or quantized together.
        units: all that could be kept, in the models' order; those that quantization left alone are not among them.
        kept: which of them are, by index.
        linear_modules: all linear layers inside the blocks, as transformers names them.
        budget_bytes: what the choice could spend; None if a target was given.
        target: what it had to reach; None if a budget was given.
        target_met: whether it does, as measured on the prompts that were chosen on.
        bytes_basis: how bytes are counted.
        outcomes: measured on the held-out prompts: "reference", "quantized", "plan"; and the same bytes spent otherwise:
            "magnitude" (the largest Σ ‖error‖²), "relative magnitude" (the largest Σ ‖error‖²/‖W‖²) and "random 1", … (drawn
            until nothing more fits).
        predicted: recovery that the choice was predicted to bring on the held-out prompts, a sum over its units; None where it was
            not chosen by a prediction.
        predicted_flips: of the margins so predicted, against the reference's.
        predicted_perplexity: by the same gradients, of the texts that perplexity is measured on; None if not chosen by them.
            CPFR has no gradient to foretell it by, and is measured alone.
        chosen_predicted, chosen_measured: recovery on the prompts that were chosen on.
        n_choosing: how many these are.
        held_out: the prompts that were measured on.
        settings: precision, seed, ...
        measuring: the metric as an object; it is not saved.
    """

    reference: str
    quantized: str
    architecture: str
    metric: str
    unit: str
    by: str
    granularity: str
    units: tuple[Unit, ...] = field(repr=False)
    kept: tuple[int, ...]
    linear_modules: tuple[str, ...] = field(repr=False)
    budget_bytes: int | None
    target: Target | None
    target_met: bool | None
    bytes_basis: str
    outcomes: tuple[Outcome, ...] = field(repr=False)
    predicted: Estimate | None
    predicted_flips: Flips | None
    predicted_perplexity: float | None
    chosen_predicted: Estimate | None
    chosen_measured: Estimate
    n_choosing: int
    held_out: HeldOut = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    measuring: Any = field(default=None, repr=False, compare=False)

    @property
    def keep(self) -> tuple[Unit, ...]:
        """The units that are kept."""
        return tuple(self.units[i] for i in self.kept)

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules of transformers to keep in 16 bit; the output layer, which is never quantized, is not among them."""
        return tuple(module for unit in self.keep for module in unit.modules)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Parameters of the loaded model that are kept."""
        return tuple(name for unit in self.keep for name in unit.matrices)

    @property
    def bytes(self) -> int:
        """That the plan adds to the quantized build; see `bytes_basis`."""
        return sum(unit.bytes for unit in self.keep)

    def outcome(self, name: str) -> Outcome | None:
        """By name; None if it was not measured, as where there was nothing to repair."""
        return next((found for found in self.outcomes if found.name == name), None)

    @property
    def random(self) -> tuple[Outcome, ...]:
        """The random choices of the same bytes."""
        return tuple(found for found in self.outcomes if found.name.startswith("random "))

    @property
    def recovery(self) -> Estimate:
        """Measured on the held-out prompts; NaN where nothing was kept, or where the two models agree on all of them."""
        found = self.outcome("plan")
        return Estimate(*[float("nan")] * 3, n=0, method="bootstrap") if found is None else found.recovery

    @cached_property
    def random_recovery(self) -> Estimate:
        """Of the mean over the random choices."""
        return recovery(self._random_values, self._values("quantized"), self._values("reference"))

    @cached_property
    def advantages(self) -> dict[str, Estimate]:
        """Recovery of the plan less that of "random" (their mean), "magnitude" and "relative magnitude", paired over prompts."""
        if self.outcome("plan") is None:
            return {}
        ends = self._values("quantized"), self._values("reference")
        others = {"random": self._random_values} | {name: self._values(name) for name in MAGNITUDES}
        return {name: advantage(self._values("plan"), values, *ends) for name, values in others.items()}

    @property
    def beats(self) -> dict[str, bool]:
        """Whether the 95 % interval of each advantage lies above 0; and over "random", so few single choices being as good that
        `measures.rank_p` ≤ .05: half of all random choices are better than their mean, and with many prompts surely so.
        """
        found = {name: gain.low > 0 for name, gain in self.advantages.items()}
        return found | ({"random": found["random"] and self.random_p <= LEVEL} if found else {})

    @property
    def as_good(self) -> int:
        """How many of the random choices bring back as much as the plan, or more."""
        return sum(found.recovery.value >= self.recovery.value for found in self.random)

    @property
    def random_p(self) -> float:
        """`measures.rank_p` of the plan among the random choices: how likely one more of them would rank as high."""
        return rank_p(self.as_good, len(self.random))

    @property
    def target_holds(self) -> bool | None:
        """Whether the target is met on the held-out prompts too, also where nothing is kept; None without a target, and where a
        recovery is 0/0.
        """
        if self.target is None:
            return None
        model = "quantized" if self.outcome("plan") is None else "plan"
        values, start, goal = map(self._values, (model, "quantized", "reference"))
        if self.target.kind == "recovery" and not recovery(values, start, goal).n:
            return None
        return self.target.met(values, start, goal)

    @property
    def verdict(self) -> str:
        """What the plan is worth, in words: beside chance and beside the size of the error."""
        return verdict_of(self)

    def export(self, library: str, recipe: str | None = None) -> Any:
        """The plan for a quantizer: see `exports.export`. Raises `PlanError` for an architecture whose modules are not known."""
        if not self.architecture:
            raise PlanError(
                f"the model {self.reference!r} does not say what its architecture is called in transformers, so its "
                f"{len(self.matrices)} matrices cannot be named to {library}; load it with tracelens.load"
            )
        return export(self.modules, self.architecture, library, known=self.linear_modules, recipe=recipe)

    def write_export(self, library: str, path: str | PathLike[str], recipe: str | None = None) -> Path:
        """Writes an export: JSON, or YAML where the path ends so; with a recipe, the recipe alone, which llm-compressor reads."""
        made = self.export(library, recipe)
        made = made["recipe"] if isinstance(made, dict) and "recipe" in made else made
        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            import yaml

            return write_atomically(path, yaml.safe_dump(made, sort_keys=False))
        return write_atomically(path, json.dumps(made, indent=2) + "\n")

    def apply(
        self, source: Any, out: str | PathLike[str], recipe: str, calibration: Any = None, **options: Any
    ) -> "Verification":
        """Quantizes the checkpoint `source` with a real library, these modules left in 16 bit, and verifies what it wrote:
        see `applying.apply`.
        """
        from tracelens.causal.repair.applying import apply

        return apply(self, source, out, recipe, calibration, **options)

    def verify(self, build: Any, source: Any, **options: Any) -> "Verification":
        """Whether a build keeps what the plan keeps, and quantizes all else; see `applying.verify`."""
        from tracelens.causal.repair.applying import verify

        return verify(self, build, source, **options)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a unit: name, layer, kind, kept, bytes, n_weights, gain (predicted recovery), error, relative_error."""
        import pandas as pd

        names = ("name", "layer", "kind", "bytes", "n_weights", "gain", "error", "relative_error")
        rows = [
            {name: getattr(unit, name) for name in names} | {"kept": i in self.kept}
            for i, unit in enumerate(self.units)
        ]
        return pd.DataFrame(rows, columns=pd.Index([*names, "kept"]))

    @cached_property
    def comparison(self) -> "pd.DataFrame":
        """One row a measured model: bytes, recovery, metric, flips, perplexity and CPFR, each with its interval; `closed`, the
        share of the squared gap that is gone (1 only where every prompt arrives): a recovery can go too far.
        """
        import pandas as pd

        table = pd.DataFrame([_row(found) for found in self.outcomes])
        ends = {found.name: found.values for found in self.outcomes if found.name in ("reference", "quantized")}
        patched, start, goal = (
            torch.tensor(values, dtype=torch.float64)
            for values in ([found.values for found in self.outcomes], ends["quantized"], ends["reference"])
        )
        closed = effects(patched, start, goal, n_permutations=1).closed
        for place, (name, values) in enumerate(
            (
                ("closed", [e.value for e in closed]),
                ("closed_low", [e.low for e in closed]),
                ("closed_high", [e.high for e in closed]),
            )
        ):
            table.insert(6 + place, name, values)
        return table

    def to_dataframe(self) -> "pd.DataFrame":
        """`table`."""
        return self.table

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return encode({f.name: getattr(self, f.name) for f in fields(self) if f.name != "measuring"})

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes one JSON file, which `load` reads back."""
        text = json.dumps({KIND: VERSION} | self.to_dict(), indent=1, allow_nan=False)
        return write_atomically(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "RepairPlan":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        with reading(str(path), "a repair plan that Tracelens wrote"):
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop(KIND) != VERSION:
                raise ResultFileError(
                    f"{path} was written by another version of Tracelens; this one reads version {VERSION}"
                )
            hints = get_type_hints(cls)
            return cls(**{name: decode(hints[name], value) for name, value in data.items()})

    def plot(self) -> "go.Figure":
        """What is kept, by layer and kind, and what was measured, beside random and magnitude."""
        from tracelens.views.plan_figures import plan_figure

        return plan_figure(self)

    def _values(self, name: str) -> Float64[Tensor, "prompt"]:
        found = self.outcome(name)
        assert found is not None, name
        return torch.tensor(found.values, dtype=torch.float64)

    @property
    def _random_values(self) -> Float64[Tensor, "prompt"]:
        return torch.tensor([found.values for found in self.random], dtype=torch.float64).mean(0)


def _row(found: Outcome) -> dict[str, Any]:
    estimates = {"recovery": found.recovery, "metric": found.metric, "perplexity": found.perplexity}
    if found.flips is not None:
        estimates["flips"] = found.flips.rate
    estimates |= {f"cpfr_{kind}": value for kind, value in found.cpfr.items()}
    row: dict[str, Any] = {"name": found.name, "kept": len(found.units), "bytes": found.bytes}
    for name, e in estimates.items():
        row |= {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
    return row
