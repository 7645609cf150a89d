"""Bridges against transformers and against hooked models: logits, activations and what editing them does, float32."""

import pytest
import torch

import tracelens
from tests.tiny import tiny_hf_model, tiny_tokenizer, write_checkpoint
from tracelens.errors import CheckpointError, PairMismatchError, UnsupportedArchitectureError
from tracelens.loading import Checkpoint, bridge
from tracelens.loading.bridge import build_bridge
from tracelens.pair import PrecisionPair, stream_aligned
from tracelens.sites import HOOKS, Site

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Relative to the largest value."""
MHA = {"num_key_value_heads": 4}
GEMMA = {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "neox": ("GPTNeoXForCausalLM", {**MHA, "rotary_pct": 0.25}),
    "gpt2": ("GPT2LMHeadModel", {**MHA, "n_inner": 40}),
    "gptj": ("GPTJForCausalLM", {**MHA, "rotary_dim": 4}),
    "opt": ("OPTForCausalLM", {**MHA, "ffn_dim": 40, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", MHA),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma": ("GemmaForCausalLM", GEMMA),
    "gemma2": ("Gemma2ForCausalLM", {**GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "phi": ("PhiForCausalLM", MHA),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 0}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {}),
}
MAIN = ["llama", "qwen2", "neox", "gpt2"]
PARALLEL = ("neox", "gptj", "phi")
"""Architectures whose attention and MLP read the same residual stream: there is no point between them."""


def write(tmp_path, case, **options):
    # Libraries that look for a model's name in a path would find one here.
    architecture, config = CASES[case]
    return write_checkpoint(tmp_path / f"llama-gemma-{case}", architecture, **config, **options)


def build(folder, **options):
    return build_bridge(Checkpoint(folder), **{"dtype": torch.float32, "device": CPU, **options})


def original(case):
    architecture, config = CASES[case]
    return tiny_hf_model(architecture, attn_implementation="eager", **config)


def hooked(folder):
    return tracelens.load(folder, device="cpu")


def some_ids(batch=2, pos=20):
    return torch.randint(4, 30, (batch, pos), generator=torch.Generator().manual_seed(1))


def assert_close(found, expected):
    assert found.shape == expected.shape
    # Masked attention scores are minus infinity in one model and very small in the other.
    seen = (found > -1e30) & (expected > -1e30)
    assert ((found - expected)[seen].abs().max() <= TOLERANCE * expected[seen].abs().max()).item()


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(tmp_path, case, no_network):
    model, ids = build(write(tmp_path, case)), some_ids()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        expected = original(case)(ids, output_hidden_states=True)
        logits, cache = model.run_with_cache(ids)
    assert_close(logits, expected.logits)
    assert_close(model(ids), expected.logits)
    # The last hidden state is normalized already.
    for layer in range(model.cfg.n_layers - 1):
        assert_close(cache[str(Site(layer))], expected.hidden_states[layer + 1])
        assert_close(cache[str(Site(layer, "resid_pre"))], expected.hidden_states[layer])


@pytest.mark.parametrize("case", MAIN)
def test_all_sites_are_those_of_a_hooked_model(tmp_path, case):
    folder = write(tmp_path, case)
    model, ids = build(folder), some_ids()
    sites = {str(Site(1, name)) for name in HOOKS if case not in PARALLEL or name != "resid_mid"}
    assert sites <= model.hook_dict.keys()
    reference = hooked(folder)
    with torch.no_grad():
        (logits, cache), (expected, theirs) = model.run_with_cache(ids), reference.run_with_cache(ids)
    assert_close(logits, expected)
    for site in sites:
        assert_close(cache[site], theirs[site])


@pytest.mark.parametrize("case", MAIN)
def test_editing_a_site_does_what_it_does_in_a_hooked_model(tmp_path, case):
    folder = write(tmp_path, case)
    model, reference, ids = build(folder), hooked(folder), some_ids()

    def edit(value, hook):
        value = value.clone()
        value[:, 3:9] *= 0.5
        return value

    with torch.no_grad():
        before = model(ids)
        for name in ("resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "mlp_pre", "mlp_post"):
            hooks = [(str(Site(1, name)), edit)]
            edited = model.run_with_hooks(ids, fwd_hooks=hooks)
            assert (edited - before).abs().max() > 1e-3 * before.abs().max(), name
            assert_close(edited, reference.run_with_hooks(ids, fwd_hooks=hooks))
            with model.hooks(fwd_hooks=hooks):
                assert torch.equal(model(ids), edited)
        assert torch.equal(model(ids), before)


@pytest.mark.parametrize("case", [*MAIN, "gptj", "opt", "bloom", "mistral", "gemma3", "phi3"])
def test_a_pair_on_padded_prompts(tmp_path, case, no_network):
    folder, alone = write(tmp_path, case), original(case)
    prompts = [some_ids(1, length)[0].tolist() for length in (12, 3, 7)]
    pair = PrecisionPair(build(folder), build(folder))
    sites = [Site(0), Site(1)]
    (left,), (right,) = (pair.stream(prompts, sites=sites, padding_side=side) for side in ("left", "right"))
    for index, ids in enumerate(prompts):
        with torch.no_grad():
            expected = alone(torch.tensor([ids]), output_hidden_states=True)
        for batch in (left, right):
            rows = batch.prompt == index
            for name in ("reference", "quantized"):
                assert_close(batch.logits[name][rows], expected.logits[0])
                for site in sites:
                    assert_close(batch.activations[name][site][rows], expected.hidden_states[site.layer + 1][0])


def test_as_deep_as_the_sites_need(tmp_path):
    model = build(write(tmp_path, "gpt2"))
    full, short = (
        list(stream_aligned({"m": model}, [[5, 6, 7], [8, 9]], sites=[Site(0), Site(1, "z")], logits=logits))
        for logits in (True, False)
    )
    assert not short[0].logits
    for site, rows in short[0].activations["m"].items():
        assert torch.equal(rows, full[0].activations["m"][site])


def test_pairs_that_differ(tmp_path):
    folder = write(tmp_path, "llama")
    model = build(folder)
    assert (
        PrecisionPair(model, tracelens.load(folder, device="cpu")).settings[
            "normalization_type (…Pre: norm weights folded)"
        ]
        == "RMS"
    )
    with pytest.raises(PairMismatchError, match=r"dtype: reference torch\.float32, quantized torch\.bfloat16"):
        PrecisionPair(model, build(folder, dtype=torch.bfloat16))
    folded = build(folder)
    folded.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(PairMismatchError, match="unembedding"):
        PrecisionPair(model, folded)


def test_weights_are_not_processed(tmp_path):
    model, plain = build(write(tmp_path, "llama")), original("llama")
    assert not model.compatibility_mode
    assert torch.equal(model.blocks[1].ln1.weight, plain.model.layers[1].input_layernorm.weight)
    assert torch.equal(model.W_U, plain.lm_head.weight.T)
    assert torch.equal(model.W_E, plain.model.embed_tokens.weight)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("case", ["llama", "neox", "gpt2"])
def test_tokens_are_those_of_the_tokenizer(tmp_path, case, add_bos, no_network):
    model = build(write(tmp_path, case, add_bos=add_bos))
    text = "the cat sat on the mat"
    expected = tiny_tokenizer(add_bos=add_bos)(text).input_ids
    assert model.to_tokens(text).tolist() == [expected] == [model.tokenizer(text).input_ids]
    assert model.cfg.default_prepend_bos is add_bos
    assert torch.equal(model(text), model(torch.tensor([expected])))


def test_without_a_tokenizer(tmp_path, no_network):
    tiny_hf_model().save_pretrained(tmp_path)
    model = build(tmp_path)
    assert model.tokenizer is None
    assert model(some_ids()).shape == (2, 20, 48)


def test_config(tmp_path):
    folder = write(tmp_path, "neox")
    cfg = build(folder).cfg
    assert (cfg.model_name, cfg.original_architecture) == ("llama-gemma-neox", "GPTNeoXForCausalLM")
    assert (cfg.n_ctx, cfg.n_layers, cfg.d_model, cfg.d_vocab) == (64, 3, 32, 48)
    assert (cfg.dtype, cfg.device) == (torch.float32, "cpu")


@pytest.mark.parametrize("case", ["llama", "gpt2", "gptj", "bloom"])
def test_context(tmp_path, case):
    folder = write(tmp_path, case)
    model = build(folder, n_ctx=4)
    assert model.cfg.n_ctx == 4
    assert model.to_tokens("the cat sat on the mat").shape == (1, 4)
    with pytest.raises(CheckpointError, match="n_ctx is 0"):
        build(folder, n_ctx=0)
    if case in ("gpt2", "gptj"):
        with pytest.raises(CheckpointError, match=r"n_ctx is 65; llama-gemma-.* has positions for 1 to 64 tokens"):
            build(folder, n_ctx=65)
    else:
        assert build(folder, n_ctx=4096).cfg.n_ctx == 4096


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path, dtype):
    model = build(write(tmp_path, "llama"), dtype=dtype)
    assert model.cfg.dtype == dtype
    assert model(some_ids()).dtype == dtype


def test_an_architecture_without_a_bridge(tmp_path):
    # transformers knows it.
    folder = write_checkpoint(tmp_path / "m", "PersimmonForCausalLM", num_key_value_heads=4)
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'PersimmonForCausalLM' has no .*Supported: .*GPT2LMHeadModel"
    ):
        build(folder)


def test_a_configuration_that_the_bridge_cannot_run(tmp_path):
    narrow = {"ffn_dim": 40, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "num_key_value_heads": 4}
    folder = write_checkpoint(tmp_path / "m", "OPTForCausalLM", **narrow)
    with pytest.raises(UnsupportedArchitectureError, match=r"cannot run this OPTForCausalLM .*wrapper='hooked'"):
        build(folder)


def test_a_bridge_that_computes_something_else(tmp_path, monkeypatch):
    folder, wrap = write(tmp_path, "llama"), bridge._wrap

    def faulty(model, *args):
        model.model.norm.weight.mul_(torch.linspace(1, 1.001, 32))
        return wrap(model, *args)

    monkeypatch.setattr(bridge, "_wrap", faulty)
    with pytest.raises(UnsupportedArchitectureError, match=r"differ from those of the LlamaForCausalLM .* by .*e-0"):
        build(folder)
