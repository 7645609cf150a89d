"""What quantizers are told: the names of transformers' own modules, matched by each library's rule to these layers and no others."""

import functools
import json
import re

import pytest
import torch
import yaml

from tests.tiny import SIZES, SIZES_OF
from tracelens.causal.repair.exports import LIBRARIES, export, matched
from tracelens.causal.repair.module_names import aliases, module_of, modules_of, output_layers
from tracelens.errors import PlanError, UnknownNameError
from tracelens.loading.architectures import ARCHITECTURES

OPTIONS = {
    "Phi3ForCausalLM": {"pad_token_id": 0},
    "Gemma3ForConditionalGeneration": {"text_config": SIZES, "vision_config": {"num_hidden_layers": 1}},
}
EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "GptOssForCausalLM")
DENSE = [name for name in ARCHITECTURES if name not in EXPERTS]
LLAMA = [
    f"model.layers.{layer}.{part}"
    for layer in range(12)
    for part in (
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    )
]


@functools.cache
def in_transformers(architecture: str) -> dict[str, str]:
    """Linear modules inside the language model's blocks → their class, and the output layer."""
    import transformers

    kind = getattr(transformers, architecture)
    with torch.device("meta"):
        model = kind(kind.config_class(**{**SIZES_OF.get(architecture, SIZES), **OPTIONS.get(architecture, {})}))
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "vision" not in name and "projector" not in name
    }


def hooked_names(architecture: str, layers: int = 3) -> list[str]:
    """The parameters of a hooked model that are weight matrices."""
    table = ARCHITECTURES[architecture]
    sources = {key for group in (table.sources, *table.optional.values(), *table.variants) for key in group}
    leaves = {key.partition("{layer}.")[2] for key in sources if key.startswith("blocks")}
    weights = {leaf for leaf in leaves if re.search(r"\.W_\w+(\.weight)?$", leaf) and leaf != "mlp.W_gate.weight"}
    return [f"blocks.{layer}.{leaf.format(expert=0)}" for layer in range(layers) for leaf in sorted(weights)]


@pytest.mark.parametrize("architecture", DENSE)
def test_names_are_those_of_transformers(architecture):
    modules = set(modules_of(hooked_names(architecture), architecture).values())
    theirs = set(in_transformers(architecture)) - {"lm_head"}
    assert modules == theirs
    assert set(output_layers(architecture)) >= {"lm_head"} <= set(in_transformers(architecture))


@pytest.mark.parametrize("architecture", EXPERTS)
def test_names_of_experts(architecture):
    modules = modules_of(hooked_names(architecture, 1), architecture)
    assert {m for m in modules.values() if "experts" not in m} == {
        m for m in in_transformers(architecture) if ".0." in m
    }
    down = modules["blocks.0.mlp.experts.0.W_out.weight"]
    if architecture == "GptOssForCausalLM":
        with pytest.raises(
            PlanError, match=re.escape("model.layers.0.mlp.experts.down_proj holds several experts in one")
        ):
            export([down], architecture, "gptqmodel", known=list(modules.values()))
    else:
        assert "model.layers.0.mlp.experts.0.down_proj" in aliases(down), "as libraries that unpack experts call it"
        dynamic = export([down], architecture, "gptqmodel", known=[*dict.fromkeys(modules.values())])
        assert matched(dynamic, "gptqmodel", ["model.layers.0.mlp.experts.0.down_proj"])


@pytest.mark.parametrize(
    ("name", "architecture", "module"),
    [
        ("blocks.3.mlp.W_out", "LlamaForCausalLM", "model.layers.3.mlp.down_proj"),
        ("blocks.11.attn._W_K", "LlamaForCausalLM", "model.layers.11.self_attn.k_proj"),
        ("blocks.1.attn.W_Q", "GPT2LMHeadModel", "transformer.h.1.attn.c_attn"),
        ("blocks.1.attn.W_V", "GPT2LMHeadModel", "transformer.h.1.attn.c_attn"),
        ("transformer.h.1.attn.q.weight", "GPT2LMHeadModel", "transformer.h.1.attn.c_attn"),
        ("gpt_neox.layers.2.attention.o.weight", "GPTNeoXForCausalLM", "gpt_neox.layers.2.attention.dense"),
        ("model.layers.1.mlp.gate.weight", "Phi3ForCausalLM", "model.layers.1.mlp.gate_up_proj"),
        ("model.layers.1.self_attn.q_proj.weight", "LlamaForCausalLM", "model.layers.1.self_attn.q_proj"),
        ("blocks.0.mlp.experts.2.W_in.weight", "MixtralForCausalLM", "model.layers.0.mlp.experts.2.w3"),
    ],
)
def test_names_of_both_wrappers(name, architecture, module):
    assert module_of(name, architecture) == module


def test_what_has_no_name_is_said():
    with pytest.raises(PlanError, match="the modules of 'NewForCausalLM' are not known"):
        module_of("blocks.0.mlp.W_in", "NewForCausalLM")
    with pytest.raises(PlanError, match=r"no tensor from which blocks.0.mlp.W_extra is made"):
        module_of("blocks.0.mlp.W_extra", "LlamaForCausalLM")
    with pytest.raises(UnknownNameError, match="unknown library to export to 'ggml'"):
        export(LLAMA[:1], "LlamaForCausalLM", "ggml", known=LLAMA)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("architecture", DENSE)
def test_each_layer_is_matched_alone(library, architecture):
    """Whichever layer is kept, the library's rule finds it, the output layer, and nothing else."""
    known = [name for name in in_transformers(architecture) if name != "lm_head"]
    for module in known:
        made = export([module], architecture, library, known=known)
        assert matched(made, library, [*known, "lm_head"]) == [module, "lm_head"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_layer_1_is_not_layer_11(library):
    made = export(["model.layers.1.self_attn.o_proj"], "LlamaForCausalLM", library, known=LLAMA)
    found = matched(made, library, [*LLAMA, "lm_head"])
    assert found == ["model.layers.1.self_attn.o_proj", "lm_head"]


def test_a_name_that_begins_another_is_closed():
    known = ["model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj"]
    made = export(known[:1], "LlamaForCausalLM", "bitsandbytes", known=known)
    assert made == [r"^model\.layers\.1\.mlp\.gate$", "lm_head"]
    assert matched(made, "bitsandbytes", known) == known[:1]
    made = export(known[:1], "LlamaForCausalLM", "gptqmodel", known=known)
    assert matched(made, "gptqmodel", known) == known[:1]


@pytest.mark.parametrize("architecture", DENSE)
def test_transformers_reads_the_skip_list_alike(architecture):
    """Against the function that its bitsandbytes integration asks."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    known = list(in_transformers(architecture))
    inside = [name for name in known if name != "lm_head"]
    kept = inside[1::3]
    made = export(kept, architecture, "bitsandbytes", known=inside)
    assert [name for name in known if not should_convert_module(name, made)] == matched(made, "bitsandbytes", known)
    assert not should_convert_module("lm_head", made), "a list that is given replaces the default"


def test_llm_compressor_reads_the_ignore_list_alike():
    compressed_tensors = pytest.importorskip("compressed_tensors.utils.match")
    made = export(LLAMA[::5], "LlamaForCausalLM", "llm-compressor", known=LLAMA)
    theirs = [m for m in [*LLAMA, "lm_head"] if any(compressed_tensors.match_name(m, i) for i in made["ignore"])]
    assert theirs == matched(made, "llm-compressor", [*LLAMA, "lm_head"]) == [*LLAMA[::5], "lm_head"]


def test_keys_are_what_gptqmodel_takes():
    """Its facts: `-:` and a regular expression that has to match at the start; one between ^ and $ with nothing special but
    escapes is looked up as a literal, and it is asked about the part of the name inside the block too.
    """
    made = export(LLAMA[:2], "LlamaForCausalLM", "gptqmodel", known=LLAMA)
    assert json.loads(json.dumps(made)) == made
    for key, overrides in made.items():
        assert overrides == {}
        assert key.startswith("-:^")
        assert key.endswith("$")
        literal = re.sub(r"\\(.)", r"\1", key.removeprefix("-:^").removesuffix("$"))
        assert literal in [*LLAMA[:2], "lm_head"]
        assert not re.search(r"\\[a-zA-Z0-9]", key), "no class of characters"
    assert matched(made, "gptqmodel", ["self_attn.q_proj", "mlp.down_proj"]) == []
    assert matched({"-:.*down": {}, "-:^model": {}}, "gptqmodel", LLAMA) == LLAMA, "matching begins at the start"
    first = {"+:.*q_proj": {"bits": 8}, "-:.*": {}}
    assert "model.layers.0.self_attn.q_proj" not in matched(first, "gptqmodel", LLAMA), "the first that matches decides"


def test_layers_that_vllm_fuses_are_named_for_it_too():
    queries = [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    assert "model.layers.1.self_attn.qkv_proj" in export(queries, "LlamaForCausalLM", "bitsandbytes", known=LLAMA)
    part = export(queries[:2], "LlamaForCausalLM", "bitsandbytes", known=LLAMA)
    assert not any(name.endswith("qkv_proj") for name in part)


def test_a_recipe_is_one_that_llm_compressor_reads(tmp_path):
    recipes = pytest.importorskip("llmcompressor.recipe")
    made = export(LLAMA[:2], "LlamaForCausalLM", "llm-compressor", known=LLAMA, recipe="awq-int4-g128-asym")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(made["recipe"], sort_keys=False))
    modifiers = recipes.Recipe.create_instance(str(file)).modifiers
    assert [type(modifier).__name__ for modifier in modifiers] == ["AWQModifier", "QuantizationModifier"]
    assert modifiers[1].ignore == [*LLAMA[:2], "lm_head"]
    weights = modifiers[1].config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 128, False)
    nvfp4 = export(LLAMA[:1], "LlamaForCausalLM", "llm-compressor", known=LLAMA, recipe="nvfp4")
    file.write_text(yaml.safe_dump(nvfp4["recipe"]))
    scale = recipes.Recipe.create_instance(str(file)).modifiers[0].config_groups["group_0"].weights.scale_dtype
    assert scale == torch.float8_e4m3fn
