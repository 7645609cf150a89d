"""`ContrastCheck`: does a model tell the clean runs from the corrupted ones?"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.effects import MIN_DIFFERENCE
from tracelens.stats import Estimate, wilson

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class ContrastCheck:
    """Whether a model tells the two runs of each pair apart.

    Attributes:
        clean, corrupted: the metric of each run.
        metric: its name.
        unit: its unit.
        min_difference: pairs whose metrics differ by less are called alike.
    """

    clean: Float64[Tensor, "prompt"] = field(repr=False)
    corrupted: Float64[Tensor, "prompt"] = field(repr=False)
    metric: str
    unit: str
    min_difference: float = MIN_DIFFERENCE

    def __repr__(self) -> str:
        n, told = len(self.clean), len(self.distinguished)
        gap = (self.clean - self.corrupted).abs().mean().item() if n else float("nan")
        return (
            f"ContrastCheck({told} of {n} pairs told apart, mean |difference| {gap:.2f} {self.unit}, "
            f"{round(self.share_crossing.value * n) if n else 0} cross 0; {self.metric})"
        )

    @property
    def alike(self) -> list[int]:
        """Pairs that the model does not tell apart: no effect can be normalised by them."""
        return ((self.clean - self.corrupted).abs() < self.min_difference).nonzero().flatten().tolist()

    @property
    def share_alike(self) -> Estimate:
        """Of all pairs, with its Wilson interval."""
        return wilson(len(self.alike), len(self.clean))

    @property
    def share_crossing(self) -> Estimate:
        """Pairs whose metric is above 0 in the clean run and at most 0 in the corrupted one, or the other way round.

        Of a margin or a logit difference: those whose answer the change turns over.
        """
        return wilson(int(((self.clean > 0) != (self.corrupted > 0)).sum()), len(self.clean))

    @property
    def distinguished(self) -> list[int]:
        """The other pairs, for `Contrasts.select`."""
        return [i for i in range(len(self.clean)) if i not in set(self.alike)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "unit": self.unit,
            "min_difference": self.min_difference,
            "clean": self.clean.tolist(),
            "corrupted": self.corrupted.tolist(),
            "share_alike": self.share_alike.to_dict(),
            "share_crossing": self.share_crossing.to_dict(),
        }

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a pair: clean, corrupted, difference (in the metric's unit), alike."""
        import pandas as pd

        difference = self.clean - self.corrupted
        table = {"clean": self.clean.numpy(), "corrupted": self.corrupted.numpy(), "difference": difference.numpy()}
        return pd.DataFrame(table | {"alike": (difference.abs() < self.min_difference).numpy()})
