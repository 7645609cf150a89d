import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_checkpoint
from tracelens import load
from tracelens.errors import CheckpointError, UnsupportedArchitectureError
from tracelens.loading import Checkpoint
from tracelens.loading.alibi import slopes
from tracelens.loading.architectures import ARCHITECTURES
from tracelens.loading.hooked import build_hooked

CPU = torch.device("cpu")


def edit_config(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def rewrite(folder: Path, change) -> dict[str, torch.Tensor]:
    """Write the weights again as `change` has them; returns what was there."""
    before = load_file(folder / "model.safetensors")
    save_file(change(dict(before)), folder / "model.safetensors")
    return before


def renamed(pattern: str, replacement: str):
    return lambda tensors: {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}


def built(folder, dtype=torch.float32, **options):
    return build_hooked(Checkpoint(folder), dtype=dtype, device=CPU, **options)


def ids(length=20):
    return torch.arange(4, 4 + length)[None] % 40


@pytest.mark.parametrize(
    "architecture",
    ["GPTNeoXForCausalLM", "GPT2LMHeadModel", "Phi3ForCausalLM", "GptOssForCausalLM", "GemmaForCausalLM"],
)
def test_each_tensor_is_read_once_and_in_the_order_of_the_files(tmp_path, monkeypatch, architecture):
    padding = {"pad_token_id": 1}
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "m", architecture, max_shard_size="20KB", **padding))
    read, weight = [], Checkpoint.weight
    monkeypatch.setattr(Checkpoint, "weight", lambda self, name, **how: read.append(name) or weight(self, name, **how))
    build_hooked(checkpoint, dtype=torch.float32, device=CPU)
    assert read == checkpoint.names()


def fused(tensors, gate="w1", up="w3", down="w2"):
    """Experts as transformers 5 keeps them in memory."""
    experts = {}
    for name in [n for n in tensors if ".experts." in n]:
        layer, expert, kind = re.fullmatch(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w\d)\.weight", name).groups()
        experts.setdefault(layer, {}).setdefault(int(expert), {})[kind] = tensors.pop(name)
    for layer, rows in experts.items():
        rows = [rows[e] for e in sorted(rows)]
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat([r[gate], r[up]]) for r in rows])
        tensors[f"{layer}.mlp.experts.down_proj"] = torch.stack([r[down] for r in rows])
        tensors[f"{layer}.mlp.gate.weight"] = tensors.pop(f"{layer}.block_sparse_moe.gate.weight")
    return tensors


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("LlamaForCausalLM", renamed(r"^model\.", "")),
        ("GPT2LMHeadModel", renamed(r"^transformer\.", "")),
        ("GPTNeoForCausalLM", renamed(r"^transformer\.", "")),
        ("GPTJForCausalLM", renamed(r"^transformer\.", "")),
        ("GPTNeoXForCausalLM", renamed(r"^embed_out\.", "lm_head.")),
        ("GPTNeoXForCausalLM", renamed(r"^gpt_neox\.", "")),
        ("OPTForCausalLM", renamed(r"^model\.decoder\.", "decoder.")),
        ("BloomForCausalLM", renamed(r"^transformer\.", "")),
        ("Gemma3ForCausalLM", renamed(r"^model\.", "language_model.model.")),
        ("Gemma3ForCausalLM", renamed(r"^model\.", "model.language_model.")),
        ("MixtralForCausalLM", fused),
    ],
)
def test_older_and_shorter_names_are_those_of_the_same_model(tmp_path, architecture, change):
    folder = write_checkpoint(tmp_path / "m", architecture, pad_token_id=1)
    before, names = built(folder), Checkpoint(folder).names()
    stored = rewrite(folder, change)
    assert load_file(folder / "model.safetensors").keys() != stored.keys()
    after = built(folder)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    if change is not fused:
        assert set(Checkpoint(folder).names()) == set(names)


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
def test_experts_of_mixtral_under_the_names_of_other_families(tmp_path, wrapper):
    folder = write_checkpoint(tmp_path / "m", "MixtralForCausalLM")
    ids = torch.arange(4, 20)[None]
    wanted = load(folder, wrapper=wrapper, device="cpu")(ids)
    tensors = load_file(folder / "model.safetensors")
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        tensors = {
            re.sub(rf"block_sparse_moe(\.experts\.\d+)\.{ours}\.", rf"mlp\1.{theirs}.", name): tensor
            for name, tensor in tensors.items()
        }
    assert any("mlp.experts.3.up_proj" in name for name in tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(folder, wrapper=wrapper, device="cpu")(ids), wanted)


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
def test_a_split_mlp_of_phi3_is_the_fused_one(tmp_path, wrapper):
    folder = write_checkpoint(tmp_path / "m", "Phi3ForCausalLM", pad_token_id=0)
    ids = torch.arange(4, 20)[None]
    wanted, names = load(folder, wrapper=wrapper, device="cpu")(ids), set(Checkpoint(folder).names())
    tensors = load_file(folder / "model.safetensors")
    fused = {name: tensor for name, tensor in tensors.items() if "gate_up_proj" in name}
    for name, tensor in fused.items():
        del tensors[name]
        for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
            tensors[name.replace("gate_up_proj", part)] = half.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    split = Checkpoint(folder)
    assert set(split.names()) == names
    assert all(torch.equal(split.tensor(name), tensor) for name, tensor in fused.items())
    assert torch.equal(load(folder, wrapper=wrapper, device="cpu")(ids), wanted)

    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors .*model\.layers\.1\.mlp\.gate_up_proj\.weight"):
        load(folder, wrapper=wrapper, device="cpu")


@pytest.mark.parametrize(
    "architecture", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "GPTJForCausalLM", "OPTForCausalLM", "BloomForCausalLM"]
)
def test_names_are_those_of_the_state_dict(tmp_path, architecture):
    from tests.tiny import tiny_hf_model

    names = set(Checkpoint(write_checkpoint(tmp_path / "m", architecture)).names())
    assert names == set(tiny_hf_model(architecture).state_dict()) - (
        set() if "lm_head.weight" in names else {"lm_head.weight"}
    )


MASK = torch.ones(1, 1, 8, 8).tril()


@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        ("GPT2LMHeadModel", "transformer.h.1.attn"),
        ("GPTNeoForCausalLM", "transformer.h.1.attn.attention"),
        ("GPTJForCausalLM", "transformer.h.1.attn"),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.1.attention"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_of_old_checkpoints_are_left_out_but_not_biases(tmp_path, architecture, module, dtype):
    folder = write_checkpoint(tmp_path / "m", architecture)
    before = built(folder)(ids())
    buffers = {f"{module}.bias": MASK.to(dtype), f"{module}.masked_bias": torch.tensor(-1e9)}
    stored = rewrite(folder, lambda tensors: tensors | buffers)
    assert torch.equal(built(folder)(ids()), before)
    save_file({**stored, f"{module}.bias": torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"1 tensors that are no part of .*{module}\.bias"):
        built(folder)


def test_frequencies_are_left_out_only_where_the_model_rotates(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "GPTNeoXForCausalLM")
    rewrite(folder, lambda t: t | {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1)})
    built(folder)
    folder = write_checkpoint(tmp_path / "opt", "OPTForCausalLM")
    rewrite(folder, lambda t: t | {"model.decoder.rotary_emb.inv_freq": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no part of OPTForCausalLM"):
        built(folder)


def test_a_bias_that_is_no_part_of_the_model_is_refused_unless_it_adds_nothing(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "m")
    extra = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda tensors: tensors | {extra: torch.ones(32)})
    with pytest.raises(CheckpointError, match=rf"no part of .*{extra}"):
        built(folder)
    monkeypatch.setattr(Checkpoint, "adds_nothing", lambda self, name: name == extra)
    assert not built(folder).blocks[0].attn.b_Q.any()


def test_all_wrong_shapes_are_named_before_anything_is_made(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "m", "GPTNeoXForCausalLM")
    fused_name, norm = "gpt_neox.layers.1.attention.query_key_value.weight", "gpt_neox.final_layer_norm.bias"
    rewrite(folder, lambda t: t | {fused_name: torch.zeros(64, 32), norm: torch.zeros(31)})
    monkeypatch.setattr("tracelens.loading.hooked._empty_model", lambda *a, **k: pytest.fail("a model was made"))
    with pytest.raises(CheckpointError) as error:
        built(folder)
    assert f"{fused_name} is [64, 32], expected [96, 32]" in str(error.value)
    assert f"{norm} is [31], expected [32]" in str(error.value)


def test_weights_of_a_fused_tensor_lie_where_they_belong(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "GPTNeoXForCausalLM")
    model, disk = built(folder), load_file(folder / "model.safetensors")
    rows = disk["gpt_neox.layers.2.attention.query_key_value.weight"]
    biases = disk["gpt_neox.layers.2.attention.query_key_value.bias"]
    for head in range(4):
        for place, letter in enumerate("QKV"):
            where = slice((head * 3 + place) * 8, (head * 3 + place + 1) * 8)
            assert torch.equal(getattr(model.blocks[2].attn, f"W_{letter}")[head], rows[where].T)
            assert torch.equal(getattr(model.blocks[2].attn, f"b_{letter}")[head], biases[where])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "architecture", ["MixtralForCausalLM", "GptOssForCausalLM", "GPT2LMHeadModel", "GemmaForCausalLM"]
)
def test_all_parameters_have_the_dtype_asked_for(tmp_path, architecture, dtype):
    model = built(write_checkpoint(tmp_path / "m", architecture, pad_token_id=1), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model(ids()).isfinite().all()


def test_gemmas_norms_are_one_more_than_stored_rounded_once(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "GemmaForCausalLM", pad_token_id=1)
    disk = load_file(folder / "model.safetensors")
    model = built(folder, torch.bfloat16)
    stored = disk["model.layers.0.input_layernorm.weight"]
    assert torch.equal(model.blocks[0].ln1.w, (1 + stored).bfloat16())
    embedding = disk["model.embed_tokens.weight"].bfloat16()
    assert torch.equal(model.W_E, embedding * torch.tensor(32**0.5).bfloat16())
    assert torch.equal(model.W_U, embedding.T)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "OPTForCausalLM", "GPTNeoForCausalLM"])
def test_learned_positions_are_cut_and_never_made_up(tmp_path, architecture):
    folder = write_checkpoint(tmp_path / "m", architecture)
    whole, short = built(folder), built(folder, n_ctx=24)
    assert short.cfg.n_ctx == 24
    assert torch.equal(short.W_pos, whole.W_pos[:24])
    torch.testing.assert_close(short(ids()), whole(ids()))
    with pytest.raises(CheckpointError, match=r"n_ctx=65 is more than the 64 positions .*at most 64"):
        built(folder, n_ctx=65)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPTJForCausalLM", "BloomForCausalLM"])
@pytest.mark.parametrize("n_ctx", [24, 5000])
def test_other_contexts_are_as_long_as_asked_for(tmp_path, architecture, n_ctx):
    folder = write_checkpoint(tmp_path / "m", architecture)
    model = built(folder, n_ctx=n_ctx)
    assert model.cfg.n_ctx == n_ctx
    torch.testing.assert_close(model(ids()), built(folder)(ids()))


@pytest.mark.parametrize("n_ctx", [0, -1, True])
def test_a_context_must_be_a_number_of_tokens(tiny_folder, n_ctx):
    with pytest.raises(CheckpointError, match=r"n_ctx is .*positive number of tokens"):
        built(tiny_folder, n_ctx=n_ctx)


def test_a_window_shows_only_where_the_context_is_longer(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "MistralForCausalLM", sliding_window=30)
    assert not built(folder, n_ctx=30).cfg.use_local_attn
    assert built(folder, n_ctx=31).cfg.window_size == 30


def test_scaled_ropes_do_not_move_with_the_context(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}
    folder = write_checkpoint(tmp_path / "m", rope_parameters=rope)
    torch.testing.assert_close(built(folder, n_ctx=2000)(ids()), built(folder)(ids()))


def same_memory(a, b):
    return a.data_ptr() == b.data_ptr()


def test_a_pair_shares_what_is_the_same_bit_for_bit(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "m", "GPT2LMHeadModel")
    changed, zero = "transformer.h.1.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias"
    quantized = "transformer.h.2.attn.c_attn.weight"
    before = load_file(folder / "model.safetensors")
    # A zero that differs from another only by its sign.
    save_file({**before, zero: torch.zeros(128)}, folder / "model.safetensors")
    first = built(folder)
    other = {**before, changed: before[changed] + 1, zero: torch.zeros(128).index_fill(0, torch.tensor([5]), -0.0)}
    save_file(other, folder / "model.safetensors")
    monkeypatch.setattr(Checkpoint, "quantized", lambda self, name: "yes" if name == quantized else None)
    second, alone = built(folder, share=first), built(folder)

    ours, theirs = dict(second.named_parameters()), dict(first.named_parameters())
    own = {name for name in ours if not same_memory(ours[name], theirs[name])}
    from_disk = {name for name in own if not name.endswith("b_U")}
    assert from_disk == {"blocks.1.mlp.W_in", "blocks.0.mlp.b_in", *(f"blocks.2.attn.W_{x}" for x in "QKV")}
    for name, parameter in alone.named_parameters():
        assert torch.equal(ours[name].view(torch.int32), parameter.view(torch.int32)), name
    assert not any(same_memory(p, theirs[n]) for n, p in alone.named_parameters())


def test_nothing_is_shared_between_dtypes(tiny_folder, tiny_model):
    half = built(tiny_folder, torch.bfloat16, share=tiny_model)
    theirs = dict(tiny_model.named_parameters())
    assert not any(same_memory(p, theirs[n]) for n, p in half.named_parameters())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_remote_code_is_never_run_and_not_needed_for_what_is_known(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    code = {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')")
    built(edit_config(folder, auto_map=code))
    edit_config(folder, architectures=["EvilForCausalLM"])
    with pytest.raises(UnsupportedArchitectureError, match=r"'EvilForCausalLM'.*LlamaForCausalLM.*never run"):
        built(folder)
    edit_config(folder, auto_map=...)
    with pytest.raises(UnsupportedArchitectureError) as error:
        built(folder)
    assert "never run" not in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("LlamaForCausalLM", {"attention_multiplier": 0.5}, "sets attention_multiplier=0.5"),
        ("LlamaForCausalLM", {"logits_scaling": 8.0}, "sets logits_scaling=8.0"),
        ("LlamaForCausalLM", {"qk_layernorm": True}, "sets qk_layernorm=True"),
        ("LlamaForCausalLM", {"num_local_experts": 8}, "sets num_local_experts=8"),
        (
            "LlamaForCausalLM",
            {"head_dim": ..., "num_attention_heads": 5},
            "32 is not divisible by num_attention_heads=5",
        ),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "not divisible by num_key_value_heads=3"),
        ("LlamaForCausalLM", {"num_hidden_layers": "3"}, "num_hidden_layers='3' is no positive whole number"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supp"),
        ("LlamaForCausalLM", {"rope_parameters": {"mrope_section": [1, 2, 1]}}, "mrope_section"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, "chunked_attent"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention=True is not supported, only False"),
        ("GPT2LMHeadModel", {"activation_function": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
        ("GPT2LMHeadModel", {"hidden_size": 64}, "n_embd=32 and hidden_size=64, which mean the same"),
        ("GPTNeoForCausalLM", {"attention_types": [[["global"], 2]], "attention_layers": ...}, "for each of 3 layers"),
        ("GPTNeoXForCausalLM", {"rope_parameters": ..., "rotary_pct": 0.4}, "rotates 3 of 8"),
        ("GPTJForCausalLM", {"rotary_dim": 16}, "rotary_dim=16 must be even and at most the 8"),
        ("OPTForCausalLM", {"do_layer_norm_before": False}, "do_layer_norm_before=False is not supported, only True"),
        ("OPTForCausalLM", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 is not supported"),
        ("OPTForCausalLM", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True is not supported"),
        ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}, "post_layernorm=True is not supp"),
        ("PhiForCausalLM", {"qk_layernorm": True}, "qk_layernorm=True is not supported"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "bidirectional_attention=True is not supported"),
        ("Olmo2ForCausalLM", {"head_dim": 16}, "head_dim=16 times num_attention_heads=4 must be hidden_size=32"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than num_experts=4"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("GptOssForCausalLM", {"swiglu_limit": 5.0}, "swiglu_limit=5.0 is not supported, only 7.0"),
    ],
)
def test_what_would_compute_otherwise_is_refused_by_name(tmp_path, architecture, changes, message):
    folder = write_checkpoint(tmp_path / "m", architecture, pad_token_id=1)
    built(folder)
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        built(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None, "rope_scaling": None, "use_mrope": False, "num_experts": 0},
        {"_attn_implementation_autoset": True, "pretraining_tp": 1, "attention_dropout": 0.1, "unsloth_fixed": True},
        {"transformers.js_config": {"kv_cache_dtype": "x"}, "torch_dtype": "float16", "quantization": None},
    ],
)
def test_keys_that_change_nothing_may_be_there(tiny_folder, tmp_path, tiny_model, changes):
    folder = edit_config(write_checkpoint(tmp_path / "m"), **changes)
    assert torch.equal(built(folder)(ids()), tiny_model(ids()))


def test_longrope_ends_where_the_prompts_length_would_matter(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 500.0}
    limits = {"pad_token_id": 1, "original_max_position_embeddings": 32}
    folder = write_checkpoint(tmp_path / "m", "Phi3ForCausalLM", rope_parameters=rope, **limits)
    assert built(folder).cfg.n_ctx == 32
    assert built(folder, n_ctx=8).cfg.n_ctx == 8
    with pytest.raises(CheckpointError, match=r"n_ctx=33 is more than the 32 positions .*at most 32"):
        built(folder, n_ctx=33)
    edit_config(folder, rope_parameters={**rope, "short_factor": [1.0] * 3})
    with pytest.raises(CheckpointError, match=r"short_factor has 3 values, expected 4"):
        built(folder)


def test_a_second_unembedding_that_differs_contradicts_tying(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "GPT2LMHeadModel")
    before = rewrite(folder, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()})
    built(folder)
    save_file({**before, "lm_head.weight": torch.zeros(48, 32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from transformer.wte.weight"):
        built(folder)


def test_apertus_may_lack_the_constants_of_its_activation(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "ApertusForCausalLM")
    before = built(folder)(ids())
    rewrite(folder, lambda t: {n: v for n, v in t.items() if not n.endswith(("act_fn.beta", "act_fn.eps"))})
    torch.testing.assert_close(built(folder)(ids()), before, rtol=1e-3, atol=1e-3)
    rewrite(folder, lambda t: {n: v for n, v in t.items() if not n.endswith("act_fn.alpha_p")})
    with pytest.raises(CheckpointError, match=r"lack 3 tensors .*act_fn\.alpha_p"):
        built(folder)


@pytest.mark.parametrize(
    ("n_heads", "expected"),
    [
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (1, [2**-8]),
    ],
)
def test_slopes_are_those_of_the_paper(n_heads, expected):
    torch.testing.assert_close(slopes(n_heads), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", ["BloomForCausalLM", "GPT2LMHeadModel", "GptOssForCausalLM"])
def test_a_cache_of_keys_and_values_changes_nothing(tmp_path, architecture):
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    sizes = {"n_head": 6, "hidden_size": 36} if architecture == "BloomForCausalLM" else {}
    model = load(write_checkpoint(tmp_path / "m", architecture, **sizes), device="cpu")
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, CPU, 1)
    whole = model(ids())
    parts = [model(ids()[:, :12], past_kv_cache=cache), model(ids()[:, 12:], past_kv_cache=cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_every_row_of_the_table_names_its_embedding_among_its_sources():
    for name, row in ARCHITECTURES.items():
        assert row.sources["embed.W_E"].name == row.embed, name
