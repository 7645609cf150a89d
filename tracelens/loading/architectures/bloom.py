"""BLOOM: attention biased by distance (ALiBi), a norm after the embedding."""

from tracelens.loading.architectures.base import Architecture
from tracelens.loading.architectures.sources import Source, fused_qkv, in_blocks, layer_norm, linear, same

PREFIX = "transformer.h.{layer}."
EMBED = "transformer.word_embeddings.weight"
ROWS = "(head qkv d_head)"

TABLE = {
    "BloomForCausalLM": Architecture(
        {
            "embed.W_E": Source(EMBED, "vocab d_model", "vocab d_model"),
            **layer_norm("embed.ln", "transformer.word_embeddings_layernorm"),
            **layer_norm("ln_final", "transformer.ln_f"),
        }
        | in_blocks(
            PREFIX,
            {
                **layer_norm("ln1", "input_layernorm"),
                **layer_norm("ln2", "post_attention_layernorm"),
                **fused_qkv("self_attention.query_key_value", f"{ROWS} d_model", ROWS),
                "attn.W_O": Source("self_attention.dense.weight", "d_model (head d_head)", "head d_head d_model"),
                "attn.b_O": same("self_attention.dense.bias"),
                "mlp.W_in": linear("mlp.dense_h_to_4h.weight"),
                "mlp.b_in": same("mlp.dense_h_to_4h.bias", "d_mlp"),
                "mlp.W_out": linear("mlp.dense_4h_to_h.weight", "d_mlp", "d_model"),
                "mlp.b_out": same("mlp.dense_4h_to_h.bias"),
            },
        ),
        embed=EMBED,
        defaults={
            **{"max_position_embeddings": 2048, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
            "hidden_act": "gelu_fast",
        },
        spelled={
            **{"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
            "seq_length": "max_position_embeddings",
        },
        understood=frozenset({"offset_alibi"}),
        only={"apply_residual_connection_post_layernorm": False},
        norm="LN",
        grouped=False,
        eps="layer_norm_epsilon",
        positions="alibi",
        mlp_ratio=4,
        fixed={"post_embedding_ln": True},
        buffers=(),
        renames=((r"^(word_embeddings|word_embeddings_layernorm|h|ln_f)\.", r"transformer.\1."),),
    ),
}
