"""OLMo: norms without weights (1), and norms of what attention and MLP give (2, 3)."""

from typing import Any

from tracelens.errors import CheckpointError
from tracelens.loading.architectures.base import Architecture, Config, window_by_layer_types
from tracelens.loading.architectures.llama import ATTENTION, ATTENTION_BIAS, GATED, MLP, OUTSIDE, PREFIX
from tracelens.loading.architectures.sources import Sources, in_blocks, same

BEHIND: Sources = {"ln1.w": same("post_attention_layernorm.weight"), "ln2.w": same("post_feedforward_layernorm.weight")}
# Queries and keys are normalized over all heads at once.
QK_NORM: Sources = {
    "attn.q_norm.w": same("self_attn.q_norm.weight", "(head d_head)"),
    "attn.k_norm.w": same("self_attn.k_norm.weight", "(kv d_head)"),
}
OLMO2 = OUTSIDE | in_blocks(PREFIX, {**BEHIND, **ATTENTION, **QK_NORM, **MLP})
DEFAULTS = {"max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-5}


def clipped(config: Config) -> dict[str, Any]:
    return {"clip_qkv": config.get("clip_qkv")}


def heads_fill_the_model(config: Config) -> dict[str, Any]:
    """Nothing; raises `CheckpointError` where transformer-lens' norm of all queries would have another length."""
    if (config.get("head_dim") or 0) * config["num_attention_heads"] not in (0, config["hidden_size"]):
        raise CheckpointError(
            f"config.json: head_dim={config['head_dim']} times num_attention_heads={config['num_attention_heads']} "
            f"must be hidden_size={config['hidden_size']} in this architecture"
        )
    return {}


def _all_but_every_fourth(config: Config, layer: int) -> bool:
    if config.get("layer_types"):
        return window_by_layer_types(config, layer)
    return (layer + 1) % 4 != 0 and config.get("sliding_window") is not None


TABLE = {
    "OlmoForCausalLM": Architecture(
        {"embed.W_E": OUTSIDE["embed.W_E"]} | in_blocks(PREFIX, {**ATTENTION, **MLP}),
        optional={"attention_bias": ATTENTION_BIAS},
        defaults=DEFAULTS,
        understood=frozenset({"clip_qkv"}),
        norm="LN",
        eps=1e-5,
        fixed={"gated_mlp": True},
        more=clipped,
    ),
    "Olmo2ForCausalLM": Architecture(
        OLMO2,
        optional={"attention_bias": ATTENTION_BIAS},
        defaults=DEFAULTS,
        fixed=GATED,
        more=heads_fill_the_model,
    ),
    "Olmo3ForCausalLM": Architecture(
        OLMO2,
        optional={"attention_bias": ATTENTION_BIAS},
        defaults={**DEFAULTS, "sliding_window": 4096, "rope_theta": 500000.0},
        understood=frozenset({"layer_types"}),
        layered_rope=True,
        windowed=_all_but_every_fourth,
        fixed=GATED,
        more=heads_fill_the_model,
    ),
}
