"""What llama.cpp's converters do to a transformers model, as data keyed by GGUF's `general.architecture`.

Names, metadata and the changes made to weights are those of llama.cpp's `conversion/*.py`. A row is added when a model
written that way opens as the model it was made from (tests/loading/test_open_gguf.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tracelens.errors import UnsupportedArchitectureError

Change = Literal["interleaved", "plus one", "transposed", "split by q, k, v"]
"""What conversion did to a tensor:
`interleaved`: the two halves of each head's rows take turns, for a rotation of neighbouring pairs (weights and biases);
`plus one`: 1 was added, for norms that transformers computes as x · (1 + weight);
`transposed`: (in, out) of `Conv1D` became (out, in) (weights only);
`split by q, k, v`: rows in the order head, q/k/v became q/k/v, head (weights and biases)."""


@dataclass(frozen=True)
class GgufArchitecture:
    """One value of `general.architecture`."""

    architecture: str
    """Name in `architectures` of the plain model's config."""
    model_type: str
    outside: Mapping[str, str]
    """GGUF module -> plain module, for those outside the blocks."""
    blocks: str
    """What plain names of modules in block N begin with, `{}` for N."""
    block: Mapping[str, str]
    """GGUF module after `blk.N.` -> plain module after `blocks`."""
    changes: Mapping[str, Change] = field(default_factory=dict)
    """GGUF module, without `blk.N.` -> what conversion did to it."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Metadata key after the architecture -> key of the plain model's config, where the value is the same."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the config that GGUF leaves to the architecture."""
    switches: Mapping[str, str] = field(default_factory=dict)
    """Stored tensor whose presence decides -> boolean key of the config."""
    eps: str = "attention.layer_norm_rms_epsilon"
    """Metadata key of the epsilon of the norms."""
    notes: tuple[str, ...] = ()
    """What a file leaves open and was taken for granted."""

    def plain(self, stored: str) -> tuple[str, Change | None] | None:
        """Name in the plain model's state dict, and what has to be undone; None for a name it does not have."""
        module, _, kind = stored.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        if found := re.fullmatch(r"blk\.(\d+)\.(\w+)", module):
            module = found[2]
            prefix, plain = self.blocks.format(found[1]), self.block.get(module)
        else:
            prefix, plain = "", self.outside.get(module)
        change = self.changes.get(module)
        if change == "transposed" and kind == "bias":
            change = None
        return (f"{prefix}{plain}.{kind}", change) if plain else None


SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
WITH_HEAD = {**SIZES, "attention.key_length": "head_dim"}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA_NORMS: dict[str, Change] = {"attn_norm": "plus one", "ffn_norm": "plus one", "output_norm": "plus one"}
GEMMA2_NORMS: dict[str, Change] = {**GEMMA_NORMS, "post_attention_norm": "plus one", "post_ffw_norm": "plus one"}
SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
LAYERS = "model.layers.{}."

GGUF_ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture(
        "LlamaForCausalLM", "llama", OUTSIDE, LAYERS, LLAMA_BLOCK,
        changes={"attn_q": "interleaved", "attn_k": "interleaved"},
        settings={**WITH_HEAD, "attention.sliding_window": "sliding_window"},
        constants={"hidden_act": "silu"},
        switches={"blk.0.attn_q.bias": "attention_bias", "blk.0.ffn_up.bias": "mlp_bias"},
    ),
    "qwen2": GgufArchitecture(
        "Qwen2ForCausalLM", "qwen2", OUTSIDE, LAYERS, LLAMA_BLOCK,
        settings=WITH_HEAD, constants={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "qwen3": GgufArchitecture(
        "Qwen3ForCausalLM", "qwen3", OUTSIDE, LAYERS, {**LLAMA_BLOCK, **QK_NORMS},
        settings=WITH_HEAD, constants={"hidden_act": "silu", "use_sliding_window": False},
        switches={"blk.0.attn_q.bias": "attention_bias"},
    ),
    "gemma": GgufArchitecture(
        "GemmaForCausalLM", "gemma", OUTSIDE, LAYERS, LLAMA_BLOCK,
        changes=GEMMA_NORMS, settings=WITH_HEAD, constants=GEMMA,
    ),
    "gemma2": GgufArchitecture(
        "Gemma2ForCausalLM", "gemma2", OUTSIDE, LAYERS, {**LLAMA_BLOCK, **SANDWICH},
        changes=GEMMA2_NORMS, settings={**WITH_HEAD, **SOFTCAPS}, constants=GEMMA,
    ),
    "gemma3": GgufArchitecture(
        "Gemma3ForCausalLM", "gemma3_text", OUTSIDE, LAYERS, {**LLAMA_BLOCK, **SANDWICH, **QK_NORMS},
        changes={**GEMMA2_NORMS, "attn_q_norm": "plus one", "attn_k_norm": "plus one"},
        settings={**WITH_HEAD, **SOFTCAPS, "rope.freq_base_swa": "rope_local_base_freq"}, constants=GEMMA,
    ),
    "phi3": GgufArchitecture(
        "Phi3ForCausalLM", "phi3", OUTSIDE, LAYERS,
        {
            **{name: LLAMA_BLOCK[name] for name in ("attn_norm", "attn_output", "ffn_norm", "ffn_down")},
            **{"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        },
        settings={**SIZES, "attention.sliding_window": "sliding_window"}, constants={"hidden_act": "silu"},
    ),
    "olmo2": GgufArchitecture(
        "Olmo2ForCausalLM", "olmo2", OUTSIDE, LAYERS,
        {
            **{name: plain for name, plain in LLAMA_BLOCK.items() if not name.endswith("norm")}, **QK_NORMS,
            **{"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
        },
        settings=WITH_HEAD, constants={"hidden_act": "silu"},
    ),
    "gpt2": GgufArchitecture(
        "GPT2LMHeadModel", "gpt2",
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
         "output": "lm_head"},
        "transformer.h.{}.",
        {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
         "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        changes={
            "attn_qkv": "transposed", "attn_output": "transposed", "ffn_up": "transposed", "ffn_down": "transposed",
        },
        settings={
            "context_length": "n_positions", "block_count": "n_layer", "embedding_length": "n_embd",
            "feed_forward_length": "n_inner", "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        constants={"activation_function": "gelu_new"},
        eps="attention.layer_norm_epsilon",
    ),
    "gptneox": GgufArchitecture(
        "GPTNeoXForCausalLM", "gpt_neox",
        {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head"},
        "gpt_neox.layers.{}.",
        {"attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
         "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"},
        changes={"attn_qkv": "split by q, k, v"},
        settings={
            "context_length": "max_position_embeddings", "block_count": "num_hidden_layers",
            "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
            "attention.head_count": "num_attention_heads", "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        constants={"hidden_act": "gelu"},
        switches={"blk.0.attn_qkv.bias": "attention_bias"},
        eps="attention.layer_norm_epsilon",
        notes=("the file does not say hidden_act; gelu was taken, as in Pythia",),
    ),
}  # fmt: skip


def gguf_architecture(name: str) -> GgufArchitecture:
    """The row of an architecture; raises `UnsupportedArchitectureError` with the list of those supported."""
    if name not in GGUF_ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"GGUF architecture {name!r} is not supported; supported: {', '.join(GGUF_ARCHITECTURES)}. "
            "Load the model's original folder on the hub instead"
        )
    return GGUF_ARCHITECTURES[name]
