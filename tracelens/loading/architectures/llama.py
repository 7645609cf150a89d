"""Llama and the families that differ from it in switches: Mistral, Qwen2, Qwen3, Arcee, Apertus."""

from collections.abc import Mapping
from typing import Any

from tracelens.loading.architectures.base import Architecture, Config, window_by_layer_types
from tracelens.loading.architectures.sources import Source, Sources, attention, in_blocks, linear, qkv_bias, same

PREFIX = "model.layers.{layer}."
GATED: Mapping[str, Any] = {"final_rms": True, "gated_mlp": True}
OUTSIDE: Sources = {
    "embed.W_E": Source("model.embed_tokens.weight", "vocab d_model", "vocab d_model"),
    "ln_final.w": same("model.norm.weight"),
}
NORMS: Sources = {"ln1.w": same("input_layernorm.weight"), "ln2.w": same("post_attention_layernorm.weight")}
ATTENTION = attention("self_attn")
QKV_BIAS = in_blocks(PREFIX, qkv_bias("self_attn"))
ATTENTION_BIAS = QKV_BIAS | in_blocks(PREFIX, {"attn.b_O": same("self_attn.o_proj.bias")})
QK_NORM = {
    "attn.q_norm.w": same("self_attn.q_norm.weight", "d_head"),
    "attn.k_norm.w": same("self_attn.k_norm.weight", "d_head"),
}
PLAIN_MLP = {
    "mlp.W_in": linear("mlp.up_proj.weight"),
    "mlp.W_out": linear("mlp.down_proj.weight", "d_mlp", "d_model"),
}
MLP = {"mlp.W_gate": linear("mlp.gate_proj.weight"), **PLAIN_MLP}
PLAIN_MLP_BIAS = {
    "mlp.b_in": same("mlp.up_proj.bias", "d_mlp"),
    "mlp.b_out": same("mlp.down_proj.bias"),
}
MLP_BIAS = in_blocks(PREFIX, {"mlp.b_gate": same("mlp.gate_proj.bias", "d_mlp"), **PLAIN_MLP_BIAS})
LLAMA = OUTSIDE | in_blocks(PREFIX, {**NORMS, **ATTENTION, **MLP})
XIELU = {
    f"mlp.act_fn.{name}": Source(f"mlp.act_fn.{name}", "one", "", (("one", 0),)) for name in ("alpha_p", "alpha_n")
} | {f"mlp.act_fn.{name}": Source(f"mlp.act_fn.{name}", "", "") for name in ("beta", "eps")}


def window_everywhere(config: Config, layer: int) -> bool:
    return config.get("sliding_window") is not None


def window_by_layer(config: Config, layer: int) -> bool:
    """Qwen's windows: switched on, and then by `layer_types` or from layer `max_window_layers` on."""
    by_type = window_by_layer_types(config, layer) if config.get("layer_types") else None
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return False
    return layer >= config["max_window_layers"] if by_type is None else by_type


LLAMA_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
QWEN_DEFAULTS = {
    **LLAMA_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN_KEYS = frozenset({"layer_types"})
APERTUS_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12000000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

TABLE = {
    "LlamaForCausalLM": Architecture(
        LLAMA,
        optional={"attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
        defaults=LLAMA_DEFAULTS,
        fixed=GATED,
    ),
    "MistralForCausalLM": Architecture(
        LLAMA,
        defaults={
            **LLAMA_DEFAULTS,
            **{"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        },
        windowed=window_everywhere,
        fixed=GATED,
    ),
    "Qwen2ForCausalLM": Architecture(
        LLAMA | QKV_BIAS,
        defaults=QWEN_DEFAULTS,
        windowed=window_by_layer,
        understood=QWEN_KEYS,
        fixed=GATED,
    ),
    "Qwen3ForCausalLM": Architecture(
        LLAMA | in_blocks(PREFIX, QK_NORM),
        optional={"attention_bias": ATTENTION_BIAS},
        defaults={**QWEN_DEFAULTS, "head_dim": 128},
        windowed=window_by_layer,
        understood=QWEN_KEYS,
        fixed={**GATED, "use_qk_norm": True},
    ),
    "ArceeForCausalLM": Architecture(
        OUTSIDE | in_blocks(PREFIX, {**NORMS, **ATTENTION, **PLAIN_MLP}),
        optional={"attention_bias": ATTENTION_BIAS, "mlp_bias": in_blocks(PREFIX, PLAIN_MLP_BIAS)},
        defaults={**LLAMA_DEFAULTS, "hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        fixed={"final_rms": True},
    ),
    "ApertusForCausalLM": Architecture(
        OUTSIDE
        | in_blocks(
            PREFIX,
            {
                "ln1.w": same("attention_layernorm.weight"),
                "ln2.w": same("feedforward_layernorm.weight"),
                **ATTENTION,
                **QK_NORM,
                **PLAIN_MLP,
                **XIELU,
            },
        ),
        optional={"attention_bias": ATTENTION_BIAS},
        defaults={
            **{"hidden_act": "xielu", "rms_norm_eps": 1e-5, "max_position_embeddings": 65536},
            "rope_parameters": APERTUS_ROPE,
            "rope_theta": 12000000.0,
        },
        only={"hidden_act": "xielu", "qk_norm": True},
        dispensable=(r"\.mlp\.act_fn\.(beta|eps)$",),
        fixed={"final_rms": True, "use_qk_norm": True},
    ),
}
