"""OPT, with norms before attention and MLP."""

from typing import Any

from tracelens.errors import CheckpointError
from tracelens.loading.architectures.base import Architecture, Config
from tracelens.loading.architectures.sources import Source, attention, in_blocks, layer_norm, linear, qkv_bias, same

PREFIX = "model.decoder.layers.{layer}."
EMBED = "model.decoder.embed_tokens.weight"


def _one_width(config: Config) -> dict[str, Any]:
    width = config.get("word_embed_proj_dim")
    if width is not None and width != config["hidden_size"]:
        raise CheckpointError(
            f"config.json: word_embed_proj_dim={width} is not supported, only hidden_size={config['hidden_size']}; "
            "a hooked model has no projection between embedding and blocks"
        )
    return {}


TABLE = {
    "OPTForCausalLM": Architecture(
        {
            "embed.W_E": Source(EMBED, "vocab d_model", "vocab d_model"),
            "pos_embed.W_pos": Source(
                "model.decoder.embed_positions.weight", "pos d_model", "pos d_model", (("pos", "positions"),)
            ),
        }
        | in_blocks(
            PREFIX,
            {
                **attention("self_attn", o="out_proj"),
                "mlp.W_in": linear("fc1.weight"),
                "mlp.W_out": linear("fc2.weight", "d_mlp", "d_model"),
            },
        ),
        embed=EMBED,
        optional={
            "enable_bias": in_blocks(
                PREFIX,
                {
                    **qkv_bias("self_attn"),
                    "attn.b_O": same("self_attn.out_proj.bias"),
                    "mlp.b_in": same("fc1.bias", "d_mlp"),
                    "mlp.b_out": same("fc2.bias"),
                },
            ),
            "layer_norm_elementwise_affine": {
                **layer_norm("ln_final", "model.decoder.final_layer_norm"),
                **in_blocks(PREFIX, layer_norm("ln1", "self_attn_layer_norm") | layer_norm("ln2", "final_layer_norm")),
            },
        },
        defaults={
            **{"max_position_embeddings": 2048, "hidden_act": "relu", "tie_word_embeddings": True},
            **{"enable_bias": True, "layer_norm_elementwise_affine": True, "do_layer_norm_before": True},
        },
        spelled={"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
        understood=frozenset({"word_embed_proj_dim"}),
        only={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
        norm="LN",
        grouped=False,
        eps=1e-5,
        positions="learned",
        first_position=2,
        more=_one_width,
        buffers=(),
        renames=(
            (r"^decoder\.", "model.decoder."),
            (r"^model\.decoder\.layer_norm\.", "model.decoder.final_layer_norm."),
        ),
    ),
}
