"""How well a prediction agrees with what was measured."""

import math

import torch
from jaxtyping import Float64
from scipy.stats import pearsonr, rankdata, spearmanr
from torch import Tensor


def agreement(predicted: Float64[Tensor, "case"], measured: Float64[Tensor, "case"]) -> dict[str, float]:
    """slope Σ predicted · measured / Σ measured², the share of the measured that is predicted (1 for a perfect prediction);
    Pearson's r, Spearman's ρ; r2 = 1 − Σ (measured − predicted)² / Σ measured², the share of the square that is predicted,
    negative where predicting 0 would do better. NaN where the measured are all 0, or for correlations all equal.
    """
    size = float(measured.square().sum())
    nan = math.nan
    if not size:
        return {"slope": nan, "pearson": nan, "spearman": nan, "r2": nan}
    varied = len(measured) > 2 and float(predicted.std()) > 0 and float(measured.std()) > 0
    return {
        "slope": float((predicted * measured).sum()) / size,
        "pearson": float(pearsonr(predicted.numpy(), measured.numpy())[0]) if varied else nan,  # pyright: ignore[reportArgumentType]
        "spearman": float(spearmanr(predicted.numpy(), measured.numpy())[0]) if varied else nan,  # pyright: ignore[reportArgumentType]
        "r2": 1 - float((measured - predicted).square().sum()) / size,
    }


def rank_correlations(
    ours: Float64[Tensor, "resample case"], theirs: Float64[Tensor, "resample case"]
) -> Float64[Tensor, "resample"]:
    """Spearman's ρ of each row with the same row of the other, ties at their mean rank; NaN where all are equal."""
    ranks = [torch.from_numpy(rankdata(values.numpy(), axis=1)) for values in (ours, theirs)]
    a, b = (values - values.mean(1, keepdim=True) for values in ranks)
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
