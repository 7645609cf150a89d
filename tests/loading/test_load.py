import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.tiny as tiny
from tests.tiny import write_checkpoint
from tracelens import load
from tracelens.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    UnknownNameError,
    UnsupportedArchitectureError,
)
from tracelens.loading import Checkpoint


def edit_config(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("name", ["llama", "my gemma-2b", "gpt2", "Llama-3.1-8B", "phi mistralai"])
def test_the_name_of_the_folder_decides_nothing(tmp_path, tiny_model, name, no_network):
    folder = write_checkpoint(tmp_path / name)
    model = load(folder, device="cpu")
    ids = torch.arange(4, 20)[None]
    assert torch.equal(model(ids), tiny_model(ids))
    assert model.cfg.model_name == name


@pytest.mark.parametrize("as_type", [str, Path])
def test_loading_uses_no_network(tiny_folder, no_network, as_type):
    assert load(as_type(tiny_folder)).cfg.d_model == 32


def test_a_relative_path_is_named_after_its_folder(tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder)
    assert load(".").cfg.model_name == tiny_folder.name


def test_the_model_is_frozen_unprocessed_and_as_configured(tiny_model):
    assert not tiny_model.training
    assert not any(p.requires_grad for p in tiny_model.parameters())
    assert tiny_model.cfg.normalization_type == "RMS"
    assert tiny_model.cfg.n_ctx == 64
    assert (tiny_model.cfg.n_heads, tiny_model.cfg.n_key_value_heads, tiny_model.cfg.d_head) == (4, 2, 8)
    assert tiny_model.cfg.original_architecture == "LlamaForCausalLM"


def test_weights_are_those_on_disk(tiny_folder, tiny_model):
    from safetensors.torch import load_file

    disk = load_file(tiny_folder / "model.safetensors")
    q, k = disk["model.layers.1.self_attn.q_proj.weight"], disk["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(tiny_model.blocks[1].attn.W_Q[3], q[24:32].T)
    assert torch.equal(tiny_model.blocks[1].attn._W_K[1], k[8:16].T)
    assert torch.equal(tiny_model.W_U, disk["lm_head.weight"].T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_asked_for(tmp_path, dtype):
    model = load(write_checkpoint(tmp_path / "m", dtype=torch.float16), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.arange(4, 20)[None]).dtype == dtype


def test_tied_embeddings_become_two_parameters(tmp_path):
    model = load(write_checkpoint(tmp_path / "m", tie_word_embeddings=True))
    assert torch.equal(model.W_U, model.W_E.T)
    model.unembed.W_U.zero_()
    assert model.W_E.abs().max() > 0


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokens_are_those_of_the_checkpoints_tokenizer(tmp_path, add_bos, no_network):
    model = load(write_checkpoint(tmp_path / "m", add_bos=add_bos))
    original = tiny.tiny_tokenizer(add_bos=add_bos)
    for text in tiny.TEXTS:
        assert model.to_tokens(text).tolist() == [original(text).input_ids]
    assert model.to_tokens(tiny.TEXTS).tolist() == original(tiny.TEXTS, padding=True).input_ids
    assert model.cfg.default_prepend_bos is add_bos
    assert model.cfg.tokenizer_prepends_bos is add_bos
    bare = original("the cat", add_special_tokens=False).input_ids
    assert model.to_tokens("the cat", prepend_bos=True).tolist() == [[original.bos_token_id, *bare]]
    assert model.to_tokens("the cat", prepend_bos=False).tolist() == [bare]


def test_the_chat_template_is_kept(tiny_model):
    text = tiny_model.tokenizer.apply_chat_template([{"role": "i", "content": "no"}], tokenize=False)
    assert text == "<s>i no "


def test_a_tokenizer_without_padding_can_still_batch(folder):
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).exists():
            settings = json.loads((folder / file).read_text())
            settings.pop("pad_token", None)
            (folder / file).write_text(json.dumps(settings))
    model = load(folder)
    assert model.tokenizer.pad_token == "</s>"
    assert model.to_tokens(["yes no", "yes"]).shape == (2, 3)


def test_a_folder_without_tokenizer_takes_token_ids(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    model = load(folder)
    assert model.tokenizer is None
    assert model(torch.arange(4, 20)[None]).shape == (1, 16, 48)


def test_a_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer in .* cannot be opened"):
        load(folder)


def test_a_hooked_model_is_passed_through(tiny_model):
    assert load(tiny_model) is tiny_model


def test_organism_is_the_folder_in_the_package(tiny_folder, monkeypatch):
    monkeypatch.setattr("tracelens.organism.path", lambda: tiny_folder, raising=False)
    model = load("organism")
    assert model.cfg.d_model == 32
    assert model.cfg.model_name == "organism"


def test_precision_is_simulated_on_a_copy(tiny_folder, tiny_model):
    ids = torch.arange(4, 20)[None]
    before = tiny_model(ids)
    from_folder, from_model = load(tiny_folder, precision="int4"), load(tiny_model, precision="int4")
    assert not torch.equal(from_folder(ids), before)
    assert torch.equal(from_folder(ids), from_model(ids))
    assert torch.equal(tiny_model(ids), before)


def test_a_wrong_precision_is_found_before_anything_is_read(tmp_path):
    with pytest.raises(UnknownNameError, match="int99"):
        load(tmp_path / "nothing", precision="int99")


def test_a_model_without_hook_points_is_refused():
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM is not a model with hook points.*run_with_cache"):
        load(tiny.tiny_hf_model())


def test_unknown_wrapper_and_dtype_list_what_exists(tiny_folder):
    with pytest.raises(UnknownNameError, match=r"unknown wrapper 'bridged'.*Did you mean 'bridge'.* Known: hooked, br"):
        load(tiny_folder, wrapper="bridged")
    with pytest.raises(UnknownNameError, match=r"unknown dtype 'torch.int8'.* Known: torch.float32"):
        load(tiny_folder, dtype=torch.int8)


def test_a_model_says_how_it_was_stored(tiny_model):
    fixtures = Path(__file__).parents[1] / "fixtures" / "checkpoints"
    assert tiny_model.stored_as == "full precision"
    assert load(fixtures / "bnb" / "int8" / "llama").stored_as.startswith("bitsandbytes")


def test_progress_is_shown_when_it_is_asked_for(tiny_folder, capsys):
    load(tiny_folder)
    assert capsys.readouterr().err == ""
    load(tiny_folder, progress=True)
    assert "loading" in capsys.readouterr().err


def test_a_checkpoint_that_is_open_can_be_loaded(tiny_folder, tiny_model):
    ids = torch.arange(4, 20)[None]
    assert torch.equal(load(Checkpoint(tiny_folder))(ids), tiny_model(ids))


def test_options_that_would_be_without_effect_are_refused(tiny_folder, tiny_model):
    with pytest.raises(
        CheckpointError, match=r"round_to=torch\.bfloat16 comes too late .*Checkpoint\(\.\.\., round_to"
    ):
        load(Checkpoint(tiny_folder), round_to=torch.bfloat16)
    load(Checkpoint(tiny_folder, round_to=torch.bfloat16), round_to=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"share=\.\.\. goes with wrapper='hooked'"):
        load(tiny_folder, wrapper="bridge", share=tiny_model)


def test_a_missing_folder_says_what_to_give(tmp_path, no_network):
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint folder at .*\.gguf file.*hub.*'organism'"):
        load(tmp_path / "nothing")


def test_the_context_can_be_cut_and_stretched(tiny_folder, tiny_model):
    ids = torch.arange(4, 20)[None]
    for n_ctx in (16, 200):
        model = load(tiny_folder, n_ctx=n_ctx)
        assert model.cfg.n_ctx == n_ctx
        torch.testing.assert_close(model(ids), tiny_model(ids))
    assert load(tiny_folder, n_ctx=200)(torch.full((1, 150), 5)).isfinite().all()
    with pytest.raises(CheckpointError, match="n_ctx is 0"):
        load(tiny_folder, n_ctx=0)


def test_an_unsupported_architecture_lists_the_supported(folder):
    edit_config(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedArchitectureError, match=r"'MambaForCausalLM'.*MistralForCausalLM, Qwen2ForCausalLM"):
        load(folder)


def test_a_config_without_architecture_is_refused(folder):
    edit_config(folder, architectures=...)
    with pytest.raises(CheckpointError, match=r"does not say which architecture"):
        load(folder)


def test_a_quantization_nobody_knows_is_refused_with_what_is_known(folder):
    edit_config(folder, quantization_config={"quant_method": "abacus", "bits": 4})
    with pytest.raises(
        CheckpointError, match=r"quantized \(abacus\), in a layout that is not known.*bitsandbytes.*origi"
    ):
        load(folder)


def test_tensors_that_quantization_left_alone_are_shared(tmp_path, tiny_folder, tiny_model):
    folder = write_checkpoint(tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    changed = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, changed: tensors[changed] + 1}, folder / "model.safetensors")
    model = load(folder, device="cpu", share=tiny_model)
    ours, theirs = dict(model.named_parameters()), dict(tiny_model.named_parameters())
    own = {name for name, parameter in ours.items() if parameter.data_ptr() != theirs[name].data_ptr()}
    # Constants that the conversion adds (biases of zero) may be shared or not; what was read from disk is.
    assert "blocks.1.mlp.W_in" in own
    assert {name for name in own if "W_" in name or name.endswith(".w")} == {"blocks.1.mlp.W_in"}
    fresh = load(folder, device="cpu")
    assert all(torch.equal(ours[name], parameter) for name, parameter in fresh.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
        ({"hidden_act": "relu6"}, "hidden_act 'relu6' is not supported; supported: silu"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope scaling 'longrope' is not supported; supported: d",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope parameters lacks 'low_freq_factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layers"),
    ],
)
def test_configs_that_are_not_understood_are_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)
