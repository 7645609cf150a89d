"""Settings that cannot be measured with are refused before anything runs."""

from dataclasses import replace

import pytest

from tracelens.audit_settings import AuditSettings
from tracelens.errors import MetricInputError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_seeds": -1}, "noise_seeds is -1; it must be at least 0"),
        ({"permuted_seeds": -1}, "permuted_seeds is -1; it must be at least 0"),
        ({"n_resamples": 0}, "n_resamples is 0; it must be at least 1"),
        ({"n_blocks": 7}, "n_blocks is 7; it must be at least 8"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"survived_at": 0.5, "damaged_at": 0.9}, "damaged_at is 0.9 and survived_at 0.5; expected damaged_at ≤ surv"),
    ],
)
def test_what_is_too_small_is_named(change, message):
    with pytest.raises(MetricInputError, match=message):
        AuditSettings(**change)
    with pytest.raises(MetricInputError, match=message):
        replace(AuditSettings(), **change)
