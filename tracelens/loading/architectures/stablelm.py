"""StableLM 2 and StableLM 3B: Llama with LayerNorms, partial rotation and, at times, MLPs beside attention."""

from typing import Any

from tracelens.loading.architectures.base import Architecture, Config
from tracelens.loading.architectures.llama import ATTENTION, MLP, OUTSIDE, PREFIX, QKV_BIAS
from tracelens.loading.architectures.sources import in_blocks, layer_norm


def _residual(config: Config) -> dict[str, Any]:
    return {"parallel_attn_mlp": bool(config["use_parallel_residual"])}


TABLE = {
    "StableLmForCausalLM": Architecture(
        {"embed.W_E": OUTSIDE["embed.W_E"], **layer_norm("ln_final", "model.norm")}
        | in_blocks(PREFIX, {**layer_norm("ln1", "input_layernorm"), **ATTENTION, **MLP}),
        optional={
            "use_qkv_bias": QKV_BIAS,
            "use_parallel_residual": in_blocks(PREFIX, layer_norm("ln2", "input_layernorm")),
            "not use_parallel_residual": in_blocks(PREFIX, layer_norm("ln2", "post_attention_layernorm")),
        },
        defaults={
            **{"max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "hidden_act": "silu"},
            **{"partial_rotary_factor": 0.25, "use_parallel_residual": False, "num_key_value_heads": 32},
        },
        only={"qk_layernorm": False},
        norm="LN",
        eps="layer_norm_eps",
        partial_rotary=True,
        fixed={"gated_mlp": True},
        more=_residual,
    ),
}
