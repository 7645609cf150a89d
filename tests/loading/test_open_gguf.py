import math
import struct

import gguf
import numpy as np
import pytest
import torch

import tracelens
from tests.gguf_models import KINDS, Q, write_gguf
from tests.tiny import tiny_hf_model
from tracelens.errors import CheckpointError, UnsupportedArchitectureError
from tracelens.loading import Checkpoint
from tracelens.loading.architectures import ARCHITECTURES
from tracelens.loading.gguf import GgufFiles, open_gguf

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 48, "layer_norm_epsilon": 1e-5}
CONFIGS = {
    "LlamaForCausalLM": [
        {},
        {"tie_word_embeddings": True, "head_dim": 16, "rms_norm_eps": 1e-5},
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
    ],
    "MistralForCausalLM": [{"sliding_window": 3}],
    "Qwen2ForCausalLM": [{}],
    "Qwen3ForCausalLM": [{"head_dim": 16}, {"head_dim": 8, "attention_bias": True}],
    "GemmaForCausalLM": [{"head_dim": 16}],
    "Gemma2ForCausalLM": [
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 3, "final_logit_softcapping": 2.0},
        {"head_dim": 16, "query_pre_attn_scalar": 8, "sliding_window": 3, "num_hidden_layers": 46},
    ],
    "Gemma3ForCausalLM": [
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 3, "num_hidden_layers": 7},
    ],
    "Phi3ForCausalLM": [{"pad_token_id": 1}, {"pad_token_id": 1, "sliding_window": 3}],
    "Olmo2ForCausalLM": [{}],
    "GPT2LMHeadModel": [GPT2],
    "GPTNeoXForCausalLM": [
        {},
        {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ],
}
CASES = [pytest.param(name, config, id=f"{name}-{i}") for name, cs in CONFIGS.items() for i, config in enumerate(cs)]
TOKENS = torch.tensor([[2, 9, 30, 11, 5, 40, 17, 8], [2, 3, 4, 5, 6, 7, 8, 9]])


def tiny(architecture, **config):
    return tiny_hf_model(architecture, **{"intermediate_size": 64, **config})


def reopened(path):
    """The plain transformers model that a file says it holds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = Checkpoint(path)
    config = AutoConfig.for_model(**checkpoint.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert type(model).__name__ == checkpoint.architecture
    state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    lost = model.load_state_dict(state, strict=False)
    assert not lost.unexpected_keys
    assert set(lost.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model


def logits(model):
    model.set_attn_implementation("eager")  # the other ones leave out Gemma 2's softcap of scores
    with torch.inference_mode():
        return model(TOKENS).logits


def test_every_architecture_is_tested():
    from tracelens.loading.gguf_architectures import GGUF_ARCHITECTURES

    assert set(KINDS.values()) == set(GGUF_ARCHITECTURES)
    assert set(CONFIGS) == set(KINDS)


@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_a_converted_model_opens_as_itself(architecture, config, tmp_path):
    model = tiny(architecture, **config)
    write_gguf(tmp_path / "model.gguf", model)
    again = reopened(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q5_1, Q.BF16, Q.F16])
def test_weights_are_what_gguf_says_put_back_in_order(architecture, kind, tmp_path):
    model = tiny(architecture, **CONFIGS[architecture][0])
    expected = write_gguf(
        tmp_path / "model.gguf", model, quantize=lambda name, tensor: kind if tensor.ndim == 2 else Q.F32
    )
    checkpoint = Checkpoint(tmp_path / "model.gguf")
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
        assert checkpoint.shape(name) == tensor.shape
        if tensor.ndim == 2 and kind not in (Q.F16, Q.BF16):
            assert checkpoint.quantized(name).scheme.code == kind.name


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name in ARCHITECTURES])
def test_hooked_logits_are_those_of_the_dequantized_model(architecture, tmp_path, no_network):
    model = tiny(architecture, **CONFIGS[architecture][0])
    expected = write_gguf(
        tmp_path / "model.gguf", model, quantize=lambda name, tensor: Q.Q5_0 if tensor.ndim == 2 else Q.F32
    )
    hooked = tracelens.load(tmp_path / "model.gguf", device="cpu")
    before = logits(model)
    model.load_state_dict(expected, strict=False)  # without the output of a model that has it tied
    model.tie_weights()
    wanted = logits(model)
    with torch.inference_mode():
        found = hooked(TOKENS, return_type="logits")
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (before - wanted).abs().max() > 1e-3 * wanted.abs().max()


# --- rope


def llama3_factors(width, theta, factor, original):
    """Divisors of the frequencies, from the definition in Llama 3.1's reference code."""
    factors = []
    for i in range(0, width, 2):
        length = 2 * math.pi * theta ** (i / width)
        if length < original / 4:
            factors.append(1.0)
        elif length > original:
            factors.append(factor)
        else:
            smooth = (original / length - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def with_tensor(name, data):
    return lambda writer: writer.add_tensor(name, data)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 16384)])
def test_llama3_scaling_is_read_from_the_frequencies(factor, original, tmp_path):
    rope = {
        **{"rope_theta": 500000.0, "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": original},
    }
    model = tiny("LlamaForCausalLM", head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
    factors = llama3_factors(64, 500000.0, factor, original)
    write_gguf(tmp_path / "model.gguf", model, change=with_tensor("rope_freqs.weight", factors))
    checkpoint = Checkpoint(tmp_path / "model.gguf")
    assert checkpoint.config["rope_parameters"] == rope
    assert "rope_freqs.weight" not in checkpoint.names()
    assert checkpoint.layout.runtime == ("rope_freqs.weight",)
    assert checkpoint.layout.notes == ("rope_freqs.weight became rope_parameters of the config",)
    far = torch.arange(8)[None] * 9001
    with torch.inference_mode():
        found, wanted = (m(TOKENS[:1], position_ids=far).logits for m in (reopened(tmp_path / "model.gguf"), model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_other_frequencies_are_refused(tmp_path):
    factors = llama3_factors(8, 500000.0, 8.0, 8192)
    factors[2] *= 1.01
    write_gguf(tmp_path / "model.gguf", tiny("LlamaForCausalLM"), change=with_tensor("rope_freqs.weight", factors))
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight.*not the llama3 scaling"):
        open_gguf(tmp_path / "model.gguf")


def test_frequencies_of_one_change_nothing(tmp_path):
    ones = np.ones(4, dtype=np.float32)
    write_gguf(tmp_path / "model.gguf", tiny("LlamaForCausalLM"), change=with_tensor("rope_freqs.weight", ones))
    assert open_gguf(tmp_path / "model.gguf")[0]["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)
def test_scaling_in_the_metadata_is_kept(rope, tmp_path):
    rope |= {"rope_theta": 10000.0}
    model = tiny("Qwen2ForCausalLM", rope_parameters=rope)

    def change(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    write_gguf(tmp_path / "model.gguf", model, change=change)
    assert open_gguf(tmp_path / "model.gguf")[0]["rope_parameters"] == rope
    torch.testing.assert_close(logits(reopened(tmp_path / "model.gguf")), logits(model), rtol=1e-5, atol=1e-6)


def test_longrope_is_read_from_its_tensors(tmp_path):
    rope = {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4},
        **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.5, 4.0, 8.0]},
    }
    model = tiny(
        "Phi3ForCausalLM", pad_token_id=1, original_max_position_embeddings=4, rope_parameters=rope
    )  # fmt: skip

    def change(writer):
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], dtype=np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], dtype=np.float32))
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(64 / 4) / math.log(4)))

    write_gguf(tmp_path / "model.gguf", model, change=change)
    torch.testing.assert_close(logits(reopened(tmp_path / "model.gguf")), logits(model), rtol=1e-4, atol=1e-5)
    write_gguf(
        tmp_path / "half.gguf", model, change=with_tensor("rope_factors_long.weight", np.ones(4, dtype=np.float32))
    )
    with pytest.raises(CheckpointError, match=r"needs both.*rope_factors_short.weight"):
        open_gguf(tmp_path / "half.gguf")


# --- metadata that is not understood


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_expert_count(8), r"llama.expert_count = 8.*not supported"),
        (lambda w: w.add_logit_scale(0.5), r"llama.logit_scale = 0.5"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), r"yarn without llama.rope.scaling.orig"),
        (lambda w: w.add_rope_scaling_factor(2.0), r"rope scaling 'none' by 2.0"),
        (lambda w: w.add_type("adapter"), r"part of one \(adapter\)"),
        (lambda w: w.add_uint16("split.count", 3), r"one of 3 files.*llama-gguf-split --merge"),
        (with_tensor("blk.0.attn_sinks.weight", np.ones(4, dtype=np.float32)), r"'blk.0.attn_sinks.weight'.*no part"),
        (with_tensor("output_norm.scale", np.ones(4, dtype=np.float32)), r"'output_norm.scale'.*no part"),
    ],
)
def test_what_would_be_another_model_is_refused(change, message, tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny("LlamaForCausalLM"), change=change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path / "model.gguf")


def test_heads_of_other_shapes_are_refused(tmp_path):
    write_gguf(tmp_path / "neox.gguf", tiny("GPTNeoXForCausalLM"), change=lambda w: w.add_head_count_kv(2))
    with pytest.raises(CheckpointError, match=r"gpt_neox with 2 key-value heads"):
        open_gguf(tmp_path / "neox.gguf")
    write_gguf(tmp_path / "gpt2.gguf", tiny("GPT2LMHeadModel", **GPT2), change=lambda w: w.add_head_count_kv(4))
    assert open_gguf(tmp_path / "gpt2.gguf")[0]["n_head"] == 4
    write_gguf(tmp_path / "wide.gguf", tiny("Qwen2ForCausalLM"), change=lambda w: w.add_value_length(16))
    with pytest.raises(CheckpointError, match=r"keys of 8 and values of 16"):
        open_gguf(tmp_path / "wide.gguf")
    write_gguf(
        tmp_path / "uneven.gguf",
        tiny("GPT2LMHeadModel", **GPT2),
        change=lambda w: w.add_array("gpt2.attention.head_count_kv", [4, 2]),
    )
    with pytest.raises(CheckpointError, match=r"gpt2 with \(4, 2\) key-value heads"):
        open_gguf(tmp_path / "uneven.gguf")


def small_file(path, architecture="llama", **options):
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unknown_architectures_and_missing_metadata(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match=r"'rwkv6'.*supported: llama, qwen2"):
        open_gguf(small_file(tmp_path / "rwkv.gguf", "rwkv6"))
    with pytest.raises(CheckpointError, match=r"lacks the metadata llama.context_length"):
        open_gguf(small_file(tmp_path / "bare.gguf"))


# --- files


def test_reads_what_gguf_py_reads(tmp_path):
    model = tiny("LlamaForCausalLM")
    kinds = {"attn_q": Q.Q8_0, "attn_k": Q.BF16, "attn_v": Q.F16, "ffn_up": Q.Q4_1}

    def change(writer):
        writer.add_token_list(["a", "é", "<s>"])
        writer.add_token_scores([0.5, 1.5, -1.0])
        writer.add_array("x.flags", [True, False])
        writer.add_float64("x.pi", math.pi)
        writer.add_bool("x.yes", True)
        writer.add_int64("x.low", -(2**40))

    write_gguf(
        tmp_path / "model.gguf", model, change=change,
        quantize=lambda name, tensor: next((kind for part, kind in kinds.items() if part in name), Q.F32),
    )  # fmt: skip
    files, reader = GgufFiles(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "tokenizer.ggml.tokens":
            continue
        value = field.contents()
        assert files.values[key] == (tuple(value) if isinstance(value, list) else value), key
    assert files.values["tokenizer.ggml.tokens"].length == 3
    assert files.names() == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        read = files.read(tensor.name)
        assert files.kind(tensor.name) == tensor.tensor_type.name
        assert files.elements(tensor.name) == tuple(reversed(tensor.shape.tolist()))
        assert (files.dtype(tensor.name), files.shape(tensor.name)) == (read.dtype, tuple(read.shape))
        assert files.nbytes(tensor.name) == tensor.n_bytes
        assert read.view(torch.uint8).flatten().tolist() == tensor.data.view(np.uint8).flatten().tolist()
    assert files.dtype("blk.0.attn_k.weight") == torch.bfloat16


def test_tensors_lie_in_the_mapped_file(tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny("LlamaForCausalLM"))
    files = GgufFiles(tmp_path / "model.gguf")
    first, second = files.read("output.weight"), files.read("output.weight")
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("keep", [3, 10, 30, 200, 700, -4000, -1])
def test_a_file_that_is_cut_off_is_refused(keep, tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny("LlamaForCausalLM"))
    whole = (tmp_path / "model.gguf").read_bytes()
    # The last tensor is followed by padding, which may be missing.
    end = len(whole) - (31 if keep == -1 else 0)
    (tmp_path / "model.gguf").write_bytes(whole[: keep if keep > 0 else end + keep])
    with pytest.raises(CheckpointError, match=r"cut off|no GGUF file"):
        open_gguf(tmp_path / "model.gguf")


def test_other_files_are_refused(tmp_path):
    path = small_file(tmp_path / "model.gguf")
    whole = path.read_bytes()
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(CheckpointError, match=r"begins with b'GGML'"):
        open_gguf(path)
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(CheckpointError, match="GGUF version 1; versions 2 and 3"):
        open_gguf(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        open_gguf(path)
    big = small_file(tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match=r"big-endian.*gguf_convert_endian"):
        open_gguf(big)


@pytest.mark.parametrize(
    ("at", "number", "message"),
    [
        ("type", 99, r"'token_embd.weight'.*type 99.*pip install -U gguf"),
        ("type", Q.Q4_K, r"rows of 32, which Q4_K cannot divide"),
        ("offset", 64, r"cut off: tensor 'token_embd.weight' ends"),
        ("offset", 7, r"lies over another one"),
    ],
)
def test_a_damaged_description_of_a_tensor(at, number, message, tmp_path):
    path = small_file(tmp_path / "model.gguf")
    whole = bytearray(path.read_bytes())
    start = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    if at == "type":
        whole[start : start + 4] = struct.pack("<I", number)
    else:
        whole[start + 4 : start + 12] = struct.pack("<Q", number)
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=message):
        GgufFiles(path)
