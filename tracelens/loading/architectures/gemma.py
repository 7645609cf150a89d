"""Gemma: norms that multiply by one plus their weight, and embeddings scaled by the root of their width."""

from dataclasses import replace
from typing import Any

from tracelens.loading.architectures.base import Architecture, Config, window_by_layer_types
from tracelens.loading.architectures.llama import ATTENTION, ATTENTION_BIAS, GATED, MLP, PREFIX
from tracelens.loading.architectures.sources import Source, Sources, in_blocks, same

EMBED = "model.embed_tokens.weight"
OUTSIDE: Sources = {
    "embed.W_E": Source(EMBED, "vocab d_model", "vocab d_model", root_of="d_model"),
    "ln_final.w": same("model.norm.weight")._replace(shift=1.0),
}


def _norms(**names: str) -> Sources:
    return {f"{hooked}.w": same(f"{name}.weight")._replace(shift=1.0) for hooked, name in names.items()}


TWO_NORMS = _norms(ln1="input_layernorm", ln2="post_attention_layernorm")
FOUR_NORMS = _norms(
    ln1="input_layernorm",
    ln1_post="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    ln2_post="post_feedforward_layernorm",
)
QK_NORM: Sources = {
    f"attn.{x}_norm.w": same(f"self_attn.{x}_norm.weight", "d_head")._replace(shift=1.0) for x in ("q", "k")
}
DEFAULTS = {
    **{"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True},
    "max_position_embeddings": 8192,
}
CAPPED = frozenset({"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "layer_types"})
SPELLED = {"hidden_activation": "hidden_act"}
BOTH_WAYS = {"use_bidirectional_attention": False}
GEMMA2_DEFAULTS = {
    **DEFAULTS,
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096},
    **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}
GEMMA3_DEFAULTS = {
    **{**GEMMA2_DEFAULTS, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    **{"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "vocab_size": 262208},
    **{"max_position_embeddings": 131072, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
}
GEMMA3_KEYS = CAPPED | {"sliding_window_pattern", "rope_local_base_freq"}


def _caps(config: Config) -> dict[str, Any]:
    # -1 switches a cap off.
    return {
        "attn_scale": float(config["query_pre_attn_scalar"]) ** 0.5,
        "attn_scores_soft_cap": config["attn_logit_softcapping"] or -1.0,
        "output_logits_soft_cap": config["final_logit_softcapping"] or -1.0,
    }


def _every_other(config: Config, layer: int) -> bool:
    if config.get("layer_types"):
        return window_by_layer_types(config, layer)
    return layer % 2 == 0 and config.get("sliding_window") is not None


def _all_but_every_sixth(config: Config, layer: int) -> bool:
    if config.get("layer_types"):
        return window_by_layer_types(config, layer)
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return (layer + 1) % pattern != 0 and config.get("sliding_window") is not None


GEMMA3 = Architecture(
    OUTSIDE | in_blocks(PREFIX, {**FOUR_NORMS, **ATTENTION, **MLP, **QK_NORM}),
    optional={"attention_bias": ATTENTION_BIAS},
    defaults=GEMMA3_DEFAULTS,
    spelled=SPELLED,
    understood=GEMMA3_KEYS,
    only=BOTH_WAYS,
    layered_rope=True,
    windowed=_all_but_every_sixth,
    fixed={**GATED, "use_normalization_before_and_after": True, "use_qk_norm": True},
    more=_caps,
    foreign=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
    renames=(
        (r"^(model\.language_model\.|language_model\.model\.)", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(layers|embed_tokens|norm)\.", r"model.\1."),
    ),
    inside="text_config",
)


def _beside_vision(sources: Sources) -> Sources:
    return {
        name: source._replace(name=source.name.replace("model.", "model.language_model.", 1))
        for name, source in sources.items()
    }


GEMMA3_WITH_VISION = replace(
    GEMMA3,
    sources=_beside_vision(GEMMA3.sources),
    optional={switch: _beside_vision(sources) for switch, sources in GEMMA3.optional.items()},
    embed="model.language_model.embed_tokens.weight",
    renames=(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^vision_tower\.", "model.vision_tower."),
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ),
)
TABLE = {
    "GemmaForCausalLM": Architecture(
        OUTSIDE | in_blocks(PREFIX, {**TWO_NORMS, **ATTENTION, **MLP}),
        optional={"attention_bias": ATTENTION_BIAS},
        defaults={**DEFAULTS, "num_attention_heads": 16, "num_key_value_heads": 16},
        # The first configs say gelu as hidden_act; hidden_activation came later, with what the model was trained with.
        spelled=SPELLED,
        only=BOTH_WAYS,
        fixed=GATED,
    ),
    "Gemma2ForCausalLM": Architecture(
        OUTSIDE | in_blocks(PREFIX, {**FOUR_NORMS, **ATTENTION, **MLP}),
        optional={"attention_bias": ATTENTION_BIAS},
        defaults=GEMMA2_DEFAULTS,
        spelled=SPELLED,
        understood=CAPPED,
        only=BOTH_WAYS,
        windowed=_every_other,
        fixed={**GATED, "use_normalization_before_and_after": True},
        more=_caps,
    ),
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_WITH_VISION,
}
