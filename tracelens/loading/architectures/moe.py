"""Mixtures of experts: Mixtral, Qwen3-MoE, OLMoE, gpt-oss."""

from typing import Any

from tracelens.errors import CheckpointError
from tracelens.loading.architectures.base import Architecture, Config, need_size, window_by_layer_types
from tracelens.loading.architectures.llama import (
    ATTENTION,
    ATTENTION_BIAS,
    NORMS,
    OUTSIDE,
    PREFIX,
    QK_NORM,
    window_everywhere,
)
from tracelens.loading.architectures.olmo import QK_NORM as QK_NORM_OF_ALL_HEADS
from tracelens.loading.architectures.olmo import clipped, heads_fill_the_model
from tracelens.loading.architectures.sources import Source, Sources, in_blocks, same

ROUTER: Sources = {"mlp.W_gate.weight": Source("mlp.gate.weight", "expert d_model", "expert d_model")}


def _apart(gate: str, up: str, down: str) -> Sources:
    """A tensor for each matrix of each expert."""
    into = {"W_gate": (gate, "d_mlp d_model"), "W_in": (up, "d_mlp d_model"), "W_out": (down, "d_model d_mlp")}
    return in_blocks(
        PREFIX,
        {
            f"mlp.experts.{{expert}}.{hooked}.weight": Source(f"mlp.experts.{{expert}}.{name}.weight", axes, axes)
            for hooked, (name, axes) in into.items()
        },
    )


def _stacked(gate_up: str, down: str) -> Sources:
    """All experts in one tensor, gate and up in another order or turned; axes are those on disk."""
    expert = ("expert", "{expert}")
    return {
        **{
            f"mlp.experts.{{expert}}.{hooked}.weight": Source(
                "mlp.experts.gate_up_proj", gate_up, "d_mlp d_model", (expert, ("two", half))
            )
            for half, hooked in enumerate(("W_gate", "W_in"))
        },
        "mlp.experts.{expert}.W_out.weight": Source("mlp.experts.down_proj", down, "d_model d_mlp", (expert,)),
    }


STACKED = in_blocks(PREFIX, _stacked("expert (two d_mlp) d_model", "expert d_model d_mlp"))
EXPERT = ("expert", "{expert}")
GPT_OSS: Sources = {
    "attn.sinks": same("self_attn.sinks", "head"),
    "mlp.W_gate.weight": Source("mlp.router.weight", "expert d_model", "expert d_model"),
    "mlp.W_gate.bias": same("mlp.router.bias", "expert"),
    **_stacked("expert d_model (d_mlp two)", "expert d_mlp d_model"),
    **{
        f"mlp.experts.{{expert}}.{hooked}.bias": Source(
            "mlp.experts.gate_up_proj_bias", "expert (d_mlp two)", "d_mlp", (EXPERT, ("two", half))
        )
        for half, hooked in enumerate(("W_gate", "W_in"))
    },
    "mlp.experts.{expert}.W_out.bias": Source("mlp.experts.down_proj_bias", "expert d_model", "d_model", (EXPERT,)),
}
GPT_OSS_ROPE = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    **{"original_max_position_embeddings": 4096, "rope_theta": 150000.0},
}
MOE = {"final_rms": True, "gated_mlp": True}


def _experts(config: Config) -> dict[str, Any]:
    number, used = need_size(config, "num_experts"), need_size(config, "num_experts_per_tok")
    if used > number:
        raise CheckpointError(
            f"config.json: num_experts_per_tok={used} is more than num_experts={number}; "
            "get the checkpoint's original config.json"
        )
    return {"num_experts": number, "experts_per_token": used, "norm_topk_prob": bool(config["norm_topk_prob"])}


def _qwen3(config: Config) -> dict[str, Any]:
    if config.get("mlp_only_layers") or config["decoder_sparse_step"] != 1:
        raise CheckpointError(
            f"config.json: mlp_only_layers={config.get('mlp_only_layers')}, "
            f"decoder_sparse_step={config['decoder_sparse_step']} are not supported; "
            "the layers of a hooked model all have experts, or none has"
        )
    return {**_experts(config), "d_mlp": need_size(config, "moe_intermediate_size")}


def _olmoe(config: Config) -> dict[str, Any]:
    return _experts(config) | clipped(config) | heads_fill_the_model(config)


def _window_if_used(config: Config, layer: int) -> bool:
    return bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None


def _every_other(config: Config, layer: int) -> bool:
    if config.get("layer_types"):
        return window_by_layer_types(config, layer)
    return layer % 2 == 0 and config.get("sliding_window") is not None


TABLE = {
    "MixtralForCausalLM": Architecture(
        OUTSIDE | in_blocks(PREFIX, {**NORMS, **ATTENTION, **ROUTER}),
        variants=(_apart("w1", "w3", "w2"), STACKED),
        defaults={
            **{"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
            **{"num_experts_per_tok": 2, "rope_theta": 1000000.0, "norm_topk_prob": True, "num_experts": 8},
        },
        spelled={"num_local_experts": "num_experts"},
        only={"norm_topk_prob": True},
        windowed=window_everywhere,
        fixed=MOE,
        more=_experts,
        renames=(
            (r"^(layers|embed_tokens|norm)\.", r"model.\1."),
            (r"\.block_sparse_moe\.", ".mlp."),
            # Quantizers that unpack the experts of the model in memory name them as other families do.
            (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."),
            (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
            (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
        ),
    ),
    "Qwen3MoeForCausalLM": Architecture(
        OUTSIDE | in_blocks(PREFIX, {**NORMS, **ATTENTION, **QK_NORM, **ROUTER}),
        optional={"attention_bias": ATTENTION_BIAS},
        variants=(_apart("gate_proj", "up_proj", "down_proj"), STACKED),
        defaults={
            **{"num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
            **{"num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False, "decoder_sparse_step": 1},
            **{"moe_intermediate_size": 768, "sliding_window": 4096, "intermediate_size": 6144},
        },
        spelled={"num_local_experts": "num_experts"},
        understood=frozenset({"use_sliding_window", "max_window_layers", "mlp_only_layers"}),
        windowed=_window_if_used,
        fixed={**MOE, "use_qk_norm": True},
        more=_qwen3,
    ),
    "OlmoeForCausalLM": Architecture(
        OUTSIDE | in_blocks(PREFIX, {**NORMS, **ATTENTION, **QK_NORM_OF_ALL_HEADS, **ROUTER}),
        optional={"attention_bias": ATTENTION_BIAS},
        variants=(_apart("gate_proj", "up_proj", "down_proj"), STACKED),
        defaults={
            **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
            **{"num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False},
        },
        understood=frozenset({"clip_qkv"}),
        fixed=MOE,
        more=_olmoe,
    ),
    "GptOssForCausalLM": Architecture(
        OUTSIDE | in_blocks(PREFIX, {**NORMS, **ATTENTION, **GPT_OSS}),
        optional={"attention_bias": ATTENTION_BIAS},
        defaults={
            **{"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
            **{"num_experts_per_tok": 4, "num_experts": 128, "norm_topk_prob": False, "sliding_window": 128},
            **{"head_dim": 64, "attention_bias": True, "rope_parameters": GPT_OSS_ROPE},
        },
        spelled={"num_local_experts": "num_experts", "experts_per_token": "num_experts_per_tok"},
        understood=frozenset({"layer_types"}),
        # The constants of the experts' activation are part of transformer-lens' component.
        only={"hidden_act": "silu", "swiglu_limit": 7.0},
        windowed=_every_other,
        fixed={**MOE, "use_attention_sinks": True},
        more=_experts,
    ),
}
