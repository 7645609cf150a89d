import pytest
import torch

from tracelens.errors import PrecisionSpecError
from tracelens.precision.recipes import Recipe, scheme

GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
PER_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize(
    ("name", "smoothing", "rounding", "weights"),
    [
        ("gptq-int4-g128", None, "gptq", GROUPS),
        ("GPTQ-INT4-g128", None, "gptq", GROUPS),
        ("int4-g128", None, "rtn", GROUPS),
        ("rtn-int4-g128-mse", None, "rtn", {**GROUPS, "observer": "memoryless_mse"}),
        ("awq-int4-g128-asym", "awq", "rtn", {**GROUPS, "symmetric": False}),
        ("awq-gptq-int4-g128", "awq", "gptq", GROUPS),
        ("gptq-int3", None, "gptq", {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel"}),
        ("gptq-int8-tensor", None, "gptq", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}),
        ("fp8", None, "rtn", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}),
        (
            "fp8-block",
            None,
            "rtn",
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [128, 128]},
        ),
    ],
)
def test_a_name_says_method_and_grid(name, smoothing, rounding, weights):
    recipe = Recipe.parse(name)
    assert (recipe.smoothing, recipe.rounding) == (smoothing, rounding)
    assert recipe.config is not None
    assert scheme(recipe.config) == {"targets": ["Linear"], "weights": weights}


@pytest.mark.parametrize("name", ["smoothquant-int8", "smoothquant-gptq-int8", "gptq-int8+a8", "rtn-int8-dynamic"])
def test_activations_per_token(name):
    config = Recipe.parse(name).config
    assert config is not None
    assert scheme(config)["input_activations"] == PER_TOKEN


def test_static_activations_need_prompts_and_dynamic_ones_do_not():
    assert Recipe.parse("int8+a8-static").needs_calibration
    assert not Recipe.parse("int8+a8").needs_calibration
    assert not Recipe.parse("nvfp4").needs_calibration
    assert all(Recipe.parse(f"{method}-int8").needs_calibration for method in ("gptq", "awq", "smoothquant"))
    static = Recipe.parse("fp8-tensor+afp8-static").config
    assert static is not None
    assert scheme(static)["input_activations"]["dynamic"] is False
    assert scheme(static)["input_activations"]["type"] == "float"


def test_what_is_computed_in_is_what_the_model_is_held_in():
    assert Recipe.parse("gptq-int4-g128+bf16").dtype is torch.bfloat16
    assert Recipe.parse("gptq-int4-g128").dtype is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("foo-int4", "there is no number format 'foo'"),
        ("gptq-int9", "there is no number format 'int9'"),
        ("gptq", "'' is no precision"),
        ("gptq-awq-int4", "gptq-awq is no order of methods"),
        ("awq-smoothquant-int4", "awq-smoothquant is no order of methods"),
        ("gptq-nf4", "writes no checkpoint in nf4"),
        ("gptq-bf16", "writes no checkpoint in bf16"),
        ("gptq-int4+kv8", "leave +kv8 out"),
        ("awq-fp8", "a scale per group or channel"),
        ("awq-int4-tensor", "a scale per group or channel"),
        ("/nowhere/recipe.yaml", "there is no recipe at /nowhere/recipe.yaml"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_can(name, said):
    with pytest.raises(PrecisionSpecError) as caught:
        Recipe.parse(name)
    assert said in str(caught.value)
    if "+kv" not in name and "awq-" not in name:
        assert "METHOD is gptq, awq, smoothquant" in str(caught.value)


def test_a_file_says_itself_what_it_ignores(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("{}")
    recipe = Recipe.parse(str(file))
    assert recipe == Recipe.parse(file) == Recipe.parse(recipe)
    assert recipe.needs_calibration
    assert recipe.modifiers(["lm_head"]) == str(file)
