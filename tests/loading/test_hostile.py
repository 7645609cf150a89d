"""Damaged and hostile checkpoints: each with an error that names it, and no model."""

import contextlib
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny import write_checkpoint
from tracelens import load
from tracelens.errors import CheckpointError, NonFiniteError, UnsupportedArchitectureError
from tracelens.loading import Checkpoint


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "model")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "boom")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "qmodel.pt"])
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_would_run_code_is_not_opened(folder, tmp_path, file, old):
    (folder / "model.safetensors").unlink()
    target = tmp_path / "ran"
    torch.save({"model.norm.weight": Bomb(target)}, folder / file, _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=rf"{file} holds more than tensors.*could run code.*as safetensors"):
        load(folder)
    assert not target.exists()


def test_a_file_of_rubbish_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 this is no model")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_safetensors(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        load(folder)


def test_a_header_larger_than_the_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**40) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "sub/other.safetensors", "..\\x.safetensors", 3]
)
def test_an_index_that_leads_outside_is_not_followed(tmp_path, shard):
    folder = write_checkpoint(tmp_path / "m", max_shard_size="20KB")
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"refers to .*outside the folder, and was not followed"):
        load(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map(tmp_path, content):
    folder = write_checkpoint(tmp_path / "m", max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load(folder)


def test_a_tensor_in_two_shards(tmp_path):
    folder = write_checkpoint(tmp_path / "m", max_shard_size="20KB")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    save_file({**load_file(second), next(iter(tensors)): next(iter(tensors.values()))}, second)
    with pytest.raises(CheckpointError, match=rf"is in {first.name} and in {second.name}"):
        load(folder)


def test_shapes_that_disagree_with_the_config(folder):
    edit_config(folder, intermediate_size=44)
    with pytest.raises(
        CheckpointError, match=r"mlp\.gate_proj\.weight is \[40, 32\], expected \[44, 32\].*different models"
    ):
        load(folder)


def test_layers_that_the_config_does_not_have(folder):
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"hold 9 tensors that are no part of .*model\.layers\.2\."):
        load(folder)
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"lack 9 tensors of .*model\.layers\.3\."):
        load(folder)


def test_remote_code_is_never_run(folder, tmp_path):
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto_map = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    edit_config(folder, auto_map=auto_map)
    load(folder)  # the architecture is one we know: the folder's own code is of no interest
    edit_config(folder, architectures=["EvilForCausalLM"], model_type="evil")
    with pytest.raises(UnsupportedArchitectureError, match=r"'EvilForCausalLM'.*LlamaForCausalLM.*remote code"):
        load(folder)
    with pytest.raises(UnsupportedArchitectureError, match=r"'EvilForCausalLM' has no TransformerBridge.*LlamaForCaus"):
        load(folder, wrapper="bridge")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_remote_code_is_not_run(folder, tmp_path):
    (folder / "tokenization_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with contextlib.suppress(CheckpointError):  # transformers may do without the class or refuse
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_not_a_model(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("not a model")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a file, but not a GGUF file; give the folder"):
        load(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file, but not a GGUF file"):
        load(folder / "model.safetensors")


@pytest.fixture
def readable_by_all():
    """A checkpoint in a folder that everyone may enter, unlike pytest's own."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    folder = write_checkpoint(root / "model")
    yield folder
    shutil.rmtree(root)


@contextlib.contextmanager
def as_nobody():
    """Root may read everything, so it becomes somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no permissions of this kind")
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "."])
def test_no_permission(readable_by_all, file):
    path = readable_by_all / file
    path.chmod(0)
    try:
        with as_nobody(), pytest.raises(CheckpointError, match=r"may not be read .*mend its permissions"):
            Checkpoint(readable_by_all)
    finally:
        path.chmod(0o755)
    assert Checkpoint(readable_by_all).names()


FIXTURES = Path(__file__).parents[1] / "fixtures"
SCALED = [
    pytest.param(file.parent, id=str(file.parent.relative_to(FIXTURES)))
    for file in sorted(FIXTURES.rglob("model.safetensors"))
    # Marlin is refused as it is; these two have no floating-point scales.
    if not {"marlin_b4_g64", "mxfp4", "gguf_q8_0"} & set(file.parts)
]


@pytest.mark.parametrize("source", SCALED)
def test_a_nan_in_a_scale_is_named_whatever_the_format(tmp_path, source):
    checkpoint = Checkpoint(source)
    name = next(name for name in checkpoint.names() if checkpoint.quantized(name))
    floats = (torch.float32, torch.float16, torch.bfloat16)
    # The first part are the codes, which may be stored as floats of any value.
    parts = [part for part in checkpoint.parts(name)[1:] if checkpoint.stored.dtype(part) in floats]
    part = next((part for part in parts if "quant_map" not in part), checkpoint.parts(name)[0])
    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    tensors[part].view(-1)[0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata)
    # Zero points that are products with their scale are looked at on opening.
    with pytest.raises(
        (NonFiniteError, CheckpointError), match=r"holds NaN or infinity in .*\(through |not -scale times"
    ):
        Checkpoint(folder).weight(name)


def test_a_quantization_config_that_is_no_object(folder):
    edit_config(folder, quantization_config="gptq")
    with pytest.raises(CheckpointError, match="quantization_config is no object"):
        load(folder)


def test_nothing_is_left_of_a_model_that_failed(folder, monkeypatch):
    """The error comes from the last tensor; what was filled until then is not handed out."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    model = None
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*NaN"):
        model = load(folder)
    assert model is None
