import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_hf_model, write_checkpoint
from tracelens.errors import CheckpointError, NonFiniteError, UnsupportedArchitectureError
from tracelens.loading import Checkpoint
from tracelens.loading.plain import build_plain

CPU = torch.device("cpu")
GEMMA = {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA_WINDOWS = {**GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 8, "num_hidden_layers": 4}
CASES = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-untied": ("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    "neox": ("GPTNeoXForCausalLM", {"rotary_pct": 0.25}),
    "neox-tied": ("GPTNeoXForCausalLM", {"tie_word_embeddings": True, "use_parallel_residual": False}),
    "gptj": ("GPTJForCausalLM", {"rotary_dim": 4}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 40, "word_embed_proj_dim": 32}),
    "opt-350m": ("OPTForCausalLM", {"ffn_dim": 40, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("BloomForCausalLM", {}),
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-3": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 500.0,
            }
        },
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma": ("GemmaForCausalLM", GEMMA),
    "gemma2": ("Gemma2ForCausalLM", GEMMA_WINDOWS),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA_WINDOWS, "sliding_window_pattern": 2}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 0}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}
EAGER = {"attn_implementation": "eager"}


def write(folder, architecture="LlamaForCausalLM", **config):
    """A checkpoint folder and the transformers model in it."""
    model = tiny_hf_model(architecture, **config, **EAGER)
    model.save_pretrained(folder)
    return folder, model


def build(folder, dtype=torch.float32):
    return build_plain(Checkpoint(folder), dtype=dtype, device=CPU)


def rewrite(folder, change):
    """Change the tensors of a checkpoint, given as a dict, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_equals_the_original(tmp_path, case, no_network):
    architecture, config = CASES[case]
    folder, original = write(tmp_path, architecture, **config)
    model = build(folder)
    assert type(model) is type(original)
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for mine, theirs in ((model.state_dict(), original.state_dict()), *buffers(model, original)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name]), name
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, original)]
    assert tied[0] == tied[1] == bool(original.config.tie_word_embeddings)
    ids = torch.randint(4, 30, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)


def buffers(*models):
    yield tuple(dict(model.named_buffers()) for model in models)


def test_weights_that_a_format_dequantizes(tmp_path, monkeypatch):
    # Whatever the format, tensors come from `Checkpoint.weight`; a view, not contiguous, as formats may return it.
    folder, original = write(tmp_path)
    plain = Checkpoint.weight

    def halved(self, name, **options):
        tensor = plain(self, name, **options)
        return tensor.mT.contiguous().mT / 2 if tensor.ndim == 2 else tensor

    monkeypatch.setattr(Checkpoint, "weight", halved)
    for name, tensor in build(folder).state_dict().items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, original.state_dict()[name] / (2 if tensor.ndim == 2 else 1))


def test_config_says_nothing_of_quantization(tmp_path, monkeypatch):
    folder, _ = write(tmp_path)
    checkpoint = Checkpoint(folder)
    checkpoint.config = {**checkpoint.config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    model = build_plain(checkpoint, dtype=torch.float32, device=CPU)
    assert not hasattr(model.config, "quantization_config")


def test_dtype(tmp_path):
    folder, original = write(tmp_path)
    model = build(folder, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, original.lm_head.weight.to(torch.bfloat16))
    assert model.config.dtype == torch.bfloat16
    # Rotary frequencies stay exact.
    assert torch.equal(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)


def test_shards_and_older_names(tmp_path):
    original = tiny_hf_model("GPTNeoXForCausalLM", **EAGER)
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    model = build(tmp_path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.state_dict().items())


@pytest.mark.parametrize("old", ["embed_out.weight", "lm_head.weight"])
def test_neox_unembedding_under_either_name(tmp_path, old):
    folder, original = write(tmp_path, "GPTNeoXForCausalLM")

    def rename(tensors):
        tensors[old] = tensors.pop("embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight")

    assert torch.equal(build(rewrite(folder, rename)).lm_head.weight, original.lm_head.weight)


def test_names_without_the_base_prefix(tmp_path):
    folder, original = write(tmp_path, "GPT2LMHeadModel")

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    model = build(rewrite(folder, strip))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.state_dict().items())


def test_the_model_owns_its_memory(tmp_path):
    folder, original = write(tmp_path)
    checkpoint = Checkpoint(folder)
    model = build_plain(checkpoint, dtype=torch.float32, device=CPU)
    model.lm_head.weight.zero_()
    assert torch.equal(checkpoint.tensor("lm_head.weight"), original.lm_head.weight)


def test_memory_holds_one_tensor_beside_the_model(tmp_path, monkeypatch):
    # Tensors are read one at a time: none is asked for before the one before it has been handed over.
    folder, _ = write(tmp_path, num_hidden_layers=6)
    plain, reading = Checkpoint.weight, []

    def watched(self, name, **options):
        assert not reading, "two at a time"
        reading.append(name)
        try:
            return plain(self, name, **options)
        finally:
            reading.remove(name)

    monkeypatch.setattr(Checkpoint, "weight", watched)
    build(folder)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_missing_tensor(tmp_path, architecture):
    folder, _ = write(tmp_path, architecture)
    name = next(name for name in load_file(folder / "model.safetensors") if "attn" in name and ".1." in name)
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lack 1 tensors of .*{name}; get the whole checkpoint"):
        build(folder)


def test_extra_tensor(tmp_path):
    folder, _ = write(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    with pytest.raises(CheckpointError, match=r"no part of .*layers\.0\.self_attn\.q_proj\.bias; .*check config"):
        build(folder)


def test_more_layers_than_the_config_says(tmp_path):
    folder, _ = write(tmp_path)
    with pytest.raises(CheckpointError, match=r"hold 9 tensors .*model\.layers\.2\."):
        build(edit_config(folder, num_hidden_layers=2))


def test_mis_shaped_tensor(tmp_path):
    folder, _ = write(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[31\], expected \[32\]"):
        build(folder)


def test_nothing_is_read_of_a_checkpoint_that_does_not_fit(tmp_path, monkeypatch):
    folder, _ = write(tmp_path)
    monkeypatch.setattr(Checkpoint, "weight", lambda *args, **options: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="shape"):
        build(edit_config(folder, vocab_size=47))


def test_stored_twice(tmp_path):
    folder, _ = write(tmp_path, "FalconForCausalLM")
    rewrite(folder, lambda tensors: tensors.update({"ln_f.bias": torch.zeros(32)}))
    twice = r"'transformer\.ln_f\.bias' twice, as 'ln_f\.bias' and as 'transformer\.ln_f\.bias'"
    with pytest.raises(CheckpointError, match=twice):
        build(folder)


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"


def mixtral(folder):
    return write(folder, "MixtralForCausalLM", num_local_experts=4)[0]


def test_missing_expert(tmp_path):
    folder = rewrite(mixtral(tmp_path), lambda tensors: tensors.pop(EXPERT.format(2)))
    with pytest.raises(CheckpointError, match=r"lack 1 tensors of experts: .*experts\.2\.w1\.weight"):
        build(folder)


def test_misnumbered_expert(tmp_path):
    def shift(tensors):
        for part in ("w1", "w2", "w3"):
            old = EXPERT.format(3).replace("w1", part)
            tensors[old.replace("experts.3", "experts.4")] = tensors.pop(old)

    with pytest.raises(CheckpointError, match=r"experts\.3\.w"):
        build(rewrite(mixtral(tmp_path), shift))


def test_too_few_experts(tmp_path):
    with pytest.raises(CheckpointError, match=r"experts.*is \[4, .*expected \[8, "):
        build(edit_config(mixtral(tmp_path), num_local_experts=8))


def test_mis_shaped_expert(tmp_path):
    folder = rewrite(mixtral(tmp_path), lambda tensors: tensors.update({EXPERT.format(2): torch.zeros(40, 31)}))
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1\.weight .* is \[40, 31\], expected \[40, 32\]"):
        build(folder)


def test_parts_of_experts_that_do_not_fit_together(tmp_path):
    def narrow(tensors):
        tensors |= {EXPERT.format(n).replace("w3", "w1"): torch.zeros(40, 31) for n in range(4)}

    with pytest.raises(
        CheckpointError, match=r"no model\.layers\.1\.mlp\.experts\.gate_up_proj can be made of its parts"
    ):
        build(rewrite(mixtral(tmp_path), narrow))


def test_experts_given_fused_and_in_parts(tmp_path):
    fused = {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 80, 32)}
    folder = rewrite(mixtral(tmp_path), lambda tensors: tensors.update(fused))
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj' twice, as .*its parts"):
        build(folder)


def test_tied_embeddings_that_differ(tmp_path):
    folder, original = write(tmp_path, tie_word_embeddings=True)
    same = original.model.embed_tokens.weight.detach()
    model = build(rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": same.clone()})))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": same + 1}))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings, but lm_head\.weight differs"):
        build(folder)


def test_untied_without_an_unembedding(tmp_path):
    folder, _ = write(tmp_path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lack 1 tensors .*lm_head\.weight"):
        build(edit_config(folder, tie_word_embeddings=False))


def test_non_finite(tmp_path):
    folder, _ = write(tmp_path)
    rewrite(folder, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].mul_(1e6))
    build(folder)
    with pytest.raises(NonFiniteError, match=r"layers\.2\.mlp\.up_proj\.weight.* overflows torch\.float16"):
        build(folder, torch.float16)


@pytest.mark.parametrize("name", ["NoSuchForCausalLM", "pipeline", "LlamaConfig", "PreTrainedModel"])
def test_unknown_architecture(tmp_path, name):
    folder, _ = write(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=f"no model class '{name}'"):
        build(edit_config(folder, architectures=[name]))


def test_config_of_another_architecture(tmp_path):
    folder, _ = write(tmp_path)
    with pytest.raises(CheckpointError, match="model_type is 'mistral', and the model_type 'llama'"):
        build(edit_config(folder, architectures=["MistralForCausalLM"]))
    with pytest.raises(CheckpointError, match=r"does not accept config\.json"):
        build(edit_config(folder, architectures=["LlamaForCausalLM"], hidden_size="wide"))


def test_without_a_model_type(tmp_path):
    folder, original = write(tmp_path)
    model = build(edit_config(folder, model_type=None))
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_is_quiet(tmp_path, capfd, caplog):
    folder = write_checkpoint(tmp_path)
    with caplog.at_level(logging.INFO):
        build(folder)
        rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
        capfd.readouterr()
        with pytest.raises(CheckpointError):
            build(folder)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
