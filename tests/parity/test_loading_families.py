"""Every architecture of the table: logits against transformers, float32, ≤ 1e-4 relative to the largest logit."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import write_checkpoint
from tracelens import load
from tracelens.loading import Checkpoint
from tracelens.loading.architectures import ARCHITECTURES

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
GEMMA = {"head_dim": 16, "pad_token_id": 1}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
OLMO_ROPES = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 500.0},
    **{"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [2.0, 3.0, 4.0, 5.0]},
}
CASES = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "arcee": ("ArceeForCausalLM", {}),
    "arcee-bias": ("ArceeForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "apertus": ("ApertusForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "apertus-llama3": ("ApertusForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-untied-wide": ("GPT2LMHeadModel", {"tie_word_embeddings": False, "n_inner": 24}),
    "gpt2-scales": ("GPT2LMHeadModel", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2-relu": ("GPT2LMHeadModel", {"activation_function": "relu", "layer_norm_epsilon": 1e-2}),
    "bigcode": ("GPTBigCodeForCausalLM", {}),
    "bigcode-mha": ("GPTBigCodeForCausalLM", {"multi_query": False, "tie_word_embeddings": False}),
    "gpt-neo": ("GPTNeoForCausalLM", {}),
    "gpt-neo-wide": ("GPTNeoForCausalLM", {"intermediate_size": 24, "tie_word_embeddings": False}),
    "gptj": ("GPTJForCausalLM", {}),
    "gptj-tied": ("GPTJForCausalLM", {"tie_word_embeddings": True, "rotary_dim": 8, "n_inner": 24}),
    "neox": ("GPTNeoXForCausalLM", {}),
    "neox-in-turn": ("GPTNeoXForCausalLM", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "neox-no-bias": ("GPTNeoXForCausalLM", {"attention_bias": False, "rotary_pct": 0.5, "rotary_emb_base": 99}),
    "neox-whole": ("GPTNeoXForCausalLM", {"rotary_pct": 1.0, "hidden_act": "gelu_new"}),
    "opt": ("OPTForCausalLM", {}),
    "opt-untied-plain": (
        "OPTForCausalLM",
        {"tie_word_embeddings": False, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "bloom": ("BloomForCausalLM", {}),
    "bloom-six-heads": ("BloomForCausalLM", {"n_head": 6, "hidden_size": 36, "tie_word_embeddings": False}),
    "gemma": ("GemmaForCausalLM", {**GEMMA}),
    "gemma-untied-bias": ("GemmaForCausalLM", {**GEMMA, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma2": ("Gemma2ForCausalLM", {**GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 20}),
    "gemma2-caps": (
        "Gemma2ForCausalLM",
        {**GEMMA, "sliding_window": 5, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    ),
    "gemma2-uncapped": (
        "Gemma2ForCausalLM",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 20}),
    "gemma3-ropes": ("Gemma3ForCausalLM", {**GEMMA, "sliding_window": 99, "rope_parameters": TWO_ROPES}),
    "gemma3-pattern": (
        "Gemma3ForCausalLM",
        {**GEMMA, "sliding_window": 5, "sliding_window_pattern": 2, "tie_word_embeddings": False},
    ),
    "phi": ("PhiForCausalLM", {}),
    "phi-partial": (
        "PhiForCausalLM",
        {"num_key_value_heads": 4, "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 500.0}},
    ),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 1}),
    "phi3-window": ("Phi3ForCausalLM", {"pad_token_id": 1, "sliding_window": 5, "num_key_value_heads": 4}),
    "phi3-partial": (
        "Phi3ForCausalLM",
        {"pad_token_id": 1, "tie_word_embeddings": True, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "phi3-long": (
        "Phi3ForCausalLM",
        {
            "pad_token_id": 1,
            "rope_parameters": LONG,
            "max_position_embeddings": 160,
            "original_max_position_embeddings": 40,
        },
    ),
    "phi3-long-partial": (
        "Phi3ForCausalLM",
        {
            **{"pad_token_id": 1, "max_position_embeddings": 160, "original_max_position_embeddings": 40},
            **{"sliding_window": 5, "num_key_value_heads": 4, "head_dim": 8},
            "rope_parameters": {
                **LONG,
                "short_factor": [1.5, 3.0],
                "long_factor": [5.0] * 2,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo-clip": ("OlmoForCausalLM", {"clip_qkv": 0.3, "num_key_value_heads": 4}),
    "olmo-bias": ("OlmoForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo-bias-clip": ("OlmoForCausalLM", {"attention_bias": True, "clip_qkv": 0.3}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo2-mha": ("Olmo2ForCausalLM", {"num_key_value_heads": 4, "attention_bias": True}),
    "olmo3": ("Olmo3ForCausalLM", {"sliding_window": 5, "num_hidden_layers": 4}),
    "olmo3-yarn": (
        "Olmo3ForCausalLM",
        {"sliding_window": 5, "num_hidden_layers": 4, "rope_parameters": OLMO_ROPES},
    ),
    "stablelm": ("StableLmForCausalLM", {}),
    "stablelm-parallel": ("StableLmForCausalLM", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "mixtral": ("MixtralForCausalLM", {}),
    "mixtral-window": ("MixtralForCausalLM", {"sliding_window": 5, "num_key_value_heads": 4, "head_dim": 12}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3-moe-norm": ("Qwen3MoeForCausalLM", {"norm_topk_prob": True, "attention_bias": True, **WINDOW}),
    "olmoe": ("OlmoeForCausalLM", {}),
    "olmoe-clip": ("OlmoeForCausalLM", {"clip_qkv": 0.3, "norm_topk_prob": True, "num_key_value_heads": 4}),
    "gpt-oss": ("GptOssForCausalLM", {"sliding_window": 5}),
    "gpt-oss-plain": (
        "GptOssForCausalLM",
        {"attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
}
LENGTHS = (12, 7, 1)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    folders = {}

    def make(case):
        if case not in folders:
            architecture, config = CASES[case]
            folders[case] = write_checkpoint(tmp_path_factory.mktemp(case), architecture, **config)
        return folders[case]

    return make


def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def some_ids(batch=3, pos=40):
    ids = torch.randint(4, 30, (batch, pos), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 2
    return ids


def assert_close(actual, expected, tolerance=1e-4):
    assert expected.abs().max() > 0.1
    assert ((actual - expected).abs().max() / expected.abs().max()).item() <= tolerance


def padded(side):
    """Ids and mask of prompts of `LENGTHS`, each with BOS first, padded on a side."""
    ids, mask = some_ids(len(LENGTHS), max(LENGTHS)), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    rows = torch.full_like(ids, 1)
    for row, length in enumerate(LENGTHS):
        where = slice(-length, None) if side == "left" else slice(0, length)
        rows[row, where], mask[row, where] = ids[row, :length], 1
    return rows, mask


def test_every_architecture_has_a_case():
    assert {architecture for architecture, _ in CASES.values()} | {"Gemma3ForConditionalGeneration"} == set(
        ARCHITECTURES
    )


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(folder_of, case):
    folder, ids = folder_of(case), some_ids()
    model, plain = load(folder, device="cpu"), reference(folder)
    assert_close(model(ids), plain(ids).logits)
    for side in ("left", "right"):
        rows, mask = padded(side)
        position_ids = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        if CASES[case][0] in ("BloomForCausalLM", "OPTForCausalLM"):
            position_ids = {}
        expected = plain(rows, attention_mask=mask, **position_ids).logits
        real = mask.bool()
        assert_close(model(rows, attention_mask=mask)[real], expected[real])


# What transformer-lens cannot fold: norms behind attention and MLP; value biases that are clipped, or that attention
# to a sink takes a part of.
POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
VALUE_BIASES_MATTER = ("olmo-bias-clip", "gpt-oss")


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_processed_weights_compute_the_same(folder_of, case):
    model, ids = load(folder_of(case), device="cpu"), some_ids()
    before = model(ids)
    fold_ln, capped = CASES[case][0] not in POST_NORM, model.cfg.output_logits_soft_cap > 0
    model.load_and_process_state_dict(
        model.state_dict(),
        fold_ln=fold_ln,
        center_writing_weights=True,
        center_unembed=not capped,
        fold_value_biases=case not in VALUE_BIASES_MATTER,
    )
    after = model(ids)
    if not capped:
        before, after = before.log_softmax(-1), after.log_softmax(-1)
    assert_close(after, before)
    assert model.cfg.normalization_type.endswith("Pre") is fold_ln
    assert case in VALUE_BIASES_MATTER or not any(block.attn.b_V.any() for block in model.blocks)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_keys_that_config_leaves_out_are_what_transformers_assumes(tmp_path, case):
    architecture, config = CASES[case]
    folder = write_checkpoint(tmp_path / "m", architecture, **config)
    plain = reference(folder)
    default = type(plain.config)().to_dict()
    written = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in written.items() if k == "architectures" or k not in default or default[k] != v}
    (folder / "config.json").write_text(json.dumps({**kept, "model_type": written["model_type"]}))
    assert_close(load(folder, device="cpu")(some_ids()), reference(folder)(some_ids()).logits)


@torch.no_grad()
def test_the_language_model_of_a_multimodal_checkpoint(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        **{"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 5},
        **{"query_pre_attn_scalar": 20, "pad_token_id": 1, "sliding_window_pattern": 2, "rope_parameters": TWO_ROPES},
    }
    vision = {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 16, "patch_size": 8},
    }
    marks = {"image_token_index": 47, "boi_token_index": 46, "eoi_token_index": 45, "mm_tokens_per_image": 4}
    torch.manual_seed(0)
    plain = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **marks)).eval()
    for parameter in plain.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    plain.save_pretrained(tmp_path / "m")
    model = load(tmp_path / "m", device="cpu")
    assert_close(model(some_ids()), plain(some_ids()).logits)
    assert not any("vision" in name for name, _ in model.named_parameters())
    assert set(Checkpoint(tmp_path / "m").names()) == set(plain.state_dict()) - {"lm_head.weight"}
