"""Both layouts of HQQ, every packing, against codes placed bit by bit."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tracelens.errors import CheckpointError
from tracelens.loading import Checkpoint

MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{MODULE}.weight"
PACKING = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}
PLANES = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def packed(codes: list[list[int]], packing: str) -> torch.Tensor:
    """Row r goes to word r % step, in the plane r // step, planes from the top bits down."""
    width, planes = PLANES[packing]
    step = math.ceil(len(codes) / planes)
    words = [[0] * len(codes[0]) for _ in range(step)]
    for r, row in enumerate(codes):
        for c, code in enumerate(row):
            words[r % step][c] |= code << (width * (planes - 1 - r // step))
    return torch.tensor(words).to(torch.int32 if packing == "3bit_32" else torch.uint8)


def quantized(nbits=4, axis=1, group=8, shape=(16, 16), dtype=torch.float32):
    """What describes one weight, and the weight, number by number."""
    count = shape[0] * shape[1]
    if group is None:
        rows, columns = shape
    else:
        rows, columns = (count // group, group) if axis == 1 else (group, count // group)
    top = round(2**nbits - 1)
    codes = [[(5 * r + 3 * c + r // 7) % (top + 1) for c in range(columns)] for r in range(rows)]
    factors = (rows, 1) if axis == 1 else (1, columns)
    scale, zero = uniform(*factors).to(dtype), uniform(*factors, seed=1).to(dtype) * top
    made = np.zeros((rows, columns), dtype=np.float32)
    for r in range(rows):
        for c in range(columns):
            at = (r, 0) if axis == 1 else (0, c)
            made[r, c] = (np.float32(codes[r][c]) - np.float32(zero.float()[at])) * np.float32(scale.float()[at])
    description = {
        "W_q": packed(codes, PACKING[nbits]),
        "scale": scale,
        "zero": zero,
        "nbits": nbits,
        "group_size": group,
        "shape": torch.Size(shape),
        "axis": axis,
        "packing": PACKING[nbits],
        "unpack_view_dtype": torch.int32 if nbits == 3 else torch.uint8,
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": torch.float32,
    }
    return description, torch.from_numpy(made).reshape(shape)


FLAGS = {"offload_meta": False, "stores_quant_config": True, "channel_wise": True, "optimize": True, "round_zero": True}
FLAGS_OLD = {"quant_scale": False, "quant_zero": False}


def encoded(value):
    """As transformers stores it in safetensors."""
    if isinstance(value, torch.Size):
        return torch.tensor(value)
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    if isinstance(value, (str, torch.dtype)):
        return torch.tensor([ord(letter) for letter in str(value)], dtype=torch.uint8)
    return value.contiguous()


def as_safetensors(folder, description, **others):
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "hqq"}}
    (folder / "config.json").write_text(json.dumps(config))
    stored = {f"{MODULE}.{key}": encoded(v) for key, v in {**FLAGS, **description}.items() if v is not None}
    save_file(stored | others, folder / "model.safetensors")
    return Checkpoint(folder)


def as_native(folder, description, **others):
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    torch.save({MODULE: {**description, **FLAGS, "bias": None}, **others}, folder / "qmodel.pt")
    return Checkpoint(folder)


def as_old_native(folder, description, **others):
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    meta = {**FLAGS_OLD, **description}
    torch.save({MODULE: {"W_q": meta.pop("W_q"), "meta": meta, "bias": None}, **others}, folder / "qmodel.pt")
    return Checkpoint(folder)


WRITERS = [as_safetensors, as_native, as_old_native]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", list(PACKING))
def test_bits_and_axes(tmp_path, write, nbits, axis):
    description, made = quantized(nbits, axis)
    checkpoint = write(tmp_path, description)
    assert checkpoint.shape(WEIGHT) == (16, 16)
    assert torch.equal(checkpoint.tensor(WEIGHT), made)
    assert checkpoint.names() == [WEIGHT]
    assert not checkpoint.quantized(WEIGHT).scheme.symmetric


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("nbits", "shape"), [(4, (16, 24)), (3, (7, 9)), (3, (20, 4)), (8, (5, 3))])
def test_no_groups(tmp_path, write, nbits, shape, axis):
    description, made = quantized(nbits, axis, None, shape)
    assert torch.equal(write(tmp_path, description).tensor(WEIGHT), made)


@pytest.mark.parametrize(("group", "axis"), [(6, 1), (20, 0), (30, 0), (10, 1), (4, 1)])
def test_three_bits_fill_the_last_words(tmp_path, group, axis):
    description, made = quantized(3, axis, group, (12, 10))
    assert torch.equal(as_native(tmp_path, description).tensor(WEIGHT), made)


def test_the_sign_bit_of_three_bit_words(tmp_path):
    description, made = quantized(3)
    description["W_q"] = description["W_q"] | torch.tensor(-(2**31) + 2**30).int()
    assert (description["W_q"] < 0).all()
    assert torch.equal(as_native(tmp_path, description).tensor(WEIGHT), made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scales(tmp_path, dtype):
    description, made = quantized(4, dtype=dtype)
    assert torch.equal(as_native(tmp_path, description).tensor(WEIGHT), made)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("nbits", "view"), [(4, torch.float16), (4, torch.float32), (3, torch.float16), (3, torch.float32)]
)
def test_words_stored_as_floats(tmp_path, write, nbits, view):
    description, made = quantized(nbits)
    description |= {"W_q": description["W_q"].view(view), "view_as_float": True}
    assert torch.equal(write(tmp_path, description).tensor(WEIGHT), made)


def test_names_beside(tmp_path):
    description, made = quantized()
    others = {"model.embed_tokens": {"weight": uniform(4, 4)}, "model.norm": {"weight": uniform(4)}}
    checkpoint = as_native(tmp_path, {**description, "bias": uniform(16)}, **others)
    (tmp_path / "biased").mkdir()
    assert set(checkpoint.names()) == {WEIGHT, "model.embed_tokens.weight", "model.norm.weight"}
    biased = as_safetensors(tmp_path / "biased", {**description, "bias": uniform(16)})
    assert set(biased.names()) == {WEIGHT, f"{MODULE}.bias"}
    assert torch.equal(biased.tensor(f"{MODULE}.bias"), uniform(16))
    assert torch.equal(biased.tensor(WEIGHT), made)
    assert biased.format == "hqq (transformers)"
    assert checkpoint.format == "hqq (native)"


def once_more(description, key, *, whole):
    """Scales or zero points quantized to 8 bits: one scale for all of them, or one for each 8."""
    factor = description.pop(key)
    nested, made = quantized(8, 1, 8, (len(factor) // 8, 8))
    if whole:
        nested |= {"scale": torch.tensor(0.01), "zero": torch.tensor(3.5), "group_size": None, "shape": factor.shape}
        codes = torch.arange(len(factor)).mul(7).remainder(256).byte().reshape(-1, 1)
        nested["W_q"], made = codes, (codes.float() - 3.5) * torch.tensor(0.01)
    nested["shape"] = factor.shape
    description |= {f"{key}_q": nested.pop("W_q"), f"meta_{key}": nested, f"quant_{key}": True}
    return made.reshape(factor.shape)


@pytest.mark.parametrize("write", [as_native, as_old_native])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("keys", [["zero"], ["scale"], ["zero", "scale"]])
def test_quantized_scales_and_zero_points(tmp_path, write, keys, whole):
    description, _ = quantized(4)
    factors = {key: description[key] for key in ("scale", "zero")}
    for key in keys:
        factors[key] = once_more(description, key, whole=whole)
    codes = as_codes(quantized(4)[0])
    checkpoint = write(tmp_path, description)
    expected = ((codes - factors["zero"]) * factors["scale"]).reshape(16, 16)
    assert torch.equal(checkpoint.tensor(WEIGHT), expected)
    assert checkpoint.names() == [WEIGHT]
    assert checkpoint.quantized(WEIGHT).scheme.notes == ("double-quantized",)


def as_codes(description):
    words = description["W_q"]
    return torch.cat([words >> 4, words & 15]).float()


@pytest.mark.parametrize("both", [False, True])
def test_stacked_for_offloading(tmp_path, both):
    description, made = quantized(4)
    if both:
        zero, scale = (once_more(description, key, whole=False) for key in ("zero", "scale"))
        stacked = torch.stack([description.pop("zero_q"), description.pop("scale_q")])
        made = ((as_codes(quantized(4)[0]) - zero) * scale).reshape(16, 16)
    else:
        stacked = torch.stack([description.pop("zero"), description.pop("scale")])
    checkpoint = as_old_native(tmp_path, {**description, "zero_scale": stacked})
    assert torch.equal(checkpoint.tensor(WEIGHT), made)
    assert checkpoint.names() == [WEIGHT]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nbits": 7}, "holds 7 bit codes in the packing '4bit_u8', expected one of 8bit_u8"),
        ({"packing": "4bit_i8"}, "in the packing '4bit_i8'"),
        ({"packing": "8bit_u8"}, "holds 4 bit codes in the packing '8bit_u8'"),
        ({"axis": 2}, "has axis 2"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 7}, "group_size 7 does not divide the 256 values"),
        ({"group_size": 16}, r"have shape \[32, 1\], expected \[16, 1\]: group_size 16 along axis 1"),
        ({"axis": 0}, r"have shape \[32, 1\], expected \[1, 32\]"),
        ({"shape": torch.Size((16, 15))}, r"expected \[30, 1\]"),
        ({"shape": torch.Size((256,))}, r"shape' is \[256\], expected the \[out, in\]"),
        ({"W_q": torch.zeros(15, 8, dtype=torch.uint8)}, r"W_q' has shape \[15, 8\], expected \[16, 8\]"),
        ({"W_q": torch.zeros(16, 8, dtype=torch.int32)}, "W_q' is torch.int32, expected torch.uint8"),
        ({"W_q": torch.zeros(16, 8)}, "W_q' is torch.float32, expected torch.uint8"),
        ({"zero": torch.zeros(31, 1)}, "scale and zero of"),
        ({"zero": torch.zeros(32, 1, dtype=torch.int32)}, "zero' is torch.int32, expected floating point"),
    ],
)
def test_damage_is_named(tmp_path, write, change, message):
    description, _ = quantized()
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path, description | change)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("key", ["scale", "zero", "nbits", "packing", "axis", "shape"])
def test_what_is_missing_is_named(tmp_path, write, key):
    description, _ = quantized()
    del description[key]
    with pytest.raises(CheckpointError, match=f"{MODULE}.*{'' if key in ('packing', 'nbits') else key}"):
        write(tmp_path, description)


def test_missing_quantized_scales_are_named(tmp_path):
    description, _ = quantized()
    with pytest.raises(CheckpointError, match=r"lack '.*zero_q'"):
        as_native(tmp_path, description | {"quant_zero": True})


def test_sinq_is_not_taken(tmp_path):
    with pytest.raises(CheckpointError, match=r"SINQ|not known"):
        as_safetensors(tmp_path, {**quantized()[0], "scale2": uniform(16)})
