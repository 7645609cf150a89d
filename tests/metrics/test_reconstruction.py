"""Reconstruction sums: the formulas, whatever the split of the data and the order of merging."""

import math

import pytest
import torch

from tracelens.errors import MetricInputError
from tracelens.metrics.reconstruction import ReconstructionAccumulator

D_IN, FEATURES, BLOCKS = 6, 5, 4


def data(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D_IN, generator=g) + 2
    output = 0.8 * x + 0.2 * torch.randn(n, D_IN, generator=g)
    features = torch.randn(n, FEATURES, generator=g).relu()
    features[:, 3] = 0
    return x, output, features, torch.randint(BLOCKS, (n,), generator=g)


def accumulate(*rows, n_blocks=BLOCKS):
    return ReconstructionAccumulator(D_IN, FEATURES, n_blocks).update(*rows)


def test_the_formulas():
    x, output, features, block = data()
    sums = accumulate(x, output, features, block).finalize()
    total = sums.total()
    x, output = x.double(), output.double()
    variance = (x - x.mean(0)).square().sum()
    assert total.explained_variance().item() == pytest.approx(1 - (x - output).square().sum().item() / variance.item())
    assert total.cosine().item() == pytest.approx(torch.cosine_similarity(x, output, dim=1).mean().item())
    assert total.l0().item() == pytest.approx((features > 0).sum(1).double().mean().item())
    assert sums.dead() == pytest.approx(1 / FEATURES)
    # The bias is the scale that, taken out of the output, leaves the least error.
    best = total.bias().item()
    errors = [(x - output / (best + shift)).square().sum().item() for shift in (-0.01, 0, 0.01)]
    assert min(errors) == errors[1]


def test_blocks_are_what_they_hold():
    x, output, features, block = data()
    sums = accumulate(x, output, features, block).finalize()
    for b in range(BLOCKS):
        rows = block == b
        alone = accumulate(x[rows], output[rows], features[rows], n_blocks=1).finalize()
        for name in ("explained_variance", "cosine", "bias", "l0"):
            assert getattr(sums, name)()[b].item() == pytest.approx(getattr(alone, name)().item(), rel=1e-12)


def test_any_split_in_any_order_is_one_pass():
    rows = data()
    whole = accumulate(*rows).finalize()
    parts = [[t[i::7] for t in rows] for i in range(7)]
    merged = ReconstructionAccumulator(D_IN, FEATURES, BLOCKS)
    for part in reversed(parts):
        merged.merge(accumulate(*part))
    merged.merge(ReconstructionAccumulator(D_IN, FEATURES, BLOCKS))
    for name, sums in vars(merged.finalize()).items():
        torch.testing.assert_close(sums, getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_resampling_is_repeating_tokens():
    x, output, features, block = data()
    weights = torch.tensor([[2.0, 0.0, 1.0, 3.0]])
    rows = weights[0].long()[block].repeat_interleave(torch.ones(len(x), dtype=torch.long))
    repeated = [t.repeat_interleave(rows, 0) for t in (x, output, features)]
    expected = accumulate(*repeated, n_blocks=1).finalize()
    drawn = accumulate(x, output, features, block).finalize().resample(weights)
    for name in ("explained_variance", "cosine", "bias", "l0"):
        torch.testing.assert_close(getattr(drawn, name)(), getattr(expected, name)(), rtol=1e-10, atol=1e-10)


def test_perfect_zero_and_constant():
    x, _, features, _ = data()
    perfect = accumulate(x, x, features, n_blocks=1).finalize()
    assert perfect.explained_variance().item() == 1
    assert (perfect.cosine().item(), perfect.bias().item()) == (pytest.approx(1), pytest.approx(1))
    nothing = accumulate(x, torch.zeros_like(x), features, n_blocks=1).finalize()
    assert nothing.cosine().item() == 0
    assert nothing.explained_variance().item() < 0  # worse than the mean
    constant = torch.ones(10, D_IN)
    assert math.isnan(accumulate(constant, constant, features[:10], n_blocks=1).finalize().explained_variance().item())


def test_a_large_mean_costs_no_precision():
    x, output, features, _ = data()
    moved = accumulate(x.double() + 1e5, output.double() + 1e5, features.double(), n_blocks=1).finalize()
    plain = accumulate(x, output, features, n_blocks=1).finalize()
    assert moved.explained_variance().item() == pytest.approx(plain.explained_variance().item(), abs=1e-4)


def test_widths_are_checked():
    x, output, features, _ = data()
    with pytest.raises(MetricInputError, match="do not fit d_in 6 and 5 features"):
        accumulate(x[:, :3], output[:, :3], features)
    with pytest.raises(MetricInputError, match="cannot merge a reconstruction"):
        ReconstructionAccumulator(D_IN, FEATURES, 2).merge(ReconstructionAccumulator(D_IN, FEATURES, 3))
