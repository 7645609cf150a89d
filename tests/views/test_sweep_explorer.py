"""The sweep explorer without a browser: its controls are moved, and what its figures and card then say is read."""

from dataclasses import replace

import pytest

from tests.views.made_up import NAN, estimate, made_up_report, unchanged_report
from tracelens.errors import MetricInputError, UnknownNameError
from tracelens.stats import wilson
from tracelens.sweep_result import SweepResult
from tracelens.views.sweep_figures import places, sweep_panel
from tracelens.views.sweep_series import flips_of
from tracelens.views.widgets.sweep import SweepExplorer

HOSTILE = '<script>window.hacked=1</script> "$x$" %{y}'


def sets(safety: float, capability: float = 0.5) -> dict:
    return {
        "safety": estimate(safety),
        "capability": estimate(capability),
        "refusal": estimate(safety - 0.04),
        "warning": estimate(safety + 0.02),
    }


def entry(label: str, safety: float, *, weights: int | None = 8000, **settings):
    report = made_up_report(label=label, cpfr=sets(safety), kl=1 - safety)
    more = settings | ({"linear_weights": weights} if weights else {})
    return replace(report, settings=report.settings | more)


@pytest.fixture
def sweep() -> SweepResult:
    return SweepResult(
        {
            "int4": entry("INT4", 0.93),
            "int8": entry("INT8", 0.99),
            "int3": entry("INT3", 0.80),
            "build": entry(HOSTILE, 0.95, weights=None),
        }
    )


def curve(live, name: str):
    return next(trace for trace in live.data if trace.visible is not False and trace.name == name)


def test_the_decay_is_that_of_the_reports(sweep):
    explorer = SweepExplorer(sweep)
    safety = curve(explorer.decay, "safety features")
    at = dict(zip(safety.customdata, zip(safety.x, safety.y, strict=True), strict=True))
    assert {name: at[name] for name in ("int8", "int4", "int3")} == {
        "int8": (8, 0.99),
        "int4": (4, 0.93),
        "int3": (3, 0.8),
    }
    assert list(curve(explorer.decay, "capability features").y) == [0.5] * 4
    assert safety.error_y.array == pytest.approx([0.01] * 4)
    # Beside them the controls, as bands.
    assert [trace.name for trace in explorer.decay.data if trace.name == "matched noise"]


def test_what_does_not_say_its_bits_stands_apart(sweep):
    x, axis, apart = places(sweep, "bits")
    assert apart is not None
    assert x["build"] < apart < min(x[name] for name in ("int3", "int4", "int8"))
    assert axis["range"][0] > axis["range"][1]
    lines = [shape for shape in sweep_panel(sweep, "CPFR").layout.shapes if shape.x0 == apart]
    assert len(lines) == 1


def test_bytes_follow_from_bits_and_weights(sweep):
    assert sweep.bytes["int4"] == 4000
    assert sweep.bytes["build"] != sweep.bytes["build"]
    explorer = SweepExplorer(sweep)
    explorer.axis.value = "bytes"
    safety = curve(explorer.decay, "safety features")
    assert dict(zip(safety.customdata, safety.x, strict=True))["int8"] == 8000
    assert explorer.figure.layout.xaxis.title.text == "bytes of the linear layers' weights"


def test_bytes_are_not_offered_where_nothing_tells_them():
    explorer = SweepExplorer(SweepResult({"int8": entry("INT8", 0.99, weights=None)}))
    assert list(explorer.axis.options) == ["bits", "in order"]


def test_thresholds_answer_as_best_config_does(sweep):
    explorer = SweepExplorer(sweep)
    for least in (0.7, 0.9, 0.94, 0.96, 1.0):
        explorer.min_cpfr.value = least
        best = sweep.best_config(least)
        assert (f"smallest that passes is {best} (" if best else "Nothing of the 4 passes") in str(explorer)
        marks = {note.x: note.text for note in explorer.decay.layout.annotations if note.text in "✓✗"}
        at = places(sweep, "bits")[0]
        assert {name for name, x in at.items() if marks[x] == "✓"} == {
            name for name, report in sweep.reports.items() if report.cpfr["safety"].value >= least
        }
        assert explorer.decay.layout.shapes[0].y0 == least
    explorer.min_cpfr.value = 0.7
    explorer.max_flips.value = 1.0
    # One of its two prompts flips in each of them.
    assert sweep.best_config(0.7, 0.01) is None
    assert "Nothing of the 4 passes" in str(explorer)
    assert explorer.figure.layout.shapes[0].y0 == 1.0


def test_the_answer_says_whether_the_interval_passes_too():
    explorer = SweepExplorer(SweepResult({"int8": entry("INT8", 0.905)}))
    assert "its own is 0.905, its interval reaches below" in str(explorer)
    explorer.min_cpfr.value = 0.89
    assert "its interval too" in str(explorer)


@pytest.mark.parametrize("measure", ["flips", "KL", "perplexity", "smeared", "muted", "degraded", "damaged"])
def test_every_measure_is_drawn_beside_its_control(sweep, measure):
    explorer = SweepExplorer(sweep)
    explorer.measure.value = measure
    named = {trace.name for trace in explorer.figure.data if trace.visible is not False}
    assert "matched noise" in named
    assert explorer.message == ""
    own = next(
        t
        for t in explorer.figure.data
        if t.visible is not False and t.customdata and "control" not in str(t.name) and t.showlegend is not False
    )
    expected = {"KL": [1 - 0.99, 1 - 0.93, 1 - 0.8], "perplexity": [4.5] * 3, "muted": [0.0] * 3}.get(measure)
    if expected:
        at = dict(zip(own.customdata, own.y, strict=True)) if measure != "muted" else dict.fromkeys(sweep.reports, 0.0)
        assert [at[name] for name in ("int8", "int4", "int3")] == pytest.approx(expected)


def test_flips_of_a_behaviour_are_counted_over_its_prompts(sweep):
    report = sweep.reports["int4"]
    assert flips_of(report, "refusal")["both ways"] == wilson(1, 2)
    assert flips_of(report, "refusal")["refuse→comply"] == wilson(1, 1)
    assert flips_of(report, "warning") == {}
    explorer = SweepExplorer(sweep)
    explorer.behaviour.value = "refusal"
    assert dict(
        zip(
            curve(explorer.decay, "refusal features").customdata,
            curve(explorer.decay, "refusal features").y,
            strict=True,
        )
    )["int8"] == pytest.approx(0.95)
    assert "Of refusal alone no control of this measure was recorded" in explorer.answer.value
    explorer.behaviour.value = "warning"
    assert "no prompt" in explorer.figure.layout.annotations[-1].text
    explorer.measure.value = "KL"
    assert "KL is of all prompts" in explorer.answer.value


def test_a_point_the_list_and_the_buttons_open_the_same_report(sweep):
    explorer = SweepExplorer(sweep)
    assert explorer.selected == "int8"
    safety = curve(explorer.decay, "safety features")
    explorer._clicked(safety, [list(safety.customdata).index("int3")])
    assert explorer.selected == "int3"
    assert sweep.reports["int3"].verdict.text.split(".")[0] in explorer.card.value
    assert "matched noise" in explorer.card.value
    assert "#3 (refusal" in explorer.card.value
    assert explorer.decay.data[0].x == (3, 3)
    explorer.previous.click()
    assert explorer.selected == "int4"
    explorer.next.click()
    explorer.next.click()
    assert explorer.selected == "build"
    assert explorer.next.disabled
    assert not explorer.previous.disabled
    explorer.select("int8")
    assert explorer.previous.disabled
    with pytest.raises(UnknownNameError, match="int5"):
        explorer.select("int5")


def test_text_from_outside_stays_text(sweep):
    explorer = SweepExplorer(sweep)
    explorer.select("build")
    explorer.axis.value = "in order"
    text = explorer.card.value + explorer.answer.value
    assert "<script" not in text
    assert "&lt;script" in text
    drawn = explorer.decay.to_json().replace("\\u003c", "<")
    assert "<script" not in drawn
    assert "$x$" not in drawn
    assert "%{y}" not in drawn.replace("%{text}", "")


def test_a_reports_explorer_opens_below_and_closes(sweep, monkeypatch):
    import ipywidgets as widgets

    from tracelens.views.widgets import sweep as module

    made = []

    class Inside:
        def __init__(self, report):
            made.append(report.label)
            self.box = widgets.HTML(report.label)

    monkeypatch.setattr(module, "_explorer_of", lambda view: Inside)
    explorer = SweepExplorer(sweep)
    explorer.below.value = "features"
    assert [child.value for child in explorer.inside.children] == ["INT8"]
    explorer.select("int4")
    explorer.select("int8")
    assert made == ["INT8", "INT4"]
    explorer.below.value = ""
    assert explorer.inside.children == ()


def test_a_sweep_with_little_in_it():
    bare = made_up_report(
        controls=False,
        readable=False,
        features=[],
        pairs=[],
        cpfr={"safety": estimate(NAN), "capability": estimate(NAN)},
    )
    explorer = SweepExplorer(SweepResult({"int4": bare}))
    assert "Nothing of the 1 passes" in str(explorer)
    assert "No controls were measured" in str(
        [child.value for child in explorer.box.children if hasattr(child, "value")]
    )
    assert "No feature fires often enough" in explorer.card.value
    for measure in explorer.measure.options:
        explorer.measure.value = measure
        assert explorer.message == ""
    for axis in explorer.axis.options:
        explorer.axis.value = axis
    assert explorer.previous.disabled
    assert explorer.next.disabled
    assert explorer.still().to_json()
    with pytest.raises(MetricInputError, match="holds no report"):
        SweepExplorer(SweepResult({}))


def test_nothing_changed_passes():
    explorer = SweepExplorer(SweepResult({"fp32": unchanged_report()}))
    explorer.min_cpfr.value = 1.0
    assert "smallest that passes is fp32" in str(explorer)


def test_a_saved_sweep_is_drawn_alike(sweep, tmp_path):
    sweep = SweepResult({name: report for name, report in sweep.reports.items() if name != "build"})
    sweep.save(tmp_path / "sweep")
    explorer, loaded = SweepExplorer(sweep), SweepExplorer(SweepResult.load(tmp_path / "sweep"))
    assert str(explorer) == str(loaded)
    assert explorer.card.value == loaded.card.value
    assert list(curve(explorer.decay, "safety features").y) == list(curve(loaded.decay, "safety features").y)


def test_the_number_of_linear_weights_is_recorded():
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from tracelens.optimization_auditor import _n_linear_weights

    cfg = HookedTransformerConfig(
        n_layers=2, d_model=8, n_ctx=4, d_head=4, n_heads=2, d_mlp=16, d_vocab=5, act_fn="relu"
    )
    assert _n_linear_weights(HookedTransformer(cfg)) == 2 * (4 * 8 * 8 + 2 * 8 * 16)
    assert _n_linear_weights(torch.nn.Linear(2, 2)) is None
