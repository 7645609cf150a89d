import numpy as np
import pytest
import torch

from tracelens.auditing.feature_intervals import RESAMPLED, bootstrap_intervals, over_draws, percentile_ends
from tracelens.auditing.preservation import bootstrap_cpfr
from tracelens.metrics.moments import FeatureMoments, MomentAccumulator
from tracelens.stats import bootstrap_weights, percentile_interval

BLOCKS, TOKENS = 12, 20


def activations(n_features: int, seed: int, blocks: int = BLOCKS) -> tuple[np.ndarray, np.ndarray]:
    """[block, token, feature]: sparse, with blocks that differ, the quantized side weaker and noisy."""
    rng = np.random.default_rng(seed)
    shape = (blocks, TOKENS, n_features)
    r = rng.exponential(1, shape) * (rng.random(shape) < 0.4) * rng.uniform(0.5, 2, (blocks, 1, n_features))
    q = np.clip(0.8 * r + 0.3 * rng.normal(size=shape) * (r > 0), 0, None)
    return r, q


def moments_of(r: np.ndarray, q: np.ndarray) -> FeatureMoments:
    blocks, tokens, n = r.shape
    sides = [torch.from_numpy(x.reshape(-1, n)).float() for x in (r, q)]
    return MomentAccumulator(n, blocks).update(*sides, torch.arange(blocks).repeat_interleave(tokens)).finalize()


def test_a_loop_over_resampled_tokens_gives_the_same():
    r, q = activations(4, seed=0)
    r[2:, :, 3] = 0  # two blocks only: some resamples hold neither
    q[2:, :, 3] = 0
    r, q = r.astype(np.float32).astype(float), q.astype(np.float32).astype(float)
    weights = bootstrap_weights(BLOCKS, 300, seed=5)
    found = bootstrap_intervals(moments_of(r, q), weights)
    for k in range(4):
        values = {name: [] for name in RESAMPLED}
        for row in weights.long().numpy():
            a, b = (np.repeat(x[:, :, k], row, axis=0).ravel() for x in (r, q))
            if not a.any():
                continue
            values["fidelity"].append(a @ b / max(a @ a, b @ b))
            values["correlation"].append(np.corrcoef(a, b)[0, 1])
            values["drift"].append(np.linalg.norm(a - b) / np.linalg.norm(a))
            values["retention"].append(b.sum() / a.sum())
        for name, of in values.items():
            low, high = np.quantile(of, [0.025, 0.975])
            assert found[f"{name}_low"][k].item() == pytest.approx(low, abs=1e-9)
            assert found[f"{name}_high"][k].item() == pytest.approx(high, abs=1e-9)
    assert len(values["fidelity"]) < 300


def test_the_interval_is_that_of_the_cpfr_of_the_feature_alone():
    moments, weights = moments_of(*activations(3, seed=9)), bootstrap_weights(BLOCKS, 500)
    found = bootstrap_intervals(moments, weights)
    sets = {str(k): torch.arange(3) == k for k in range(3)}
    for name, run in bootstrap_cpfr(moments, sets, weights, BLOCKS).items():
        ends = [found[f"fidelity_{end}"][int(name)].item() for end in ("low", "high")]
        assert ends == pytest.approx([run.estimate.low, run.estimate.high], abs=1e-12)


def test_the_same_model_is_certain():
    r, _ = activations(5, seed=1)
    found = bootstrap_intervals(moments_of(r, r), bootstrap_weights(BLOCKS, 200))
    for name, value in {"fidelity": 1, "correlation": 1, "retention": 1, "drift": 0}.items():
        assert (found[f"{name}_low"] == value).all()
        assert (found[f"{name}_high"] == value).all()


def test_one_block_says_nothing():
    r, q = activations(3, seed=2)
    r[1:, :, 1] = 0
    found = bootstrap_intervals(moments_of(r, q), bootstrap_weights(BLOCKS, 100))
    assert all(values.isnan().tolist() == [False, True, False] for values in found.values())
    alone = bootstrap_intervals(moments_of(r[:1], q[:1]), bootstrap_weights(1, 100))
    assert all(values.isnan().all() for values in alone.values())


def test_other_prompts_would_lie_in_the_interval():
    """Of 300 features whose true fidelity is known from 4,000 blocks, about 95 % lie in their interval from 40."""
    rng = np.random.default_rng(3)
    kept = rng.uniform(0.4, 1, 300)
    n = rng.poisson(5, (4000, 300))  # firings of each block
    strength = rng.gamma(4, 0.25, (4000, 300))
    noise = rng.gamma(2, 0.1, (4000, 300))
    sums = torch.zeros(8, 4000, 300, dtype=torch.float64)
    sums[0] = torch.from_numpy(n.astype(float))
    sums[5], sums[7] = torch.from_numpy(n * strength**2), torch.from_numpy(n * kept * strength**2)
    sums[6] = torch.from_numpy(n * (kept**2 * strength**2 + noise))
    all_blocks = FeatureMoments(torch.full((4000,), 20.0).double(), *sums, max_ref=sums[0, 0], max_quant=sums[0, 0])
    truth = RESAMPLED["fidelity"](all_blocks.total())[0]
    few = FeatureMoments(all_blocks.n[:40], *sums[:, :40], max_ref=sums[0, 0], max_quant=sums[0, 0])
    found = bootstrap_intervals(few, bootstrap_weights(40, 1000))
    covered = ((found["fidelity_low"] <= truth) & (truth <= found["fidelity_high"])).double().mean().item()
    assert 0.88 < covered < 0.99
    assert (found["fidelity_high"] - found["fidelity_low"]).min() > 0


def test_more_features_than_a_chunk_and_in_any_order():
    r, q = activations(700, seed=4)
    moments, weights = moments_of(r, q), bootstrap_weights(BLOCKS, 50)
    found, order = bootstrap_intervals(moments, weights), torch.randperm(700)
    again = bootstrap_intervals(moments.select(order), weights)
    for name, values in found.items():
        torch.testing.assert_close(again[name], values[order], rtol=1e-12, atol=0, equal_nan=True)


def test_the_ends_are_those_of_one_row_at_a_time():
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 333)))
    rows[1, 5:] = torch.nan
    rows[2, :] = torch.nan
    rows[3, 1:] = torch.nan
    low, high = percentile_ends(rows)
    for k, row in enumerate(rows):
        one = percentile_interval(0.0, row)
        assert [low[k].item(), high[k].item()] == pytest.approx([one.low, one.high], nan_ok=True, abs=1e-12)


def test_the_draws_of_noise_and_their_ends():
    r, _ = activations(6, seed=6)
    draws = [moments_of(r, activations(6, seed=k)[1]) for k in (7, 8, 9)]
    keep = torch.tensor([4, 0])
    of = torch.stack([RESAMPLED["fidelity"](draw.total())[0, keep] for draw in draws])
    found = over_draws(draws, keep)
    torch.testing.assert_close(found["fidelity_noise"], of.mean(0))
    assert found["fidelity_noise_low"].tolist() == of.min(0).values.tolist()
    assert found["fidelity_noise_high"].tolist() == of.max(0).values.tolist()
    one = over_draws(draws[:1], keep)
    assert one["fidelity_noise"].tolist() == of[0].tolist()
    assert one["fidelity_noise_low"].isnan().all()
    assert all(values.isnan().all() and len(values) == 2 for values in over_draws([], keep).values())
