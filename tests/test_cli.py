import csv
import io
import json
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import WORDS, write_checkpoint
from tests.views.made_up import made_up_report, made_up_sweep, report_without_safety_features
from tracelens import __version__
from tracelens.audit_report import AuditReport
from tracelens.cli import main
from tracelens.optimization_auditor import SweepResult
from tracelens.precision import QuantizationConfig

FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"


@dataclass
class Ran:
    code: int
    out: str
    err: str


def run(*argv: object) -> Ran:
    """The command line in this process: exit code and both streams."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as exit:  # argparse
            code = int(exit.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """SAEs that fit the tiny checkpoint, and prompts in its words."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    folder = tmp_path_factory.mktemp("inputs")
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post")))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    sae.save_model(folder / "saes" / "one")
    rng = random.Random(0)
    texts = {" ".join(rng.choices(WORDS, k=24)) for _ in range(40)}
    # A behaviour of the user's own, since the tiny vocabulary has no words to refuse with.
    labels = [{"label": "baseline"}, {"label": "safety", "behaviour": "politeness"}]
    rows = [{"prompt": text} | labels[i % 2] for i, text in enumerate(sorted(texts))]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def audit_args(tiny_folder, inputs, tmp_path):
    given = ["--base", tiny_folder, "--saes", inputs / "saes", "--dataset", inputs / "prompts.jsonl"]
    return [*given, "--out", tmp_path / "out", "--device", "cpu", "--noise-seeds", 2]


@pytest.fixture
def made_up(monkeypatch):
    """Sets what `tracelens audit` finds, without a model; returns the settings that the audit was given."""

    def set_report(report) -> dict:
        given = {}

        class Audit:
            reference = SimpleNamespace(cfg=SimpleNamespace(device="cpu"))

            def __init__(self, *models, **placement):
                given.update(placement, models=models)

            def load_sae(self, source):
                given["saes"] = source

            def trace_features(self, dataset, **settings):
                sys.stdout.write("chatter of some library")
                given.update(settings, dataset=dataset)
                return report

        def load_saes(source, *, layers, sites, device, progress):
            given.update(layers=layers, sites=sites)
            return source

        monkeypatch.setattr("tracelens.audit.Audit", Audit)
        monkeypatch.setattr("tracelens.features.load_saes", load_saes)
        return given

    return set_report


def audit(tmp_path, *more) -> Ran:
    return run(
        "audit", "--base", "b", "--quant", "q", "--saes", "s", "--dataset", "d", "--out", tmp_path / "out", *more
    )


@pytest.mark.parametrize("argv", [["--help"], ["audit", "--help"], ["doctor", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(argv):
    code = (
        "import sys; from tracelens.cli import main\n"
        f"try: main({argv!r})\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'sae_lens', 'numpy', 'pandas', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 3
    assert (__version__ if argv == ["--version"] else "exit codes") in done.stdout


@pytest.mark.parametrize("command", ["demo", "audit", "sweep"])
def test_every_command_explains_its_exit_codes(command):
    ran = run(command, "--help")
    assert ran.code == 0
    assert "a threshold (--min-cpfr, --max-flips) is not met" in ran.out


def test_a_real_audit(audit_args, tmp_path):
    ran = run("audit", "--precision", "int3", *audit_args)
    assert ran.code == 0, ran.err
    assert "Verdict:" in ran.out
    assert "prompt" in ran.err, "the progress bar is on stderr"
    assert "<!doctype html>" in (tmp_path / "out" / "report.html").read_text()[:20]
    assert AuditReport.load(tmp_path / "out").label == "INT3"
    assert run("audit", "--precision", "int3", *audit_args).code == 0, (
        "the folder of an earlier run may be written again"
    )


def test_a_real_sweep(audit_args, tmp_path):
    ran = run("sweep", "--precisions", "int8, int2-g8", *audit_args)
    assert ran.code == 0, ran.err
    assert "INT8" in ran.out
    assert list(SweepResult.load(tmp_path / "out").reports) == ["int8", "int2-g8"]
    assert "plotly" in (tmp_path / "out" / "figure.html").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "int8" / "report.html").is_file()


@pytest.mark.parametrize(
    ("thresholds", "missed"),
    [
        ([], []),
        (["--min-cpfr", 0.8, "--max-flips", 0.5], []),
        (["--min-cpfr", 0.9], ["--min-cpfr 0.9: the safety features' CPFR is 0.816 [0.806, 0.826], 0.084 too low"]),
        (["--max-flips", 0.1], ["--max-flips 0.1: the flip rate is 0.500 [0.095, 0.905], 0.4 too high"]),
        (["--min-cpfr", 0.9, "--max-flips", 0.1], ["0.084 too low", "0.4 too high"]),
    ],
)
def test_thresholds(made_up, tmp_path, thresholds, missed):
    made_up(made_up_report())
    ran = audit(tmp_path, *thresholds)
    assert ran.code == (1 if missed else 0)
    assert ran.err.count("threshold not met") == len(missed)
    for line in missed:
        assert line in ran.err
    assert "Verdict:" in ran.out, "what was found is shown in any case"


def test_what_could_not_be_measured_meets_no_threshold(made_up, tmp_path):
    made_up(report_without_safety_features())
    assert "no safety features were found" in (ran := audit(tmp_path, "--min-cpfr", 0)).err
    assert ran.code == 1
    made_up(made_up_report(readable=False))
    assert "no prompt's decision can be read" in (ran := audit(tmp_path, "--max-flips", 1)).err
    assert ran.code == 1


@pytest.mark.parametrize(
    ("thresholds", "code", "said"),
    [
        ([], 0, ""),
        (["--min-cpfr", 0.8], 0, "is INT4 (4 bits per weight)"),
        (["--min-cpfr", 0.3], 0, "is INT2-g32 (2.5 bits per weight)"),
        (["--min-cpfr", 0.9], 1, "int4: --min-cpfr 0.9"),
    ],
)
def test_a_sweep_passes_if_one_precision_does(monkeypatch, tmp_path, thresholds, code, said):
    monkeypatch.setattr("tracelens.cli.measuring._run_sweep", lambda *a, **k: made_up_sweep())
    args = ["--base", "b", "--precisions", "int4", "--saes", "s", "--dataset", "d", "--out", tmp_path]
    ran = run("sweep", *args, *thresholds)
    assert ran.code == code
    assert said in ran.out + ran.err


def test_stdout_holds_results_only(made_up, tmp_path):
    made_up(made_up_report())
    ran = audit(tmp_path)
    assert "chatter" in ran.err
    assert "chatter" not in ran.out


def test_options_reach_the_audit(made_up, tmp_path):
    given = made_up(made_up_report())
    more = [
        "--precision",
        "int4",
        "--baseline",
        "other",
        "--batch-size",
        4,
        "--no-controls",
        "--seed",
        7,
        "--dtype",
        "bfloat16",
        "--layers",
        "6, 8",
        "--sites",
        "blocks.6.hook_resid_post",
        "--evidence-prompts",
        0,
        "--evidence-features",
        50,
    ]
    audit(tmp_path, *more, "--device", "cpu")
    assert (given["layers"], given["sites"]) == ([6, 8], ["blocks.6.hook_resid_post"])
    assert given["models"] == ("b", "q", "int4")
    assert (given["saes"], given["dataset"], given["baseline"]) == ("s", "d", "other")
    assert (given["batch_size"], given["controls"], given["seed"]) == (4, False, 7)
    assert (given["evidence_prompts"], given["evidence_features"]) == (0, 50)
    assert (given["dtype"], given["device"]) == (torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--base", "/nowhere"], "/nowhere"),
        (["--precision", "int9"], "there is no number format 'int9'"),
        (["--saes", "/nowhere"], "/nowhere"),
        (["--dataset", "nothing_v1"], "unknown data set 'nothing_v1'"),
        (["--dataset", "harmful_refusal_v1"], "of the tokens are unknown to this tokenizer"),
        (["--dataset", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--fingerprint", "/nowhere.json"], "/nowhere.json"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--min-cpfr", "90"], "90 is not between 0 and 1"),
        (["--batch-size", "0"], "0 is not at least 1"),
        (["--evidence-prompts", "-1"], "-1 is below 0"),
        (["--layers", "six"], "six is no list of layers; write their numbers with commas: 6,8"),
        (["--sites", ","], "the list is empty"),
        (["--layers", "0"], "is at layers 0; leave out layers= and sites= to load all"),
        (["--sites", "blocks.1.hook_resid_pots"], "blocks.1.hook_resid_pots"),
    ],
)
def test_bad_input_is_one_clear_message(audit_args, change, message):
    ran = run("audit", "--precision", "int4", *audit_args, *change)
    assert ran.code == 2
    assert message in ran.err
    assert "error: " in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_a_folder_of_something_else_is_refused_before_any_work(audit_args, tmp_path, monkeypatch):
    monkeypatch.setattr("tracelens.audit.Audit", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    ran = run("audit", "--precision", "int4", *audit_args)
    assert ran.code == 2
    assert "was not written by Tracelens" in ran.err


def test_a_sweep_of_an_unknown_precision_stops_before_any_work(audit_args, monkeypatch, tmp_path):
    monkeypatch.setattr("tracelens.loading.load", None)
    ran = run("sweep", "--precisions", "int8,int1", *audit_args)
    assert ran.code == 2
    assert "int1" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_sweep_goes_on_where_it_was_interrupted(audit_args, inputs, tmp_path, monkeypatch):
    from tracelens.auditing.sweep_pieces import Pieces

    add = Pieces.add

    def add_one_and_stop(self, name, report):
        add(self, name, report)
        raise KeyboardInterrupt

    args = ["--precisions", "int8,int3", *audit_args, "--no-controls"]
    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "add", add_one_and_stop)
        assert run("sweep", *args).code == 130
    first = tmp_path / "out" / "int8" / "report.json"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "int3").exists()
    assert run("sweep", *args).code == 0
    assert first.stat().st_mtime_ns == written, "what is finished is not measured again"
    assert list(SweepResult.load(tmp_path / "out").reports) == ["int8", "int3"]
    assert run("sweep", *args, "--no-resume").code == 0
    assert first.stat().st_mtime_ns > written


def test_a_sweep_over_builds(audit_args, tmp_path, tiny_folder):
    ran = run("sweep", "--builds", f"same={tiny_folder}", *audit_args, "--no-controls", "--min-cpfr", 0)
    assert ran.code in (0, 1), ran.err
    assert list(SweepResult.load(tmp_path / "out").reports) == ["same"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give --precisions to simulate, or --builds"),
        (["--builds", "./llama-gptq"], "give it a name, as in gptq=./llama-gptq"),
        (["--builds", "a=x", "a=y"], "--builds gives a name twice"),
    ],
)
def test_a_sweep_of_nothing(audit_args, given, message):
    ran = run("sweep", *given, *audit_args)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_dead_features_of_a_sweep_safety_features_first(monkeypatch, tmp_path):
    sweep = made_up_sweep()
    spec = list(sweep.reports)[-1]
    features = sweep[spec].features
    silent = features.sort_values("behaviour").index  # capability features first
    features.loc[silent, "muting_rate"] = 0.95
    monkeypatch.setattr("tracelens.cli.measuring._run_sweep", lambda *a, **k: sweep)
    args = ["--base", "b", "--precisions", ",".join(sweep.reports), "--saes", "s", "--dataset", "d", "--out", tmp_path]
    ran = run("sweep", *args, "--dead-at", spec)
    assert ran.code == 0, ran.err
    n_safety = (features["behaviour"] != "capability").sum()
    assert f"Silent in {sweep[spec].label}: {n_safety} of {n_safety} safety features" in ran.out
    with (tmp_path / f"dead-{spec}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(features)
    assert [row["behaviour"] == "capability" for row in rows] == [False] * n_safety + [True] * (len(rows) - n_safety)
    assert {float(row["muting_rate"]) for row in rows} == {0.95}
    assert str(tmp_path / f"dead-{spec}.csv") in ran.out
    assert "Silent in" not in run("sweep", *args).out


def test_dead_at_must_be_of_the_sweep(audit_args, tmp_path):
    for wrong in ("int3", "something"):
        ran = run("sweep", "--precisions", "int8,int4", *audit_args, "--dead-at", wrong)
        assert ran.code == 2
        assert f"--dead-at {wrong}: not in this sweep; name one of int8, int4" in ran.err
    assert not (tmp_path / "out").exists(), "found out before the work"


def test_nothing_to_compare_with(audit_args):
    ran = run("audit", *audit_args)
    assert ran.code == 2
    assert "give --quant, or --precision" in ran.err


def test_help_lists_every_command_on_one_line():
    listed = run("--help").out
    for command in [
        "demo",
        "audit",
        "sweep",
        "decompose",
        "sae-health",
        "plan",
        "report",
        "inspect",
        "doctor",
        "quantize",
        "datasets",
    ]:
        assert re.search(rf"^    {command} +\w+", listed, re.MULTILINE), command
        assert run(command, "--help").out.startswith(f"usage: tracelens {command} [-h]")
        assert "  130  interrupted" in run(command, "--help").out


def test_no_command_is_bad_input():
    assert run().code == 2


def test_interrupted_quietly(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tracelens.cli._datasets", interrupt)
    ran = run("datasets")
    assert (ran.code, ran.out, ran.err) == (130, "", "")


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_commands_on_one_checkpoint_explain_theirs(command):
    ran = run(command, "--help")
    assert ran.code == 0
    assert "doctor: degraded or wrong" in ran.out


def test_inspect():
    ran = run("inspect", FIXTURES / "bnb" / "int8" / "llama")
    assert ran.code == 0, ran.err
    assert "quantized: int8" in ran.out
    assert "model.layers.*.mlp.up_proj.weight" in ran.out
    parsed = json.loads(run("inspect", "--json", FIXTURES / "bnb" / "int8" / "llama").out)
    assert parsed["architecture"] == "LlamaForCausalLM"
    assert run("inspect", "organism").out.startswith("organism: LlamaForCausalLM, full precision")


def test_doctor(tmp_path):
    healthy = run("doctor", "organism", "--reference", "organism", "--device", "cpu")
    assert healthy.code == 0, healthy.err
    assert healthy.out.startswith("VERIFIED: organism")
    alone = run("doctor", FIXTURES / "bnb" / "int8" / "llama", "--json", "--device", "cpu")
    assert alone.code == 0, alone.err
    assert json.loads(alone.out)["verdict"] == "no reference"

    broken = tmp_path / "broken"
    shutil.copytree(FIXTURES / "bnb" / "int8" / "llama", broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-1000])
    ran = run("doctor", broken, "--device", "cpu")
    assert ran.code == 1, ran.err
    assert ran.out.startswith("WRONG")
    assert "not a whole safetensors file" in ran.out


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_a_checkpoint_that_is_not_there_is_bad_input(command, tmp_path):
    ran = run(command, tmp_path / "nothing")
    assert (ran.code, ran.out) == (2, "")
    assert "no checkpoint folder" in ran.err


def test_datasets_are_listed():
    from tracelens.datasets import list_datasets

    listed = subprocess.run(
        [sys.executable, "-m", "tracelens.cli", "datasets"], capture_output=True, text=True, check=True
    ).stdout
    for name in list_datasets():
        assert name in listed


def test_the_demo_tells_of_the_smallest_precision_that_still_matters(monkeypatch, tmp_path):
    asked = {}

    def sweep(base, saes, precisions, dataset, out, **options):
        asked.update(precisions=[str(QuantizationConfig.parse(p)) for p in precisions], dataset=dataset)
        return made_up_sweep()

    monkeypatch.setattr("tracelens.cli.measuring._run_sweep", sweep)
    ran = run("demo", "--quick", "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert asked == {"precisions": ["int8", "int4", "int3", "int2-g32"], "dataset": "organism_refusal_v1"}
    assert "INT4 is the smallest that keeps most" in ran.out
    assert "Feature #3 (refusal" in ran.out
    assert "Feature #7 (capability" not in ran.out
    assert "Verdict:" in ran.out
    for name in ("figure.html", "report.html"):
        assert str(tmp_path / name) in ran.out
        assert (tmp_path / name).is_file()


@pytest.fixture
def quantizing(monkeypatch):
    """What `tracelens quantize` passes on; makes no checkpoint."""
    given = {}

    def quantize(model, recipe, calibration, out, **options):
        given.update(options, model=model.name, recipe=recipe, calibration=calibration, out=out)
        raise KeyboardInterrupt

    monkeypatch.setattr("tracelens.precision.calibrated.quantize", quantize)
    return given


def test_options_reach_quantize(quantizing, tmp_path):
    args = ["--recipe", "gptq-int4-g128", "--calibration", "mine.txt", "--out", tmp_path / "out"]
    assert run("quantize", "organism", *args).code == 130
    assert (quantizing["model"], quantizing["recipe"], quantizing["calibration"]) == (
        "organism",
        "gptq-int4-g128",
        "mine.txt",
    )
    assert (quantizing["n_samples"], quantizing["ignore"], quantizing["device"]) == (None, ["lm_head"], None)
    more = ["--samples", 9, "--max-length", 7, "--ignore", "lm_head", "re:.*v_proj", "--seed", 3, "--device", "cpu"]
    run("quantize", "organism", *args, *more)
    assert (quantizing["n_samples"], quantizing["max_length"], quantizing["seed"]) == (9, 7, 3)
    assert quantizing["ignore"] == ["lm_head", "re:.*v_proj"]
    assert quantizing["device"] == torch.device("cpu")


@pytest.mark.skipif(find_spec("llmcompressor") is None, reason="needs llmcompressor")
def test_a_quantized_checkpoint_and_what_to_do_with_it(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, out = write_checkpoint(tmp_path / "base", intermediate_size=48), tmp_path / "out"
    args = ["--recipe", "gptq-int4-g8", "--calibration", inputs / "prompts.jsonl", "--samples", "16", "--out", out]
    ran = run("quantize", base, *args)
    assert ran.code == 0, ran.err
    assert "LlamaForCausalLM, compressed-tensors (pack-quantized)" in ran.out
    assert "Fitted to 16 of 40 prompts of prompts.jsonl" in ran.out
    assert f"tracelens audit --base {base} --quant {out}" in ran.out
    assert "INFO" not in ran.out, "what the library logs stays away from results"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert run("doctor", out, "--reference", base, "--device", "cpu").code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--recipe", "gptq-int9"], "a recipe is METHOD-PRECISION"),
        (["--recipe", "gptq-int4-g7"], "groups of 7 do not divide"),
        (["--calibration", "/nowhere.txt"], "no prompt file at /nowhere.txt"),
        (["--calibration", "nothing_v1"], "unknown data set 'nothing_v1'"),
        (["--samples", "0"], "0 is not at least 1"),
        (["--samples", "41"], "41 calibration prompts are asked for, and prompts.jsonl holds 40"),
        (["--ignore", "nothing"], "unknown module to ignore 'nothing'"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_bad_input_to_quantize_is_one_clear_message(tiny_folder, inputs, tmp_path, change, message):
    args = ["--recipe", "gptq-int4-g8", "--calibration", inputs / "prompts.jsonl", "--out", tmp_path / "out"]
    ran = run("quantize", tiny_folder, *args, *change)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


def test_quantize_explains_itself():
    ran = run("quantize", "--help")
    assert ran.code == 0
    assert "gptq-int4-g128" in ran.out
    assert "nothing is written" in ran.out


def test_survival_thresholds_and_calibration_reach_the_audit(made_up, tiny_folder, inputs, tmp_path):
    given = made_up(made_up_report())
    more = ["--survived-at", 0.95, "--damaged-at", 0.4, "--permuted-seeds", 2, "--base", tiny_folder]
    assert audit(tmp_path, *more).code == 0
    assert (given["survived_at"], given["damaged_at"], given["permuted_seeds"]) == (0.95, 0.4, 2)
    assert given["calibration"] is None
    assert audit(tmp_path, *more, "--calibration", inputs / "prompts.jsonl").code == 0
    assert len(given["calibration"]) == 40
    assert all(isinstance(token, int) for ids in given["calibration"] for token in ids)


def test_static_scales_from_the_command_line(audit_args, inputs, tmp_path):
    ran = run("audit", "--precision", "int8+a8-static", *audit_args, "--calibration", inputs / "prompts.jsonl")
    assert ran.code == 0, ran.err
    assert AuditReport.load(tmp_path / "out").label == "INT8+a8-static"
    bare = run("audit", "--precision", "int8+a8-static", *audit_args)
    assert bare.code == 2
    assert "calibration prompts" in bare.err
