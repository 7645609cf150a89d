"""The controls of a report, from measured numbers made by hand."""

import math

import torch

from tracelens.auditing.measured import FLIPS, SCALES, Measured
from tracelens.auditing.preservation import SHARES
from tracelens.auditing.replicates import Replicated
from tracelens.auditing.report_controls import RandomErrors, floor_control, set_control


def measured(x: float, *, hits: int = 5, of: int = 20) -> Measured:
    def same(value: float, n: int = 40) -> Replicated:
        return Replicated(value, torch.full((200,), value, dtype=torch.float64), n)

    return Measured(
        cpfr={"safety": same(x)},
        shares={"safety": {name: same(x) for name in SHARES}},
        flips={name: same(hits / of if of else math.nan, of) for name in FLIPS},
        divergence={name: same(x) for name in SCALES},
    )


def test_draws_of_noise_tell_how_much_a_single_shuffle_varies():
    noise, shuffle = [measured(x) for x in (0.90, 0.92, 0.94)], [measured(0.8)]
    found = RandomErrors.of(noise, shuffle, seed=0)
    assert found.permuted is not None
    assert abs(found.permuted.cpfr["safety"].value - 0.8) < 1e-9  # its own mean
    assert found.permuted.cpfr["safety"].estimate.low < 0.75
    assert found.permuted.shares["safety"]["survived"].replicates.std() > 0
    assert found.permuted.divergence["kl"].replicates.std() > 0
    alone = RandomErrors.of([], shuffle, seed=0)
    assert alone.noise is None
    assert alone.permuted is not None
    assert alone.permuted.cpfr["safety"].replicates.isnan().all()


def test_the_floor_is_one_model_whose_flips_are_counted():
    flips = floor_control(measured(0.99), smeared=0).flips
    assert flips is not None
    assert (round(flips.value, 9), flips.n, flips.method) == (0.25, 20, "wilson")
    nothing = floor_control(measured(0.99, of=0), smeared=None).refuse_to_comply
    assert nothing is not None
    assert math.isnan(nothing.value)


def test_sets_have_the_mean_and_the_range_of_their_members():
    phi = torch.arange(10, dtype=torch.float64) / 10
    classes = (phi >= 0.5).double().expand(len(SHARES), -1).clone()
    sets = torch.tensor([[0, 1, 8], [1, 9, 9]])  # three sets of two
    found = set_control("by hand", phi, classes, sets)
    assert found["safety"].value == phi[sets].mean(0).mean()
    assert found.shares["safety"].survived.value == 0.5
    assert found.flips is None
