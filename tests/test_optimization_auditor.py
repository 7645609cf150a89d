import copy
import json
import math
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests import handmade
from tests.handmade import FEATURES, OPTIONS, ReadOut
from tests.test_audit import tiny  # noqa: F401
from tracelens import (
    Audit,
    AuditReport,
    OptimizationAuditor,
    QuantizationConfig,
    QuantizationType,
    SweepResult,
    load,
    load_saes,
)
from tracelens.datasets import get_dataset
from tracelens.errors import (
    CheckpointNotFoundError,
    OutputError,
    PairMismatchError,
    PrecisionSpecError,
    PromptError,
    ResultFileError,
    SAEError,
)
from tracelens.optimization_auditor import fitting_baseline
from tracelens.precision import apply_precision
from tracelens.precision.sharing import copy_sharing

CONFIGS = ["int8", QuantizationConfig(QuantizationType.INT4, group_size=8), QuantizationType.INT2]
SPECS = ["int8", "int4-g8", "int2"]


@pytest.fixture(scope="module")
def sweep(tiny) -> SweepResult:  # noqa: F811
    model, saes, prompts = tiny
    auditor = OptimizationAuditor(model, saes)
    return auditor.run_sweep(prompts, CONFIGS, **OPTIONS, min_auroc=0.8, noise_seeds=2)


def test_a_sweep_says_what_the_audits_say(sweep, tiny):  # noqa: F811
    model, saes, prompts = tiny
    assert list(sweep.reports) == SPECS
    assert [str(config) for config in sweep.configs] == SPECS
    for spec in SPECS:
        one = (
            Audit(model, precision=spec).load_sae(saes).trace_features(prompts, **OPTIONS, min_auroc=0.8, noise_seeds=2)
        )
        pd.testing.assert_frame_equal(sweep[spec].features, one.features)
        pd.testing.assert_frame_equal(sweep[spec].prompts, one.prompts)
        assert sweep[spec].cpfr == one.cpfr
        assert sweep[spec].verdict == one.verdict
        assert sweep[spec].label == one.label


def test_the_reference_runs_once(tiny, monkeypatch):  # noqa: F811
    model, saes, prompts = tiny
    calls = {"reference": 0, "others": 0, "gradients": 0}
    run = type(model).run_with_hooks

    def counted(self, *args, **kwargs):
        calls["gradients" if torch.is_grad_enabled() else "reference" if self is model else "others"] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "run_with_hooks", counted)
    auditor = OptimizationAuditor(model, saes)
    auditor.run_sweep(prompts, CONFIGS, **OPTIONS, batch_size=20, noise_seeds=2, permuted_seeds=1)
    batches = 80 // 20
    # Three precisions with two draws of noise and a permuted error each, and one bf16 floor for all.
    # Evidence takes the margin's gradient on 16 of the prompts, once for all precisions.
    assert calls == {"reference": batches, "others": batches * (3 * (1 + 2 + 1) + 1), "gradients": 1}
    calls.update(reference=0, others=0, gradients=0)
    auditor.run_sweep(prompts, CONFIGS, **OPTIONS, batch_size=20, controls=False, evidence_prompts=0)
    assert calls == {"reference": batches, "others": 3 * batches, "gradients": 0}


def test_damage_grows_as_bits_fall(sweep):
    table = sweep.to_dataframe()
    assert table["precision"].tolist() == SPECS
    assert table["bits"].tolist() == [8, 6, 2]
    assert table["cpfr_capability"].is_monotonic_decreasing
    assert table["kl"].is_monotonic_increasing
    assert (table["cpfr_safety_low"] <= table["cpfr_safety"]).all()
    assert (table["cpfr_safety"] <= table["cpfr_safety_high"]).all()
    for spec in SPECS:
        report, row = sweep[spec], table.set_index("precision").loc[spec]
        assert row["live_safety"] + row["live_capability"] == len(report.features)
        assert row["degraded_safety"] + row["degraded_capability"] == report.features["degraded"].sum()
        assert row["flips"] == report.flips.rate.value
        assert row["noise_safety"] == report.controls["noise"]["safety"].value


def test_the_best_config_is_the_smallest_that_passes(sweep):
    safety = {spec: sweep[spec].cpfr["safety"].value for spec in SPECS}  # in order of falling bits
    for least in (0.0, *safety.values()):
        assert str(sweep.best_config(min_cpfr=least)) == [spec for spec in SPECS if safety[spec] >= least][-1]
    assert sweep.best_config(min_cpfr=1.01) is None
    assert sweep.best_config(min_cpfr=0.0, max_flips=-1.0) is None


def test_the_summary_has_a_line_for_each(sweep):
    text = sweep.summary()
    assert all(sweep[spec].label in text for spec in SPECS)


def test_save_and_load(sweep, tmp_path):
    folder = sweep.save(tmp_path / "sweep")
    loaded = SweepResult.load(folder)
    assert list(loaded.reports) == SPECS
    pd.testing.assert_frame_equal(loaded.to_dataframe(), sweep.to_dataframe())
    assert loaded.summary() == sweep.summary()
    sweep.save(folder)
    with pytest.raises(OutputError, match="not written by Tracelens"):
        sweep["int8"].save(folder)  # a sweep is not an audit report
    (folder / "int8" / "report.json").unlink()
    with pytest.raises(ResultFileError):
        SweepResult.load(folder)
    (folder / "report.json").write_text(json.dumps({"tracelens_sweep": 7}))
    with pytest.raises(ResultFileError, match="version 1"):
        SweepResult.load(folder)
    with pytest.raises(ResultFileError, match="not a sweep"):
        SweepResult.load(tmp_path)


def test_precisions_are_checked_before_anything_runs(tiny):  # noqa: F811
    model, saes, prompts = tiny
    auditor = OptimizationAuditor(model, saes)
    with pytest.raises(PrecisionSpecError, match="at least one precision, each once; got: none"):
        auditor.run_sweep(prompts, [])
    with pytest.raises(PrecisionSpecError, match="got: int8, int8"):
        auditor.run_sweep(prompts, ["int8", QuantizationType.INT8])
    with pytest.raises(PrecisionSpecError, match="int9"):
        auditor.run_sweep(prompts, ["int9"])
    with pytest.raises(PrecisionSpecError, match="already computes in INT4"):
        OptimizationAuditor(apply_precision(model, "int4"), saes)
    with pytest.raises(SAEError, match="only 3 layers"):
        OptimizationAuditor(model, {7: ReadOut(model.W_E)})


def test_prompts_without_baseline_in_words_of_no_built_in_set(tiny):  # noqa: F811
    model, saes, prompts = tiny
    auditor = OptimizationAuditor(model, saes)
    with pytest.raises(PromptError, match=r"pass baseline_prompts=\[...\]"):
        auditor.run_sweep(prompts["refusal"], ["int8"], **OPTIONS)
    sweep = auditor.run_sweep(
        prompts["refusal"], ["int8"], **OPTIONS, min_auroc=0.8, controls=False, baseline_prompts=prompts["baseline"]
    )
    assert len(sweep["int8"].prompts) == 80


def test_a_model_whose_blocks_write_nothing_survives_every_precision():
    sweep = OptimizationAuditor(handmade.model(), {0: ReadOut()}).run_sweep(handmade.prompts(), SPECS[::2], **OPTIONS)
    assert sweep.to_dataframe()["cpfr_safety"].tolist() == [1, 1]
    assert len(sweep["int2"].features) == FEATURES
    assert str(sweep.best_config()) == "int2"


def test_baselines_of_the_built_in_set_that_fits():
    from transformers import AutoTokenizer

    from tracelens.organism import path

    tokenizer = AutoTokenizer.from_pretrained(path())
    for behaviour in ("refusal", "warning"):
        expected = get_dataset(f"organism_{behaviour}_v1").baseline_prompts
        assert fitting_baseline({behaviour}, tokenizer) == expected


def test_the_example_that_users_bring_along():
    """A list of strings, and no baseline prompts."""
    prompts = get_dataset("organism_refusal_v1").safety_prompts
    auditor = OptimizationAuditor(load("organism"), load_saes("organism"), load("organism").tokenizer)
    configs = [QuantizationConfig(QuantizationType.INT8_DYNAMIC), QuantizationConfig(QuantizationType.INT4)]
    sweep = auditor.run_sweep(test_prompts=prompts, configs=configs, controls=False)
    assert list(sweep.reports) == ["int8-dynamic", "int4"]
    table = sweep.to_dataframe()
    assert (table["live_safety"] > 0).all()
    assert table["cpfr_safety"].between(0.3, 1).all()
    best = sweep.best_config(min_cpfr=0.0)
    assert best == QuantizationConfig(QuantizationType.INT4)


@pytest.fixture
def passes(tiny, monkeypatch):  # noqa: F811
    """How often each model ran, by its precision ("fp" for the reference)."""
    model = tiny[0]
    ran: list[str] = []
    run = type(model).run_with_hooks

    def counted(self, *args, **kwargs):
        if not torch.is_grad_enabled():  # evidence takes gradients on a few prompts, which is no pass
            ran.append("fp" if self is model else str(getattr(self, "precision", "control")))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "run_with_hooks", counted)
    return ran


PLAIN = OPTIONS | {"min_auroc": 0.8, "controls": False, "batch_size": 100}


def swept(tiny, out, configs=SPECS, **options):  # noqa: F811
    model, saes, prompts = tiny
    return OptimizationAuditor(model, saes).run_sweep(
        options.pop("prompts", prompts), configs, out=out, **PLAIN | options
    )


def assert_equal(ours, theirs):
    assert list(ours.reports) == list(theirs.reports)
    pd.testing.assert_frame_equal(ours.to_dataframe(), theirs.to_dataframe())
    for spec, report in ours.reports.items():
        pd.testing.assert_frame_equal(report.features, theirs[spec].features)
        assert report.cpfr == theirs[spec].cpfr
        assert report.fingerprint == theirs[spec].fingerprint


def test_an_interrupted_sweep_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, passes):  # noqa: F811
    whole, out = swept(tiny, tmp_path / "whole"), tmp_path / "out"
    assert passes == ["fp", "int8", "int4-g8", "int2"]

    def stop(model, config, **options):
        if str(config) == "int2":
            raise KeyboardInterrupt
        return apply_precision(model, config, **options)

    with monkeypatch.context() as patch:
        patch.setattr("tracelens.optimization_auditor.apply_precision", stop)
        with pytest.raises(KeyboardInterrupt):
            swept(tiny, out)
    with pytest.raises(ResultFileError, match=r"interrupted before int2; call run_sweep\(..., out='.*out'\) again"):
        SweepResult.load(out)
    passes.clear()
    resumed = swept(tiny, out)
    assert passes == ["fp", "int2"]
    assert_equal(resumed, whole)
    assert_equal(SweepResult.load(out), whole)
    passes.clear()
    assert_equal(swept(tiny, out), whole)
    assert passes == []
    # Other precisions in the same folder: what is there is used, what is not asked for is left out.
    assert list(swept(tiny, out, ["int3", "int8"]).reports) == ["int3", "int8"]
    assert passes == ["fp", "int3"]
    assert list(SweepResult.load(out).reports) == ["int3", "int8"]
    passes.clear()
    swept(tiny, out, resume=False)
    assert passes == ["fp", "int8", "int4-g8", "int2"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"degradation_threshold": 0.7},
        {"batch_size": 40},
        {"n_resamples": 100},
        {"calibration": ["yes no"]},
        {"prompts": "fewer"},
        {"prompts": "other labels"},
        {"model": "one weight"},
        {"saes": "one weight"},
    ],
    ids=str,
)
def test_a_changed_setting_uses_no_stale_piece(tiny, tmp_path, passes, change):  # noqa: F811
    model, saes, prompts = tiny
    swept(tiny, tmp_path / "out", ["int8"])
    passes.clear()
    swept(tiny, tmp_path / "out", ["int8"], progress=True, memory=0.0)
    assert passes == []  # no number depends on these two
    change = dict(change)
    if change.get("prompts") == "fewer":
        change["prompts"] = {name: texts[:-1] for name, texts in prompts.items()}
    elif change.get("prompts") == "other labels":
        change["prompts"] = {"warning": prompts["refusal"], "baseline": prompts["baseline"]}
        change["answer_tokens"] = {"warning": OPTIONS["answer_tokens"]["refusal"]}
    if change.pop("model", None):
        bias = model.b_out.clone()[0]
        bias[0] += 1e-3
        model = copy_sharing(model, {"blocks.0.mlp.b_out": bias})
    if change.pop("saes", None):
        saes = {site: copy.deepcopy(sae) for site, sae in saes.items()}
        next(iter(saes.values())).W_dec[0, 0] += 1e-3
    swept((model, saes, prompts), tmp_path / "out", ["int8"], **change)
    assert "int8" in passes


def test_half_a_piece_is_no_piece(tiny, tmp_path, monkeypatch, passes):  # noqa: F811
    """Interrupted while a report that was there is replaced: its old marker must not stand for a mixture."""
    out = tmp_path / "out"
    first = swept(tiny, out, ["int8"])
    replace = Path.replace

    def move(self, target):
        if self.name == "features.csv":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", move)
        with pytest.raises(KeyboardInterrupt):
            swept(tiny, out, ["int8"], seed=1)
    with pytest.raises(ResultFileError, match="interrupted before int8"):
        SweepResult.load(out)
    with pytest.raises(ResultFileError, match="not written to the end"):
        AuditReport.load(out / "int8")
    passes.clear()
    assert_equal(swept(tiny, out, ["int8"]), first)
    assert passes == ["fp", "int8"]
    # A piece that cannot be read is made again.
    (out / "int8" / "moments.safetensors").write_bytes(b"half")
    assert_equal(swept(tiny, out, ["int8"]), first)
    assert_equal(SweepResult.load(out), first)


def test_a_folder_of_something_else_is_refused_before_anything_runs(tiny, tmp_path, passes):  # noqa: F811
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not written by Tracelens"):
        swept(tiny, tmp_path)
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "out" / "int8").mkdir(parents=True)
    swept(tiny, tmp_path / "out2", ["int2"])
    (tmp_path / "out2" / "int8").mkdir()
    (tmp_path / "out2" / "int8" / "notes.txt").write_text("mine")
    passes.clear()
    with pytest.raises(OutputError, match="int8 exists"):
        swept(tiny, tmp_path / "out2", ["int8"])
    assert passes == []


def test_builds_beside_simulated_precisions(tiny, tmp_path, passes):  # noqa: F811
    model, _, _ = tiny
    builds = {"ours, int4": apply_precision(model, "int4-g8"), "a copy": copy_sharing(model, {})}
    sweep = swept(tiny, tmp_path / "out", ["int2", "int4-g8"], builds=builds)
    assert list(sweep.reports) == ["int2", "int4-g8", "ours, int4", "a copy"]
    assert passes == ["fp", "int2", "int4-g8", "int4-g8", "control"]
    assert sweep["ours, int4"].cpfr == sweep["int4-g8"].cpfr
    assert sweep["a copy"].cpfr["capability"].value == 1
    assert list(map(str, sweep.configs)) == ["int2", "int4-g8"]
    assert sweep.bits["ours, int4"] == sweep.bits["int4-g8"] == 6
    assert math.isnan(sweep.bits["a copy"])
    table = sweep.to_dataframe().set_index("precision")
    assert table.loc["ours, int4", "bits"] == 6
    assert "ours, int4" in sweep.summary()
    assert str(sweep.best_config(min_cpfr=0.0)) == "int2"
    others = {name: sweep[name] for name in builds}
    assert SweepResult(others).best_config(min_cpfr=0.0) == "ours, int4"  # what does not say its bits comes last
    assert SweepResult({"a copy": sweep["a copy"]}).best_config(min_cpfr=0.0) == "a copy"
    loaded = SweepResult.load(tmp_path / "out")
    assert_equal(loaded, sweep)
    assert loaded.plot().to_dict() == sweep.plot().to_dict()
    passes.clear()
    swept(tiny, tmp_path / "out", ["int2", "int4-g8"], builds=builds)
    assert passes == []
    swept(tiny, tmp_path / "out", ["int2", "int4-g8"], builds=builds | {"a copy": apply_precision(model, "int8")})
    assert passes == ["fp", "int8"]


def test_a_build_from_disk(tmp_path, organism):
    """GPTQ beside rounding to nearest; a folder that changed is measured again."""
    saes = load_saes("organism")
    gptq = shutil.copytree(Path(__file__).parent / "fixtures" / "organism" / "gptq", tmp_path / "gptq")
    prompts = get_dataset("organism_refusal_v1")
    few = {"refusal": prompts.safety_prompts[:40], "baseline": prompts.baseline_prompts[:40]}
    options = {"controls": False, "n_resamples": 100, "out": tmp_path / "out"}
    auditor = OptimizationAuditor(organism, saes)
    sweep = auditor.run_sweep(few, ["int8"], builds={"GPTQ": gptq}, **options)
    assert sweep["GPTQ"].settings["quantized_stored_as"] == "gptq"
    assert 3 < sweep.bits["GPTQ"] < 8
    assert sweep["GPTQ"].divergence.kl.value > 0
    written = (tmp_path / "out" / "GPTQ" / "report.json").stat().st_mtime_ns
    auditor.run_sweep(few, ["int8"], builds={"GPTQ": gptq}, **options)
    assert (tmp_path / "out" / "GPTQ" / "report.json").stat().st_mtime_ns == written
    os.utime(next(gptq.glob("*.safetensors")))
    auditor.run_sweep(few, ["int8"], builds={"GPTQ": gptq}, **options)
    assert (tmp_path / "out" / "GPTQ" / "report.json").stat().st_mtime_ns > written


def test_builds_are_checked_before_anything_runs(tiny, passes, tmp_path):  # noqa: F811
    model, saes, prompts = tiny
    auditor = OptimizationAuditor(model, saes)
    with pytest.raises(PrecisionSpecError, match="'int4' is called like a precision"):
        auditor.run_sweep(prompts, builds={"int4": model})
    for name in ("a/b", "", "..", ".hidden", "what?"):
        with pytest.raises(OutputError, match="cannot be a folder's name"):
            auditor.run_sweep(prompts, builds={name: model})
    with pytest.raises(CheckpointNotFoundError):
        auditor.run_sweep(prompts, builds={"gone": tmp_path / "gone"})
    with pytest.raises(PairMismatchError, match="cannot be compared"):
        auditor.run_sweep(prompts, builds={"another model": handmade.model()})
    assert passes == []
