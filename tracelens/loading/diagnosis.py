"""`Diagnosis`: what the doctor found, with the evidence for it."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from tracelens.loading.faults import Severity

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["verified", "degraded", "wrong", "no reference"]
Outcome = Literal["passed", "failed", "skipped"]

WHAT_TO_DO: dict[Verdict, str] = {
    "verified": "The loaded model is the model on disk, and the model on disk is its reference in that format.",
    "degraded": "It loads as it lies on disk, but quantization took more from it than rounding has to: quantize it "
    "again (more bits, smaller groups, other calibration data), or keep the weights named above in 16 bit.",
    "wrong": "Do not use it: get the checkpoint again, or quantize it again with a current version of the library that "
    "wrote it. If that changes nothing, its layout is read wrongly here: please report it.",
    "no reference": "The loaded model is the model on disk. Whether that is what was quantized needs the "
    "full-precision original: give it as reference.",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    outcome: Outcome
    evidence: str
    """A sentence: what was seen, or why it was not looked at."""


@dataclass(frozen=True)
class TensorRow:
    """A weight beside its reference."""

    name: str
    scheme: str
    """How it is quantized in words; `plain` if it is not."""
    relative_error: float
    """‖Q − W‖ / ‖W‖, Frobenius norms, W already in the basis and with the factors of the quantized checkpoint."""
    yardstick: float
    """The same for W rounded to nearest in the scheme; to bfloat16 if it is plain."""
    ratio: float
    """The first over the second: about 1 for rounding to nearest."""
    worst_block: float
    """The largest such ratio among the blocks that have a scale of their own, or their rows."""
    fault: str
    """What is wrong with it in words; empty if nothing is."""
    severity: Severity
    """`wrong`, `poor` (it is the weight, with more error than rounding makes) or empty."""


@dataclass(frozen=True)
class Function:
    """What the quantized model computes beside the reference, on random tokens, logits centred over the vocabulary."""

    kl: float
    """KL(reference‖quantized) in nats, summed over the vocabulary, mean over tokens."""
    kl_rounding: float
    """The same for the reference with its weights rounded to nearest in the schemes of the quantized one."""
    error: float
    """‖logits − reference logits‖ / ‖reference logits‖."""
    error_rounding: float
    """The same for the reference rounded to nearest."""
    kl_uniform: float
    """KL(reference‖uniform) in nats: what guessing costs. From here on nothing of the function is left."""
    agreement: float
    """Share of tokens after which both have the same most likely token."""

    @property
    def ratio(self) -> float:
        """Error over that of rounding to nearest; below 1 if calibration helped."""
        # Rounding that changes nothing still leaves float32 arithmetic in another order.
        return self.error / max(self.error_rounding, 1e-5)

    @property
    def gone(self) -> bool:
        """Whether the quantized model predicts the reference no better than a guess."""
        return self.kl >= self.kl_uniform


@dataclass(frozen=True)
class Diagnosis:
    """Whether a loaded model is the model on disk, and that one its reference."""

    source: str
    format: str
    verdict: Verdict
    """`verified`: everything agrees, and errors are those of the format. `degraded`: it agrees, with clearly larger
    errors than rounding makes, or with nothing left of the reference's function (KL as large as that of guessing).
    `wrong`: a check failed, or a weight is not the reference's. `no reference`: all checks that need none passed."""
    checks: tuple[Check, ...]
    tensors: tuple[TensorRow, ...] = ()
    """One row for each tensor that was compared, in the order of the files; empty without a reference."""
    function: Function | None = None
    """None without a reference, or if either model does not run."""
    notes: tuple[str, ...] = ()
    """What should be known when reading the numbers: rescaled norms, a rotated basis, activations that the runtime
    quantizes."""

    def worst(self, count: int = 5) -> tuple[TensorRow, ...]:
        """Tensors with the gravest faults first, then by their ratio."""
        order = {"wrong": 0, "poor": 1, "": 2}
        return tuple(sorted(self.tensors, key=lambda row: (order[row.severity], -row.ratio))[:count])

    def summary(self) -> str:
        """The verdict, the evidence, the worst tensors and what to do, as text."""
        lines = [f"{self.verdict.upper()}: {self.source} ({self.format})", ""]
        lines += [f"{check.outcome:>7}  {check.name}: {check.evidence}" for check in self.checks]
        if bad := [row for row in self.tensors if row.severity]:
            lines += ["", f"{len(bad)} of {len(self.tensors)} tensors with faults:"]
            lines += [f"    {row.name} ({row.scheme}): {row.fault}" for row in self.worst(min(len(bad), 12))]
            lines += [f"    … and {len(bad) - 12} more"] if len(bad) > 12 else []
        elif self.tensors:
            lines += ["", "largest errors, as multiples of rounding to nearest:"]
            lines += [f"    {row.ratio:5.2f}  {row.name} ({row.scheme})" for row in self.worst(3)]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "", WHAT_TO_DO[self.verdict]])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        function = None if self.function is None else {**asdict(self.function), "ratio": self.function.ratio}
        return {
            **{"source": self.source, "format": self.format, "verdict": self.verdict},
            "checks": [asdict(check) for check in self.checks],
            "tensors": [asdict(row) for row in self.tensors],
            **{"function": function, "notes": list(self.notes)},
        }

    def to_frame(self) -> "pd.DataFrame":
        """The tensors as a table, one row each."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.tensors], columns=list(TensorRow.__dataclass_fields__))

    def __str__(self) -> str:
        return self.summary()
