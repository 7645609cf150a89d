"""Figures of repair: what is drawn is what the result says."""

import pytest
import torch

from tracelens.causal.repair import DirectionRepair, RepairCurve


def made_curve(n_components=6, gap=1.0, restore="weights"):
    """A curve in which "good" restores what matters first; every component brings the same else."""
    generator = torch.Generator().manual_seed(0)
    n = 30
    start = torch.randn(n, generator=generator, dtype=torch.float64)
    goal = start + gap * (1 + torch.rand(n, generator=generator, dtype=torch.float64))
    counts = (0, 1, 3, n_components)
    shares = {"good": (0, 0.9, 0.95, 1), "magnitude": (0, 0.1, 0.4, 1)} | {
        f"random {i}": (0, 0.1 * (i % 3), 0.5, 1) for i in range(21)
    }
    part = torch.tensor(list(shares.values()), dtype=torch.float64)
    order = torch.arange(n_components).expand(len(shares), -1).contiguous()
    return RepairCurve(
        restore=restore,
        metric="margin <b>",
        unit="nats",
        names=tuple(f"matrix {i}" for i in range(n_components)),
        layers=tuple(range(n_components)),
        bytes=torch.full((n_components,), 2000.0, dtype=torch.float64),
        bytes_note="",
        orders=tuple(shares),
        order=order,
        scores=torch.zeros(order.shape, dtype=torch.float64),
        counts=counts,
        measured=start + part[..., None] * (goal - start),
        start=start,
        goal=goal,
        prompts=tuple(map(str, range(n))),
        n_chosen_on=30,
    )


def made_direction():
    curve = made_curve()
    kinds = {
        "refusal": 0.8,
        "largest error": 0.3,
        **{f"random {i}": 0.1 * (i % 2) for i in range(10)},
        **{f"labels {i}": 0.1 + 0.1 * (i % 2) for i in range(10)},
        "everything": 1.0,
    }
    rows = [
        {"version": version, "direction": kind, "layers": layers, "bytes": 4.0}
        for version in ("activations", "weights")
        for kind in kinds
        for layers in ("0", "all")
    ]
    shares = torch.tensor([kinds[row["direction"]] for row in rows], dtype=torch.float64)[:, None]
    measured = curve.start + shares * (curve.goal - curve.start)
    return DirectionRepair(
        "margin", "nats", tuple(rows), measured, curve.start, curve.goal, (0.9, 0.8), 9, 9, curve.prompts
    )


def test_a_line_an_order_over_components_and_bytes():
    curve = made_curve()
    figure = curve.plot()
    good = [trace for trace in figure.data if trace.name == "good"]
    assert [list(trace.x) for trace in good] == [[0, 1, 3, 6], pytest.approx([0, 2, 6, 12])]
    assert list(good[0].y) == pytest.approx([0, 0.9, 0.95, 1])
    band = next(trace for trace in figure.data if trace.fill == "toself")
    assert list(band.y)[:4] == pytest.approx([0, 0.2, 0.5, 1])
    assert list(band.y)[4:] == pytest.approx([1, 0.5, 0, 0])
    assert [trace.showlegend for trace in good] == [True, False]
    assert figure.layout.xaxis2.title.text == "kB added"
    assert "<b>" not in figure.layout.yaxis.title.text
    assert "beaten by good" in figure.layout.title.subtitle.text.replace("<br>", " ")


def test_what_is_closed_of_the_gap():
    closed = next(trace for trace in made_curve().plot(measure="closed").data if trace.name == "good")
    assert list(closed.y) == pytest.approx([1 - (1 - share) ** 2 for share in (0, 0.9, 0.95, 1)])


def test_identical_models_are_drawn_as_nothing():
    figure = made_curve(gap=0.0).plot()
    assert "nothing to repair" in figure.layout.title.subtitle.text


def test_bars_of_directions():
    repair = made_direction()
    figure = repair.plot()
    bars = {trace.name: trace for trace in figure.data if trace.xaxis == "x2"}
    assert list(bars["refusal direction"].x) == ["0", "all"]
    assert list(bars["refusal direction"].y) == pytest.approx([0.8, 0.8])
    random = bars["random (mean, spread)"]
    assert list(random.y) == pytest.approx([0.05, 0.05])
    assert list(random.error_y.array) == pytest.approx([0.05, 0.05])
    assert repair.table[repair.table["direction"] == "refusal"]["wins"].all()
    assert "weights, all" in figure.layout.title.subtitle.text.replace("<br>", " ")
