"""8-bit floats with scales of blocks, rows and whole weights, that multiply or divide."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tracelens.errors import CheckpointError, NonFiniteError
from tracelens.loading import Checkpoint

MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{MODULE}.weight"


def opened(folder, tensors, quantization=None, other=None, **config):
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization or {}, **config}
    (folder / "config.json").write_text(json.dumps(config))
    if other:
        (folder / "hf_quant_config.json").write_text(json.dumps(other))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def fine(**more):
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **more}


def value(octet: int, exponent_bits: int) -> np.float32:
    """An 8-bit float by its definition: e4m3 (no infinity) or e5m2."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = (octet & 127) >> mantissa_bits, octet & (2**mantissa_bits - 1)
    fraction = mantissa / 2**mantissa_bits
    size = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
    return np.float32(-size if octet & 128 else size)


def codes(rows, columns, dtype=torch.float8_e4m3fn) -> torch.Tensor:
    """All finite codes in turn."""
    exponent_bits = 5 if dtype == torch.float8_e5m2 else 4
    finite = [o for o in range(256) if (o & 127) < (124 if exponent_bits == 5 else 127)]
    octets = [finite[(i * 11) % len(finite)] for i in range(rows * columns)]
    return torch.tensor(octets, dtype=torch.uint8).view(dtype).reshape(rows, columns)


def made(weight, scales, block, *, divide=False):
    """Number by number; `block` None: one scale."""
    exponent_bits = 5 if weight.dtype == torch.float8_e5m2 else 4
    result = np.zeros(weight.shape, dtype=np.float32)
    octets = weight.view(torch.uint8).tolist()
    grid = scales.float().numpy()
    for i, row in enumerate(octets):
        for j, octet in enumerate(row):
            scale = grid.reshape(-1)[0] if block is None else grid[i // block[0], j // block[1]]
            number = value(octet, exponent_bits)
            result[i, j] = number / scale if divide else number * scale
    return torch.from_numpy(result)


def scales(*shape, dtype=torch.float32):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.01).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "block"), [((8, 12), (4, 4)), ((9, 10), (4, 4)), ((3, 5), (4, 8)), ((9, 8), (2, 8)), ((5, 9), (1, 4))]
)
def test_blocks_with_ragged_ends(tmp_path, shape, block, dtype):
    weight = codes(*shape)
    grid = scales(-(-shape[0] // block[0]), -(-shape[1] // block[1]), dtype=dtype)
    checkpoint = opened(
        tmp_path, {WEIGHT: weight, f"{MODULE}.weight_scale_inv": grid}, fine(weight_block_size=list(block))
    )
    assert checkpoint.format.startswith("fp8 (")
    assert torch.equal(checkpoint.tensor(WEIGHT), made(weight, grid, block))
    assert checkpoint.quantized(WEIGHT).scheme.block == block
    assert checkpoint.names() == [WEIGHT]
    assert "activations" in checkpoint.layout.notes[0]


def test_the_block_is_not_found_by_dividing(tmp_path):
    """12 rows in 2 rows of scales: blocks of 8 and 4, not of 6 and 6."""
    weight, grid = codes(12, 8), scales(2, 1)
    checkpoint = opened(tmp_path, {WEIGHT: weight, f"{MODULE}.weight_scale_inv": grid}, fine(weight_block_size=[8, 8]))
    assert torch.equal(checkpoint.tensor(WEIGHT), made(weight, grid, (8, 8)))
    assert not torch.equal(checkpoint.tensor(WEIGHT), made(weight, grid, (6, 8)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("tracelens.loading.formats.fp8.PIECE", 100)
    weight, one = codes(16, 32, dtype), torch.tensor(0.37)
    checkpoint = opened(tmp_path, {WEIGHT: weight, f"{MODULE}.weight_scale_inv": one}, fine())
    assert torch.equal(checkpoint.tensor(WEIGHT), made(weight, one, None))
    assert checkpoint.quantized(WEIGHT).scheme.block is None
    assert checkpoint.quantized(WEIGHT).scheme.code == ("e4m3" if dtype == torch.float8_e4m3fn else "e5m2")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_one_scale_and_what_only_kernels_use(tmp_path, shape, name):
    weight, one = codes(4, 6), torch.full(shape, 0.37)
    kernels = {f"{MODULE}.input_scale": torch.ones(()), "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}
    checkpoint = opened(
        tmp_path, {WEIGHT: weight, f"{MODULE}.{name}": one, **kernels}, fine(activation_scheme="static")
    )
    assert torch.equal(checkpoint.tensor(WEIGHT), made(weight, one, None))
    assert checkpoint.names() == [WEIGHT]
    assert set(checkpoint.layout.runtime) == set(kernels)


@pytest.mark.parametrize(
    ("shape", "block", "more"),
    [((), None, {}), ((6,), (1, 8), {}), ((3, 2), (2, 4), {"weight_block_size": [2, 4]})],
)
def test_gptqmodel_divides(tmp_path, shape, block, more):
    weight, grid = codes(6, 8), scales(*shape) * 100
    quantization = {"quant_method": "fp8", "weight_scale_semantics": "inverse", "group_size": -1, **more}
    checkpoint = opened(tmp_path, {WEIGHT: weight, f"{MODULE}.weight_scale_inv": grid}, quantization)
    column = grid.reshape(-1, 1) if len(shape) == 1 else grid
    assert torch.equal(checkpoint.tensor(WEIGHT), made(weight, column, block, divide=True))
    assert not checkpoint.layout.notes


def test_gptqmodel_turns_conv1d(tmp_path):
    weight, grid = codes(6, 8), scales(6)
    name = "transformer.h.0.attn.c_attn"
    tensors = {f"{name}.weight": weight, f"{name}.weight_scale_inv": grid}
    quantization = {"quant_method": "fp8", "weight_scale_semantics": "inverse"}
    checkpoint = opened(tmp_path, tensors, quantization, model_type="gpt2")
    assert torch.equal(checkpoint.tensor(f"{name}.weight"), made(weight, grid[:, None], (1, 8), divide=True).T)
    with pytest.raises(CheckpointError, match=r"c_attn.weight' belongs to a Conv1D layer"):
        opened(tmp_path, {**tensors, f"{name}.weight_scale_inv": torch.ones(())}, fine(), model_type="gpt2")


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        {"quant_method": "auto-round", "packing_format": "auto_round:fp8_static", "group_size": -1},
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    ],
)
def test_rows_multiply(tmp_path, quantization, shape):
    weight, grid = codes(6, 8), scales(*shape)
    tensors = {WEIGHT: weight, f"{MODULE}.weight_scale": grid, f"{MODULE}.input_scale_ub": torch.ones(1)}
    checkpoint = opened(tmp_path, tensors, quantization)
    assert torch.equal(checkpoint.tensor(WEIGHT), made(weight, grid.reshape(6, 1), (1, 8)))
    assert checkpoint.names() == [WEIGHT]
    assert quantization["quant_method"] in checkpoint.format


def test_auto_round_blocks(tmp_path):
    weight, grid = codes(6, 10), scales(2, 3, dtype=torch.bfloat16)
    quantization = {"quant_method": "auto-round", "packing_format": "auto_round:fp8", "group_size": [4, 4]}
    tensors = {WEIGHT: weight, f"{MODULE}.weight_scale_inv": grid}
    assert torch.equal(opened(tmp_path, tensors, quantization).tensor(WEIGHT), made(weight, grid, (4, 4)))


def test_modelopt_by_its_own_file(tmp_path):
    weight = codes(4, 6)
    tensors = {WEIGHT: weight, f"{MODULE}.weight_scale": torch.tensor(0.5), f"{MODULE}.input_scale": torch.tensor(1.0)}
    said = {"producer": {"name": "modelopt", "version": "0.29"}, "quantization": {"quant_algo": "FP8"}}
    checkpoint = opened(tmp_path, tensors, other=said)
    assert torch.equal(checkpoint.tensor(WEIGHT), made(weight, torch.tensor(0.5), None))
    said["quantization"]["quant_algo"] = "MIXED_PRECISION"
    with pytest.raises(CheckpointError, match="quant_algo 'MIXED_PRECISION'; of ModelOpt's, only FP8"):
        opened(tmp_path, tensors, other=said)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents_as_scales(tmp_path, dtype):
    weight, exponents = codes(4, 64), torch.tensor([[120, 130], [127, 1], [126, 128], [100, 140]], dtype=torch.uint8)
    grid = torch.tensor([[2.0 ** (int(e) - 127) for e in row] for row in exponents])
    tensors = {WEIGHT: weight, f"{MODULE}.weight_scale_inv": exponents.view(dtype)}
    checkpoint = opened(tmp_path, tensors, fine(weight_block_size=[1, 32]))
    assert torch.equal(checkpoint.tensor(WEIGHT), made(weight, grid, (1, 32)))


def test_nan_is_found(tmp_path):
    weight = codes(4, 4).view(torch.uint8).clone()
    weight[1, 2] = 127
    tensors = {WEIGHT: weight.view(torch.float8_e4m3fn), f"{MODULE}.weight_scale_inv": torch.ones(1, 1)}
    checkpoint = opened(tmp_path, tensors, fine(weight_block_size=[4, 4]))
    with pytest.raises(NonFiniteError, match="in 1 of 16 values"):
        checkpoint.tensor(WEIGHT)


def good():
    return {WEIGHT: codes(6, 8), f"{MODULE}.weight_scale_inv": scales(2, 2)}


BLOCKS = fine(weight_block_size=[4, 4])


@pytest.mark.parametrize(
    ("change", "quantization", "message"),
    [
        (
            {},
            fine(weight_block_size=[2, 4]),
            r"\[2, 2\], expected \[3, 2\]: '.*up_proj.weight' is 6×8, in blocks of 2×4",
        ),
        ({}, fine(weight_block_size=[6, 8]), r"\[2, 2\], expected \[1, 1\]"),
        ({}, fine(weight_block_size=[4, 0]), r"weight_block_size \[4, 0\], expected \[rows, columns\]"),
        ({}, fine(weight_block_size=4), "weight_block_size 4"),
        ({}, fine(), "scales of blocks need weight_block_size in config.json"),
        ({f"{MODULE}.weight_scale_inv": scales(6)}, fine(), "no weight_scale_semantics to say"),
        ({f"{MODULE}.weight_scale_inv": scales(6, 1)}, fine(), "no weight_scale_semantics to say"),
        ({f"{MODULE}.weight_scale_inv": scales(8)}, fine(), r"\[8\] for '.*' of 6×8, expected one scale"),
        ({}, {**BLOCKS, "weight_scale_semantics": "scale"}, "weight_scale_semantics 'scale', expected 'inverse'"),
        ({f"{MODULE}.weight_scale": scales(2, 2)}, BLOCKS, "has scales of two kinds"),
        ({f"{MODULE}.weight_zp": scales(2, 2)}, BLOCKS, "up_proj.weight_zp' changes what"),
        ({f"{MODULE}.pre_quant_scale": scales(8)}, BLOCKS, "pre_quant_scale' changes what"),
        ({WEIGHT: torch.ones(6, 8, dtype=torch.int8)}, BLOCKS, "up_proj.weight' is torch.int8"),
        ({WEIGHT: codes(6, 8).reshape(2, 3, 8)}, BLOCKS, r"up_proj.weight' is torch.float8_e4m3fn \[2, 3, 8\]"),
        ({f"{MODULE}.weight_scale_inv": torch.ones(2, 2).int()}, BLOCKS, "weight_scale_inv' is torch.int32"),
        ({f"{MODULE}.weight_scale_inv": torch.ones(2, 2).byte()}, fine(), "holds exponents"),
        (
            {"model.experts.gate_up_proj": codes(2, 2)},
            BLOCKS,
            "'model.experts.gate_up_proj' is stored as .* stands beside",
        ),
    ],
)
def test_damage_is_named(tmp_path, change, quantization, message):
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, good() | change, quantization)


def test_missing_codes_and_scales_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"lack '.*up_proj.weight'"):
        opened(tmp_path, {f"{MODULE}.weight_scale_inv": scales(2, 2)}, BLOCKS)
    with pytest.raises(CheckpointError, match="no weight_scale_inv or weight_scale stands beside it"):
        opened(tmp_path, {WEIGHT: codes(6, 8)}, BLOCKS)
    with pytest.raises(CheckpointError, match="no weight is stored in 8-bit floats"):
        opened(tmp_path, {WEIGHT: torch.ones(6, 8)}, BLOCKS)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "quark"},
        {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ],
)
def test_what_belongs_to_others_is_not_taken(tmp_path, quantization):
    from tracelens.loading.files import SafetensorFiles
    from tracelens.loading.formats import FORMATS, Stored

    kind = torch.uint8 if "quant_algo" in quantization else torch.float8_e4m3fn
    save_file({WEIGHT: codes(6, 8).view(kind), f"{MODULE}.weight_scale": scales(6, 1)}, tmp_path / "model.safetensors")
    stored = Stored(tmp_path, {"quantization_config": quantization}, SafetensorFiles([tmp_path / "model.safetensors"]))
    assert not FORMATS["fp8"].recognise(stored)
