"""Magnitude pruning, for comparison with rounding."""

from jaxtyping import Float
from torch import Tensor


def prune(matrix: Float[Tensor, "out in"], sparsity: float) -> Float[Tensor, "out in"]:
    """`matrix` with its round(sparsity · n) smallest magnitudes set to zero, over the matrix as a whole; of equal ones,
    those that come first go first.

    The weights that `torch.nn.utils.prune.l1_unstructured` takes, except that its choice among equals is arbitrary.
    `sparsity` in [0, 1). Raises nothing of its own.
    """
    count = round(sparsity * matrix.numel())
    if count == 0:
        return matrix.clone()
    magnitude = matrix.abs().flatten()
    threshold = magnitude.kthvalue(count).values
    gone = magnitude < threshold
    ties = (magnitude == threshold).nonzero().squeeze(-1)
    gone[ties[: count - int(gone.sum())]] = True
    return matrix.masked_fill(gone.view_as(matrix), 0)
