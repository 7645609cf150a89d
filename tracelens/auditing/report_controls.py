"""The controls of a report: what each of its numbers is where nothing safety-specific happened."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float64, Int
from torch import Tensor

from tracelens.audit_report import Control
from tracelens.auditing.measured import Measured
from tracelens.auditing.preservation import SHARES, Shares
from tracelens.auditing.random_sets import mean_of_members
from tracelens.auditing.replicates import Replicated
from tracelens.stats import Estimate, percentile_interval, wilson

NOISE = "Gaussian noise of the Frobenius norm of each tensor's error"
PERMUTED = "the true error, shuffled within the rows of each tensor"


@dataclass(frozen=True)
class RandomErrors:
    """The draws of the two random errors, and what one more of each would give; None where there is no draw."""

    noise_draws: list[Measured]
    permuted_draws: list[Measured]
    noise: Measured | None
    permuted: Measured | None

    @classmethod
    def of(cls, noise: list[Measured], permuted: list[Measured], seed: int) -> "RandomErrors":
        """Draws of either kind tell how much a random error of this size varies; each kind keeps its own mean."""
        return cls(
            noise,
            permuted,
            Measured.further(noise, seed) if noise else None,
            Measured.further(permuted, seed, alike=noise) if permuted else None,
        )


def shares_of(shares: dict[str, Replicated]) -> Shares:
    return Shares(**{name: shares[name].estimate for name in SHARES})


def random_error(what: str, n: int, further: Measured, smeared: int | None) -> Control:
    """The control of a random error of which `n` draws were made."""
    flips = {name: run.estimate for name, run in further.flips.items()}
    drawn = "1 draw" if n == 1 else f"{n} draws"
    return Control(
        f"{what}; typical of {drawn}, and where one more would be (smeared pairs: of the first)",
        {name: run.estimate for name, run in further.cpfr.items()},
        flips.pop("flips", None),
        **flips,
        shares={name: shares_of(shares) for name, shares in further.shares.items()},
        **{name: run.estimate for name, run in further.divergence.items()},
        smeared=smeared,
    )


def floor_control(measured: Measured, smeared: int | None) -> Control:
    """The control of the reference in bf16, which is one model like the quantized one."""
    flips = {name: _wilson(run) for name, run in measured.flips.items()}
    return Control(
        "the reference computed in bf16",
        {name: run.estimate for name, run in measured.cpfr.items()},
        flips.pop("flips", None),
        **flips,
        shares={name: shares_of(shares) for name, shares in measured.shares.items()},
        **{name: run.estimate for name, run in measured.divergence.items()},
        smeared=smeared,
    )


def set_control(
    what: str,
    phi: Float64[Tensor, "feature"],
    classes: Float64[Tensor, "share feature"],
    sets: Int[Tensor, "member set"] | Sequence[Int[Tensor, "_"]],
) -> Control:
    """The control of random sets of features in the quantized model: mean and 95 % range over the sets."""

    def over_sets(values: Float64[Tensor, "feature"]) -> Estimate:
        means = mean_of_members(values, sets)
        return percentile_interval(means.nanmean().item(), means)

    shares = Shares(**{name: over_sets(values) for name, values in zip(SHARES, classes, strict=True)})
    return Control(what, {"safety": over_sets(phi)}, None, shares={"safety": shares})


def _wilson(run: Replicated) -> Estimate:
    n = run.n_prompts
    return wilson(round(run.value * n) if n else 0, n)
