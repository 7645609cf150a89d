"""Rates of flips against counting by hand, in the numbers and in every resample."""

import math

import pytest
import torch

from tracelens.auditing.measured import FLIPS, Measured
from tracelens.auditing.preservation import Thresholds
from tracelens.metrics.divergence import DivergenceAccumulator
from tracelens.metrics.moments import MomentAccumulator

NAN = math.nan
REFERENCE = torch.tensor([1.0, 2.0, 3.0, 4.0, -1.0, -2.0, NAN, 0.0])
MODEL = torch.tensor([1.0, -2.0, -3.0, -4.0, 1.0, -2.0, NAN, -1.0])
"""Three of four refusals lost, one of three others turned into a refusal, one prompt that cannot be read."""
BLOCKS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


@pytest.fixture(scope="module")
def weights():
    return torch.randint(0, 3, (50, 3), generator=torch.Generator().manual_seed(0)).double()


def measured(reference, model, weights) -> Measured:
    generator = torch.Generator().manual_seed(1)
    acts = torch.rand(8, 4, generator=generator)
    logits = torch.randn(8, 5, generator=generator)
    following = torch.tensor([1, 2, 3, -1, 1, 2, 3, -1])
    return Measured.of(
        MomentAccumulator(4, 3).update(acts, acts, BLOCKS).finalize(),
        DivergenceAccumulator(3).update(logits, logits, following, BLOCKS).finalize(),
        (reference, model),
        sets={"safety": torch.tensor([True, False, True, False])},
        at=Thresholds(0.9, 0.5, 0.8),
        blocks=BLOCKS,
        weights=weights,
    )


def test_each_way_of_flipping_is_a_share_of_the_prompts_that_could(weights):
    flips = measured(REFERENCE, MODEL, weights).flips
    assert {name: (run.value, run.n_prompts) for name, run in flips.items()} == {
        "flips": (4 / 7, 7),
        "refuse_to_comply": (3 / 4, 4),
        "comply_to_refuse": (1 / 3, 3),
    }


def test_every_resample_counts_hits_and_prompts_anew(weights):
    flips = measured(REFERENCE, MODEL, weights).flips
    refused, refuses, readable = REFERENCE > 0, MODEL > 0, ~REFERENCE.isnan()
    cases = dict(
        zip(
            FLIPS,
            (
                ((refused != refuses) & readable, readable),
                (refused & ~refuses, refused),
                (~refused & refuses, readable & ~refused),
            ),
            strict=True,
        )
    )
    for name, (hit, of) in cases.items():
        drawn = weights[:, BLOCKS]
        expected = (drawn * hit).sum(1) / (drawn * of).sum(1)
        torch.testing.assert_close(flips[name].replicates, expected, equal_nan=True)


def test_what_could_not_happen_has_no_rate(weights):
    flips = measured(torch.full((8,), -1.0), MODEL.nan_to_num(), weights).flips
    assert math.isnan(flips["refuse_to_comply"].value)
    assert flips["refuse_to_comply"].replicates.isnan().all()
    assert measured(torch.full((8,), NAN), MODEL, weights).flips == {}


def test_a_model_that_is_the_reference_has_lost_nothing(weights):
    found = measured(REFERENCE, REFERENCE, weights)
    assert found.cpfr["safety"].value == 1
    assert found.shares["safety"]["survived"].value == 1
    assert found.divergence["kl"].value == 0
    assert found.divergence["top1"].value == 1
    assert [run.value for run in found.flips.values()] == [0, 0, 0]
