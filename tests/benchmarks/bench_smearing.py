"""Smearing over 16k and 131k features × 100k tokens at L0 64: `python -m tests.benchmarks.bench_smearing [TOKENS]`.

Budget at 16k: 60 s and 4 GB on 2 cores. Beside it, at a size where they fit, dense Gram matrices in torch.
"""

import resource
import sys

import torch

from tests.benchmarks.measuring import Peak, in_turns
from tests.benchmarks.synthetic import activations
from tracelens.metrics import SmearingAccumulator

L0, BATCH = 64, 2_000


def dense_pairs(r: torch.Tensor, q: torch.Tensor, tau: float = 0.5, delta: float = 0.2) -> int:
    """The baseline: both d_sae × d_sae Gram matrices."""
    cosines = []
    for x in (r, q):
        x = x / x.norm(dim=0).clamp(min=1e-12)
        cosines.append(x.T @ x)
    smeared = (cosines[1] >= tau) & (cosines[1] - cosines[0] >= delta)
    return int(smeared.triu(1).sum())


def streamed(n_features: int, n_tokens: int, **options: int) -> None:
    r, q = activations(n_tokens, n_features, L0, seed=1)
    with Peak() as peak:
        seen = SmearingAccumulator(n_features, **options)
        for start in range(0, n_tokens, BATCH):
            seen.update(r[start : start + BATCH], q[start : start + BATCH])
        found = seen.finalize().num_smeared_pairs
    what = f"{n_features} features × {n_tokens} tokens" + "".join(f", {k} of {v}" for k, v in options.items())
    print(f"{what}: {peak}, {found} pairs")


def main(n_tokens: str = "100000") -> None:
    n_features, few = 4_096, 5_000
    r, q = activations(few, n_features, L0, seed=0)
    dense = [torch.from_numpy(x.toarray()) for x in (r, q)]
    assert SmearingAccumulator(n_features).update(r, q).finalize().num_smeared_pairs == dense_pairs(*dense)
    jobs = {"sparse": lambda: SmearingAccumulator(n_features).update(*dense).finalize()}
    in_turns(f"{n_features} features × {few} tokens: dense torch", lambda: dense_pairs(*dense), jobs, 3)
    streamed(16_384, int(n_tokens))
    streamed(16_384, int(n_tokens), segment=2**20)
    streamed(131_072, int(n_tokens))
    print(f"peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB, data included")


if __name__ == "__main__":
    main(*sys.argv[1:])
