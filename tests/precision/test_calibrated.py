"""Checkpoints that llm-compressor makes: opened, compared with the library's own reading, and better for the prompts."""

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tracelens
from tests.tiny import TEXTS, write_checkpoint
from tracelens.errors import (
    CheckpointError,
    OutputError,
    PrecisionSpecError,
    PromptError,
    QuantizeError,
    UnknownNameError,
)
from tracelens.precision.calibrated import RECORD, quantize

# Found, not imported: the import takes over loguru's handlers, and the package has to cope with that itself.
pytestmark = pytest.mark.skipif(find_spec("llmcompressor") is None, reason="needs llmcompressor")

KINDS = {
    "gptq-int4-g8": "pack-quantized",
    "gptq-int3-g8": "pack-quantized",
    "gptq-int2-g8": "pack-quantized",
    "gptq-int8": "pack-quantized",
    "awq-int4-g8": "pack-quantized",
    "awq-int4-g8-asym": "pack-quantized",
    "smoothquant-int8": "int-quantized",
    "smoothquant-gptq-int8": "int-quantized",
    "rtn-int4-g8": "pack-quantized",
    "fp8": "float-quantized",
    "int8+a8-static": "int-quantized",
}
VERIFIED = ("awq-int4-g8", "smoothquant-int8", "rtn-int4-g8", "gptq-int4-g8")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """Of widths that groups of 8 divide, and that tell how codes of 3 bits are packed."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", intermediate_size=64)


@pytest.fixture(scope="module")
def build(tiny_folder, tmp_path_factory):
    """Builds of the tiny checkpoint, each made once."""
    made: dict[str, Path] = {}

    def once(recipe: str) -> Path:
        if recipe not in made:
            out = tmp_path_factory.mktemp("builds") / recipe
            made[recipe] = quantize(tiny_folder, recipe, TEXTS, out, progress=False)
        return made[recipe]

    return once


def library_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model as transformers and compressed-tensors open it, its weights decompressed."""
    from compressed_tensors.compressors import ModelCompressor
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ModelCompressor.from_pretrained_model(model).decompress_model(model)
    return model.state_dict()


@pytest.mark.parametrize("recipe", KINDS)
def test_weights_are_those_that_the_library_reads(build, recipe):
    checkpoint = tracelens.Checkpoint(build(recipe))
    assert checkpoint.format == f"compressed-tensors ({KINDS[recipe]})"
    theirs = library_weights(checkpoint.path)
    quantized = [name for name in checkpoint.names() if checkpoint.quantized(name)]
    assert len(quantized) == 3 * 7
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), theirs[name].float()), name


@pytest.mark.parametrize("recipe", VERIFIED)
def test_the_doctor_finds_the_reference_in_it(build, tiny_folder, recipe):
    diagnosis = tracelens.doctor(build(recipe), reference=tiny_folder)
    assert diagnosis.verdict == "verified", diagnosis.summary()


def test_rounding_to_nearest_is_what_is_simulated(build, tiny_model):
    stored = tracelens.load(build("rtn-int4-g8"), device="cpu")
    simulated = tracelens.load(tiny_model, precision="int4-g8")
    for name, parameter in stored.named_parameters():
        assert torch.equal(parameter, dict(simulated.named_parameters())[name]), name


@pytest.mark.parametrize(("recipe", "rounding"), [("awq-int4-g8", "int4-g8"), ("smoothquant-int8", "int8")])
def test_smoothing_moves_scales_between_layers_and_keeps_the_function(build, tiny_folder, recipe, rounding):
    original, smoothed = tracelens.Checkpoint(tiny_folder), tracelens.Checkpoint(build(recipe))
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(smoothed.tensor(norm), original.tensor(norm))
    reference = tracelens.load(original, device="cpu")
    rounded = tracelens.load(reference, precision=rounding)(TEXTS) - reference(TEXTS)
    found = tracelens.load(smoothed, device="cpu")(TEXTS) - reference(TEXTS)
    assert found.norm() < 1.5 * rounded.norm(), "scales that nothing undoes cost many times as much as rounding"


def mean_kl(reference, quantized, ids: list[list[int]]) -> float:
    """KL in nats, mean over the tokens of prompts given as ids."""
    total, n = 0.0, 0
    with torch.inference_mode():
        for row in ids:
            p, q = (model(torch.tensor([row]))[0, 1:].log_softmax(-1) for model in (reference, quantized))
            total, n = total + float((p.exp() * (p - q)).sum()), n + len(p)
    return total / n


def test_gptq_is_better_than_rounding_on_prompts_it_was_and_was_not_fitted_to(organism, tmp_path):
    from tracelens.datasets import get_dataset
    from tracelens.precision.calibration_prompts import read_calibration

    prompts = get_dataset("organism_comprehensive_v1").prompts
    fitted, held_out = prompts[::20], prompts[10::20]
    quantize("organism", "gptq-int3-g32", fitted, tmp_path / "gptq", progress=False)
    gptq = tracelens.load(tmp_path / "gptq", device="cpu")
    rounded = tracelens.load(organism, precision="int3-g32")
    source = tracelens.Checkpoint(tracelens.organism.path())
    for texts in (fitted, held_out):
        ids = read_calibration(texts, source).ids
        assert mean_kl(organism, gptq, ids) < mean_kl(organism, rounded, ids) / 2


def test_the_record_and_the_files(build, tiny_folder):
    folder = build("gptq-int4-g8")
    record = json.loads((folder / RECORD).read_text())
    assert record["recipe"] == "gptq-int4-g8"
    assert record["calibration"]["prompts"] == len(TEXTS)
    assert len(record["calibration"]["sha256_token_ids"]) == 64
    assert set(record["versions"]) == {"tracelens", "llmcompressor", "compressed-tensors", "transformers", "torch"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert json.loads((build("rtn-int4-g8") / RECORD).read_text())["calibration"] is None, "no prompt was run"
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_the_same_call_writes_the_same_weights_quietly(build, tiny_folder, tmp_path, monkeypatch, capfd, no_network):
    first = build("gptq-int4-g8")
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    again = quantize(tiny_folder, "gptq-int4-g8", TEXTS, "again", progress=False)
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert capfd.readouterr() == ("", "")
    assert os.listdir() == ["again"]
    assert dict(os.environ) == environment


def test_a_build_is_replaced_as_a_whole_and_only_by_a_whole_one(build, tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(build("rtn-int4-g8"), out)
    (out / "model-00001-of-00002.safetensors").touch()
    before = (out / "model.safetensors").read_bytes()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.LlamaForCausalLM.save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_folder, "fp8", None, out, progress=False)
    assert (out / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]
    quantize(tiny_folder, "fp8", None, out, progress=False)
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert tracelens.Checkpoint(out).format == "compressed-tensors (float-quantized)"
    assert os.listdir(tmp_path) == ["out"]


def test_ignored_layers_stay_as_they_are(tiny_folder, tmp_path):
    out = quantize(tiny_folder, "int4-g8", None, tmp_path / "out", ignore=["lm_head", "re:.*down_proj"], progress=False)
    found, original = tracelens.Checkpoint(out), tracelens.Checkpoint(tiny_folder)
    for name in found.names():
        kept = "down_proj" in name or "_proj" not in name
        assert kept == (found.quantized(name) is None), name
        assert not kept or torch.equal(found.tensor(name), original.tensor(name)), name


def test_a_recipe_file_and_a_tokenizer_of_ones_own(tiny_folder, tmp_path):
    from tests.tiny import tiny_tokenizer

    file = tmp_path / "mine.yaml"
    file.write_text(
        "quant_stage:\n  quant_modifiers:\n    GPTQModifier:\n      ignore: [lm_head]\n      dampening_frac: 0.1\n"
        "      config_groups:\n        group_0:\n          targets: [Linear]\n"
        "          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 8}\n"
    )
    out = quantize(tiny_folder, file, TEXTS, tmp_path / "out", tokenizer=tiny_tokenizer(add_bos=False), progress=False)
    assert tracelens.Checkpoint(out).format == "compressed-tensors (pack-quantized)"
    assert tracelens.Checkpoint(out).tokenizer("yes").input_ids == tiny_tokenizer(add_bos=False)("yes").input_ids
    file.write_text(file.read_text().replace("group_size: 8", "group_size: 24"))
    with pytest.raises(QuantizeError, match=r"could not apply 'mine.yaml'.*LlamaForCausalLM.*group_size"):
        quantize(tiny_folder, file, TEXTS, tmp_path / "other", progress=False)


@pytest.mark.parametrize(
    ("recipe", "calibration", "options", "error", "said"),
    [
        (
            "gptq-int4-g24",
            TEXTS,
            {},
            PrecisionSpecError,
            "width 32 of model.layers.0.self_attn.q_proj.*every width: 2, 4, 8, 16, 32. Or",
        ),
        ("gptq-int4-g8", None, {}, PromptError, "recipe 'gptq-int4-g8' is fitted to prompts"),
        ("gptq-int4-g8", [], {}, PromptError, "there are none"),
        ("int8", None, {"ignore": ["lm_haed"]}, UnknownNameError, "unknown module to ignore 'lm_haed'"),
        ("int8", None, {"ignore": ["Linear"]}, QuantizeError, "or all of them are ignored"),
        ("int7.5", None, {}, PrecisionSpecError, "METHOD-PRECISION"),
    ],
)
def test_what_cannot_be_done_is_found_before_the_run(tiny_folder, tmp_path, recipe, calibration, options, error, said):
    with pytest.raises(error, match=said):
        quantize(tiny_folder, recipe, calibration, tmp_path / "out", progress=False, **options)
    assert os.listdir(tmp_path) == []


def test_an_architecture_without_mappings_or_linear_layers(tmp_path):
    neox = write_checkpoint(tmp_path / "neox", "GPTNeoXForCausalLM")
    with pytest.raises(QuantizeError, match=r"no awq mappings for GPTNeoXForCausalLM.*LlamaForCausalLM.*Use gptq"):
        quantize(neox, "awq-int4-g8", TEXTS, tmp_path / "out", progress=False)
    out = quantize(neox, "gptq-int4-g8", TEXTS, tmp_path / "out", progress=False)
    found = tracelens.Checkpoint(out)
    assert found.quantized("embed_out.weight") is None, "the output layer, whatever its name"
    gpt2 = write_checkpoint(tmp_path / "gpt2", "GPT2LMHeadModel")
    with pytest.raises(QuantizeError, match="GPT2LMHeadModel has no linear layers that llm-compressor quantizes"):
        quantize(gpt2, "int8", None, tmp_path / "other", progress=False)


def test_sources_and_places_that_are_refused(build, tiny_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is quantized already .*pack-quantized"):
        quantize(build("rtn-int4-g8"), "int8", None, tmp_path / "out", progress=False)
    with pytest.raises(OutputError, match="was not written by Tracelens"):
        quantize(tiny_folder, "int8", None, tiny_folder, progress=False)
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        quantize(bare, "gptq-int8", TEXTS, tmp_path / "out", progress=False)


def test_what_cannot_be_read_back_is_not_kept(tmp_path):
    narrow = write_checkpoint(tmp_path / "narrow")  # 4 words hold 40 codes of 3 bits in a row, or 10 in each
    with pytest.raises(QuantizeError, match=r"cannot be read back, and is not kept.*3 bits in two ways"):
        quantize(narrow, "rtn-int3-g8", None, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["narrow"]


def test_a_missing_library_says_what_to_install(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    with pytest.raises(QuantizeError, match=r"pip install -U 'tracelens\[full\]'"):
        quantize(tiny_folder, "int8", None, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == []
