"""Plans made real by llm-compressor and bitsandbytes, read back, and checked tensor by tensor."""

from importlib.util import find_spec

import pytest

import tracelens
from tracelens.causal.repair import RepairPlan, plan
from tracelens.errors import PlanError, QuantizeError, UnknownNameError
from tracelens.organism import sample
from tracelens.pair import PrecisionPair
from tracelens.precision import apply_precision

compressor = pytest.mark.skipif(find_spec("llmcompressor") is None, reason="needs llmcompressor")
bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture(scope="module")
def made(organism):
    pair = PrecisionPair(organism, apply_precision(organism, "int3-g32"))
    # Two lengths: prompts of one length share their passes.
    prompts = sample(24, "refusal", seed=2, where=lambda p: len(p.prompt.split()) in (10, 11))
    return plan(pair, prompts, budget_bytes=100_000, n_random=1)


@pytest.fixture(scope="module")
def calibration():
    return tracelens.datasets.get_dataset("organism_refusal_v1").prompts[:24]


@compressor
def test_rounding_by_the_library_is_the_simulated_plan(made, tmp_path):
    found = made.apply("organism", tmp_path / "rtn", "rtn-int3-g32", progress=False)
    assert found.ok
    assert set(found.kept) == set(made.modules)
    assert set(found.kept.values()) == {"exact"}
    assert found.n_quantized == 35 - len(made.modules)
    assert found.outcome.values == pytest.approx(made.outcome("plan").values, abs=1e-4)
    assert found.outcome.recovery.value == pytest.approx(made.recovery.value, abs=1e-3)
    assert "as planned" in str(found)


@compressor
def test_gptq_keeps_what_a_plan_read_from_a_file_says(made, calibration, tmp_path):
    again = RepairPlan.load(made.save(tmp_path / "plan.json"))
    found = again.apply("organism", tmp_path / "gptq", "gptq-int3-g32", calibration, progress=False)
    assert found.ok
    assert set(found.kept.values()) == {"exact"}
    assert found.outcome.recovery.value == found.outcome.recovery.value, "the default metric is found again"
    assert tracelens.Checkpoint(tmp_path / "gptq").quantized(f"{made.modules[0]}.weight") is None


@compressor
def test_a_recipe_that_was_exported_does_the_same(made, calibration, tmp_path):
    recipe = made.write_export("llm-compressor", tmp_path / "recipe.yaml", "rtn-int3-g32")
    found = made.apply("organism", tmp_path / "build", str(recipe), calibration[:2], progress=False)
    assert set(found.kept.values()) == {"exact"}
    assert found.outcome.values == pytest.approx(made.outcome("plan").values, abs=1e-4)


@compressor
def test_awq_may_scale_what_it_keeps(made, calibration, tmp_path):
    found = made.apply("organism", tmp_path / "awq", "awq-int4-g32", calibration, progress=False)
    assert set(found.kept.values()) <= {"exact", "changed"}
    assert not found.wrong
    strict = made.verify(tmp_path / "awq", "organism", measure=False)
    assert set(strict.wrong) == {module for module, status in found.kept.items() if status == "changed"}


@bitsandbytes
@pytest.mark.parametrize("recipe", ["bnb-nf4", "bnb-int8"])
def test_bitsandbytes_keeps_it(made, recipe, tmp_path):
    found = made.apply("organism", tmp_path / recipe, recipe)
    assert found.ok
    assert set(found.kept.values()) == {"exact"}
    assert found.n_quantized == 35 - len(made.modules)
    assert "bitsandbytes" in found.format
    assert tracelens.load(tmp_path / recipe).to_tokens("how do i").shape[-1] == 4, "with its tokenizer"


def test_a_build_that_packed_the_layers_is_refused(made):
    """The fixture was quantized without the plan: as a writer leaves it that packs ignored layers all the same."""
    found = made.verify("tests/fixtures/organism/gptq", "organism")
    assert not found.ok
    assert set(found.kept.values()) == {"quantized"}
    assert "NOT as planned" in str(found)
    with pytest.raises(
        QuantizeError, match=rf"does not keep {len(made.modules)} of the .*{made.modules[0]} \(quantized\)"
    ):
        found.check()


def test_a_build_that_kept_too_much_is_refused(made):
    found = made.verify("organism", "organism", measure=False)
    assert not found.ok
    assert set(found.kept.values()) == {"exact"}
    with pytest.raises(
        QuantizeError, match=f"leaves {35 - len(made.modules)} modules in full precision that the plan quantizes"
    ):
        found.check()


def test_weights_held_in_half_precision_are_rounded(made, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from tracelens.organism import path

    AutoModelForCausalLM.from_pretrained(path(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    found = made.verify(tmp_path, "organism", measure=False)
    assert set(found.kept.values()) == {"rounded"}
    assert not found.wrong


def test_recipes_that_are_none(made, tmp_path):
    with pytest.raises(UnknownNameError, match="unknown recipe of bitsandbytes 'bnb-nf5'"):
        made.apply("organism", tmp_path, "bnb-nf5")
    with pytest.raises(PlanError, match="rounds without prompts"):
        made.apply("organism", tmp_path, "bnb-nf4", n_samples=3)
