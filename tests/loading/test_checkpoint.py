"""Every tensor is accounted for, and every damaged folder is named with the way to mend it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny import write_checkpoint
from tracelens import load
from tracelens.errors import CheckpointError, NonFiniteError
from tracelens.loading import Checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "model")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_names_shapes_and_tensors(tiny_folder):
    checkpoint = Checkpoint(tiny_folder)
    assert set(checkpoint.names()) == set(load_file(tiny_folder / "model.safetensors"))
    assert checkpoint.shape(NAME) == (40, 32)
    assert torch.equal(checkpoint.tensor(NAME), load_file(tiny_folder / "model.safetensors")[NAME])
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.config["hidden_size"] == 32


def test_tensors_are_read_one_at_a_time(tiny_folder, monkeypatch):
    held = []
    read = Checkpoint.weight

    def spy(self, name, **kwargs):
        held.append(name)
        return read(self, name, **kwargs)

    monkeypatch.setattr(Checkpoint, "weight", spy)
    checkpoint = Checkpoint(tiny_folder)
    assert checkpoint.shape(NAME)
    assert held == []
    load(tiny_folder)
    assert sorted(held) == sorted(checkpoint.names())


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(NAME))
    with pytest.raises(CheckpointError, match=rf"lack 1 tensors of LlamaForCausalLM .*{NAME}; get the whole"):
        load(folder)


def test_an_extra_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"hold 1 tensors that are no part of .*q_proj\.bias; .*check config"):
        load(folder)


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
def test_biases_of_zeros_on_quantized_layers_change_nothing(tmp_path, wrapper):
    """AutoGPTQ gives one to every layer that it quantizes, Llama's too."""
    source = Path(__file__).parents[1] / "fixtures" / "checkpoints" / "autogptq" / "b3_g32_asym" / "llama"
    bias = "model.layers.0.mlp.up_proj.bias"
    assert Checkpoint(source).adds_nothing(bias)
    assert load(source, wrapper=wrapper)(torch.arange(4, 20)[None]).isfinite().all()

    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    tensors[bias][0] = 1
    save_file(tensors, folder / "model.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"hold 1 tensors that are no part of .*{bias}"):
        load(folder, wrapper=wrapper)


def test_stored_rotary_buffers_are_no_weights(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    load(folder)


def test_a_misshaped_tensor_is_named_with_both_shapes(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NAME: torch.zeros(41, 32)}))
    with pytest.raises(CheckpointError, match=rf"{NAME} is \[41, 32\], expected \[40, 32\]"):
        load(folder)


def test_quantized_tensors_without_a_quantization_config_are_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NAME: torch.zeros(40, 32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{NAME}.* is stored as torch.int8 and belongs to no format .*original"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    edit_tensors(folder, lambda tensors: tensors[NAME].__setitem__((3, 5), value))
    with pytest.raises(NonFiniteError, match=rf"{NAME}.* holds NaN or infinity in 1 of 1280 values"):
        load(folder)


def test_weights_too_large_for_float16_are_named(folder):
    edit_tensors(folder, lambda tensors: tensors[NAME].__setitem__((3, 5), 1e6))
    load(folder)
    with pytest.raises(NonFiniteError, match=rf"{NAME}.* overflows torch.float16; load with dtype=torch.float32"):
        load(folder, dtype=torch.float16)


def test_tied_embeddings_that_differ_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(folder)
    edit_tensors(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings, but lm_head\.weight differs"):
        load(folder)


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_config_that_is_no_json_object(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json .*JSON"):
        load(folder)


def test_a_folder_without_weights_names_what_is_there(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors, .*has consolidated.*save_pretrained"):
        load(folder)


def test_a_single_file_of_another_name(folder, tiny_model):
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    ids = torch.arange(4, 20)[None]
    assert torch.equal(load(folder)(ids), tiny_model(ids))


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_torch_save(tmp_path, tiny_folder, sharded):
    tensors = load_file(tiny_folder / "model.safetensors")
    config = (tiny_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    if sharded:
        names = list(tensors)
        shards = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
        for shard, inside in shards.items():
            torch.save({name: tensors[name] for name in inside}, tmp_path / shard)
        homes = {name: shard for shard, inside in shards.items() for name in inside}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": homes}))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    ids = torch.arange(4, 20)[None]
    assert torch.equal(load(tmp_path)(ids), load(tiny_folder)(ids))


def test_safetensors_are_preferred_to_pickles(folder):
    (folder / "pytorch_model.bin").write_bytes(b"no model")
    assert Checkpoint(folder).stored.files.home(NAME) == "model.safetensors"


def test_shards_are_closed_behind_us(tmp_path, tiny_folder):
    folder = write_checkpoint(tmp_path / "m", max_shard_size="10KB")
    shards = len(list(folder.glob("*.safetensors")))
    assert shards > 4
    checkpoint = Checkpoint(folder)
    whole = Checkpoint(tiny_folder)
    for name in reversed(checkpoint.names()):
        assert torch.equal(checkpoint.tensor(name), whole.tensor(name))
        assert len(checkpoint.stored.files._open) <= 2  # type: ignore[attr-defined]


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file.*download it again"):
        load(folder)


def test_a_missing_shard_and_a_wrong_index(tmp_path):
    folder = write_checkpoint(tmp_path / "m", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    wrong = {**content, "weight_map": {**content["weight_map"], "model.extra": content["weight_map"][NAME]}}
    index.write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match=r"disagree on model.extra"):
        load(folder)

    index.write_text(json.dumps(content))
    shard = content["weight_map"][NAME]
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {shard}, which .*refers to"):
        load(folder)
