"""Tiny random checkpoints of real Hugging Face architectures, written and read in milliseconds."""

from pathlib import Path
from typing import Any

import torch

VOCABULARY = (
    "the cat dog bird sat ran sleeps on under over a mat tree roof and then she he it saw heard no yes how do i"
)
WORDS = VOCABULARY.split()
SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
TEXTS = ["the cat sat on the mat", "a bird ran and then it saw the roof", "yes", "she heard the dog under a tree then"]
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"vocab_size": 48, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
MHA_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4}
SIZES_OF: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": GPT2_SIZES,
    "GPTBigCodeForCausalLM": GPT2_SIZES,
    "GPTJForCausalLM": {**GPT2_SIZES, "rotary_dim": 4},
    "GPTNeoForCausalLM": {
        **{"vocab_size": 48, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 64},
        **{"attention_types": [[["global", "local", "local"], 1]], "window_size": 5},
    },
    "GPTNeoXForCausalLM": MHA_SIZES,
    "OPTForCausalLM": {**{k: v for k, v in MHA_SIZES.items() if k != "intermediate_size"}, "ffn_dim": 40},
    "BloomForCausalLM": {"vocab_size": 48, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "MixtralForCausalLM": {**SIZES, "num_experts_per_tok": 2, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {**SIZES, **EXPERTS, "moe_intermediate_size": 24, "head_dim": 16},
    "OlmoeForCausalLM": {**SIZES, **EXPERTS},
    "GptOssForCausalLM": {**SIZES, "num_experts_per_tok": 2, "num_local_experts": 4, "head_dim": 16},
}
"""Sizes of architectures that are not spelled as Llama's are."""


def tiny_tokenizer(*, add_bos: bool = True) -> Any:
    """A word-level fast tokenizer over `WORDS`, with a chat template, that adds BOS or does not."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_hf_model(architecture: str = "LlamaForCausalLM", *, seed: int = 0, **config: Any) -> Any:
    """A random transformers model; every parameter is drawn, norms and biases included, so that none can be lost."""
    import transformers

    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**{**SIZES_OF.get(architecture, SIZES), **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


def write_checkpoint(
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    seed: int = 0,
    add_bos: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Write a tiny random checkpoint with tokenizer; `config` overrides the sizes and whatever the architecture takes."""
    tiny_hf_model(architecture, seed=seed, **config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(add_bos=add_bos).save_pretrained(folder)
    return folder
