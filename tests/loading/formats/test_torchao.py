"""Tensor subclasses of torchao, taken apart."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tracelens.errors import CheckpointError
from tracelens.loading import Checkpoint

MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{MODULE}.weight"
INT8 = "Int8Tensor"


def opened(folder, tensors, metadata=None, quant_type=None, method="torchao", architecture="LlamaForCausalLM"):
    quantization = {"quant_method": method, "quant_type": quant_type or {}} if method else None
    (folder / "config.json").write_text(
        json.dumps({"architectures": [architecture], "quantization_config": quantization})
    )
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return Checkpoint(folder)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def entry(kind, block, names, weight=WEIGHT, **attributes):
    said = {"_type": kind, "_data": {"block_size": block, **attributes}, "_tensor_data_names": names}
    return {weight: json.dumps(said), "tensor_names": json.dumps([weight])}


def weight(shape=(6, 8), block=(1, 8), dtype=torch.int8, zero=torch.int8, factor=torch.float32, scale_shape=None):
    """Stored tensors, names of the parts, and the weight, number by number."""
    octets = torch.arange(shape[0] * shape[1]).mul(37).remainder(120).to(torch.uint8).reshape(shape)
    qdata = octets.view(dtype)
    grid = [size // part for size, part in zip(shape, block, strict=True)]
    scale = uniform(*grid).to(factor)
    zeros = None
    if zero is not None:
        zeros = torch.arange(grid[0] * grid[1]).remainder(9).sub(4).reshape(grid).to(zero)
    made = np.zeros(shape, dtype=np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            at = (i // block[0], j // block[1])
            code = np.float32(qdata[i, j].float())
            made[i, j] = (code - np.float32(0 if zeros is None else zeros[at].float())) * np.float32(scale[at].float())
    tensors = {f"{MODULE}._weight_qdata": qdata, f"{MODULE}._weight_scale": scale.reshape(scale_shape or grid)}
    if zeros is not None:
        tensors[f"{MODULE}._weight_zero_point"] = zeros
    names = ["qdata", "scale", *(["zero_point"] if zeros is not None else [])]
    return tensors, names, torch.from_numpy(made)


@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [None, torch.int8, torch.float32])
@pytest.mark.parametrize("block", [(1, 8), (1, 4), (6, 8), (2, 4), (1, 1)])
@pytest.mark.parametrize("kind", ["Int8Tensor", "IntxUnpackedToInt8Tensor"])
def test_integers(tmp_path, kind, block, zero, factor):
    tensors, names, made = weight(block=block, zero=zero, factor=factor)
    others = {"model.norm.weight": torch.ones(4)}
    metadata = entry(kind, list(block), names, target_dtype={"_type": "torch.dtype", "_data": "int4"})
    checkpoint = opened(tmp_path, tensors | others, metadata | {"model.norm.weight": '{"_type": "Tensor"}'})
    assert torch.equal(checkpoint.tensor(WEIGHT), made)
    assert set(checkpoint.names()) == {WEIGHT, "model.norm.weight"}
    assert checkpoint.format == "torchao (int4)"
    assert checkpoint.quantized(WEIGHT).scheme.block == (None if block == (6, 8) else block)
    assert checkpoint.quantized(WEIGHT).scheme.bits == 4


@pytest.mark.parametrize("said", ["lm_head.weight", "embed_out.weight"])
def test_the_metadata_may_have_another_name_than_the_tensors(tmp_path, said):
    """transformers gives the tensors of GPT-NeoX their old names when it saves them, and leaves the metadata."""
    tensors, names, made = weight()
    tensors = {name.replace(MODULE, "embed_out"): tensor for name, tensor in tensors.items()}
    metadata = entry(INT8, [1, 8], names, weight=said)
    checkpoint = opened(tmp_path, tensors, metadata, architecture="GPTNeoXForCausalLM")
    assert torch.equal(checkpoint.tensor("lm_head.weight"), made)
    assert checkpoint.names() == ["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lack 'lm_head._weight_qdata'"):
        opened(tmp_path, tensors, entry(INT8, [1, 8], names, weight="lm_head.weight"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("block", "scale_shape"), [((1, 8), (6, 1)), ((1, 8), (6,)), ((6, 8), ()), ((6, 8), (1, 1)), ((3, 4), (2, 2))]
)
def test_floats(tmp_path, dtype, block, scale_shape):
    tensors, names, made = weight(block=block, dtype=dtype, zero=None)
    tensors[f"{MODULE}._weight_scale"] = tensors[f"{MODULE}._weight_scale"].reshape(scale_shape)
    checkpoint = opened(tmp_path, tensors, entry("Float8Tensor", list(block), names))
    assert torch.equal(checkpoint.tensor(WEIGHT), made)
    assert checkpoint.quantized(WEIGHT).scheme.code == ("e4m3" if dtype == torch.float8_e4m3fn else "e5m2")


def test_tensors_tell_without_a_label(tmp_path):
    tensors, names, made = weight()
    assert torch.equal(opened(tmp_path, tensors, entry(INT8, [1, 8], names), method=None).tensor(WEIGHT), made)


def test_what_only_kernels_use(tmp_path):
    tensors, names, made = weight()
    kernel = f"{MODULE}._weight_act_quant_scale"
    metadata = entry(
        INT8, [1, 8], [*names, "act_quant_scale"], act_quant_kwargs={"_type": "QuantizeTensorToInt8Kwargs"}
    )
    checkpoint = opened(tmp_path, {**tensors, kernel: torch.ones(1)}, metadata)
    assert torch.equal(checkpoint.tensor(WEIGHT), made)
    assert checkpoint.names() == [WEIGHT]
    assert checkpoint.layout.runtime == (kernel,)
    assert "activations" in checkpoint.layout.notes[0]


def test_asymmetry_is_told_by_the_config(tmp_path):
    tensors, names, _ = weight()
    metadata = entry(INT8, [1, 8], names)
    assert opened(tmp_path, tensors, metadata).quantized(WEIGHT).scheme.symmetric
    mapping = {"default": {"_data": {"mapping_type": {"_data": "ASYMMETRIC", "_type": "MappingType"}}}}
    assert not opened(tmp_path, tensors, metadata, mapping).quantized(WEIGHT).scheme.symmetric


@pytest.mark.parametrize("kind", ["Int4TilePackedTo4dTensor", "Int4Tensor", "NVFP4Tensor", "MXTensor", "Whatever"])
def test_other_classes_are_refused_by_name(tmp_path, kind):
    tensors, names, _ = weight()
    with pytest.raises(
        CheckpointError, match=f"up_proj.weight' .* is a {kind} of torchao; .* Int8Tensor, IntxUnpacked"
    ):
        opened(tmp_path, tensors, entry(kind, [1, 8], names))


def without(part):
    def change(tensors, metadata):
        del tensors[f"{MODULE}._weight_{part}"]

    return change


def metadata_is(text):
    return lambda tensors, metadata: metadata.update({WEIGHT: text})


def said(block=(1, 8), names=("qdata", "scale", "zero_point"), kind=INT8):
    return metadata_is(entry(kind, None if block is None else list(block), list(names))[WEIGHT])


def stored(part, tensor):
    return lambda tensors, metadata: tensors.update({f"{MODULE}._weight_{part}": tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("scale"), "lack '.*_weight_scale'"),
        (without("qdata"), "lack '.*_weight_qdata'"),
        (without("zero_point"), "lack '.*_weight_zero_point'"),
        (lambda tensors, metadata: metadata.clear(), "_weight_qdata' is a part of '.*up_proj.weight', whose class"),
        (metadata_is("{"), "metadata of '.*up_proj.weight' is no JSON"),
        (metadata_is("[]"), "metadata of '.*up_proj.weight' names no class"),
        (said(block=(1, 3)), r"gives block_size \[1, 3\], expected divisors of its shape \[6, 8\]"),
        (said(block=(8,)), r"gives block_size \[8\]"),
        (said(block=(0, 8)), r"gives block_size \[0, 8\]"),
        (said(block=None), "gives block_size None"),
        (said(block=(1, 4)), r"_weight_scale' is torch.float32 \[6, 1\], expected floating point \[6, 2\]"),
        (said(names=("qdata",)), "made of qdata, expected qdata, scale"),
        (said(names=("qdata", "scale")), "_weight_zero_point' is a part of"),
        (said(kind="Float8Tensor"), "_weight_qdata' is torch.int8, expected torch.float8"),
        (stored("qdata", torch.ones(6, 8, dtype=torch.int32)), "_weight_qdata' is torch.int32, expected torch.int8"),
        (stored("scale", torch.ones(5, 1)), r"_weight_scale' is torch.float32 \[5, 1\]"),
        (stored("scale", torch.ones(6, 1, dtype=torch.int8)), "_weight_scale' is torch.int8"),
        (stored("zero_point", torch.ones(6, 1, dtype=torch.int64)), "_weight_zero_point' is torch.int64"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    tensors, names, _ = weight()
    metadata = entry(INT8, [1, 8], names)
    change(tensors, metadata)
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, tensors, metadata or None)


def test_scaled_activations_are_refused(tmp_path):
    tensors, names, _ = weight()
    metadata = entry(INT8, [1, 8], [*names, "act_pre_scale"])
    with pytest.raises(CheckpointError, match=r"is a Int8Tensor made of .*act_pre_scale, expected"):
        opened(tmp_path, {**tensors, f"{MODULE}._weight_act_pre_scale": torch.ones(8)}, metadata)


def test_a_label_alone_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no weight is stored as safetensors of torchao"):
        opened(tmp_path, {WEIGHT: torch.ones(2, 2)})


def test_a_pickled_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    torch.save({WEIGHT: Subclass(torch.ones(2, 2))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin holds more than tensors.*safetensors"):
        Checkpoint(tmp_path)


class Subclass(torch.Tensor):
    """Stands for a class of torchao: pickled by name."""

    def __reduce_ex__(self, protocol):
        return Subclass, (torch.ones(2, 2),)
