"""Sparse activations of two models that nobody has to run.

The worst case for sparsity: all features equally likely, so that nearly every pair meets somewhere.
"""

import numpy as np
from scipy import sparse


def activations(n_tokens: int, n_features: int, l0: int, seed: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Random features, and the same with noise in which ten features write half of what their neighbour does."""
    rng = np.random.default_rng(seed)
    column = rng.integers(0, n_features, size=(n_tokens, l0)).ravel()
    row = np.repeat(np.arange(n_tokens), l0)
    value = rng.exponential(size=len(row)).astype(np.float32)
    shape = (n_tokens, n_features)
    reference = sparse.csr_matrix((value, (row, column)), shape=shape)
    noisy = value * (1 + 0.1 * rng.standard_normal(len(row)).astype(np.float32)).clip(0)
    merged = (column < 20) & (column % 2 == 0)
    quantized = sparse.csr_matrix(
        (
            np.concatenate([noisy, noisy[merged]]),
            (np.concatenate([row, row[merged]]), np.concatenate([column, column[merged] + 1])),
        ),
        shape=shape,
    )
    return reference, quantized
