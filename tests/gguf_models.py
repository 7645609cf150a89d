"""Tiny GGUF files made from transformers models, as llama.cpp's converters make them.

Written apart from the package: row by row, and with gguf-py's own table of names and its own quantization.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

Q = gguf.GGMLQuantizationType
KINDS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gptneox",
}


def row_order(kind: str, name: str, config: Any, rows: int) -> list[int] | None:
    """Row i of the stored tensor is row order[i] of the model's."""
    if kind == "llama" and any(f"{part}_proj" in name for part in "qk"):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        width = rows // heads
        return [
            head * width + half * (width // 2) + i
            for head in range(heads)
            for i in range(width // 2)
            for half in (0, 1)
        ]
    if kind == "gptneox" and "query_key_value" in name:
        heads = config.num_attention_heads
        width = rows // heads // 3
        return [(head * 3 + part) * width + i for part in range(3) for head in range(heads) for i in range(width)]
    return None


def converted(kind: str, name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor of the model as the converter writes it, before quantization."""
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T.contiguous()
    order = row_order(kind, name, config, tensor.shape[0])
    return tensor if order is None else torch.stack([tensor[row] for row in order])


def reverted(kind: str, name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """The inverse of `converted`."""
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return tensor - 1
    if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T
    if (order := row_order(kind, name, config, tensor.shape[0])) is None:
        return tensor
    result = torch.empty_like(tensor)
    for at, row in enumerate(order):
        result[row] = tensor[at]
    return result


def stored_names(kind: str, names: list[str], n_layers: int) -> dict[str, str]:
    """Plain name -> GGUF name, from gguf-py's table."""
    arch = next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == kind)
    table = gguf.get_tensor_name_map(arch, n_layers)
    return {name: table.get_name(name.rpartition(".")[0]) + "." + name.rpartition(".")[2] for name in names}


def write_metadata(writer: gguf.GGUFWriter, kind: str, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_file_type(0)
    if kind == "gpt2":
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "gptneox":
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * head))
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind not in ("gemma", "gemma2"):
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("llama", "phi3"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head)
    if kind != "phi3" and getattr(config, "head_dim", None):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
    elif kind != "qwen2" and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def write_gguf(
    path: Path,
    model: Any,
    *,
    quantize: Callable[[str, torch.Tensor], Q] = lambda name, tensor: Q.F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> dict[str, torch.Tensor]:
    """Write the model; `quantize` chooses a type for each GGUF name, `change` adds to the file.

    Returns the state dict that must be read back: dequantized by gguf-py and put back row by row.
    """
    config = model.config
    kind = KINDS[type(model).__name__]
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    writer = gguf.GGUFWriter(path, kind, endianess=endian)
    write_metadata(writer, kind, config)
    expected = {}
    for name, stored in stored_names(kind, list(state), config.num_hidden_layers).items():
        exact = converted(kind, name, state[name], config)
        type_ = quantize(stored, exact)
        data = gguf.quants.quantize(np.ascontiguousarray(exact.numpy()), type_)
        writer.add_tensor(stored, data, raw_dtype=type_)
        dense = torch.from_numpy(gguf.quants.dequantize(data, type_).astype(np.float32))
        expected[name] = reverted(kind, name, dense, config)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def random_rows(kind, rows=3, blocks=2, seed=0):
    """Blocks of random bytes whose float16 scales are finite."""
    size = gguf.GGML_QUANT_SIZES[Q[kind]][1]
    octets = np.random.default_rng(seed).integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    starts = {"Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(kind, [0])
    for start in starts:
        octets[..., start + 1] &= 0b10110011
    return torch.from_numpy(octets.reshape(rows, blocks * size))
