"""Figures of attribution and of the bound: what is drawn is what the results say."""

import pytest
import torch

from tracelens.causal.attribution_check import AttributionCheck
from tracelens.causal.attribution_result import WeightAttribution
from tracelens.causal.bound_result import DriftBound, DriftBounds
from tracelens.causal.places import Place
from tracelens.sites import Site

N = 12
NAMES = ("blocks.0.attn.W_Q", "blocks.0.attn._W_K", "blocks.0.mlp.W_out", "blocks.1.attn.W_Q", "blocks.1.mlp.W_out")


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attribution(first_order=None, at="reference"):
    first_order = (
        values(5, N) * 0.01 + torch.tensor([0.5, 0, 0, 0, -0.2])[:, None] if first_order is None else first_order
    )
    reference = values(N, seed=1)
    return WeightAttribution(
        names=NAMES,
        layers=(0, 0, 0, 1, 1),
        shapes=((4, 4),) * 5,
        at=at,
        metric="<b>margin",
        unit="nats",
        first_order=first_order,
        reference=reference,
        quantized=reference + first_order.sum(0),
        prompts=tuple(f"prompt <{i}>" for i in range(N)),
    )


def bound(label="int4", scale=1.0):
    components = (Place(Site(0, "z"), None, 0), Place(Site(0, "z"), None, 1), Place(Site(0, "mlp_out")))
    elementwise = values(3, N).abs() + torch.tensor([1, 0.5, 4.0])[:, None]
    return DriftBound(
        components=components,
        label=label,
        errors="total",
        metric="margin",
        unit="nats",
        reference=torch.zeros(N, dtype=torch.float64),
        quantized=scale * values(N, seed=2),
        signed=elementwise * 0.1,
        elementwise=elementwise,
        norms=2 * elementwise,
        prompts=tuple(f"prompt <{i}>" for i in range(N)),
    )


def test_matrices_lie_by_layer_and_kind():
    one = attribution()
    figure = one.plot()
    (heat,) = figure.data
    assert list(heat.x) == ["W_Q", "W_K", "W_out"]
    assert list(heat.y) == [0, 1]
    assert heat.z[1][1] is None
    assert "no such matrix" in heat.text[1][1]
    assert heat.z[0][0] == pytest.approx(float(one.first_order[0].mean()))
    assert heat.zmin == -heat.zmax
    assert heat.zmax == pytest.approx(0.5, abs=0.02)
    row = one.table.iloc[0]
    assert f"[{row['first_order_low']:.4f}, {row['first_order_high']:.4f}]" in heat.text[0][0]
    dots = {(mark.x, mark.y) for mark in figure.layout.annotations}
    assert {("W_Q", 0), ("W_out", 1)} <= dots
    assert len(dots) < 5
    assert "&lt;b&gt;margin" in figure.layout.title.text
    assert "<b>" not in figure.layout.title.text


def test_what_restoring_should_bring_back_is_marked_by_its_p():
    one = attribution()
    figure = one.plot(value="change")
    (heat,) = figure.data
    table = one.table.set_index("name")
    assert heat.z[0][0] == pytest.approx(table.loc[NAMES[0], "change"])
    dots = {(mark.x, int(mark.y)) for mark in figure.layout.annotations}
    marked = table[table["p_adjusted"] < 0.05]
    assert dots == {(row["kind"], row["layer"]) for row in marked.to_dict("records")}


def test_models_that_do_not_differ_are_said_to_be_equal():
    figure = attribution(torch.zeros(5, N, dtype=torch.float64)).plot()
    assert any("0/0" in mark.text for mark in figure.layout.annotations)
    same = DriftBounds({"same": bound("same", 0.0)}).plot()
    assert any("0/0" in mark.text for mark in same.layout.annotations)


def test_experts_of_a_layer_share_a_cell():
    one = attribution()
    names = tuple(f"blocks.0.mlp.experts.{i}.W_in.weight" for i in range(5))
    figure = type(one)(**{**vars_of(one), "names": names, "layers": (0,) * 5}).plot()
    (heat,) = figure.data
    assert list(heat.x) == ["W_in"]
    assert heat.z[0][0] == pytest.approx(float(one.first_order.mean(1).sum()))
    assert "5 matrices" in heat.text[0][0]
    assert names[0] in heat.text[0][0]


def vars_of(one):
    from dataclasses import fields

    return {f.name: getattr(one, f.name) for f in fields(one)}


@pytest.mark.parametrize("kind", ["elementwise", "norms", "signed"])
def test_points_of_the_bound_are_prompts(kind):
    bounds = DriftBounds({"int8": bound("int8", 0.01), "int2": bound("int2", 30.0)})
    figure = bounds.plot(kind=kind)
    few, many, line = figure.data
    assert list(few.x) == pytest.approx(bounds["int8"].bound(kind).tolist())
    assert list(many.y) == pytest.approx(bounds["int2"].measured.tolist())
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert list(line.x) == list(line.y)
    share = bounds["int2"].summary(kind)["violated"].value
    assert share > 0
    assert f"{100 * share:.1f} %" in many.name
    assert "0.0 %" in few.name
    assert "prompt &lt;0&gt;" in few.text[0]


def test_prompts_that_do_not_move_are_counted_not_drawn():
    one = bound()
    quantized = one.quantized.clone()
    quantized[:2] = 0
    figure = type(one)(**{**vars_of(one), "quantized": quantized}).plot()
    assert len(figure.data[0].x) == N - 2
    assert "2 points that do not move are not shown" in figure.layout.title.subtitle.text.replace("<br>", " ")


def test_components_stand_in_the_order_of_what_they_carry():
    figure = bound().plot_components()
    could, predicted = figure.data
    assert list(could.y) == ["L0 MLP", "L0H0", "L0H1"] == list(predicted.y)
    assert could.x[0] > could.x[1] > could.x[2]
    assert could.error_x.array[0] > 0
    assert sum(could.customdata) == pytest.approx(100, abs=0.2)
    assert len(bound().plot_components(top=2).data[0].y) == 2


def test_points_of_the_check_are_matrices():
    one = attribution()
    check = AttributionCheck(
        names=NAMES,
        layers=one.layers,
        how="alone",
        at="reference",
        metric="margin",
        unit="nats",
        predicted=one.first_order,
        exact=one.first_order * 0.5,
        reference=one.reference,
        quantized=one.quantized,
        prompts=one.prompts,
    )
    figure = check.plot()
    *kinds, line = figure.data
    assert [trace.name for trace in kinds] == ["W_Q", "W_K", "W_out"]
    assert list(kinds[0].y) == pytest.approx([x / 2 for x in kinds[0].x])
    assert list(line.x) == list(line.y)
    assert check.summary["slope"] == pytest.approx(2)
    assert check.summary["pearson"] == pytest.approx(1)
    assert check.summary["ranks"].value == pytest.approx(1)
    assert check.summary["best"]
    assert "slope 2.00" in figure.layout.title.subtitle.text.replace("<br>", " ")
