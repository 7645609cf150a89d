"""`tracelens plan`."""

import argparse
import json
from importlib.util import find_spec

import pytest

from tests.test_cli import run
from tracelens.causal.repair import RepairPlan
from tracelens.cli.repairing import n_bytes

BUILD = "tests/fixtures/organism/gptq"


@pytest.fixture
def few(tmp_path):
    """Two files of prompts in the embedded model's words."""
    from tracelens.datasets import get_dataset

    prompts = get_dataset("organism_refusal_v1").safety_prompts
    for name, some in (("choose", prompts[:10]), ("held", prompts[10:20])):
        rows = [json.dumps({"prompt": text, "behaviour": "refusal"}) for text in some]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return [
        "--dataset",
        tmp_path / "choose.jsonl",
        "--held-out",
        tmp_path / "held.jsonl",
        "--device",
        "cpu",
        "--random",
        2,
    ]


def test_a_build_is_planned_and_the_ignore_list_written(few, tmp_path):
    out = tmp_path / "new" / "plan.json"
    ran = run("plan", "organism", BUILD, *few, "--budget-bytes", "100kB", "--export", "gptqmodel", "--out", out)
    assert ran.code == 0, ran.err
    plan = RepairPlan.load(out)
    assert plan.bytes <= 100_000
    assert "less what gptq stores of it" in plan.bytes_basis
    assert plan.verdict.split(".")[0][:60] in ran.out.replace("\n", " ")
    for name in ("predicted:", "random 2", "magnitude", "recovery", "flips", "perplexity", r'"-:^lm_head$": {}'):
        assert name in ran.out, name
    assert json.loads((tmp_path / "new" / "plan.gptqmodel.json").read_text()) == plan.export("gptqmodel")
    assert "plotly" in out.with_suffix(".html").read_text(encoding="utf-8")
    assert plan.granularity == "fused"


def test_a_target_that_is_not_held_is_exit_code_1(few):
    args = ["plan", "organism", "--precision", "int3-g32", *few, "--max-flips", "0"]
    ran = run(*args, "--export", "llm-compressor", "--recipe", "gptq-int3-g32")
    held = "holds on the held-out" in ran.out.replace("\n", " ") or "meets the target" in ran.out
    assert ran.code == (0 if held else 1), ran.err
    assert '"GPTQModifier"' in ran.out


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_plan_is_carried_out_and_verified(few, tmp_path):
    args = ["--budget-bytes", "100kB", "--granularity", "module", "--apply", tmp_path / "build", "--recipe", "bnb-nf4"]
    ran = run("plan", "organism", "--precision", "nf4", *few, *args)
    assert ran.code == 0, ran.err
    assert "as planned; kept:" in ran.out
    assert "recovery of the build" in ran.out
    assert (tmp_path / "build" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([BUILD, "--budget-bytes", "10"], "holds nothing: the smallest"),
        ([BUILD, "--budget-bytes", "much"], "is no size; write 2MB"),
        ([BUILD], "one of the arguments --budget-bytes --target --max-flips is required"),
        (["--budget-bytes", "1MB"], "give the quantized build, or --precision"),
        ([BUILD, "--target", "0.9", "--apply", "x"], "--apply needs --recipe"),
        ([BUILD, "--target", "0.9", "--out", "plan"], "ends in .json"),
        ([BUILD, "--target", "0.9", "--behaviour", "humour"], "unknown behaviour"),
    ],
)
def test_what_cannot_be_planned_is_exit_code_2(few, change, message):
    ran = run("plan", "organism", *change, *few)
    assert ran.code == 2
    assert message in ran.err


def test_sizes():
    assert [n_bytes(text) for text in ("2MB", "500kB", "1.5 GB", "2000000", "7b")] == [
        2 * 10**6,
        500_000,
        1_500_000_000,
        2 * 10**6,
        7,
    ]
    for text in ("MB", "2TB", "-1", "0", "inf", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"size|one byte"):
            n_bytes(text)
