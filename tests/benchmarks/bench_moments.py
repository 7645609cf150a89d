"""Moments over 16k and 131k features × 100k tokens at L0 64, in 64 blocks: `python -m tests.benchmarks.bench_moments [TOKENS]`.

Beside it, on one batch, the same sums in dense torch.
"""

import resource
import sys

import torch

from tests.benchmarks.measuring import Peak, in_turns
from tests.benchmarks.synthetic import activations
from tracelens.metrics import MomentAccumulator

L0, BATCH, BLOCKS = 64, 2_000, 64


def dense_sums(r: torch.Tensor, q: torch.Tensor, block: torch.Tensor) -> list[torch.Tensor]:
    """The baseline: the eight sums of each block, and the maxima."""
    columns = (r > 0, q > 0, (r > 0) & (q > 0), r, q, r * r, q * q, r * q)
    sums = []
    for x in columns:
        sums.append(torch.zeros(BLOCKS, r.shape[1], dtype=torch.float64).index_add_(0, block, x.double()))
    return [*sums, r.amax(0), q.amax(0)]


def streamed(n_features: int, n_tokens: int) -> None:
    r, q = activations(n_tokens, n_features, L0, seed=1)
    block = torch.arange(n_tokens) * BLOCKS // n_tokens
    with Peak() as peak:
        seen = MomentAccumulator(n_features, BLOCKS)
        for start in range(0, n_tokens, BATCH):
            part = slice(start, start + BATCH)
            seen.update(r[part], q[part], block[part])
        total = seen.finalize().total()
    print(f"{n_features} features × {n_tokens} tokens: {peak}, {int(total.n_ref.sum()):,} firings")


def main(n_tokens: str = "100000") -> None:
    n_features = 16_384
    dense = [torch.from_numpy(x.toarray()) for x in activations(BATCH, n_features, L0, seed=0)]
    block = torch.arange(BATCH) * BLOCKS // BATCH
    mine = MomentAccumulator(n_features, BLOCKS).update(*dense, block).finalize()
    torch.testing.assert_close(mine.sum_cross, dense_sums(*dense, block)[7])
    seen = MomentAccumulator(n_features, BLOCKS)
    jobs = {"sparse, from dense": lambda: seen.update(*dense, block)}
    in_turns(f"{n_features} features × {BATCH} tokens: dense torch", lambda: dense_sums(*dense, block), jobs, 5)
    streamed(n_features, int(n_tokens))
    streamed(131_072, int(n_tokens))
    print(f"peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB, data included")


if __name__ == "__main__":
    main(*sys.argv[1:])
