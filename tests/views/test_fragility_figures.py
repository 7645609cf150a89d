from dataclasses import replace

import pytest
import torch

from tests.causal.test_fragility import drawn, made_up
from tracelens.causal.ablation_result import Importance
from tracelens.causal.fragility import associate
from tracelens.causal.fragility_result import Fragility
from tracelens.causal.places import Place
from tracelens.sites import Site
from tracelens.views.fragility_figures import fragility_figure, importance_figure


@pytest.fixture(scope="module")
def found():
    ours, drift = made_up()
    nothing = replace(drift, relative=torch.zeros_like(drift.relative))
    drifts = {"int4 <b>": drift, "same": nothing, "int3": drift, "int2": drift}
    noise = {label: (made_up(seed=0, spread=0.06)[1],) if label != "same" else () for label in drifts}
    associations = associate(ours, drifts, noise, n_resamples=50, n_permutations=200)
    return Fragility(ours, drifts, noise, associations)


def text(figure):
    return " ".join(annotation.text for annotation in figure.layout.annotations)


def test_a_panel_for_each_model_with_its_correlation(found):
    figure = found.plot()
    titles = [a.text for a in figure.layout.annotations]
    assert len(titles) == 4
    assert titles[0].startswith("<b>int4 &lt;b&gt;</b>")
    assert "20 heads: ρ = -1.00 [" in titles[0]
    assert "p = 0.005" in titles[0]
    assert "noise: ρ = -1.00" in titles[0]
    assert "ρ undefined" in titles[1]
    for axis in ("xaxis", "yaxis", "xaxis4", "yaxis4"):
        assert figure.layout[axis].type == "log"


def test_points_are_the_components(found):
    figure = fragility_figure(found, n_labels=2)
    heads = [trace for trace in figure.data if trace.name == "heads"]
    assert len(heads) == 3
    assert list(heads[0].x) == pytest.approx(found.importance.value.tolist())
    assert list(heads[0].y) == pytest.approx(found.drifts["int3"].value.tolist())
    named = [name for name in heads[0].text if name]
    assert set(named) == set(found.importance.top(2)["component"])
    assert "L0H0" in heads[0].hovertext[0]
    assert sum(trace.showlegend for trace in heads) == 1
    assert any(trace.text == ("nothing drifts",) for trace in figure.data)
    noise = [trace for trace in figure.data if trace.name == "matched noise"]
    assert len(noise) == 3
    assert not any(trace.name == "matched noise" for trace in fragility_figure(found, noise=False).data)


def everything(placebo=False):
    places = [Place(Site(layer, "z"), None, head) for layer in range(3) for head in range(4)]
    places += [Place(Site(layer, name)) for name in ("mlp_out", "attn_out", "resid_post") for layer in range(3)]
    places += [Place(Site(1, "resid_post"), feature=i) for i in range(30)]
    change = drawn(len(places), 25, seed=1)
    other = drawn(len(places), 25, seed=2) if placebo else None
    plain = torch.zeros(25, dtype=torch.float64)
    return Importance(tuple(places), "mean", "margin <i>", "nats", plain, change, other, ("",) * 25)


def test_importance_shows_every_kind():
    importance = everything(placebo=True)
    figure = importance.plot(n_ranked=7)
    (heat,) = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [list(row) for row in heat.z] == importance.value[:12].reshape(3, 4).tolist()
    assert "mean |Δ|" in heat.hovertext[2][1]
    assert "random displacement" in heat.hovertext[2][1]
    bars = {trace.name: trace for trace in figure.data if trace.type == "bar"}
    assert set(bars) == {"MLPs", "attention layers", "layers", "features"}
    assert list(bars["MLPs"].x) == pytest.approx(importance.value[12:15].tolist())
    assert len(bars["features"].x) == 7
    assert min(bars["features"].x) >= sorted(importance.value[21:].tolist())[-8]
    assert "margin &lt;i&gt;" in figure.layout.title.subtitle.text


@pytest.mark.parametrize("kind", ["head", "mlp", "feature"])
def test_importance_of_one_kind(kind):
    whole = everything()
    rows = [i for i, other in enumerate(whole.kinds) if other == kind]
    one = replace(whole, components=tuple(whole.components[i] for i in rows), change=whole.change[rows])
    figure = importance_figure(one)
    assert {trace.type for trace in figure.data} == {"heatmap" if kind == "head" else "bar"}
