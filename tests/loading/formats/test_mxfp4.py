import pytest
import torch
from safetensors.torch import save_file

from tracelens.errors import CheckpointError, NonFiniteError
from tracelens.loading import Checkpoint
from tracelens.loading.files import SafetensorFiles
from tracelens.loading.formats import Stored, find_layout

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NAME = "model.layers.0.mlp.experts.gate_up_proj"


def stored(folder, tensors, **quantization):
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "mxfp4"} | quantization}
    return Stored(folder, config, SafetensorFiles([folder / "model.safetensors"]))


def experts(seed=0, experts=2, outputs=5, blocks=3, low=120, high=135):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{NAME}_blocks": torch.randint(0, 256, (experts, outputs, blocks, 16), generator=generator, dtype=torch.uint8),
        f"{NAME}_scales": torch.randint(low, high, (experts, outputs, blocks), generator=generator, dtype=torch.uint8),
        f"{NAME}_bias": torch.randn(experts, outputs, generator=generator),
    }


def test_every_value_is_its_float_times_a_power_of_two(tmp_path):
    tensors = experts()
    source = stored(tmp_path, tensors)
    layout = find_layout(source)
    assert list(layout.tensors) == [NAME]
    assert layout.tensors[NAME].shape == (2, 96, 5)
    weight = layout.tensors[NAME].dequantize(source.read)
    assert weight.dtype == torch.float32
    blocks, scales = tensors[f"{NAME}_blocks"].tolist(), tensors[f"{NAME}_scales"].tolist()
    for e in range(2):
        for o in range(5):
            for k in range(96):
                byte = blocks[e][o][k // 32][k % 32 // 2]
                code = byte >> 4 if k % 2 else byte & 15
                value = (-1 if code & 8 else 1) * VALUES[code & 7] * 2.0 ** (scales[e][o][k // 32] - 127)
                assert weight[e, k, o].item() == value


@pytest.mark.parametrize(("low", "high"), [(0, 10), (120, 135), (240, 252)])
def test_as_transformers_does_it(tmp_path, low, high):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = experts(1, experts=3, outputs=32, blocks=2, low=low, high=high)
    source = stored(tmp_path, tensors)
    weight = find_layout(source).tensors[NAME].dequantize(source.read)
    theirs = convert_moe_packed_tensors(tensors[f"{NAME}_blocks"], tensors[f"{NAME}_scales"], dtype=torch.float32)
    assert torch.equal(weight, theirs)


def test_opens_as_a_checkpoint_and_keeps_biases_plain(tmp_path):
    save_file(experts(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.format == "mxfp4"
    assert sorted(checkpoint.names()) == [NAME, f"{NAME}_bias"]
    assert checkpoint.tensor(NAME).shape == checkpoint.shape(NAME) == (2, 96, 5)
    assert str(checkpoint.quantized(NAME).scheme) == "e2m1, block 1×32, MXFP4"


def test_a_scale_of_255_is_not_a_number(tmp_path):
    tensors = experts()
    tensors[f"{NAME}_scales"][1, 2, 0] = 255
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    with pytest.raises(NonFiniteError, match="32 of 960 values"):
        Checkpoint(tmp_path).tensor(NAME)


def test_what_does_not_fit_is_refused(tmp_path):
    tensors = experts()
    shapes = tensors | {f"{NAME}_scales": tensors[f"{NAME}_scales"][:, :, :2].contiguous()}
    with pytest.raises(CheckpointError, match=r"gate_up_proj_blocks.*\[2, 5, 3, 16\].*\[2, 5, 2\].*expected uint8"):
        find_layout(stored(tmp_path, shapes))
    dtypes = tensors | {f"{NAME}_scales": tensors[f"{NAME}_scales"].to(torch.int8)}
    with pytest.raises(CheckpointError, match=r"scales torch\.int8"):
        find_layout(stored(tmp_path, dtypes))
    with pytest.raises(CheckpointError, match=r"lack.*gate_up_proj_scales.*whole checkpoint"):
        find_layout(stored(tmp_path, {k: v for k, v in tensors.items() if "scales" not in k}))
    with pytest.raises(CheckpointError, match="no tensor ends in _blocks"):
        find_layout(stored(tmp_path, {f"{NAME}_bias": tensors[f"{NAME}_bias"]}))
    with pytest.raises(CheckpointError, match=r"down_proj_scales.*has no _blocks"):
        find_layout(stored(tmp_path, tensors | {"down_proj_scales": tensors[f"{NAME}_scales"].clone()}))
