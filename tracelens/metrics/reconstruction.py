"""How well an autoencoder reconstructs what it reads: explained variance, cosine, bias, L0, dead features."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tracelens.errors import MetricInputError


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Sums over the tokens of each block, in float64; the methods give one number per block.

    x is what the autoencoder reads, x̂ what it makes of it.
    """

    n: Float64[Tensor, "block"]
    """Tokens."""
    sum_x: Float64[Tensor, "block d_in"]
    sum_x2: Float64[Tensor, "block"]
    """Σ‖x‖²."""
    sum_error2: Float64[Tensor, "block"]
    """Σ‖x − x̂‖²."""
    sum_dot: Float64[Tensor, "block"]
    """Σ x·x̂."""
    sum_output2: Float64[Tensor, "block"]
    """Σ‖x̂‖²."""
    sum_cosine: Float64[Tensor, "block"]
    sum_l0: Float64[Tensor, "block"]
    """Features that fire, counted over tokens."""
    fired: Float64[Tensor, "_feature"]
    """Tokens, of all blocks, that each feature fires on."""

    def total(self) -> "Reconstruction":
        """All blocks as one."""
        return self.resample(torch.ones(1, len(self.n)))

    def resample(self, weights: Float[Tensor, "resample block"]) -> "Reconstruction":
        """Weighted sums over the blocks; the result's block axis is the resample. `fired` stays as it is."""
        blockwise = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "fired"}
        return replace(self, **{name: weights.to(sums) @ sums for name, sums in blockwise.items()})

    def explained_variance(self) -> Float64[Tensor, "block"]:
        """1 − Σ‖x − x̂‖² / Σ‖x − mean x‖², at most 1, mean over the block's tokens; NaN where x does not vary."""
        variance = self.sum_x2 - self.sum_x.square().sum(-1) / self.n
        return 1 - self.sum_error2 / variance.where(variance > 1e-12 * self.sum_x2, torch.nan)

    def cosine(self) -> Float64[Tensor, "block"]:
        """Mean over tokens of the cosine of x and x̂, 0 where either is zero; in [−1, 1]."""
        return self.sum_cosine / self.n

    def bias(self) -> Float64[Tensor, "block"]:
        """Σ‖x̂‖² / Σ x·x̂: 1 if no rescaling of x̂ fits x better, below 1 if x̂ is shrunken.

        The relative reconstruction bias of Rajamanoharan et al. (2024, arXiv 2404.16014).
        """
        return self.sum_output2 / self.sum_dot

    def l0(self) -> Float64[Tensor, "block"]:
        """Mean number of features that fire on a token."""
        return self.sum_l0 / self.n

    def dead(self) -> float:
        """Share of features that fire on none of the tokens, in [0, 1]; falls as more tokens are seen."""
        return (self.fired == 0).double().mean().item()


class ReconstructionAccumulator:
    """Streams tokens into a `Reconstruction`; memory does not grow with them."""

    def __init__(self, d_in: int, n_features: int, n_blocks: int = 1) -> None:
        self.n_blocks = n_blocks
        self._scalars = torch.zeros(n_blocks, 7, dtype=torch.float64)
        self._sum_x = torch.zeros(n_blocks, d_in, dtype=torch.float64)
        self._fired = torch.zeros(n_features, dtype=torch.float64)

    def update(
        self,
        x: Float[Tensor, "token d_in"],
        output: Float[Tensor, "token d_in"],
        features: Float[Tensor, "token feature"],
        block: Int[Tensor, "token"] | None = None,
    ) -> "ReconstructionAccumulator":
        """Adds tokens: what was read, what was made of it, the features between, and the block of each token.

        Raises `MetricInputError` for widths other than the accumulator's.
        """
        if (x.shape[1], features.shape[1]) != (self._sum_x.shape[1], len(self._fired)) or x.shape != output.shape:
            raise MetricInputError(
                f"x {tuple(x.shape)}, output {tuple(output.shape)} and features {tuple(features.shape)} do not fit d_in "
                f"{self._sum_x.shape[1]} and {len(self._fired)} features"
            )
        self._scalars, self._sum_x, self._fired = (t.to(x.device) for t in (self._scalars, self._sum_x, self._fired))
        x, output, fires = x.detach().double(), output.detach().to(x.device).double(), features.to(x.device) > 0
        dot, x2, output2 = (torch.linalg.vecdot(a, b) for a, b in ((x, output), (x, x), (output, output)))
        norms = (x2 * output2).sqrt()
        cosine = torch.where(norms > 0, dot / norms, 0)
        error2 = (x - output).square().sum(-1)
        rows = torch.stack([torch.ones_like(dot), x2, error2, dot, output2, cosine, fires.sum(-1).double()], 1)
        block = torch.zeros(len(x), dtype=torch.long) if block is None else block
        index = (block.to(x.device).long(),)
        self._scalars = self._scalars.index_put(index, rows, accumulate=True)
        self._sum_x = self._sum_x.index_put(index, x, accumulate=True)
        self._fired = self._fired + fires.sum(0)
        return self

    def merge(self, other: "ReconstructionAccumulator") -> "ReconstructionAccumulator":
        """Adds what another accumulator has seen; raises `MetricInputError` for one of another shape."""
        mine, theirs = (tuple(a._sum_x.shape) + tuple(a._fired.shape) for a in (self, other))
        if mine != theirs:
            raise MetricInputError(f"cannot merge a reconstruction of (blocks, d_in, features) {theirs} into {mine}")
        for name in ("_scalars", "_sum_x", "_fired"):
            own = getattr(self, name)
            setattr(self, name, own + getattr(other, name).to(own.device))
        return self

    def finalize(self) -> Reconstruction:
        """The sums so far, on the CPU; more may be added afterwards."""
        n, *scalars = self._scalars.cpu().T.clone(memory_format=torch.contiguous_format)
        names = ("sum_x2", "sum_error2", "sum_dot", "sum_output2", "sum_cosine", "sum_l0")
        return Reconstruction(
            n=n,
            sum_x=self._sum_x.cpu().clone(),
            fired=self._fired.cpu().clone(),
            **dict(zip(names, scalars, strict=True)),
        )
