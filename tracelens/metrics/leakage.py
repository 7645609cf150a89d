"""Leakage between classes of features: activation that one class has in the reference and another in the quantized model."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tracelens.errors import MetricInputError
from tracelens.metrics.result import Result
from tracelens.metrics.support import JointSupport


@dataclass(frozen=True, eq=False)
class Leakage(Result):
    """Sums over the tokens of each block (a prompt); [block, A, B] with A the class in the reference, B in the quantized model."""

    cross: Float64[Tensor, "block cls cls"]
    """Σ_t Σ_{i∈A, j∈B, i≠j} r_it q_jt."""
    reference: Float64[Tensor, "block cls cls"]
    """The same of the reference with itself: what `cross` is to be compared with, since features that fire together in
    the reference already have such a sum."""

    def ratio(self, weights: Float[Tensor, "resample block"] | None = None) -> Float64[Tensor, "resample cls cls"]:
        """`cross` over `reference`, all blocks together, or weighted for a bootstrap: 1 means no change. NaN for 0 over 0."""
        weights = torch.ones(1, len(self.cross)) if weights is None else weights
        cross, reference = (
            torch.einsum("rb,bij->rij", weights.to(sums), sums) for sums in (self.cross, self.reference)
        )
        return cross / reference


class ClassLeakage:
    """Streams activations into `Leakage`: exact, and at the cost of the activations that are not zero.

    `classes` [class, feature] are disjoint masks; a feature in none of them counts for nothing. Raises `MetricInputError`
    for a feature in two.
    """

    def __init__(self, classes: Bool[Tensor, "cls feature"], n_blocks: int = 1) -> None:
        if (classes.sum(0) > 1).any():
            raise MetricInputError(
                f"feature {int((classes.sum(0) > 1).nonzero()[0])} is in two classes; leakage needs disjoint ones"
            )
        self.classes = classes
        # What is in no class goes to one more, which is dropped at the end.
        self._class_of = torch.where(classes.any(0), classes.int().argmax(0), len(classes))
        shape = (n_blocks, len(classes), len(classes))
        self._cross, self._reference = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))

    def update(
        self,
        reference: Float[Tensor, "token feature"],
        quantized: Float[Tensor, "..."],
        block: Int[Tensor, "token"] | None = None,
    ) -> "ClassLeakage":
        """Adds activations ≥ 0 of the same tokens; raises as `JointSupport.of`, and `MetricInputError` for another number
        of features."""
        return self.add(JointSupport.of(reference, quantized), block)

    def add(self, support: JointSupport, block: Int[Tensor, "token"] | None = None) -> "ClassLeakage":
        """`update` with a support that is already there, as when smearing is measured on the same activations."""
        if support.n_features != self.classes.shape[1]:
            raise MetricInputError(f"activations have {support.n_features} features, expected {self.classes.shape[1]}")
        n_classes = len(self.classes) + 1
        cell = (support.token.cpu() * n_classes) + self._class_of[support.feature.cpu()]
        r, q = support.reference.cpu().double(), support.quantized.cpu().double()

        def by_token(values: Tensor) -> Tensor:
            # Of nothing, bincount makes integers.
            sums = torch.bincount(cell, values, support.n_tokens * n_classes).double()
            return sums.view(-1, n_classes)[:, :-1]

        block = torch.zeros(support.n_tokens, dtype=torch.long) if block is None else block.cpu()
        mass = by_token(r)
        for sums, other in ((self._cross, q), (self._reference, r)):
            # The product of the classes' masses on a token, less what a feature shares with itself.
            per_token = mass[:, :, None] * by_token(other)[:, None] - torch.diag_embed(by_token(r * other))
            sums.index_add_(0, block, per_token)
        return self

    def merge(self, other: "ClassLeakage") -> "ClassLeakage":
        """Adds what another accumulator over the same classes and blocks has seen; raises `MetricInputError` for others."""
        if not torch.equal(self.classes, other.classes) or self._cross.shape != other._cross.shape:
            raise MetricInputError("cannot merge leakage between other classes or over other blocks")
        self._cross += other._cross
        self._reference += other._reference
        return self

    def finalize(self) -> Leakage:
        """The sums so far, on the CPU; more may be added afterwards."""
        return Leakage(self._cross.clone(), self._reference.clone())
