import json
import random

import pytest
import torch
from safetensors.torch import save_file

from tracelens.errors import CheckpointError, NonFiniteError
from tracelens.loading.checkpoint import Checkpoint

M = "model.layers.0.mlp.down_proj"
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def stream(codes: list[int], bits: int) -> list[int]:
    """Words of a little-endian bit stream, by way of one big integer."""
    total = sum(code << i * bits for i, code in enumerate(codes))
    return [signed(total >> 32 * i) for i in range(-(-len(codes) * bits // 32))]


def planes(codes: list[int], bits: int) -> list[int]:
    """Words of GPTQModel's planar layout."""
    words = []
    for start in range(0, len(codes), 32):
        shift = 0
        for width in PLANES[bits]:
            words += stream([code >> shift & (2**width - 1) for code in codes[start : start + 32]], width)
            shift += width
    return words


def signed(word: int) -> int:
    word &= 2**32 - 1
    return word - 2**32 if word >= 2**31 else word


def packed(rows: list[list[int]], bits: int, pack=stream) -> torch.Tensor:
    return torch.tensor([pack(row, bits) for row in rows], dtype=torch.int32)


def linear(
    bits=4,
    inputs=64,
    outputs=32,
    group=32,
    *,
    zeros=None,
    offset=0,
    index=None,
    pack=stream,
    seed=0,
    kind=torch.float16,
):
    """Tensors of one module and the weight they stand for; `offset` is added to the zero points that are stored."""
    rng = random.Random(seed)
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    g = index or [k // size for k in range(inputs)]
    codes = [[rng.randrange(2**bits) for _ in range(inputs)] for _ in range(outputs)]
    zeros = zeros or [[rng.randrange(1, 2**bits) for _ in range(outputs)] for _ in range(groups)]
    scales = torch.tensor([[rng.uniform(0.01, 1) for _ in range(outputs)] for _ in range(groups)]).to(kind)
    weight = torch.tensor(
        [[scales[g[k], n].item() * (codes[n][k] - zeros[g[k]][n]) for k in range(inputs)] for n in range(outputs)]
    )
    tensors = {
        f"{M}.qweight": packed(codes, bits, pack).t().contiguous(),
        f"{M}.qzeros": packed([[z + offset for z in row] for row in zeros], bits, pack),
        f"{M}.scales": scales,
        f"{M}.g_idx": torch.tensor(g, dtype=torch.int32),
    }
    return tensors, weight


def middle(bits, groups, outputs):
    return [[2 ** (bits - 1)] * outputs for _ in range(groups)]


def write(folder, tensors, quantization, config=None, beside=None, metadata=None):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **(config or {})}
    if quantization is not None:
        config["quantization_config"] = {"quant_method": "gptq", **quantization}
    (folder / "config.json").write_text(json.dumps(config))
    if beside:
        (folder / "quantize_config.json").write_text(json.dumps(beside))
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


V2 = {"bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}
V1 = {"bits": 4, "group_size": 32, "sym": False}


def opened(folder, tensors, quantization, name=f"{M}.weight", **more):
    checkpoint = Checkpoint(write(folder, tensors, quantization, **more))
    return checkpoint, checkpoint.tensor(name)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("label", "offset"), [("gptq", -1), ("gptq_v2", 0), (None, -1)])
@pytest.mark.parametrize("group", [-1, 32, 24])
def test_bit_widths_zero_points_and_groups(tmp_path, bits, label, offset, group):
    tensors, weight = linear(bits, 64, group=group, offset=offset)
    config = {"bits": bits, "group_size": group, "sym": False, **({"checkpoint_format": label} if label else {})}
    checkpoint, found = opened(tmp_path, tensors, config)
    assert torch.equal(found, weight)
    assert found.is_contiguous()
    scheme = checkpoint.quantized(f"{M}.weight").scheme
    assert (scheme.code, scheme.block) == (f"int{bits}", (1, 64 if group == -1 else group))
    assert not scheme.symmetric
    assert checkpoint.format == "gptq"
    assert checkpoint.names() == [f"{M}.weight"]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_planar(tmp_path, bits):
    tensors, weight = linear(bits, pack=planes)
    checkpoint, found = opened(tmp_path, tensors, {**V2, "bits": bits, "checkpoint_format": "gptq_p"})
    assert torch.equal(found, weight)
    assert checkpoint.format == "gptq (planar)"


def test_planar_zero_point_of_all_ones_and_of_zero(tmp_path):
    tensors, weight = linear(7, zeros=[[0, 127] * 16] * 2, pack=planes)
    assert torch.equal(opened(tmp_path, tensors, {**V2, "bits": 7, "checkpoint_format": "gptq_p"})[1], weight)


def test_five_bits_in_no_planes_are_refused(tmp_path):
    tensors, _ = linear(5)
    with pytest.raises(CheckpointError, match="5-bit codes and checkpoint_format 'gptq_v2', expected 'gptq_p'"):
        Checkpoint(write(tmp_path, tensors, {**V2, "bits": 5}))


@pytest.mark.parametrize("bits", [4, 8])
def test_act_order(tmp_path, bits):
    index = [k // 32 for k in range(96)]
    random.Random(1).shuffle(index)
    tensors, weight = linear(bits, 96, index=index)
    checkpoint, found = opened(tmp_path, tensors, {**V2, "bits": bits, "desc_act": True})
    assert torch.equal(found, weight)
    assert checkpoint.quantized(f"{M}.weight").scheme.notes == ("act-order",)


def test_more_weights_than_are_worked_on_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("tracelens.loading.formats.group_codes.BLOCK", 64 * 5)
    tensors, weight = linear(outputs=32)
    assert torch.equal(opened(tmp_path, tensors, V2)[1], weight)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_scales_of_other_dtypes(tmp_path, kind):
    tensors, weight = linear(kind=kind)
    assert torch.equal(opened(tmp_path, tensors, V2)[1], weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("offset", [0, -1])
def test_symmetric_data_beat_the_label(tmp_path, caplog, bits, label, offset):
    tensors, weight = linear(bits, zeros=middle(bits, 2, 32), offset=offset)
    config = {"bits": bits, "group_size": 32, "sym": True, "checkpoint_format": label}
    checkpoint, found = opened(tmp_path, tensors, config)
    assert torch.equal(found, weight)
    assert checkpoint.quantized(f"{M}.weight").scheme.symmetric
    lies = (label == "gptq") == (offset == 0)
    assert any("the data were followed" in note and M in note for note in checkpoint.layout.notes) == lies
    assert (M in caplog.text) == lies


def test_symmetric_and_not_uniform_is_refused(tmp_path):
    tensors, _ = linear(offset=-1)
    with pytest.raises(CheckpointError, match=rf"'{M}.qzeros' .* sym = True .* all are 8 .*damaged"):
        Checkpoint(write(tmp_path, tensors, {**V1, "sym": True}))


def test_zero_points_lost_are_refused(tmp_path):
    tensors, _ = linear()
    tensors[f"{M}.qzeros"].zero_()
    with pytest.raises(CheckpointError, match=r"nothing but zeros.*original"):
        Checkpoint(write(tmp_path, tensors, V2))


GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}, "checkpoint_format": "gptq"}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodel_borrows_from_the_next_field(tmp_path, caplog, bits):
    rng = random.Random(3)
    zeros = [[rng.choice((0, 0, 1, 2**bits - 1)) for _ in range(32)] for _ in range(2)]
    tensors, weight = linear(bits, zeros=zeros)
    ones = sum(1 << at for at in range(0, 32, bits))
    tensors[f"{M}.qzeros"] = torch.tensor(
        [[signed(word - ones) for word in row] for row in tensors[f"{M}.qzeros"].tolist()], dtype=torch.int32
    )
    checkpoint, found = opened(tmp_path, tensors, {**V1, **GPTQMODEL, "bits": bits})
    assert torch.equal(found, weight)
    assert "zero points of 0" in checkpoint.layout.notes[0]
    assert M in caplog.text


def test_gptqmodel_wraps_each_field_of_three_bits(tmp_path):
    zeros = [[0, 7, 0, 1] * 8] * 2
    tensors, weight = linear(3, zeros=zeros)
    tensors[f"{M}.qzeros"] = packed([[z - 1 & 7 for z in row] for row in zeros], 3)
    checkpoint, found = opened(tmp_path, tensors, {**V1, **GPTQMODEL, "bits": 3})
    assert torch.equal(found, weight)
    assert checkpoint.layout.notes


def test_three_bits_of_an_old_gptqmodel_are_refused(tmp_path):
    tensors, _ = linear(3, offset=-1)
    config = {**V1, "bits": 3, "meta": {"quantizer": ["gptqmodel:5.2.0"]}, "checkpoint_format": "gptq"}
    with pytest.raises(CheckpointError, match=r"GPTQModel 5\.2\.0.*original"):
        Checkpoint(write(tmp_path, tensors, config))


@pytest.mark.parametrize("quantization", [{}, {"meta": {"quantizer": ["optimum:1.0"]}, "checkpoint_format": "gptq"}])
def test_all_ones_of_an_unknown_writer_are_refused(tmp_path, quantization):
    tensors, _ = linear(zeros=[[3] * 31 + [16]] * 2, offset=-1)
    with pytest.raises(CheckpointError, match=rf"'{M}.qzeros' .* 2 of 64 fields of all ones \(15\).*original"):
        Checkpoint(write(tmp_path, tensors, {**V1, **quantization}))


@pytest.mark.parametrize(("desc_act", "read_as"), [(False, 0), (True, 16)])
def test_all_ones_of_autogptq_are_what_its_kernels_take_them_for(tmp_path, caplog, desc_act, read_as):
    zeros = [[3] * 31 + [read_as]] * 2
    tensors, weight = linear(zeros=zeros)
    tensors[f"{M}.qzeros"] = packed([[z - 1 & 15 for z in row] for row in zeros], 4)
    config = {**V1, "desc_act": desc_act}
    checkpoint, found = opened(tmp_path, tensors, config, metadata={"auto_gptq_version": "0.7.1"})
    assert torch.equal(found, weight)
    assert "destroyed" in checkpoint.layout.notes[0]
    assert M in caplog.text


@pytest.mark.parametrize(
    ("name", "offset"), [("auto_round", 0), ("auto_round:gptqmodel", 0), ("auto_round:auto_gptq", -1)]
)
def test_auto_round(tmp_path, name, offset):
    tensors, weight = linear(offset=offset)
    del tensors[f"{M}.g_idx"]
    config = {"quant_method": "auto-round", "packing_format": name, "bits": 4, "group_size": 32, "sym": False}
    assert torch.equal(opened(tmp_path, tensors, config)[1], weight)


def test_unknown_packing_of_auto_round_is_refused(tmp_path):
    tensors, _ = linear()
    config = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:other",
        "bits": 4,
        "group_size": 32,
        "sym": False,
    }
    with pytest.raises(CheckpointError, match=r"auto_round:other\) does not say which"):
        Checkpoint(write(tmp_path, tensors, config))


def test_overrides_per_module(tmp_path):
    tensors, weights = {}, {}
    for layer, (bits, group) in enumerate([(4, 32), (8, 16), (2, -1)]):
        name = M.replace("0", str(layer))
        found, weights[name] = linear(bits, group=group, seed=layer)
        tensors |= {key.replace(M, name): value for key, value in found.items()}
    rules = {r"-:.*layers\.3.*": {}, r"+:.*layers\.1\..*": {"bits": 8, "group_size": 16}}
    rules[r".*layers\.2\."] = {"bits": 2, "group_size": -1}
    checkpoint = Checkpoint(write(tmp_path, tensors, {**V2, "dynamic": rules}))
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensor(f"{name}.weight"), weight)


def test_extra_config_of_auto_round(tmp_path):
    tensors, weight = linear(8)
    config = {"quant_method": "auto-round", "packing_format": "auto_round", "bits": 4, "group_size": 32, "sym": False}
    assert torch.equal(opened(tmp_path, tensors, {**config, "extra_config": {M: {"bits": 8}}})[1], weight)


def test_config_beside_and_no_group_index(tmp_path):
    tensors, weight = linear(offset=-1)
    del tensors[f"{M}.g_idx"]
    assert torch.equal(opened(tmp_path, tensors, None, beside={**V1, "quant_method": "gptq"})[1], weight)


def test_no_config_is_enough_for_symmetric_tensors_only(tmp_path):
    tensors, weight = linear(zeros=middle(4, 2, 32), offset=-1)
    assert torch.equal(opened(tmp_path, tensors, None)[1], weight)
    tensors, _ = linear()
    with pytest.raises(CheckpointError, match="no checkpoint_format"):
        Checkpoint(write(tmp_path, tensors, None))


def test_head_and_plain_tensors(tmp_path):
    tensors, weight = linear()
    tensors = {key.replace(M, "lm_head"): value for key, value in tensors.items()} | {
        "model.norm.weight": torch.ones(4)
    }
    checkpoint, found = opened(tmp_path, tensors, V2, "lm_head.weight")
    assert torch.equal(found, weight)
    assert set(checkpoint.names()) == {"lm_head.weight", "model.norm.weight"}


def test_conv1d_of_gpt2_is_not_transposed(tmp_path):
    tensors, weight = linear()
    tensors = {key.replace(M, "transformer.h.0.mlp.c_fc"): value for key, value in tensors.items()}
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    checkpoint = Checkpoint(write(tmp_path, tensors, V2, config=gpt2))
    name = next(name for name in checkpoint.names() if name.endswith("c_fc.weight"))
    assert torch.equal(checkpoint.tensor(name), weight.t())
    assert checkpoint.shape(name) == (64, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "bits = 8, but 4 columns of qzeros for 32 outputs are 4 bits"),
        ({"bits": "four"}, "bits = 'four' .* expected a whole number"),
        ({"group_size": 64}, r"group_size 64 .* makes 1 groups of 64 inputs, .* holds 2 \(group_size 32\)"),
        ({"group_size": -1}, "group_size -1 .* makes 1 groups"),
    ],
)
def test_config_against_tensors(tmp_path, change, message):
    tensors, _ = linear()
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(write(tmp_path, tensors, {**V2, **change}))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0] * 32 + [2] * 32, "groups from 0 to 2, expected 0 to 1"),
        ([-1] + [0] * 31 + [1] * 32, "groups from -1 to 1"),
        ([0] * 33 + [1] * 31, r"puts 33 inputs in group 0, expected 32 \(group_size 32\)"),
        ([0] * 32 + [1] * 33, "rows of qweight hold 64 codes of 4 bits, but g_idx is for 65 inputs"),
    ],
)
def test_group_index_is_checked(tmp_path, index, message):
    tensors, _ = linear()
    tensors[f"{M}.g_idx"] = torch.tensor(index, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(write(tmp_path, tensors, V2))


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("scales", lambda t: t[:1], "expected int32"),
        ("scales", lambda t: t.int(), "expected int32"),
        ("qzeros", lambda t: t[:, :3].contiguous(), "b / 32 columns|bits = 4, but 3 columns .* 3 bits"),
        ("qweight", lambda t: t[:, :16].contiguous(), "expected int32"),
        ("qweight", lambda t: t[:7].contiguous(), "hold 56 codes of 4 bits, but g_idx is for 64 inputs"),
        ("g_idx", lambda t: t.float(), "expected g_idx int32"),
    ],
)
def test_damaged_shapes_are_refused(tmp_path, part, damage, message):
    tensors, _ = linear()
    tensors[f"{M}.{part}"] = damage(tensors[f"{M}.{part}"])
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(write(tmp_path, tensors, V2))


def test_missing_tensors_are_named(tmp_path):
    tensors, _ = linear()
    del tensors[f"{M}.qzeros"]
    with pytest.raises(CheckpointError, match=f"lack '{M}.qzeros'"):
        Checkpoint(write(tmp_path, tensors, V2))
    tensors, _ = linear()
    del tensors[f"{M}.g_idx"]
    with pytest.raises(CheckpointError, match=f"desc_act, but '{M}.g_idx' is missing"):
        Checkpoint(write(tmp_path, tensors, {**V2, "desc_act": True}))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_scales_that_are_not_finite_are_reported(tmp_path, value):
    tensors, _ = linear()
    tensors[f"{M}.scales"][1, 3] = value
    checkpoint = Checkpoint(write(tmp_path, tensors, V2))
    with pytest.raises(NonFiniteError, match=f"through {M}.scales"):
        checkpoint.tensor(f"{M}.weight")


def test_nothing_stored_is_written_to(tmp_path):
    tensors, _ = linear(8)
    checkpoint = Checkpoint(write(tmp_path, tensors, {**V2, "bits": 8}))
    held = {name: value.clone() for name, value in tensors.items()}
    checkpoint.layout.tensors[f"{M}.weight"].dequantize(lambda name: held[name])
    assert all(torch.equal(held[name], value) for name, value in tensors.items())
