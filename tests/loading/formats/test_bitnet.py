import pytest
import torch
from safetensors.torch import save_file

from tracelens.errors import CheckpointError
from tracelens.loading.files import SafetensorFiles
from tracelens.loading.formats import Stored, find_layout

NAME = "model.layers.0.mlp.up_proj.weight"


def ternary(rows=12, columns=7, seed=0):
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed))


def packed(weight):
    rows, columns = weight.shape
    quarter = rows // 4
    octets = torch.zeros(quarter, columns, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            octets[row % quarter, column] += (int(weight[row, column]) + 1) << 2 * (row // quarter)
    return octets


def stored(folder, tensors, **quantization):
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "bitnet"} | quantization}
    return Stored(folder, config, SafetensorFiles([folder / "model.safetensors"]))


def tensors(weight, scale, dtype=torch.bfloat16):
    return {NAME: packed(weight), f"{NAME}_scale": torch.tensor([scale], dtype=dtype)}


@pytest.mark.parametrize(("linear_class", "effect"), [("bitlinear", 1 / 3.25), ("autobitlinear", 3.25)])
def test_the_linear_class_says_whether_the_scale_divides(tmp_path, linear_class, effect):
    weight = ternary()
    source = stored(tmp_path, tensors(weight, 3.25), linear_class=linear_class, quantization_mode="offline")
    layout = find_layout(source)
    found = layout.tensors[NAME].dequantize(source.read)
    assert torch.equal(found, weight.float() * torch.tensor(effect))
    assert layout.format == f"bitnet ({linear_class})"
    assert layout.tensors[NAME].shape == (12, 7)
    assert "int8" in layout.notes[0]


def test_without_a_linear_class_the_scale_divides(tmp_path):
    source = stored(tmp_path, tensors(ternary(), 0.3, torch.float32))
    assert torch.equal(find_layout(source).tensors[NAME].dequantize(source.read), ternary() / torch.tensor(0.3))


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_as_the_layers_of_transformers_compute(tmp_path, linear_class):
    from transformers.integrations import bitnet

    weight = ternary(16, 8)
    source = stored(tmp_path, tensors(weight, 1.75), linear_class=linear_class)
    found = find_layout(source).tensors[NAME].dequantize(source.read)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(bitnet.pack_weights(weight.clone()), packed(weight))
        if linear_class == "bitlinear":
            layer = bitnet.BitLinear(8, 16, bias=False, dtype=torch.float32)
            layer.weight = packed(weight)
        else:
            layer = bitnet.AutoBitLinear(8, 16, bias=False, dtype=torch.float32)
            layer.weight.data = bitnet.unpack_weights(packed(weight), dtype=torch.float32)
        layer.weight_scale = torch.tensor([1.75])
        # Rows of the identity survive the 8-bit rounding of the activations.
        output = layer(torch.eye(8))
    torch.testing.assert_close(output, found.T, rtol=1e-6, atol=0)


def test_a_fourth_code_is_damage(tmp_path):
    damaged = tensors(ternary(), 1.0)
    damaged[NAME][1, 3] = 0b00110000
    source = stored(tmp_path, damaged)
    with pytest.raises(CheckpointError, match=r"up_proj.weight.*not -1, 0 or 1"):
        find_layout(source).tensors[NAME].dequantize(source.read)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"linear_class": "fastbitlinear"}, "'fastbitlinear'; known: bitlinear, autobitlinear"),
        ({"linear_class": "autobitlinear", "quantization_mode": "online"}, "rounded anew.*'online'.*packed checkpoint"),
        ({"use_rms_norm": True}, "use_rms_norm"),
    ],
)
def test_other_layers_are_refused(tmp_path, said, message):
    with pytest.raises(CheckpointError, match=message):
        find_layout(stored(tmp_path, tensors(ternary(), 1.0), **said))


def test_other_tensors_are_refused(tmp_path):
    good = tensors(ternary(), 1.0)
    with pytest.raises(CheckpointError, match=r"up_proj.weight.*torch.float32 \[12, 7\], expected ternary"):
        find_layout(stored(tmp_path, good | {NAME: ternary().float()}))
    with pytest.raises(CheckpointError, match=r"weight_scale.*\[3\], expected one number"):
        find_layout(stored(tmp_path, good | {f"{NAME}_scale": torch.ones(3)}))
    with pytest.raises(CheckpointError, match="holds no weight_scale"):
        find_layout(stored(tmp_path, {NAME: good[NAME]}))
    with pytest.raises(CheckpointError, match=r"q_proj.weight.*has no weight_scale"):
        find_layout(stored(tmp_path, good | {"q_proj.weight": good[NAME].clone()}))
    with pytest.raises(CheckpointError, match=r"lack.*up_proj.weight'"):
        find_layout(stored(tmp_path, {f"{NAME}_scale": torch.ones(1)}))
