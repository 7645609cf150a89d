import math

import pytest
import torch

from tracelens.errors import MetricInputError
from tracelens.metrics.muting_thresholds import threshold_brackets

RATES = torch.tensor(
    [  # 8, 4, 3, 2 bits
        [0.0, 0.0, 1.0, 0.0, math.nan, 0.95],
        [0.1, 0.0, 1.0, 0.9, math.nan, 0.2],
        [0.9, 0.5, 1.0, 0.1, math.nan, 0.1],
        [1.0, 0.8, 1.0, 0.95, math.nan, 0.0],
    ],
    dtype=torch.float64,
)


def test_by_hand_in_any_order():
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        bits = [[8, 4, 3, 2][i] for i in order]
        found = threshold_brackets(RATES[order], bits)
        assert found.bits == (8, 4, 3, 2)
        assert found.kept_at.nan_to_num(-1).tolist() == [4, 2, -1, 8, -1, -1]
        assert found.muted_below.nan_to_num(-1).tolist() == [3, -1, 8, 4, -1, 8]
        assert found.monotone.tolist() == [True, True, True, False, True, False]


def test_the_rate_that_counts_as_muted_is_an_argument():
    assert threshold_brackets(RATES, [8, 4, 3, 2], muted_at=0.5).muted_below[1] == 3


def test_bad_ladders():
    with pytest.raises(MetricInputError, match="a different number of bits for each"):
        threshold_brackets(RATES, [8, 4, 4, 2])
    with pytest.raises(MetricInputError, match="4 rows of rates"):
        threshold_brackets(RATES, [8, 4])
