"""`tracelens decompose` and `tracelens sae-health`."""

import pytest

from tests.test_cli import inputs, run  # noqa: F401
from tracelens.features import SAEHealth
from tracelens.studies import Decomposition


@pytest.fixture
def given(tiny_folder, inputs):  # noqa: F811
    return [tiny_folder, "--saes", inputs / "saes", "--dataset", inputs / "prompts.jsonl", "--device", "cpu"]


@pytest.fixture
def organism(tmp_path):
    """The embedded model with one SAE, which is enough and quick."""
    return ["organism", "--saes", "organism", "--layers", 1, "--dataset", "organism_refusal_v1", "--device", "cpu"]


def steps(found: Decomposition) -> list[str]:
    return [step.name for step in found.steps]


def test_decompose_names_the_steps_and_writes_them(given, tmp_path):
    out = tmp_path / "new" / "steps.json"
    ran = run("decompose", *given, "--precision", "int4-g8+a8+kv8", "--out", out)
    assert ran.code == 0, ran.err
    found = Decomposition.load(out)
    assert steps(found) == ["compute", "weights", "activations", "kv_cache"]
    assert found.precision == "int4-g8+bf16+a8+kv8"
    assert ran.out.startswith(found.summary())
    assert "prompt" in ran.err, "the progress bar is on stderr"
    assert "plotly" in out.with_suffix(".html").read_text(encoding="utf-8")
    assert str(out.with_suffix(".html")) in ran.out


def test_decompose_takes_steps_in_the_order_that_was_asked_for(given, tmp_path):
    out = tmp_path / "steps.json"
    more = ["--precision", "int4-g8+a8", "--order", "activations", "--compute", "none", "--out", out]
    assert run("decompose", *given, *more).code == 0
    assert steps(Decomposition.load(out)) == ["activations", "weights"]


def test_decompose_with_static_scales(given, inputs):  # noqa: F811
    bare = run("decompose", *given, "--precision", "int8+a8-static")
    assert bare.code == 2
    assert "calibration prompts" in bare.err
    more = ["--calibration", inputs / "prompts.jsonl"]
    assert run("decompose", *given, "--precision", "int8+a8-static", *more).code == 0


def test_healthy_saes(organism, tmp_path):
    ran = run("sae-health", *organism, "--precision", "int8", "--out", tmp_path / "health.json")
    assert ran.code == 0, ran.err
    assert "All SAEs fit both models." in ran.out
    found = SAEHealth.load(tmp_path / "health.json")
    assert list(found.sites) == ["blocks.1.hook_resid_post"], "--layers chose"
    assert (tmp_path / "health.html").is_file()


def test_saes_that_stopped_fitting_are_exit_code_1(organism):
    ran = run("sae-health", *organism, "--precision", "int2")
    assert ran.code == 1, ran.err
    assert "of the variance in INT2 against 1.00 in the reference" in ran.out


def test_the_health_of_saes_on_a_build(tiny_folder, given):
    ran = run("sae-health", given[0], tiny_folder, *given[1:])
    assert ran.code == 1, "the SAE is random and fits nothing"
    assert "it does not fit the reference itself" in ran.out


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        ("decompose", ["--precision", "int9"], "there is no number format 'int9'"),
        ("decompose", ["--precision", "int4", "--order", "weights,cache"], "expected each of"),
        ("decompose", ["--precision", "int4", "--out", "steps"], "give a name that ends in .json, such as steps.json"),
        ("decompose", [], "--precision"),
        ("sae-health", [], "name a quantized model, or give --precision"),
        ("sae-health", ["--precision", "int4", "--dataset", "nothing_v1"], "unknown data set 'nothing_v1'"),
        ("sae-health", ["--precision", "int4", "--layers", "0"], "leave out layers= and sites="),
    ],
)
def test_bad_input_is_one_clear_message(given, command, change, message):
    ran = run(command, *given, *change)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(("command", "said"), [("decompose", "0    it ran"), ("sae-health", "an SAE does not fit")])
def test_they_explain_themselves(command, said):
    ran = run(command, "--help")
    assert ran.code == 0
    assert said in ran.out
    assert f"tracelens {command} organism" in ran.out
