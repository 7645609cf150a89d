"""What a sweep goes through, and what it says of names and numbers that are not there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.tiny import TEXTS
from tracelens.causal.places import Place
from tracelens.causal.prompts import PromptSet
from tracelens.causal.sweeps import sweep
from tracelens.errors import PromptError, UnknownNameError
from tracelens.sites import Site

ALIKE = ["the cat sat", "a dog ran"]
SAES = {Site(1): SimpleNamespace(W_dec=torch.zeros(5, 32)), Site(2): SimpleNamespace(W_dec=torch.zeros(3, 32))}


@pytest.fixture
def prompts(tiny_model):
    """Of 7, 10, 2 and 9 tokens, BOS counted."""
    spans = {"noun": [(2,), (2, 8), (), (4,)], "none": [(), (), (), ()]}
    return PromptSet.of(TEXTS, tiny_model, chat="never", spans=spans)


@pytest.mark.parametrize(
    ("options", "count", "axes"),
    [
        ({}, 3, ("layer",)),
        ({"by": ("layer", "position")}, 3 * 10, ("layer", "position")),
        ({"by": "group"}, 3 * 2, ("layer", "group")),
        ({"sites": "z", "by": "head"}, 3 * 4, ("layer", "head")),
        ({"sites": "k", "by": "head"}, 3 * 2, ("layer", "head")),
        ({"sites": ("z", "k"), "by": "head"}, 3 * 6, ("site", "layer", "head")),
        ({"sites": "z", "by": ("head", "group"), "layers": [-1]}, 8, ("layer", "head", "group")),
        ({"sites": "mlp_post", "by": "neuron", "neurons": [3, 39]}, 6, ("layer", "neuron")),
        ({"by": "feature", "saes": SAES}, 8, ("layer", "feature")),
        ({"by": "feature", "saes": SAES, "features": {Site(2): [1]}, "layers": [2]}, 1, ("layer", "feature")),
        ({"sites": "pattern", "by": ("position", "key"), "positions": [-1, -2]}, 3 * 3, ("layer", "position", "key")),
        ({"sites": "pattern", "by": ("head", "group", "key"), "keys": [0], "layers": [0]}, 8, ("layer", "head", "group", "key")),
        ({"cumulative": True}, 3, ("layer",)),
        ({"by": "group", "pairs": True}, 6 * 2, ("layer", "other_layer", "group")),
        ({"sites": ["blocks.1.hook_mlp_out", Site(2, "mlp_out")]}, 2, ("layer",)),
    ],
)  # fmt: skip
def test_arms_and_axes(tiny_model, prompts, options, count, axes):
    found = sweep(tiny_model, prompts, **options)
    assert found.axes == axes
    assert len(found.arms) == len(found.rows) == count == len(set(found.arms))
    assert {tuple(row) for row in found.rows} == {
        tuple(dict.fromkeys(("layer", "site", *(a for a in axes if a != "site"))))
    }
    # Rows tell the arms apart.
    assert len({tuple(row.values()) for row in found.rows}) == count


def test_what_the_arms_replace(tiny_model, prompts):
    found = sweep(tiny_model, prompts, sites="z", by=("position", "head"), layers=[2, 0], positions=[1], heads=[3, 0])
    places = [(2, 1, 3), (2, 1, 0), (0, 1, 3), (0, 1, 0)]
    assert found.arms == tuple((Place(Site(layer, "z"), p, head),) for layer, p, head in places)
    assert found.rows[0] == {"layer": 2, "site": "z", "position": 1, "head": 3}


def test_layers_together(tiny_model, prompts):
    growing = sweep(tiny_model, prompts, sites="mlp_out", by="group", groups=["noun"], layers=[2, 0], cumulative=True)
    first, last = Place(Site(0, "mlp_out"), "noun"), Place(Site(2, "mlp_out"), "noun")
    assert growing.arms == ((first,), (first, last))
    assert [row["layer"] for row in growing.rows] == [0, 2]
    two = sweep(tiny_model, prompts, sites="mlp_out", by="group", groups=["noun"], layers=[2, 0], pairs=True)
    assert two.arms == ((first,), (first, last), (last,))
    assert [(row["layer"], row["other_layer"]) for row in two.rows] == [(0, 0), (0, 2), (2, 2)]


def test_positions_count_from_the_end_where_prompts_differ_in_length(tiny_model, prompts):
    found = sweep(tiny_model, prompts, by="position", layers=[0])
    assert [row["position"] for row in found.rows] == list(range(-10, 0))
    assert found.present(prompts).sum(1).tolist() == [1, 2, 2, 3, 3, 3, 3, 3, 4, 4]
    start = sweep(tiny_model, prompts, by="position", layers=[0], positions="start")
    assert [row["position"] for row in start.rows] == list(range(10))
    assert start.present(prompts).sum(1).tolist() == [4, 4, 3, 3, 3, 3, 3, 2, 2, 1]
    alike = PromptSet.of(ALIKE, tiny_model, chat="never")
    assert [row["position"] for row in sweep(tiny_model, alike, by="position", layers=[0]).rows] == [0, 1, 2, 3]


def test_groups_that_no_prompt_has_are_left_out_and_those_that_some_lack_are_counted(tiny_model, prompts):
    found = sweep(tiny_model, prompts, by="group", layers=[0])
    counts = {row["group"]: n for row, n in zip(found.rows, found.present(prompts).sum(1).tolist(), strict=True)}
    assert counts == {"noun": 3, "answer": 4}
    pattern = sweep(tiny_model, prompts, sites="pattern", by=("group", "key"), groups=["noun"], layers=[0])
    assert pattern.present(prompts).tolist() == [[True, True, False, True]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sites": "resid"}, UnknownNameError, r"unknown site 'resid'. Did you mean 'resid_"),
        ({"sites": "blocks.7.hook_mlp_out"}, UnknownNameError, r"layer 7, but the model has 3 layers \(0 to 2\)"),
        ({"layers": [3]}, UnknownNameError, r"layer 3 of site 'resid_post' is out of range; the model has 3 layers"),
        ({"layers": [-4]}, UnknownNameError, r"layer -4 .* or -3 to -1 from the last"),
        ({"sites": Site(1), "layers": [1]}, UnknownNameError, "has its own layer; give layers= only with names"),
        ({"by": "token"}, UnknownNameError, "unknown axis 'token'. .*Known: layer, position, group"),
        ({"layers": 1}, UnknownNameError, r"layers=1 is a single value; give a list: layers=\[1\]"),
        ({"by": "position", "positions": 1}, UnknownNameError, "positions=1 is a single value"),
        ({"by": "group", "groups": "noun"}, UnknownNameError, "groups='noun' is a single value"),
        ({"sites": "z", "by": "head", "heads": 1}, UnknownNameError, "heads=1 is a single value"),
        ({"by": ("position", "group")}, UnknownNameError, "'position' and 'group' exclude each other"),
        ({"by": ("position", "position")}, UnknownNameError, "exclude each other|names an axis twice"),
        ({"by": "head"}, UnknownNameError, "resid_post has no heads; by='head' goes with the sites q, k, v, z"),
        ({"sites": "z", "by": "neuron"}, UnknownNameError, "z has no neurons; .* mlp_pre, mlp_post"),
        ({"sites": "z", "by": "key"}, UnknownNameError, "z has no keys; .* pattern, attn_scores"),
        ({"by": "feature"}, UnknownNameError, r"needs an SAE at blocks.0.hook_resid_post .saes=...\); SAEs given: none"),
        ({"by": "feature", "saes": SAES, "layers": [0]}, UnknownNameError, "needs an SAE at blocks.0.hook_resid_post"),
        ({"by": "feature", "saes": SAES, "features": [4]}, UnknownNameError, r"feature 4 is out of range; there are 3"),
        ({"sites": "z", "by": "head", "heads": [4]}, UnknownNameError, r"head 4 is out of range; there are 4 \(0 to 3\)"),
        ({"heads": [1]}, UnknownNameError, r"heads=\[1\] chooses among what by='head' goes through; .*add it"),
        ({"by": "group", "groups": ["verb"]}, UnknownNameError, "unknown group of positions 'verb'. Known: .*noun"),
        ({"by": "group", "groups": ["none"]}, PromptError, "no prompt has positions in group 'none'"),
        ({"by": "position", "positions": [10]}, PromptError, "position 10 is in no prompt; the longest, prompt 1, has 10"),
        ({"by": "position", "positions": "last"}, UnknownNameError, "give 'start', 'end', or positions"),
        ({"layers": []}, UnknownNameError, "nothing to replace at 'resid_post'"),
        ({"cumulative": True, "pairs": True}, UnknownNameError, "exclude each other"),
        ({"sites": "z", "by": "head", "cumulative": True}, UnknownNameError, "head 0 of one layer has nothing to do with"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_named(tiny_model, prompts, options, error, message):
    with pytest.raises(error, match=message):
        sweep(tiny_model, prompts, **options)


@pytest.mark.parametrize("make", [torch.tensor, np.array, tuple])
def test_choices_come_as_any_kind_of_list(tiny_model, prompts, make):
    found = sweep(
        tiny_model,
        prompts,
        sites="z",
        by=("position", "head"),
        layers=make([2, 0]),
        positions=make([-1, 1]),
        heads=make([3]),
    )
    assert [(a[0].site.layer, a[0].where, a[0].unit) for a in found.arms] == [
        (2, -1, 3),
        (2, 1, 3),
        (0, -1, 3),
        (0, 1, 3),
    ]
    assert all(type(value) is int for row in found.rows for key, value in row.items() if key != "site")
    assert found.present(prompts).all()


def test_the_frame_of_prompts_is_swept_where_it_is_asked_for(tiny_model, prompts):
    assert [row["group"] for row in sweep(tiny_model, prompts, by="group", layers=[0]).rows] == ["answer", "noun"]
    found = sweep(tiny_model, prompts, by="group", groups=["bos", "content"], layers=[0])
    assert [prompts.positions(0, arm[0].where) for arm in found.arms] == [(0,), tuple(range(1, 7))]
    assert found.present(prompts).all()


def test_a_key_that_a_prompt_lacks_is_no_place_in_it(tiny_model, prompts):
    found = sweep(
        tiny_model, prompts, sites="pattern", by=("position", "key"), positions=[-1], keys=["noun"], layers=[0]
    )
    assert found.present(prompts).tolist() == [[True, True, False, True]]
    itself = sweep(tiny_model, prompts, sites="pattern", by=("position", "key"), positions=[1], layers=[0])
    assert [arm[0].key for arm in itself.arms] == [1]


def test_layers_from_the_last(tiny_model, prompts):
    found = sweep(tiny_model, prompts, layers=[-1, -3])
    assert [(row["layer"], arm[0].site.layer) for row, arm in zip(found.rows, found.arms, strict=True)] == [
        (2, 2),
        (0, 0),
    ]
