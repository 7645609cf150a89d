import pytest

from tests.views import made_up_studies as made_up
from tests.views.made_up_studies import LABEL, NAN
from tracelens.stats import Estimate
from tracelens.views import decomposition_figures, muting_figures, smearing_figures, style
from tracelens.views.style import CAPABILITY, CONTROL, QUANTIZED, REFERENCE, SAFETY

RESULTS = {
    "no flip": made_up.decomposition(Estimate(0.0, 0.0, 0.0)),
    "metric without a value": made_up.decomposition(made_up.NOTHING),
    "change without an interval": made_up.decomposition(Estimate(0.1, NAN, NAN)),
    "ablation costs nothing": made_up.health(made_up.NOTHING),
    "no safety feature": made_up.thresholds(0.5, safety=0),
    "nothing muted": made_up.thresholds(0.0, safety=1),
    "shares without a value": made_up.thresholds(NAN, safety=1),
    "no live unit": made_up.muting(0),
    "one live unit": made_up.muting(1),
    "nothing smeared": made_up.smearing(),
    "nothing new": made_up.pathways(),
    "one new feature": made_up.pathways_of_one(),
}


def words(figure) -> str:
    return " ".join(
        [
            figure.layout.title.text,
            figure.layout.title.subtitle.text,
            *(a.text or "" for a in figure.layout.annotations),
        ]
    )


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_where_there_is_nothing_to_see_a_figure_is_drawn(result):
    figure = result.plot()
    assert figure.to_json()
    assert LABEL not in str(figure.to_dict())
    assert "nan" not in words(figure).lower()
    assert "None" not in words(figure)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("nothing smeared", "nothing is smeared"),
        ("nothing new", "no feature is new"),
        ("no safety feature", "0 safety and 3 capability features"),
        ("no live unit", "0 live features"),
        ("metric without a value", "no metric could be measured"),
    ],
)
def test_what_is_missing_is_said_in_words(result, said):
    assert said in words(RESULTS[result].plot()).replace("<br>", " ")


def test_no_flip_is_drawn_above_0():
    low, high = RESULTS["no flip"].plot().layout.yaxis.range
    assert -0.01 < low < 0 < high < 0.1


def test_a_marker_at_0_is_seen_whole():
    for name in ("nothing muted", "no safety feature", "shares without a value"):
        low, high = RESULTS[name].plot().layout.yaxis.range
        assert low < 0 < high


def test_sets_that_fall_together_stand_side_by_side():
    drawn = {trace.name: list(trace.x) for trace in RESULTS["nothing muted"].plot().data}
    assert drawn["safety features"] != drawn["capability features"]
    assert drawn["safety features"] == pytest.approx([8, 4], abs=0.1)


def test_each_panel_of_causes_has_its_own_legend():
    figure = RESULTS["one live unit"].plot()
    assert {trace.xaxis: trace.legend for trace in figure.data} == {"x": None, "x2": "legend2"}


def test_a_colour_means_one_thing():
    kept = [SAFETY, CAPABILITY, REFERENCE, QUANTIZED, *CONTROL.values()]
    assert len(set(kept)) == len(kept)
    steps = {name: colour for name, colour in decomposition_figures.STEP.items() if name != "compute"}
    others = [*steps.values(), muting_figures.MOVED, muting_figures.CLIPPED, *style.FLIP.values()]
    assert not set(others) & set(kept)
    assert decomposition_figures.STEP["compute"] == CONTROL["bf16"]
    assert (smearing_figures.JOINED["safety"], smearing_figures.JOINED["capability"]) == (SAFETY, CAPABILITY)


def test_a_long_subtitle_breaks_and_has_room():
    import plotly.graph_objects as go

    short = style.dressed(go.Figure(), "title", "few words", 400)
    long = style.dressed(go.Figure(), "title", "many words " * 40, 400)
    lines = long.layout.title.subtitle.text.split("<br>")
    assert len(lines) > 3
    assert max(map(len, lines)) <= style.SUBTITLE
    more = style.LINE * (len(lines) - 2)
    assert long.layout.height - short.layout.height == long.layout.margin.t - short.layout.margin.t == more


def test_sites_of_one_kind_are_told_by_their_layer():
    assert muting_figures._places(["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"]) == (
        ["0", "3"],
        "layer (resid_post)",
    )
    assert muting_figures._places(["blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"])[1] == "layer and site"
