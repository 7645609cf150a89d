"""LLM.int8(), NF4 and FP4 against sums done number by number."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tracelens.errors import CheckpointError
from tracelens.loading import Checkpoint

MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{MODULE}.weight"
NF4 = [-1.0, -0.69, -0.52, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]


def opened(folder, tensors, *, quantization=None, **config):
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization or {}, **config}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def text(content) -> torch.Tensor:
    return torch.tensor(
        list((content if isinstance(content, str) else json.dumps(content)).encode()), dtype=torch.uint8
    )


def random(*shape, seed=0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def packed(codes: list[int]) -> torch.Tensor:
    codes = [*codes, 0] if len(codes) % 2 else codes
    return torch.tensor([16 * first + second for first, second in zip(codes[::2], codes[1::2], strict=True)]).byte()


def four_bit(shape=(4, 96), size=64, kind="nf4", dtype="float32", storage=torch.uint8, weight=WEIGHT, **changed):
    """Stored tensors, and the weight they make, number by number."""
    count = int(np.prod(shape))
    codes = [(7 * i + i // 5) % 16 for i in range(count)]
    table, absmax = torch.tensor(NF4), random(-(-count // size))
    made = [np.float32(table[code]) * np.float32(absmax[i // size]) for i, code in enumerate(codes)]
    said = {"quant_type": kind, "blocksize": size, "dtype": dtype, "shape": list(shape), **changed}
    octets = packed(codes)
    tensors = {
        weight: octets.view(storage).reshape(-1, 1),
        f"{weight}.absmax": absmax,
        f"{weight}.quant_map": table,
        f"{weight}.quant_state.bitsandbytes__{kind}": text(said),
    }
    rounded = torch.from_numpy(np.array(made, dtype=np.float32)).to(getattr(torch, dtype)).float()
    return tensors, rounded.reshape(shape)


def nested(tensors, size=256, weight=WEIGHT):
    """The same with scales quantized once more, and what they are then."""
    count = len(tensors[f"{weight}.absmax"])
    codes = [(37 * i) % 256 for i in range(count)]
    table, absmax = torch.linspace(-1, 1, 256), random(-(-count // size), seed=1)
    offset = 1.3359375001
    scales = [np.float32(table[c]) * np.float32(absmax[i // size]) + np.float32(offset) for i, c in enumerate(codes)]
    name = next(name for name in tensors if "quant_state" in name)
    said = json.loads(bytes(tensors[name].tolist()))
    said |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
    tensors |= {
        name: text(said),
        f"{weight}.absmax": torch.tensor(codes, dtype=torch.uint8),
        f"{weight}.nested_absmax": absmax,
        f"{weight}.nested_quant_map": table,
    }
    return scales


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "size"), [((4, 96), 64), ((4, 96), 4096), ((3, 25), 64), ((5, 7), 2), ((64, 64), 128)]
)
def test_four_bits(tmp_path, kind, dtype, shape, size):
    tensors, made = four_bit(shape, size, kind, dtype)
    checkpoint = opened(tmp_path, tensors)
    assert checkpoint.format == f"bitsandbytes ({kind})"
    assert checkpoint.shape(WEIGHT) == shape
    assert torch.equal(checkpoint.tensor(WEIGHT), made)
    assert checkpoint.quantized(WEIGHT).scheme.code == kind
    assert set(checkpoint.parts(WEIGHT)) == set(tensors)
    assert checkpoint.names() == [WEIGHT]


def test_a_weight_of_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("tracelens.loading.formats.bitsandbytes.PIECE", 256)
    for number, (shape, size) in enumerate([((30, 64), 64), ((33, 61), 64), ((3, 1000), 2048), ((35, 9), 5)]):
        tensors, made = four_bit(shape, size, dtype="bfloat16")
        (tmp_path / str(number)).mkdir()
        assert torch.equal(opened(tmp_path / str(number), tensors).tensor(WEIGHT), made)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_storage_dtype(tmp_path, storage):
    tensors, made = four_bit(storage=storage)
    assert tensors[WEIGHT].dtype == storage
    assert torch.equal(opened(tmp_path, tensors).tensor(WEIGHT), made)


@pytest.mark.parametrize("size", [2, 4, 256])
def test_double_quantization(tmp_path, size):
    tensors, _ = four_bit((5, 70), 64, dtype="float16")
    scales = nested(tensors, size)
    codes = [(7 * i + i // 5) % 16 for i in range(350)]
    made = np.array([np.float32(NF4[code]) * scales[i // 64] for i, code in enumerate(codes)], dtype=np.float32)
    checkpoint = opened(tmp_path, tensors)
    assert torch.equal(checkpoint.tensor(WEIGHT), torch.from_numpy(made).half().float().reshape(5, 70))
    assert checkpoint.quantized(WEIGHT).scheme.notes[:2] == ("double-quantized", "rounded to float16")
    assert set(checkpoint.parts(WEIGHT)) == set(tensors)


def test_a_file_of_torch_save(tmp_path):
    tensors, made = four_bit()
    (tmp_path / "config.json").write_text("{}")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(Checkpoint(tmp_path).tensor(WEIGHT), made)


def test_the_table_in_the_file_counts(tmp_path):
    tensors, _ = four_bit()
    before = opened(tmp_path, tensors).tensor(WEIGHT)
    tensors[f"{WEIGHT}.quant_map"] = tensors[f"{WEIGHT}.quant_map"] * 2
    assert torch.equal(opened(tmp_path, tensors).tensor(WEIGHT), 2 * before)


def test_config_may_call_it_something_else(tmp_path):
    tensors, made = four_bit(kind="nf4")
    stale = {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}
    checkpoint = opened(tmp_path, tensors, quantization=stale)
    assert checkpoint.format == "bitsandbytes (nf4)"
    assert torch.equal(checkpoint.tensor(WEIGHT), made)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_conv1d_is_turned_back(tmp_path, kind):
    weight = "transformer.h.0.mlp.c_fc.weight"
    if kind == "nf4":
        tensors, made = four_bit((6, 64), weight=weight)
    else:
        tensors, made = rows((6, 64), module=weight.removesuffix(".weight"))
    checkpoint = opened(tmp_path, tensors, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert checkpoint.shape(weight) == (64, 6)
    assert torch.equal(checkpoint.tensor(weight), made.T)
    assert checkpoint.tensor(weight).is_contiguous()


def rows(shape=(6, 10), module=MODULE, order=0):
    codes = torch.arange(shape[0] * shape[1]).reshape(shape).mul(37).remainder(256).sub(128).to(torch.int8)
    largest = random(shape[0])
    made = [
        [np.float32(np.float32(int(c)) * np.float32(s)) * np.float32(0.007874015718698502) for c in row]
        for row, s in zip(codes, largest, strict=True)
    ]
    tensors = {f"{module}.weight": codes, f"{module}.SCB": largest}
    if order is not None:
        tensors[f"{module}.weight_format"] = torch.tensor(order, dtype=torch.uint8)
    return tensors, torch.tensor(np.array(made))


@pytest.mark.parametrize("order", [0, None])
def test_int8(tmp_path, order):
    tensors, made = rows(order=order)
    skipped = {"model.layers.0.mlp.down_proj.weight": random(4, 4)}
    checkpoint = opened(tmp_path, tensors | skipped)
    assert checkpoint.format == "bitsandbytes (int8)"
    assert torch.equal(checkpoint.tensor(WEIGHT), made)
    assert not torch.equal(made, tensors[WEIGHT].float() * (tensors[WEIGHT.replace("weight", "SCB")] / 127)[:, None])
    assert checkpoint.quantized("model.layers.0.mlp.down_proj.weight") is None
    assert checkpoint.names() == [*skipped, WEIGHT] or checkpoint.names() == [WEIGHT, *skipped]
    assert "activations" in checkpoint.layout.notes[0]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_tiles_are_refused(tmp_path, order):
    with pytest.raises(CheckpointError, match=rf"up_proj.weight_format' is \[{order}\]: the codes are stored in tiles"):
        opened(tmp_path, rows(order=order)[0])


def test_what_is_stored_is_not_written_to(tmp_path):
    tensors, made = four_bit()
    checkpoint = opened(tmp_path, tensors)
    held = {name: checkpoint.stored.read(name).clone() for name in tensors}
    copies = {name: tensor.clone() for name, tensor in held.items()}
    assert torch.equal(checkpoint.quantized(WEIGHT).dequantize(held.__getitem__), made)
    assert all(torch.equal(held[name], copies[name]) for name in held)


def spoiled(**changed):
    def change(tensors):
        name = next(name for name in tensors if "quant_state" in name)
        tensors[name] = text({**json.loads(bytes(tensors[name].tolist())), **changed})

    return change


def replaced(suffix, tensor):
    return lambda tensors: tensors.__setitem__(WEIGHT + suffix, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoiled(shape=[4, 95]), "weight.absmax|holds 384 4-bit codes"),
        (spoiled(shape=[4, 94]), "holds 384 4-bit codes, expected 376"),
        (spoiled(shape=[]), "gives the shape"),
        (spoiled(shape=None), "gives the shape None"),
        (spoiled(shape=[4, -96]), "gives shape -96, expected a positive integer"),
        (spoiled(blocksize=0), "gives blocksize 0"),
        (spoiled(blocksize=32), r"absmax' has shape \[6\], expected \[12\]"),
        (spoiled(blocksize="64"), "gives blocksize '64'"),
        (spoiled(dtype="int8"), "gives the dtype 'int8'.*float32, float16, bfloat16"),
        (spoiled(quant_type="fp4"), "speaks of codes 'fp4'"),
        (spoiled(nested_blocksize=256, nested_offset=0.5), "lack '.*nested_absmax'"),
        (spoiled(nested_blocksize=256, nested_offset="x"), "gives nested_offset 'x'"),
        (replaced(".nested_absmax", torch.ones(1)), "nested_absmax' is there, but .* gives no nested_blocksize"),
        (replaced(".absmax", torch.ones(6).byte()), "absmax' is torch.uint8, expected float32"),
        (replaced(".quant_map", torch.ones(15)), r"quant_map' is torch.float32 \[15\], expected the 16 numbers"),
        (replaced(".quant_map", torch.ones(16).byte()), "quant_map' is torch.uint8"),
        (replaced("", torch.ones(191, 1).byte()), "holds 382 4-bit codes, expected 384"),
        (replaced("", torch.ones(193, 1).byte()), "holds 386 4-bit codes, expected 384"),
        (replaced(".quant_state.bitsandbytes__nf4", text("{oh")), "bitsandbytes__nf4' holds no JSON"),
        (replaced(".quant_state.bitsandbytes__nf4", text("[1]")), r"holds \[1\], expected a JSON object"),
        (replaced(".quant_state.bitsandbytes__nf4", torch.tensor([255, 254]).byte()), "holds no JSON"),
        (lambda tensors: tensors.pop(f"{WEIGHT}.absmax"), "lack '.*up_proj.weight.absmax'"),
        (lambda tensors: tensors.pop(f"{WEIGHT}.quant_map"), "lack '.*up_proj.weight.quant_map'"),
        (lambda tensors: tensors.pop(WEIGHT), "lack '.*up_proj.weight'"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    tensors, _ = four_bit()
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, tensors)


def test_an_unknown_code_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="speaks of codes 'af4', expected nf4 or fp4"):
        opened(tmp_path, four_bit(kind="af4")[0])


def test_damaged_int8_is_named(tmp_path):
    tensors, _ = rows()
    with pytest.raises(CheckpointError, match=r"SCB' has shape \[5\], expected one scale for each of the 6 rows"):
        opened(tmp_path, tensors | {WEIGHT.replace("weight", "SCB"): torch.ones(5)})
    with pytest.raises(CheckpointError, match=r"up_proj.weight' is torch.float32"):
        opened(tmp_path, tensors | {WEIGHT: torch.ones(6, 10)})
    with pytest.raises(CheckpointError, match=r"down_proj.weight' .* holds torch.int8 codes, and .*down_proj.SCB"):
        opened(tmp_path, tensors | {"model.layers.0.mlp.down_proj.weight": torch.ones(2, 2, dtype=torch.int8)})


def test_a_label_alone_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weight is stored quantized.*remove quantization_config"):
        opened(tmp_path, {WEIGHT: torch.ones(2, 2)}, quantization={"quant_method": "bitsandbytes"})
