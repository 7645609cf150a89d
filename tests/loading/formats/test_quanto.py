"""Rows and groups of optimum-quanto, against codes placed byte by byte."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tracelens.errors import CheckpointError
from tracelens.loading import Checkpoint

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
SIZES = {"hidden_size": 32, "intermediate_size": 160, "num_hidden_layers": 1, "vocab_size": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def opened(folder, tensors, types=None, **config):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **HEADS, **config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quanto_qmap.json").unlink(missing_ok=True)
    if types is not None:
        types = {module: {"weights": kind, "activations": active} for module, (kind, active) in types.items()}
        (folder / "quanto_qmap.json").write_text(json.dumps(types))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def rows(module=UP, shape=(160, 32), dtype=torch.int8, factor=torch.float32):
    octets = torch.arange(shape[0] * shape[1]).mul(37).remainder(120).to(torch.uint8).reshape(shape)
    data, scale = octets.view(dtype), uniform(shape[0], 1).to(factor)
    made = torch.from_numpy(data.float().numpy() * scale.float().numpy())
    kernels = {f"{module}.input_scale": torch.ones(()), f"{module}.output_scale": torch.ones(())}
    return {f"{module}.weight._data": data, f"{module}.weight._scale": scale, **kernels}, made


def groups(module=UP, shape=(160, 32), bits=4, width=32, factor=torch.float32, integers=False):
    count = shape[0] * shape[1] // width
    codes = [[(5 * r + 3 * c) % 2**bits for c in range(width)] for r in range(count)]
    scale = uniform(count, 1).to(factor)
    shift = torch.arange(count).remainder(2**bits).reshape(-1, 1).to(torch.int8)
    shift = shift if integers else (uniform(count, 1, seed=1) * 3).to(factor)
    made = np.zeros((count, width), dtype=np.float32)
    for r, row in enumerate(codes):
        s, z = np.float32(scale[r].item()), np.float32(shift[r].item())
        for c, code in enumerate(row):
            made[r, c] = (np.float32(code) - z) * s if integers else np.float32(code) * s - z
    # The bytes of a plane hold the rows from plane · step on.
    step = -(-count * bits // 8)
    octets = [[0] * width for _ in range(step)]
    for r, row in enumerate(codes):
        for c, code in enumerate(row):
            octets[r % step][c] |= code << (bits * (r // step))
    tensors = {
        f"{module}.weight._data._data": torch.tensor(octets, dtype=torch.uint8),
        f"{module}.weight._scale": scale,
        f"{module}.weight._shift": shift,
        f"{module}.input_scale": torch.ones(()),
    }
    return tensors, torch.from_numpy(made).reshape(shape)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits(tmp_path, dtype, factor):
    tensors, made = rows(dtype=dtype, factor=factor)
    checkpoint = opened(tmp_path, tensors | {"model.norm.weight": torch.ones(4)})
    assert torch.equal(checkpoint.tensor(f"{UP}.weight"), made)
    assert set(checkpoint.names()) == {f"{UP}.weight", "model.norm.weight"}
    assert set(checkpoint.layout.runtime) == {f"{UP}.input_scale", f"{UP}.output_scale"}
    assert not checkpoint.layout.notes


@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(
    ("module", "shape", "width"),
    [(UP, (160, 32), 32), (DOWN, (32, 160), 32), (DOWN, (32, 160), 160), (UP, (160, 32), 16)],
)
def test_groups(tmp_path, module, shape, width, bits, integers, factor):
    tensors, made = groups(module, shape, bits, width, factor, integers)
    checkpoint = opened(tmp_path, tensors)
    assert checkpoint.format == f"quanto (int{bits})"
    assert checkpoint.shape(f"{module}.weight") == shape
    assert torch.equal(checkpoint.tensor(f"{module}.weight"), made)
    assert checkpoint.names() == [f"{module}.weight"]
    assert checkpoint.quantized(f"{module}.weight").scheme.block == (1, width)


@pytest.mark.parametrize("bits", [4, 2])
def test_rows_that_do_not_fill_bytes(tmp_path, bits):
    tensors, made = groups(UP, (33, 32), bits, 32)
    assert len(tensors[f"{UP}.weight._data._data"]) * 8 // bits > 33
    assert torch.equal(opened(tmp_path, tensors, intermediate_size=33).tensor(f"{UP}.weight"), made)


@pytest.mark.parametrize("bits", [4, 2])
def test_so_few_rows_that_only_the_map_tells(tmp_path, bits):
    tensors, made = groups(UP, (2, 32), bits, 32)
    known = opened(tmp_path, tensors, {UP: (f"qint{bits}", "none")}, intermediate_size=2)
    assert torch.equal(known.tensor(f"{UP}.weight"), made)
    with pytest.raises(CheckpointError, match=r"has 1 rows of bytes for 2 groups.*quanto_qmap.json says nothing"):
        opened(tmp_path, tensors, intermediate_size=2)


def test_activations_are_noted(tmp_path):
    tensors, _ = rows()
    types = {UP: ("qint8", "qint8"), "model.norm": ("none", "qint8")}
    kernels = {"model.norm.input_scale": torch.ones(()), "model.norm.weight": torch.ones(32)}
    checkpoint = opened(tmp_path, tensors | kernels, types)
    assert "activations to int8" in checkpoint.layout.notes[0]
    assert set(checkpoint.names()) == {f"{UP}.weight", "model.norm.weight"}


def test_a_module_of_the_map_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"says that 'model.layers.0.mlp.down_proj' is qint8"):
        opened(tmp_path, rows()[0], {UP: ("qint8", "none"), DOWN: ("qint8", "none")})


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("_data", torch.ones(160, 32, dtype=torch.int32), "_data' is torch.int32"),
        ("_data", torch.ones(160, 4, 8, dtype=torch.int8), r"_data' is torch.int8 \[160, 4, 8\]"),
        ("_scale", torch.ones(1, 32), r"_scale' is torch.float32 \[1, 32\], expected floating point \[160, 1\]"),
        ("_scale", torch.ones(160, 1, dtype=torch.int8), "_scale' is torch.int8"),
        ("_scale", None, "lack '.*up_proj.weight._scale'"),
    ],
)
def test_damaged_rows_are_named(tmp_path, part, tensor, message):
    tensors, _ = rows()
    tensors.pop(f"{UP}.weight.{part}")
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, tensors | ({} if tensor is None else {f"{UP}.weight.{part}": tensor}))


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("_data._data", torch.ones(79, 32).byte(), "has 79 rows of bytes for 160 groups, expected 80 for int4 or 40"),
        ("_data._data", torch.ones(80, 32).char(), "_data._data' is torch.int8"),
        ("_data._data", torch.ones(80, 31).byte(), "holds 160 groups of 31 codes, expected 5120 codes"),
        ("_scale", torch.ones(160), r"with scales \[160\]"),
        ("_scale", torch.ones(80, 1), "holds 80 groups|_shift' is torch.float32"),
        ("_shift", torch.ones(159, 1), r"_shift' is torch.float32 \[159, 1\], expected floating point \[160, 1\]"),
        ("_shift", None, "lack '.*up_proj.weight._shift'"),
    ],
)
def test_damaged_groups_are_named(tmp_path, part, tensor, message):
    tensors, _ = groups()
    tensors.pop(f"{UP}.weight.{part}")
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, tensors | ({} if tensor is None else {f"{UP}.weight.{part}": tensor}))


def test_groups_need_a_config_that_tells_their_shape(tmp_path):
    tensors, _ = groups()
    with pytest.raises(CheckpointError, match="expected 10240 codes in groups within"):
        opened(tmp_path, tensors, intermediate_size=320)
    with pytest.raises(CheckpointError, match="no architecture 'NoSuchModel'"):
        opened(tmp_path, tensors, architectures=["NoSuchModel"])
    with pytest.raises(CheckpointError, match="no architecture ''"):
        opened(tmp_path, tensors, architectures=None)
    with pytest.raises(CheckpointError, match="transformers cannot make a LlamaForCausalLM"):
        opened(tmp_path, tensors, hidden_size="wide")
    with pytest.raises(CheckpointError, match=r"'model.layers.7.mlp.up_proj.weight' is stored in groups"):
        opened(tmp_path, groups("model.layers.7.mlp.up_proj")[0])


def test_the_map_and_the_bytes_disagree(tmp_path):
    with pytest.raises(CheckpointError, match=r"has 80 rows of bytes.*quanto_qmap.json says qint2"):
        opened(tmp_path, groups()[0], {UP: ("qint2", "none")})


def test_the_map_may_have_another_name_than_the_tensors(tmp_path):
    """transformers gives the tensors of GPT-NeoX their old names when it saves them, and leaves quanto_qmap.json."""
    neox = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
    tensors, made = rows("embed_out", shape=(16, 32))
    checkpoint = opened(tmp_path, tensors, {"lm_head": ("qint8", "none")}, **neox)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), made)
    # Two groups take a byte in either width: only the map tells.
    tensors, made = groups("embed_out", shape=(2, 32), bits=2)
    checkpoint = opened(tmp_path, tensors, {"lm_head": ("qint2", "none")}, **neox, **{"vocab_size": 2})
    assert torch.equal(checkpoint.tensor("lm_head.weight"), made)
    with pytest.raises(CheckpointError, match=r"says that 'lm_head' is qint8, but 'lm_head.weight._data' is not in"):
        opened(
            tmp_path,
            {"gpt_neox.final_layer_norm.weight": torch.ones(4)} | rows()[0],
            {"lm_head": ("qint8", "none")},
            **neox,
        )
