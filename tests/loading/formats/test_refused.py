import json

import pytest
import torch
from safetensors.torch import save_file

from tracelens.errors import CheckpointError
from tracelens.loading.checkpoint import Checkpoint
from tracelens.loading.formats.base import FORMATS, Stored
from tracelens.loading.formats.refused import REFUSALS, refusal

M = "model.layers.0.mlp.down_proj"


def write(folder, names, quantization=None):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.ones(2, 2, dtype=torch.int32) for name in names}, folder / "model.safetensors")
    return folder


BY_METHOD = [(known.title, {"quant_method": method.upper()}) for known in REFUSALS for method in known.methods]
BY_LABEL = [
    (known.title, {"quant_method": "gptq", "checkpoint_format": label}) for known in REFUSALS for label in known.labels
]
BY_FLAG = [(known.title, {"quant_method": "gptq", flag: True}) for known in REFUSALS for flag in known.flags]
BY_TENSORS = [(known.title, together) for known in REFUSALS for together in known.tensors]


@pytest.mark.parametrize(("title", "quantization"), BY_METHOD + BY_LABEL + BY_FLAG)
def test_what_the_config_names_is_refused(tmp_path, title, quantization):
    with pytest.raises(CheckpointError, match="original") as error:
        Checkpoint(write(tmp_path, [f"{M}.qweight", f"{M}.qzeros", f"{M}.scales"], quantization))
    assert title in str(error.value)


@pytest.mark.parametrize(("title", "together"), BY_TENSORS)
def test_what_tensors_give_away_is_refused_without_a_label(tmp_path, title, together):
    with pytest.raises(CheckpointError, match="original") as error:
        Checkpoint(write(tmp_path, [f"{M}.{last}" for last in together]))
    assert title in str(error.value)


def test_marlin_under_an_awq_label_is_refused(tmp_path):
    quantization = {"quant_method": "awq", "version": "marlin", "bits": 4, "group_size": 64}
    with pytest.raises(CheckpointError, match=r"Marlin.*original"):
        Checkpoint(write(tmp_path, [f"{M}.qweight", f"{M}.scales"], quantization))


def test_a_signature_must_lie_in_one_module(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, ["a.codes", "b.codebooks", "c.weight"]))
    assert checkpoint.layout is None


@pytest.mark.parametrize("quantization", [{"is_marlin_format": False}, {"rotation": None}, {"checkpoint_format": None}])
def test_flags_that_are_not_set_refuse_nothing(tmp_path, quantization):
    folder = write(tmp_path, ["a.weight"], {"quant_method": "gptq", **quantization})
    stored = Stored(
        folder, json.loads((folder / "config.json").read_text()), Checkpoint(write(tmp_path, ["a.weight"])).stored.files
    )
    assert refusal(stored) is None


def test_compressed_tensors_is_left_to_its_own_format(tmp_path):
    files = Checkpoint(write(tmp_path, ["a.weight"])).stored.files
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}}
    stored = Stored(tmp_path, config, files)
    assert not any(FORMATS[name].recognise(stored) for name in ("refused", "gptq", "awq"))
