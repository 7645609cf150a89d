"""GPT-NeoX: Pythia, StableLM's first alpha, Dolly."""

from typing import Any

from tracelens.loading.architectures.base import Architecture, Config
from tracelens.loading.architectures.sources import Source, fused_qkv, in_blocks, layer_norm, linear, same

PREFIX = "gpt_neox.layers.{layer}."
EMBED = "gpt_neox.embed_in.weight"
ROWS = "(head qkv d_head)"
FUSED = fused_qkv("attention.query_key_value", f"{ROWS} d_model", ROWS)
ATTENTION_BIAS = {name: source for name, source in FUSED.items() if source.name.endswith(".bias")}


def _residual(config: Config) -> dict[str, Any]:
    return {"parallel_attn_mlp": bool(config["use_parallel_residual"])}


TABLE = {
    "GPTNeoXForCausalLM": Architecture(
        {
            "embed.W_E": Source(EMBED, "vocab d_model", "vocab d_model"),
            **layer_norm("ln_final", "gpt_neox.final_layer_norm"),
        }
        | in_blocks(
            PREFIX,
            {
                **layer_norm("ln1", "input_layernorm"),
                **layer_norm("ln2", "post_attention_layernorm"),
                **{name: source for name, source in FUSED.items() if name not in ATTENTION_BIAS},
                "attn.W_O": Source("attention.dense.weight", "d_model (head d_head)", "head d_head d_model"),
                "mlp.W_in": linear("mlp.dense_h_to_4h.weight"),
                "mlp.b_in": same("mlp.dense_h_to_4h.bias", "d_mlp"),
                "mlp.W_out": linear("mlp.dense_4h_to_h.weight", "d_mlp", "d_model"),
                "mlp.b_out": same("mlp.dense_4h_to_h.bias"),
            },
        ),
        embed=EMBED,
        optional={
            "attention_bias": in_blocks(PREFIX, {**ATTENTION_BIAS, "attn.b_O": same("attention.dense.bias")}),
        },
        defaults={
            **{"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "attention_bias": True},
            **{"use_parallel_residual": True, "partial_rotary_factor": 0.25},
        },
        spelled={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
        norm="LN",
        grouped=False,
        eps="layer_norm_eps",
        partial_rotary=True,
        more=_residual,
        buffers=(r"\.attention\.bias$", r"\.attention\.masked_bias$", r"\.rotary_emb\.inv_freq$"),
        renames=(
            (r"^embed_out\.", "lm_head."),
            (r"^(layers|embed_in|final_layer_norm)\.", r"gpt_neox.\1."),
        ),
    ),
}
