"""GPT-2 and its kin with learned positions: GPT-BigCode (StarCoder), GPT-Neo."""

from functools import partial
from typing import Any

from tracelens.errors import CheckpointError
from tracelens.loading.architectures.base import Architecture, Config, need
from tracelens.loading.architectures.sources import (
    Source,
    Sources,
    attention,
    fused_qkv,
    heads_in_a_row,
    in_blocks,
    layer_norm,
    linear,
    same,
)

PREFIX = "transformer.h.{layer}."
EMBED = "transformer.wte.weight"
OUTSIDE: Sources = {
    "embed.W_E": Source(EMBED, "vocab d_model", "vocab d_model"),
    "pos_embed.W_pos": Source("transformer.wpe.weight", "pos d_model", "pos d_model", (("pos", "positions"),)),
    **layer_norm("ln_final", "transformer.ln_f"),
}
NORMS: Sources = {**layer_norm("ln1", "ln_1"), **layer_norm("ln2", "ln_2")}
# Conv1D keeps its weights as (in, out), as the hooked model does.
CONV1D: Sources = {
    **fused_qkv("attn.c_attn", "d_model (qkv head d_head)", "(qkv head d_head)"),
    "attn.W_O": Source("attn.c_proj.weight", "(head d_head) d_model", "head d_head d_model"),
    "mlp.W_in": Source("mlp.c_fc.weight", "d_model d_mlp", "d_model d_mlp"),
    "mlp.W_out": Source("mlp.c_proj.weight", "d_mlp d_model", "d_mlp d_model"),
}
MLP: Sources = {
    "mlp.W_in": linear("mlp.c_fc.weight"),
    "mlp.W_out": linear("mlp.c_proj.weight", "d_mlp", "d_model"),
}
MLP_BIAS: Sources = {"mlp.b_in": same("mlp.c_fc.bias", "d_mlp"), "mlp.b_out": same("mlp.c_proj.bias")}
BIGCODE: Sources = {
    "attn.W_O": Source("attn.c_proj.weight", "d_model (head d_head)", "head d_head d_model"),
    "attn.b_O": same("attn.c_proj.bias"),
    **MLP,
    **MLP_BIAS,
}
ONE_KEY_HEAD: Sources = {**heads_in_a_row("attn.c_attn", "weight"), **heads_in_a_row("attn.c_attn", "bias")}
NEO: Sources = {
    **attention("attn.attention", o="out_proj"),
    "attn.b_O": same("attn.attention.out_proj.bias"),
    **MLP,
    **MLP_BIAS,
}
SPELLED = {
    **{"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
    **{"n_positions": "max_position_embeddings", "n_inner": "intermediate_size", "activation_function": "hidden_act"},
}
DEFAULTS = {
    **{"max_position_embeddings": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    **{"hidden_act": "gelu_new", "scale_attn_weights": True},
}
RENAMES = ((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),)
MASKS = (r"\.attn\.bias$", r"\.attn\.masked_bias$")


def _gpt2(config: Config) -> dict[str, Any]:
    return {
        "use_attn_scale": bool(config["scale_attn_weights"]),
        "scale_attn_by_inverse_layer_idx": bool(config.get("scale_attn_by_inverse_layer_idx")),
    }


def _bigcode(config: Config) -> dict[str, Any]:
    several = config["num_attention_heads"] > 1
    return {
        "use_attn_scale": bool(config["scale_attn_weights"]),
        "n_key_value_heads": 1 if config["multi_query"] and several else None,
    }


def _neo_windowed(config: Config, layer: int) -> bool:
    kinds = config.get("attention_layers") or [
        kind for pattern, times in need(config, "attention_types") for _ in range(times) for kind in pattern
    ]
    if len(kinds) != config["num_hidden_layers"] or kinds[layer] not in ("local", "global"):
        raise CheckpointError(
            f"config.json: attention_types gives {kinds}, expected local or global for each of "
            f"{config['num_hidden_layers']} layers; get the checkpoint's original config.json"
        )
    return kinds[layer] == "local"


LEARNED = partial(
    Architecture,
    embed=EMBED,
    norm="LN",
    grouped=False,
    eps="layer_norm_epsilon",
    positions="learned",
    mlp_ratio=4,
    renames=RENAMES,
)
LIKE_GPT2 = partial(LEARNED, spelled=SPELLED, only={"add_cross_attention": False}, buffers=MASKS)
TABLE = {
    "GPT2LMHeadModel": LIKE_GPT2(
        OUTSIDE | in_blocks(PREFIX, {**NORMS, **CONV1D, "attn.b_O": same("attn.c_proj.bias"), **MLP_BIAS}),
        defaults=DEFAULTS,
        understood=frozenset({"scale_attn_weights", "scale_attn_by_inverse_layer_idx"}),
        more=_gpt2,
    ),
    "GPTBigCodeForCausalLM": LIKE_GPT2(
        OUTSIDE | in_blocks(PREFIX, {**NORMS, **BIGCODE}),
        optional={
            "multi_query": in_blocks(PREFIX, ONE_KEY_HEAD),
            "not multi_query": in_blocks(
                PREFIX, fused_qkv("attn.c_attn", "(head qkv d_head) d_model", "(head qkv d_head)")
            ),
        },
        defaults={**DEFAULTS, "hidden_act": "gelu_pytorch_tanh", "multi_query": True},
        more=_bigcode,
    ),
    "GPTNeoForCausalLM": LEARNED(
        OUTSIDE | in_blocks(PREFIX, {**NORMS, **NEO}),
        defaults={
            **{"max_position_embeddings": 2048, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
            **{"hidden_act": "gelu_new", "sliding_window": 256, "attention_types": [[["global", "local"], 12]]},
        },
        spelled={
            **{"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"},
            **{"window_size": "sliding_window", "activation_function": "hidden_act"},
        },
        windowed=_neo_windowed,
        fixed={"use_attn_scale": False},
        buffers=(r"\.attn\.attention\.bias$", r"\.attn\.attention\.masked_bias$"),
    ),
}
