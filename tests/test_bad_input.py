"""Every bad input has an error that names the thing and the fix, through the public API."""

import json
import os

import pytest
import torch

from tests.handmade import OPTIONS, ReadOut
from tests.test_audit import tiny  # noqa: F401
from tests.tiny import write_checkpoint
from tracelens import Audit, CircuitTracer, HookConfig, HookManager, OptimizationAuditor, Site, load, organism
from tracelens.behaviour import answer_tokens_for
from tracelens.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    NonFiniteError,
    OutputError,
    PairMismatchError,
    PrecisionSpecError,
    PromptError,
    SAEError,
    SAENotFoundError,
    TracelensError,
    UnknownNameError,
)
from tracelens.precision.sharing import copy_sharing


@pytest.fixture
def made(tiny):  # noqa: F811
    model, saes, _ = tiny
    return Audit(model, precision="int8").load_sae(saes)


@pytest.mark.parametrize("side", ["base_model", "quant_model"])
def test_a_missing_folder(side, tiny_folder, tmp_path):
    models = {"base_model": tiny_folder, "quant_model": tiny_folder, side: str(tmp_path / "nowhere")}
    with pytest.raises(CheckpointNotFoundError, match="nowhere") as error:
        Audit(**models)
    assert isinstance(error.value, FileNotFoundError)


@pytest.mark.parametrize(("missing", "named"), [("config.json", "config.json"), ("model.safetensors", "safetensors")])
def test_a_folder_without_config_or_weights(missing, named, tmp_path):
    (write_checkpoint(tmp_path / "model") / missing).unlink()
    with pytest.raises(CheckpointError, match=named):
        Audit(tmp_path / "model", precision="int8")


def test_something_that_is_no_model():
    with pytest.raises(CheckpointError, match=r"pass a folder, .* 'organism' or a HookedTransformer"):
        Audit(torch.nn.Linear(2, 2), precision="int8")


def test_saes_that_do_not_fit(tiny, tmp_path):  # noqa: F811
    model, saes, prompts = tiny
    audit = Audit(model, precision="int8")
    with pytest.raises(SAEError, match=r"d_in is 31, but the model is 32 wide"):
        audit.load_sae({2: ReadOut(torch.eye(31))})
    with pytest.raises(SAEError, match=r"blocks.9.hook_resid_post: the model has only 3 layers \(0 to 2\)"):
        audit.load_sae({"blocks.9.hook_resid_post": ReadOut(torch.eye(32))})
    with pytest.raises(SAEError, match=r"'blocks.0.nonsense' of the SAEs is no site.*Known: "):
        audit.load_sae({"blocks.0.nonsense": ReadOut(torch.eye(32))})
    with pytest.raises(SAENotFoundError, match=r"give a folder with cfg.json"):
        audit.load_sae(tmp_path / "nowhere")
    with pytest.raises(SAEError, match=r"neither it nor a sub-folder holds cfg.json"):
        audit.load_sae(tmp_path)
    with pytest.raises(SAEError, match=r"call load_sae\(folder\) first"):
        audit.trace_features(prompts, **OPTIONS)
    for user in (CircuitTracer, OptimizationAuditor):
        with pytest.raises(SAEError, match="only 3 layers"):
            user(model, {9: saes[Site(2)]})


def test_an_sae_folder_for_another_model(tiny, tmp_path):  # noqa: F811
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", model_name="another")
    StandardSAE(StandardSAEConfig(d_in=20, d_sae=40, metadata=metadata)).save_model(tmp_path / "sae")
    with pytest.raises(
        SAEError, match=r"load those that were trained on it(.|\n)*blocks.1.hook_resid_post: the SAE's d_in is 20, but"
    ):
        Audit(tiny[0], precision="int8").load_sae(tmp_path / "sae")


def test_empty_data_sets(made):
    with pytest.raises(PromptError, match="the list is empty; give it at least one prompt"):
        made.trace_features({"refusal": [], "baseline": ["the cat"]}, **OPTIONS)
    with pytest.raises(PromptError, match="the list is empty"):
        made.trace_features([], **OPTIONS)
    with pytest.raises(PromptError, match=r"no baseline prompts to compare with; pass baseline="):
        made.trace_features(["the cat"], **OPTIONS)


def test_a_prompt_longer_than_the_context(made, tiny):  # noqa: F811
    prompts = dict(tiny[2])
    prompts["baseline"] = [*prompts["baseline"], "the cat " * 40]
    with pytest.raises(
        PromptError, match=r"prompt 80 has 81 tokens, but the model's context holds 64 .* shorten or drop it"
    ):
        made.trace_features(prompts, **OPTIONS)


def test_unknown_words_name_a_set_that_fits():
    made = Audit(organism.path(), precision="int8").load_sae({0: ReadOut(torch.eye(load("organism").cfg.d_model))})
    with pytest.raises(PromptError, match=r"harmful_refusal_v1.*unknown.*Use 'organism_refusal_v1'"):
        made.trace_features("harmful_refusal_v1", **OPTIONS)


def test_unknown_names(made, tiny, tiny_folder):  # noqa: F811
    model, _, prompts = tiny
    with pytest.raises(PrecisionSpecError, match=r"'int9'.*Known: fp32"):
        Audit(tiny_folder, precision="int9")
    with pytest.raises(UnknownNameError, match=r"data set 'organism_refusal'.*Did you mean 'organism_refusal_v1'"):
        made.trace_features("organism_refusal", **OPTIONS)
    with pytest.raises(UnknownNameError, match=r"resid_pst.*resid_post"):
        HookManager(model, HookConfig(layers=[0], hook_points=["resid_pst"]))
    with pytest.raises(UnknownNameError, match=r"site 'resid_pst'. Did you mean 'resid_post'"):
        Site(0, "resid_pst")
    with pytest.raises(UnknownNameError, match=r"behaviour 'refusing'. Did you mean 'refusal'"):
        answer_tokens_for(model.tokenizer, "refusing")
    with pytest.raises(UnknownNameError, match="refusal"):
        organism.sample(3, behaviour="refusing")
    fingerprint = made.trace_features(prompts, **OPTIONS, controls=False).fingerprint
    with pytest.raises(UnknownNameError, match=r"behaviour 'warning'. Known: refusal"):
        fingerprint.mask(Site(2), 48, "warning")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tiny, tmp_path):  # noqa: F811
    model, saes, _ = tiny
    weight = model.blocks[1].mlp.W_in.detach().clone()
    weight[0, 0] = value
    broken = copy_sharing(model, {"blocks.1.mlp.W_in": weight})
    with pytest.raises(NonFiniteError, match=r"the quantized model's blocks.1.mlp.W_in holds NaN or infinity; load or"):
        Audit(model, broken)
    with pytest.raises(NonFiniteError, match=r"the reference's blocks.1.mlp.W_in"):
        Audit(broken, precision="int4")
    with pytest.raises(NonFiniteError, match=r"the model's blocks.1.mlp.W_in"):
        OptimizationAuditor(broken, saes)

    from safetensors.torch import load_file, save_file

    file = write_checkpoint(tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        Audit(tmp_path / "model", precision="int8")


def test_models_that_differ(tmp_path, tiny_folder):
    other = write_checkpoint(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PairMismatchError, match=r"vocabulary: 2 tokens .*'cat'(.|\n)*same base model"):
        Audit(tiny_folder, other)
    narrow = write_checkpoint(tmp_path / "narrow", hidden_size=16, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(PairMismatchError, match="d_model: reference 32, quantized 16"):
        Audit(tiny_folder, narrow)


def test_output_that_is_not_ours(made, tiny, tmp_path):  # noqa: F811
    report = made.trace_features(tiny[2], **OPTIONS, controls=False)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="was not written by Tracelens; give a new or empty folder"):
        report.save(tmp_path)
    with pytest.raises(OutputError, match=r"thesis.tex is a file; give a folder"):
        report.save(tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_every_error_is_caught_as_one(tmp_path):
    with pytest.raises(TracelensError):
        Audit(tmp_path, precision="int8")
