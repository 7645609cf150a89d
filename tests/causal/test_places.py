"""Places: how they are named, and which do not exist."""

from types import SimpleNamespace

import pytest
import torch

from tracelens.causal.places import Place, check_places, n_units
from tracelens.errors import UnknownNameError
from tracelens.sites import Site


def test_names():
    assert str(Place(Site(2, "z"), "object", 1)) == "z of layer 2 head 1 at object"
    assert str(Place(Site(2, "mlp_post"), -1, 7)) == "mlp_post of layer 2 neuron 7 at position -1"
    assert str(Place(Site(0), feature=3)) == "resid_post of layer 0 feature 3"
    assert str(Place(Site(1, "pattern"), 4, 0, key="verb")) == "pattern of layer 1 head 0 at position 4 to verb"
    assert Place(Site(0)).kind == ""


def test_units_of_a_model(tiny_model):
    counts = {name: n_units(tiny_model.cfg, Site(0, name)) for name in ("z", "q", "k", "v", "pattern", "mlp_post")}
    assert counts == {"z": 4, "q": 4, "k": 2, "v": 2, "pattern": 4, "mlp_post": 40}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place(Site(3)), r"at layer 3, but the model has 3 layers \(0 to 2\)"),
        (Place(Site(0, "z"), unit=4), r"head 4 is out of range; there are 4 \(0 to 3\)"),
        (Place(Site(0, "k"), unit=2), r"head 2 is out of range; there are 2 \(0 to 1\)"),
        (Place(Site(0, "mlp_post"), unit=40), "neuron 40 is out of range"),
        (Place(Site(0), feature=1), r"needs an SAE at blocks.0.hook_resid_post; SAEs given: blocks.1.hook_resid_post"),
        (Place(Site(1), feature=5), r"feature 5 is out of range; there are 5 \(0 to 4\)"),
        (Place(Site(1), unit=0), "resid_post has no heads or neurons to choose from; sites that have: q, k"),
        (Place(Site(1), unit=0, feature=0), "either a head or neuron, or a feature"),
    ],
)
def test_what_does_not_exist_is_named(tiny_model, place, message):
    saes = {Site(1): SimpleNamespace(W_dec=torch.zeros(5, 32))}
    check_places([(Place(Site(1)), Place(Site(1), feature=4))], tiny_model, saes)
    with pytest.raises(UnknownNameError, match=message):
        check_places([(Place(Site(0)), place)], tiny_model, saes)
