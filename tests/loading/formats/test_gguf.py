import json
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.gguf_models import Q, random_rows, write_gguf
from tests.tiny import tiny_hf_model
from tracelens.errors import CheckpointError, NonFiniteError
from tracelens.loading import Checkpoint
from tracelens.loading.formats.gguf import BLOCKS, KINDS, blocks_to_floats

NAME = "model.layers.0.self_attn.q_proj"


def half(octets):
    return np.float32(struct.unpack("<e", bytes(octets))[0])


def q8_0(block):
    return [half(block[:2]) * np.float32(struct.unpack("<b", bytes([byte]))[0]) for byte in block[2:]]


def q4_0(block):
    codes = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [half(block[:2]) * np.float32(code - 8) for code in codes]


def q4_k(block):
    """Eight runs of 32 with 6-bit scales and minima (struct block_q4_K of ggml-common.h)."""
    d, least, packed, codes = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    values = []
    for run in range(8):
        if run < 4:
            scale, minimum = packed[run] & 63, packed[run + 4] & 63
        else:
            scale = packed[run + 4] & 15 | packed[run - 4] >> 6 << 4
            minimum = packed[run + 4] >> 4 | packed[run] >> 6 << 4
        for i in range(32):
            byte = codes[run // 2 * 32 + i]
            code = byte >> 4 if run % 2 else byte & 15
            values.append(d * np.float32(scale) * np.float32(code) - least * np.float32(minimum))
    return values


def q6_k(block):
    """Sixteen runs of 16 with 8-bit scales (struct block_q6_K of ggml-common.h)."""
    low, high, scales, d = block[:128], block[128:192], block[192:208], half(block[208:])
    values = []
    for i in range(256):
        part, at = divmod(i, 128)
        quarter, column = divmod(at, 32)
        byte = low[part * 64 + quarter % 2 * 32 + column]
        code = byte >> 4 if quarter >= 2 else byte & 15
        code |= (high[part * 32 + column] >> 2 * quarter & 3) << 4
        scale = struct.unpack("<b", bytes([scales[i // 16]]))[0]
        values.append(d * np.float32(scale) * np.float32(code - 32))
    return values


REFERENCES = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_K": q4_k, "Q6_K": q6_k}


@pytest.mark.parametrize("kind", REFERENCES)
def test_blocks_are_what_the_format_says(kind):
    rows = random_rows(kind)
    size = gguf.GGML_QUANT_SIZES[Q[kind]][1]
    wanted = [
        [v for at in range(0, len(row), size) for v in REFERENCES[kind](row[at : at + size])] for row in rows.tolist()
    ]
    found = blocks_to_floats(rows, kind)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(np.array(wanted, dtype=np.float32)))


def test_every_type_that_is_announced_can_be_dequantized():
    for kind, (bits, block, _, _) in KINDS.items():
        per_block, size = gguf.GGML_QUANT_SIZES[Q[kind]]
        floats = blocks_to_floats(torch.zeros(2, 3 * size, dtype=torch.uint8), kind)
        assert floats.shape == (2, 3 * per_block)
        assert per_block % block == 0
        assert bits <= 8 * size / per_block < bits + 1.5


# --- GGUF files


def test_schemes_and_changes_are_told(tmp_path):
    model = tiny_hf_model(intermediate_size=64)
    kinds = {"attn_q": Q.Q4_1, "attn_k": Q.F32, "ffn_up": Q.Q8_0, "token_embd": Q.Q4_0}
    write_gguf(
        tmp_path / "model.gguf", model,
        quantize=lambda name, tensor: next((kind for part, kind in kinds.items() if part in name and tensor.ndim == 2), Q.F16)
        if tensor.ndim == 2 else Q.F32,
    )  # fmt: skip
    checkpoint = Checkpoint(tmp_path / "model.gguf")
    assert checkpoint.format == "gguf (Q4_0, Q4_1, Q8_0)"
    layer = "model.layers.1."
    assert str(checkpoint.quantized(f"{layer}self_attn.q_proj.weight").scheme) == (
        "Q4_1, block 1×32, asymmetric, rows of heads put back in order"
    )
    assert str(checkpoint.quantized(f"{layer}self_attn.k_proj.weight").scheme) == (
        "float, per tensor, rows of heads put back in order"
    )
    assert str(checkpoint.quantized(f"{layer}mlp.up_proj.weight").scheme) == "Q8_0, block 1×32"
    assert checkpoint.quantized("model.embed_tokens.weight").scheme.code == "Q4_0"
    assert checkpoint.quantized(f"{layer}mlp.down_proj.weight") is None
    assert checkpoint.parts(f"{layer}mlp.down_proj.weight") == ("blk.1.ffn_down.weight",)


def test_types_without_a_dequantizer_are_refused(tmp_path):
    model = tiny_hf_model(intermediate_size=64)
    octets = np.zeros((32, 40), dtype=np.uint8)

    def change(writer):
        writer.add_tensor("blk.9.attn_output.weight", octets, raw_dtype=Q.Q8_1)

    write_gguf(tmp_path / "model.gguf", model, change=change)
    with pytest.raises(CheckpointError, match=r"blk.9.attn_output.weight.*type Q8_1.*supported: Q4_0"):
        Checkpoint(tmp_path / "model.gguf")


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path):
    model = tiny_hf_model(intermediate_size=64)
    write_gguf(tmp_path / "model.gguf", model)
    path = tmp_path / "model.gguf"
    whole = bytearray(path.read_bytes())
    at = whole.index(b"llama.attention.head_count_kv") + len(b"llama.attention.head_count_kv") + 4
    whole[at : at + 4] = struct.pack("<I", 3)
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"attn_k.weight.*\[16, 32\].*3 heads cannot share"):
        Checkpoint(path)


def test_a_damaged_scale_is_named(tmp_path):
    model = tiny_hf_model(intermediate_size=64)
    write_gguf(tmp_path / "model.gguf", model, quantize=lambda name, t: Q.Q8_0 if "ffn_down" in name else Q.F32)
    checkpoint = Checkpoint(tmp_path / "model.gguf")
    place = checkpoint.stored.files._places["blk.1.ffn_down.weight"]
    whole = bytearray((tmp_path / "model.gguf").read_bytes())
    whole[place.start : place.start + 2] = struct.pack("<e", float("inf"))
    (tmp_path / "model.gguf").write_bytes(whole)
    with pytest.raises(NonFiniteError, match=r"layers.1.mlp.down_proj.weight.*NaN or infinity in \d+ of 2048"):
        Checkpoint(tmp_path / "model.gguf").tensor("model.layers.1.mlp.down_proj.weight")


# --- gptqmodel


def folder_of(tmp_path, qweight, quantization, name=NAME, **config):
    config = {"hidden_size": 64, "intermediate_size": 192, "model_type": "llama"} | config
    config["quantization_config"] = {"quant_method": "gguf"} | quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({f"{name}.qweight": qweight, "model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"bits": 8, "format": "q_0"}, "Q8_0"),
        ({"bits": 4, "checkpoint_format": "q_0"}, "Q4_0"),
        ({"bits": 4, "format": "q_k_m"}, "Q4_K"),
        ({"bits": "q4_k_s", "format": "gguf"}, "Q4_K"),
        ({"bits": 6, "format": "q_k"}, "Q6_K"),
    ],
)
def test_gptqmodel_stores_the_same_blocks(said, kind, tmp_path):
    size = BLOCKS[kind][0]
    rows = random_rows(kind)
    checkpoint = Checkpoint(folder_of(tmp_path, rows, said, hidden_size=2 * size, intermediate_size=8 * size))
    assert checkpoint.format == f"gptqmodel gguf ({kind})"
    assert set(checkpoint.names()) == {"model.norm.weight", f"{NAME}.weight"}
    assert checkpoint.shape(f"{NAME}.weight") == (3, 2 * size)
    wanted = gguf.quants.dequantize(rows.numpy(), Q[kind])
    assert torch.equal(checkpoint.tensor(f"{NAME}.weight"), torch.from_numpy(wanted))


def test_inputs_padded_to_whole_blocks_are_cut_to_the_width_of_the_config(tmp_path):
    rows = random_rows("Q4_K", rows=4, blocks=4)
    folder = folder_of(tmp_path, rows, {"bits": 4, "format": "q_k"}, hidden_size=896, intermediate_size=4864)
    checkpoint = Checkpoint(folder)
    assert checkpoint.shape(f"{NAME}.weight") == (4, 896)
    assert torch.equal(checkpoint.tensor(f"{NAME}.weight"), blocks_to_floats(rows, "Q4_K")[:, :896])


def test_conv1d_is_turned_back(tmp_path):
    rows = random_rows("Q8_0")
    name = "transformer.h.0.attn.c_attn"
    folder = folder_of(tmp_path, rows, {"bits": 8, "format": "q_0"}, name, model_type="gpt2", n_embd=64)
    assert torch.equal(Checkpoint(folder).tensor(f"{name}.weight"), blocks_to_floats(rows, "Q8_0").T)


@pytest.mark.parametrize(
    ("said", "config", "message"),
    [
        ({"bits": 1, "format": "q_0"}, {}, r"bits 1 and format 'q_0', which is not known; known: Q4_0, Q8_0"),
        ({"bits": 8, "format": "gguf"}, {}, r"bits 8 and format 'gguf'"),
        ({"bits": 4, "format": "q_0"}, {}, r"q_proj.qweight'.*68 bytes; as Q4_0.*3.77778 blocks"),
        ({"bits": 8, "format": "q_0"}, {"hidden_size": 256}, r"\[192, 256\] as widths"),
        ({"bits": 8, "format": "q_0"}, {"hidden_size": 40}, None),
        ({"bits": 8, "format": "q_0"}, {"hidden_size": 40, "intermediate_size": 50}, r"\[40, 50\] as widths"),
        ({"bits": 8, "format": "q_0", "dynamic": {"+:.*q_proj": {"bits": 4}}}, {}, r"several types.*dynamic"),
    ],
)
def test_gptqmodel_configs_that_do_not_fit_are_refused(said, config, message, tmp_path):
    folder = folder_of(tmp_path, random_rows("Q8_0"), said, **config)
    if message is None:
        assert Checkpoint(folder).shape(f"{NAME}.weight") == (3, 40)
        return
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_gptqmodel_tensors_that_do_not_fit_are_refused(tmp_path):
    said = {"bits": 8, "format": "q_0"}
    with pytest.raises(CheckpointError, match=r"torch.int32 \[4, 4\], expected rows of uint8"):
        Checkpoint(folder_of(tmp_path, torch.zeros(4, 4, dtype=torch.int32), said))
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no qweight"):
        Checkpoint(tmp_path)
