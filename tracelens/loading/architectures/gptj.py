"""GPT-J: attention and MLP side by side after one norm, rotation of adjacent pairs."""

from typing import Any

from tracelens.errors import CheckpointError
from tracelens.loading.architectures.base import Architecture, Config, need_size
from tracelens.loading.architectures.gpt2 import EMBED, MASKS, PREFIX, RENAMES, SPELLED
from tracelens.loading.architectures.sources import Source, attention, in_blocks, layer_norm, linear, same


def _rotation(config: Config) -> dict[str, Any]:
    rotary_dim, d_head = need_size(config, "rotary_dim"), config["hidden_size"] // config["num_attention_heads"]
    if rotary_dim > d_head or rotary_dim % 2:
        raise CheckpointError(
            f"config.json: rotary_dim={rotary_dim} must be even and at most the {d_head} values of a head; "
            "get the checkpoint's original config.json"
        )
    return {"rotary_dim": rotary_dim, "rotary_adjacent_pairs": True, "rotary_base": 10000.0}


TABLE = {
    "GPTJForCausalLM": Architecture(
        {
            "embed.W_E": Source(EMBED, "vocab d_model", "vocab d_model"),
            **layer_norm("ln_final", "transformer.ln_f"),
            "unembed.b_U": same("lm_head.bias", "vocab"),
        }
        | in_blocks(
            PREFIX,
            {
                **layer_norm("ln1", "ln_1"),
                **layer_norm("ln2", "ln_1"),
                **attention("attn", o="out_proj"),
                "mlp.W_in": linear("mlp.fc_in.weight"),
                "mlp.b_in": same("mlp.fc_in.bias", "d_mlp"),
                "mlp.W_out": linear("mlp.fc_out.weight", "d_mlp", "d_model"),
                "mlp.b_out": same("mlp.fc_out.bias"),
            },
        ),
        embed=EMBED,
        defaults={
            **{"max_position_embeddings": 2048, "layer_norm_epsilon": 1e-5, "hidden_act": "gelu_new"},
            "rotary_dim": 64,
        },
        spelled=SPELLED,
        understood=frozenset({"rotary", "scale_attn_weights"}),
        only={"scale_attn_weights": True},
        norm="LN",
        grouped=False,
        eps="layer_norm_epsilon",
        mlp_ratio=4,
        fixed={"parallel_attn_mlp": True},
        more=_rotation,
        buffers=MASKS,
        renames=RENAMES,
    ),
}
