"""Metadata of a GGUF file -> config of the plain transformers model.

`transformers` has such a mapping, but drops rope scaling, softcaps, biases and the width of heads without a word. Here
every key that describes the model is either used or refused.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.errors import CheckpointError
from tracelens.loading.gguf_architectures import GgufArchitecture, gguf_architecture

if TYPE_CHECKING:
    from tracelens.loading.gguf import GgufFiles

HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")
"""Keys that say nothing about the weights or the computation that other keys or the tensors do not."""
ABSENT = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scale_linear": 1.0}
"""Keys whose only supported value is the one that means nothing."""
LLAMA3_ORIGINAL = (8192, 4096, 16384, 32768, 65536, 131072)
"""Original context lengths of models with llama3 rope scaling; the frequencies themselves decide which one it is."""
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQUENCIES, LONG, SHORT)
"""Tensors that are part of the config: what the angles of rotary embeddings are divided by."""
WIDE_HEADS = {"gemma2": 46, "gemma3": 62}
"""Number of layers of the one size (27B) that scales scores by hidden_size / heads and not by the width of heads."""


def config_of(path: Path, metadata: Mapping[str, Any], files: "GgufFiles") -> dict[str, Any]:
    """The config. Raises `CheckpointError` for what is missing, contradictory or not understood."""
    _check_general(path, metadata)
    name = str(metadata["general.architecture"])
    row = gguf_architecture(name)
    said = {key[len(name) + 1 :]: value for key, value in metadata.items() if key.startswith(f"{name}.")}
    stored = set(files.names())

    config: dict[str, Any] = {"architectures": [row.architecture], "model_type": row.model_type, **row.constants}
    for key, plain in row.settings.items():
        if key in said:
            config[plain] = _plain_value(path, f"{name}.{key}", said.pop(key))
    for key in ("context_length", "block_count", "embedding_length", "attention.head_count", row.eps):
        if row.settings[key] not in config:
            raise CheckpointError(f"{path} lacks the metadata {name}.{key}; get the model converted anew")
    _complete_heads(path, config, said)
    if "token_embd.weight" not in stored:
        raise CheckpointError(f"{path} lacks the tensor 'token_embd.weight'; get the whole model")
    config["vocab_size"] = files.elements("token_embd.weight")[0]
    config["tie_word_embeddings"] = "output.weight" not in stored
    config |= {switch: tensor in stored for tensor, switch in row.switches.items()}
    # None where the file says nothing, and not the number that transformers takes for this kind of model.
    config |= {f"{token}_token_id": metadata.get(f"tokenizer.ggml.{token}_token_id") for token in ("bos", "eos")}
    config["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")

    if row.model_type != "gpt2":
        config["rope_parameters"] = _rope(path, name, config, said, files)
    FINISH.get(name, lambda config: None)(config)
    _refuse_rest(path, name, said, stored, row)
    return config


def _check_general(path: Path, metadata: Mapping[str, Any]) -> None:
    if not metadata.get("general.architecture"):
        raise CheckpointError(f"{path} does not say its general.architecture; get the model converted anew")
    if (kind := metadata.get("general.type", "model")) != "model":
        raise CheckpointError(f"{path} holds no model but a part of one ({kind}); give the file of the model")
    if (count := metadata.get("split.count", 0)) > 1:
        raise CheckpointError(
            f"{path} is one of {count} files of a split model, which is not supported; put them together with "
            "`llama-gguf-split --merge FIRST_FILE WHOLE.gguf` of llama.cpp"
        )


def _plain_value(path: Path, key: str, value: Any) -> Any:
    """A number as the config has it: per-layer lists of one value become that value, float32 its shortest decimal."""
    if isinstance(value, tuple):
        if len(set(value)) != 1:
            raise CheckpointError(f"{path}: {key} differs between layers ({value[:4]}…), which is not supported")
        value = value[0]
    if not isinstance(value, int | float):
        raise CheckpointError(f"{path}: {key} is {value!r}, expected a number; the file is damaged: get it again")
    return shortest(value) if isinstance(value, float) else value


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.99999997e-07 -> 1e-06."""
    if not math.isfinite(value):
        return value
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == struct.pack("<f", value):
            return candidate
    return value


def _complete_heads(path: Path, config: dict[str, Any], said: dict[str, Any]) -> None:
    """Fills in `head_dim` and the number of key-value heads where they follow from the others."""
    heads = config.get("num_attention_heads") or config["n_head"]
    width = config.get("hidden_size") or config["n_embd"]
    if config["model_type"] not in ("gpt2", "gpt_neox"):
        config.setdefault("num_key_value_heads", heads)
    elif (others := said.pop("attention.head_count_kv", heads)) != heads:
        raise CheckpointError(f"{path}: {config['model_type']} with {others} key-value heads is not supported")
    if config["model_type"] in ("gpt2", "gpt_neox", "phi3"):
        keys = said.pop("attention.key_length", width // heads)
    else:
        keys = config.setdefault("head_dim", width // heads)
    values = said.pop("attention.value_length", keys)
    if keys != values or ("head_dim" not in config and keys != width // heads):
        raise CheckpointError(f"{path}: heads with keys of {keys} and values of {values} are not supported")


def _rope(path: Path, name: str, config: dict[str, Any], said: dict[str, Any], files: "GgufFiles") -> dict[str, Any]:
    """`rope_parameters` as transformers 5 has them."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope: dict[str, Any] = {"rope_theta": shortest(said.pop("rope.freq_base", 10000.0)), "rope_type": "default"}
    dimensions = said.pop("rope.dimension_count", head)
    if dimensions != head or config["model_type"] == "gpt_neox":  # whose own default is a quarter
        rope["partial_rotary_factor"] = dimensions / head
    kind, factor = said.pop("rope.scaling.type", "none"), said.pop("rope.scaling.factor", 1.0)
    original = said.get("rope.scaling.original_context_length")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": shortest(factor)}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": shortest(factor), "original_max_position_embeddings": original}
        if not original:
            raise CheckpointError(f"{path}: yarn without {name}.rope.scaling.original_context_length")
        for key in ("beta_fast", "beta_slow"):
            if (beta := said.pop(f"rope.scaling.yarn_{key}", None)) is not None:
                rope[key] = shortest(beta)
    elif kind not in ("none", "longrope") or (kind == "none" and factor not in (0.0, 1.0)):
        raise CheckpointError(f"{path}: rope scaling {kind!r} by {factor} is not supported")

    names = set(files.names())
    if FREQUENCIES in names:
        if rope["rope_type"] != "default":
            raise CheckpointError(f"{path} has both {FREQUENCIES} and rope scaling {kind!r}, which is not supported")
        rope |= llama3_scaling(path, files.read(FREQUENCIES).float().tolist(), rope["rope_theta"], original)
    if LONG in names or SHORT in names or kind == "longrope":
        rope |= _longrope(path, config, said, files)
    return rope


def llama3_scaling(path: Path, factors: list[float], theta: float, original: int | None) -> dict[str, Any]:
    """The llama3 scaling (Llama 3.1 model card, `rope_scaling`) that gives these divisors of the frequencies.

    They are 1 for short wavelengths, `factor` for long ones and in between follow from the original context length.
    Raises `CheckpointError` if they are no llama3 scaling with the usual limits, 1 and 4.
    """
    if all(factor == 1.0 for factor in factors):
        return {}
    largest = shortest(max(factors))
    for context in dict.fromkeys([*([original] if original else []), *LLAMA3_ORIGINAL]):
        wanted = []
        for i in range(len(factors)):
            turns = context * theta ** (-i / len(factors)) / (2 * math.pi)
            smooth = min(max((turns - 1) / 3, 0.0), 1.0)
            wanted.append(1 / ((1 - smooth) / largest + smooth))
        if all(abs(a - b) <= 1e-4 * b for a, b in zip(factors, wanted, strict=True)):
            return {
                **{"rope_type": "llama3", "factor": largest, "original_max_position_embeddings": context},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            }
    raise CheckpointError(
        f"{FREQUENCIES} in {path} scales the frequencies by {factors[0]:g} to {factors[-1]:g} in a way that is not "
        "the llama3 scaling, the only one supported; load the model's original folder on the hub instead"
    )


def _longrope(path: Path, config: dict[str, Any], said: dict[str, Any], files: "GgufFiles") -> dict[str, Any]:
    if not {LONG, SHORT} <= set(files.names()):
        raise CheckpointError(f"{path}: longrope scaling needs both {LONG} and {SHORT}; get the whole model")
    original = said.get("rope.scaling.original_context_length") or config["max_position_embeddings"]
    config["original_max_position_embeddings"] = original
    rope = {
        "rope_type": "longrope",
        "long_factor": [shortest(value) for value in files.read(LONG).float().tolist()],
        "short_factor": [shortest(value) for value in files.read(SHORT).float().tolist()],
        "original_max_position_embeddings": original,
    }
    if (temperature := said.pop("rope.scaling.attn_factor", None)) is not None:
        rope["attention_factor"] = temperature
    return rope


def _refuse_rest(path: Path, name: str, said: Mapping[str, Any], stored: set[str], row: GgufArchitecture) -> None:
    unknown = [
        f"{name}.{key} = {value!r}"
        for key, value in said.items()
        if key not in HARMLESS and not (key in ABSENT and value == ABSENT[key])
    ]
    if unknown:
        raise CheckpointError(
            f"{path} describes {row.architecture} with {', '.join(unknown)}, which is not supported; "
            "load the model's original folder on the hub instead"
        )


def _finish_llama(config: dict[str, Any]) -> None:
    # Converters write Mistral as llama; only the window tells, and without one the two are the same model.
    if config.get("sliding_window"):
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    else:
        config.pop("sliding_window", None)


def _finish_gemma2(config: dict[str, Any]) -> None:
    kind, layers = ("gemma3", 6) if config["model_type"] == "gemma3_text" else ("gemma2", 2)
    wide = config["num_hidden_layers"] == WIDE_HEADS[kind]
    heads = config["num_attention_heads"]
    config["query_pre_attn_scalar"] = config["hidden_size"] // heads if wide else config["head_dim"]
    local, everywhere = "sliding_attention", "full_attention"
    windowed = bool(config.get("sliding_window"))
    config["layer_types"] = [
        local if windowed and (i + 1) % layers else everywhere for i in range(config["num_hidden_layers"])
    ]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        config[key] = config.get(key) or None


def _finish_gemma3(config: dict[str, Any]) -> None:
    _finish_gemma2(config)
    config["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": config.pop("rope_local_base_freq", 10000.0)},
        "full_attention": config["rope_parameters"],
    }


def _finish_phi3(config: dict[str, Any]) -> None:
    config["sliding_window"] = config.get("sliding_window") or None


def _finish_gpt2(config: dict[str, Any]) -> None:
    config["n_ctx"] = config["n_positions"]


FINISH = {
    "llama": _finish_llama,
    "gemma2": _finish_gemma2,
    "gemma3": _finish_gemma3,
    "phi3": _finish_phi3,
    "gpt2": _finish_gpt2,
}
"""What a config needs beyond one value per key."""
