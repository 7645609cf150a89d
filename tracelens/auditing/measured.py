"""Every number that a report shows of one model beside the reference, with replicates over the same resamples of prompts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracelens.auditing.preservation import Thresholds, bootstrap_cpfr, bootstrap_shares
from tracelens.auditing.replicates import Replicated, Scale, further_draw
from tracelens.metrics.divergence import Divergence
from tracelens.metrics.moments import FeatureMoments

SCALES: dict[str, Scale] = {"kl": "positive", "top1": "fidelity", "perplexity": "positive"}
FLIPS = ("flips", "refuse_to_comply", "comply_to_refuse")


@dataclass(frozen=True)
class Measured:
    cpfr: dict[str, Replicated]
    """By set of features."""
    shares: dict[str, dict[str, Replicated]]
    """By set of features and name of the share."""
    flips: dict[str, Replicated]
    """`FLIPS` → share of the prompts that could flip so; empty if no decision can be read."""
    divergence: dict[str, Replicated]
    """Keys as in `SCALES`."""

    @classmethod
    def of(
        cls,
        moments: FeatureMoments,
        divergence: Divergence,
        margins: tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt"]],
        *,
        sets: Mapping[str, Bool[Tensor, "feature"]],
        at: Thresholds,
        blocks: Int[Tensor, "prompt"],
        weights: Float[Tensor, "resample block"],
    ) -> "Measured":
        """
        Args:
            margins: of reference and model; NaN where a decision cannot be read.
            blocks: block of each prompt.
        """
        n = len(blocks)
        return cls(
            cpfr=bootstrap_cpfr(moments, sets, weights, n),
            shares=bootstrap_shares(moments, sets, weights, n, at),
            flips=_flips(*margins, blocks, weights),
            divergence=_divergence(divergence, weights, n),
        )

    @classmethod
    def further(cls, draws: "list[Measured]", seed: int, *, alike: "list[Measured] | None" = None) -> "Measured":
        """What one more draw of a random error would give; see `further_draw`."""
        others = alike or []
        return cls(
            cpfr={
                name: further_draw([d.cpfr[name] for d in draws], seed, alike=[d.cpfr[name] for d in others])
                for name in draws[0].cpfr
            },
            shares={
                name: {
                    share: further_draw(
                        [d.shares[name][share] for d in draws],
                        seed,
                        scale="share",
                        alike=[d.shares[name][share] for d in others],
                    )
                    for share in shares
                }
                for name, shares in draws[0].shares.items()
            },
            flips={
                name: further_draw(
                    [d.flips[name] for d in draws], seed, scale="count", alike=[d.flips[name] for d in others]
                )
                for name in draws[0].flips
            },
            divergence={
                name: further_draw(
                    [d.divergence[name] for d in draws], seed, scale=scale, alike=[d.divergence[name] for d in others]
                )
                for name, scale in SCALES.items()
            },
        )


def _flips(reference: Tensor, model: Tensor, blocks: Tensor, weights: Tensor) -> dict[str, Replicated]:
    readable = ~reference.isnan()
    if not readable.any():
        return {}
    refused, refuses = reference > 0, model > 0
    cases = zip(
        FLIPS,
        (refused != refuses, refused & ~refuses, ~refused & refuses),
        (readable, readable & refused, readable & ~refused),
        strict=True,
    )
    return {name: _rate(hit & of, of, blocks, weights) for name, hit, of in cases}


def _rate(hit: Bool[Tensor, "prompt"], of: Bool[Tensor, "prompt"], blocks: Tensor, weights: Tensor) -> Replicated:
    counts = torch.zeros(2, weights.shape[1], dtype=torch.float64)
    counts.index_add_(1, blocks, torch.stack([hit, of]).double())
    hits, trials = (weights.double() @ counts.T).T
    n = int(of.sum())
    return Replicated(int(hit.sum()) / n if n else float("nan"), hits / trials, n)


def _divergence(divergence: Divergence, weights: Tensor, n: int) -> dict[str, Replicated]:
    total, resampled = divergence.total(), divergence.resample(weights)
    reads = {"kl": Divergence.kl, "top1": Divergence.top1, "perplexity": Divergence.perplexity_quantized}
    return {name: Replicated(read(total).item(), read(resampled).cpu(), n) for name, read in reads.items()}
