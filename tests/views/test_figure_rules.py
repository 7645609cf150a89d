"""What every figure keeps to: one template, titles with units on its axes, colours that mean the same everywhere."""

import json
import re
from pathlib import Path

import pytest

import tracelens
from tests.views.all_figures import FIGURES, damage
from tracelens.views import style

HOUSE = {
    colour.lower()
    for value in vars(style).values()
    for colour in (
        [value]
        if isinstance(value, str)
        else value
        if isinstance(value, tuple)
        else value.values()
        if isinstance(value, dict)
        else []
    )
    if isinstance(colour, str) and re.fullmatch(r"#[0-9A-Fa-f]{6}", colour)
}


@pytest.fixture(scope="module")
def study():
    return damage()


@pytest.fixture(scope="module", params=FIGURES)
def figure(request, study):
    return FIGURES[request.param](study)


def opaque(colour: str) -> str:
    """`#rrggbb` of a CSS colour; "" of one that is not seen at all."""
    if colour.startswith("#"):
        return colour.lower()
    red, green, blue, *alpha = (float(part) for part in re.findall(r"[\d.]+", colour))
    return "" if alpha == [0.0] else f"#{int(red):02x}{int(green):02x}{int(blue):02x}"


def test_it_wears_the_one_template(figure):
    assert figure.layout.template.to_plotly_json() == style.template().to_plotly_json()
    assert figure.layout.title.text
    assert figure.layout.title.subtitle.text
    assert figure.layout.height


def test_its_axes_have_titles(figure):
    """But those whose ticks are names, and those that repeat their neighbour's without labels."""
    drawn = json.loads(figure.to_json())
    axes: dict[str, list] = {}
    for trace in drawn["data"]:
        for way in "xy":
            axes.setdefault(trace.get(f"{way}axis", way).replace(way, f"{way}axis", 1), []).append(trace.get(way))
    for name, values in axes.items():
        axis = drawn["layout"].get(name, {})
        words = all(isinstance(v, str) for some in values if isinstance(some, list) for v in some)
        named = axis.get("ticktext") is not None or (words and any(isinstance(some, list) for some in values))
        assert axis.get("title", {}).get("text") or axis.get("showticklabels") is False or named, name


def test_its_colours_are_of_the_house(figure):
    drawn = json.loads(figure.to_json())
    drawn["layout"].pop("template")
    drawn["layout"].pop("coloraxis", None)
    marks = [{key: value for key, value in trace.items() if key != "colorscale"} for trace in drawn["data"]]
    text = json.dumps([marks, drawn["layout"]])
    found = {opaque(colour) for colour in re.findall(r"#[0-9A-Fa-f]{6}\b|rgba?\([^)]*\)", text)} - {""}
    assert found <= HOUSE
    assert set(re.findall(r'"(?:\w*color)": "([a-z]+)"', text)) <= {"white"}


def test_no_text_of_a_trace_reads_nan(figure):
    drawn = json.loads(figure.to_json())
    assert not re.search(r"\bnan\b", json.dumps([drawn["layout"].get("title"), drawn["layout"].get("annotations", [])]))


def test_safety_and_capability_have_their_colours_wherever_they_are_named(study):
    seen = 0
    for name, make in FIGURES.items():
        for trace in make(study).data:
            if trace.name in ("safety features", "capability features"):
                expected = style.SAFETY if trace.name == "safety features" else style.CAPABILITY
                colours = {
                    opaque(c)
                    for c in re.findall(
                        r"#[0-9A-Fa-f]{6}\b|rgba?\([^)]*\)", json.dumps(trace.to_plotly_json(), default=str)
                    )
                }
                assert expected.lower() in colours, name
                seen += 1
    assert seen >= 6


def test_intervals_and_controls_are_drawn_where_results_have_them(study):
    bars = ("audit", "sweep", "decomposition", "plan", "direction", "carriers", "health", "prediction")
    for name in bars:
        data = FIGURES[f"{name}_figure"](study).data
        assert any(e.array is not None for t in data if t.type in ("scatter", "bar") for e in (t.error_x, t.error_y)), (
            name
        )
    for name in ("audit", "sweep", "curve"):
        data = FIGURES[f"{name}_figure"](study).data
        assert any(t.fill in ("toself", "tonexty", "tonextx") for t in data if t.type == "scatter"), name


def test_the_figure_of_every_result_is_among_them():
    """Those that some `.plot()` opens; panels of an explorer are tested with it."""
    files = [path for path in Path(tracelens.__file__).parent.rglob("*.py") if not {"views", "cli"} & set(path.parts)]
    opened = {
        name
        for path in files
        for name in re.findall(r"from tracelens\.views\.\w+ import (\w+_figure)\b", path.read_text(encoding="utf-8"))
    }
    assert len(opened) > 15
    assert opened - {name.split(" of ")[0] for name in FIGURES} == set()
