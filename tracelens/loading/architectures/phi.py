"""Phi (1, 1.5, 2) and Phi-3."""

from tracelens.loading.architectures.base import Architecture
from tracelens.loading.architectures.llama import GATED, NORMS, OUTSIDE, PREFIX, window_everywhere
from tracelens.loading.architectures.sources import (
    Source,
    Sources,
    attention,
    heads_in_a_row,
    in_blocks,
    layer_norm,
    linear,
    qkv_bias,
    same,
)

PHI: Sources = {
    # One norm for attention and MLP, which stand side by side.
    **layer_norm("ln1", "input_layernorm"),
    **layer_norm("ln2", "input_layernorm"),
    **attention("self_attn", o="dense"),
    **qkv_bias("self_attn"),
    "attn.b_O": same("self_attn.dense.bias"),
    "mlp.W_in": linear("mlp.fc1.weight"),
    "mlp.b_in": same("mlp.fc1.bias", "d_mlp"),
    "mlp.W_out": linear("mlp.fc2.weight", "d_mlp", "d_model"),
    "mlp.b_out": same("mlp.fc2.bias"),
}
PHI3: Sources = {
    **NORMS,
    **heads_in_a_row("self_attn.qkv_proj", "weight"),
    "attn.W_O": Source("self_attn.o_proj.weight", "d_model (head d_head)", "head d_head d_model"),
    **{
        f"mlp.{hooked}": Source("mlp.gate_up_proj.weight", "(two d_mlp) d_model", "d_model d_mlp", (("two", half),))
        for half, hooked in enumerate(("W_gate", "W_in"))
    },
    "mlp.W_out": linear("mlp.down_proj.weight", "d_mlp", "d_model"),
}
TABLE = {
    "PhiForCausalLM": Architecture(
        {
            "embed.W_E": OUTSIDE["embed.W_E"],
            **layer_norm("ln_final", "model.final_layernorm"),
            "unembed.b_U": same("lm_head.bias", "vocab"),
        }
        | in_blocks(PREFIX, PHI),
        defaults={
            **{"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"},
            "partial_rotary_factor": 0.5,
        },
        only={"qk_layernorm": False},
        norm="LN",
        eps="layer_norm_eps",
        partial_rotary=True,
        fixed={"parallel_attn_mlp": True},
    ),
    "Phi3ForCausalLM": Architecture(
        OUTSIDE | in_blocks(PREFIX, PHI3),
        # GPTQModel writes them apart.
        joined={"mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")},
        defaults={
            **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
            "original_max_position_embeddings": 4096,
        },
        partial_rotary=True,
        long_rope=True,
        windowed=window_everywhere,
        fixed=GATED,
    ),
}
