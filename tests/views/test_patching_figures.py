import pytest
import torch

from tracelens.causal.patching_result import PatchingResult
from tracelens.errors import UnknownNameError
from tracelens.views import style
from tracelens.views.patching_figures import patching_figure
from tracelens.views.patching_panels import AWAY, BLANK, TOWARDS

N = 12


def result(
    rows, axes, effects, *, direction="repair", same=False, placebo=True, present=None, **settings
) -> PatchingResult:
    """Made up: each arm brings back its share of every prompt, the placebo nothing, both but for noise; an arm whose share is
    0 does what its placebo does."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(N, generator=generator, dtype=torch.float64)
    goal = start if same else start + 1 + torch.rand(N, generator=generator, dtype=torch.float64)
    noise = 0.01 * torch.randn(2, len(rows), N, generator=generator, dtype=torch.float64)
    shares = torch.tensor(effects, dtype=torch.float64)[:, None]
    noise[0] = torch.where(shares == 0, noise[1], noise[0])
    return PatchingResult(
        direction=direction,
        metric="margin",
        unit="nats",
        rows=tuple(rows),
        axes=tuple(axes),
        patched=start + shares * (goal - start) + noise[0] * (not same),
        start=start,
        goal=goal,
        placebo=start + noise[1] if placebo else None,
        placebo_kind="displacement" if placebo else "",
        present=present,
        prompts=tuple(f"prompt {i}" for i in range(N)),
        settings=settings,
    )


def layers(**options) -> PatchingResult:
    rows = [{"layer": layer, "site": "resid_post"} for layer in range(4)]
    return result(rows, ["layer"], [0.0, 0.2, 0.6, 1.0], **options)


def grid(axis="group", values=("object", "verb", "answer"), sites=("resid_post",), **options) -> PatchingResult:
    rows = [{"layer": i, "site": s, axis: v} for s in sites for i in range(2) for v in values]
    effects = [0.1 * i - 0.2 for i in range(len(rows))]
    return result(rows, [*(["site"] if len(sites) > 1 else []), "layer", axis], effects, **options)


def paths(**options) -> PatchingResult:
    pairs = [("L0H0", "L1 MLP"), ("L0H0", "logits"), ("L1 MLP", "logits")]
    rows = [
        {"layer": 0, "site": "z", "sender_layer": 0, "sender": s, "receiver_layer": 1, "receiver": r} for s, r in pairs
    ]
    return result(rows, ["sender", "receiver"], [0.2, -0.3, 0.5], paths=True, mlps="frozen", **options)


def attention(heads=2, **options) -> PatchingResult:
    rows = [
        {"layer": 1, "site": "pattern", "head": h, "position": q, "key": k}
        for h in range(heads)
        for q in range(3)
        for k in range(q + 1)
    ]
    return result(rows, ["layer", "head", "position", "key"], [0.01 * i for i in range(len(rows))], **options)


def features(n=40, **options) -> PatchingResult:
    rows = [{"layer": 2, "site": "resid_post", "feature": i} for i in range(n)]
    return result(rows, ["layer", "feature"], [(-1) ** i * i / n for i in range(n)], **options)


KINDS = {"layers": layers, "grid": grid, "paths": paths, "attention": attention, "features": features}


def words(figure) -> str:
    parts = [
        figure.layout.title.text,
        figure.layout.title.subtitle.text,
        *(a.text or "" for a in figure.layout.annotations),
    ]
    return " ".join(parts).replace("<br>", " ")


def maps(figure):
    """Heatmaps of effects, panel by panel."""
    return [trace for trace in figure.data if trace.type == "heatmap" and trace.coloraxis]


def dots(figure):
    return [trace for trace in figure.data if trace.type == "scatter" and "differs" in (trace.name or "")]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("direction", ["repair", "damage", "denoising", "noising"])
def test_every_figure_says_what_0_and_1_are_and_the_pitfall(kind, direction):
    made = kind(direction=direction)
    figure = made.plot()
    assert figure.to_json()
    start, goal = {
        "repair": ("quantized", "reference"),
        "damage": ("reference", "quantized"),
        "denoising": ("corrupted", "clean"),
        "noising": ("clean", "corrupted"),
    }[direction]
    said = words(figure)
    assert f"0 = the {start} run, 1 = the {goal} run; {N} prompts." in said
    restores = direction in ("repair", "denoising")
    assert (
        "sufficient here, not shown to be necessary" if restores else "needed here, not shown to be sufficient"
    ) in said
    assert "nan" not in said.lower()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_where_the_runs_agree_nothing_is_drawn_and_the_reason_given(kind):
    figure = kind(same=True).plot()
    said = words(figure)
    assert "nothing to bring back: the two runs are equal on every prompt (0/0)" in said
    assert f"{N} prompts, {N} of them undetermined" in said
    assert all(value is None for trace in maps(figure) for line in trace.z for value in line)
    assert "nan" not in said


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_without_a_placebo_effects_are_told_from_0(kind):
    figure = kind(placebo=False).plot()
    assert not any(trace.name == "placebo" for trace in figure.data)
    assert "placebo" not in words(figure).lower()
    told = words(figure) + " ".join(trace.name or "" for trace in figure.data)
    assert "differs from 0, adjusted p < 0.05" in told


def test_hover_has_the_numbers_of_the_table():
    made = grid()
    figure = made.plot()
    row = made.table.iloc[4]
    cell = maps(figure)[0].text[1][1]
    assert "layer 1 · at verb" in cell
    assert f"effect {row.effect:.3f} [{row.effect_low:.3f}, {row.effect_high:.3f}]" in cell
    assert f"change {row.change:.3f} [{row.change_low:.3f}, {row.change_high:.3f}] nats" in cell
    assert f"placebo {row.placebo_effect:.3f}" in cell
    assert f"{N} of {N} prompts" in cell
    assert maps(figure)[0].z[1][1] == pytest.approx(row.effect)


def test_colours_are_centred_at_0_and_told_apart_by_all():
    figure = grid().plot()
    axis = figure.layout.coloraxis
    assert axis.cmin == -axis.cmax
    assert axis.cmax == pytest.approx(grid().table.effect.abs().max())
    assert (axis.colorscale[0][1], axis.colorscale[-1][1]) == (AWAY, TOWARDS)
    kept = [style.SAFETY, style.CAPABILITY, style.REFERENCE, style.QUANTIZED, *style.CONTROL.values()]
    assert not {AWAY, TOWARDS} & set(kept)
    assert style.CONTROL["noise"] == BLANK


def test_only_cells_that_differ_from_their_placebo_carry_a_dot():
    made = grid()
    (found,) = dots(made.plot())
    marked = {(int(y), int(x)) for x, y in zip(found.x, found.y, strict=True)}
    # Effects are −0.2, −0.1, 0, 0.1, 0.2, 0.3, and noise is about 0.01.
    assert marked == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}


def test_points_that_do_not_differ_are_hollow():
    effect = next(trace for trace in layers().plot().data if trace.name == "effect")
    assert list(effect.marker.symbol) == ["circle-open", "circle", "circle", "circle"]
    assert effect.error_y.array is not None
    placebo = next(trace for trace in layers().plot().data if trace.name == "placebo")
    assert list(placebo.x) != list(effect.x)


def test_a_pair_without_a_path_is_blank_and_says_why():
    figure = paths().plot()
    assert "path by path" in words(figure)
    assert "All between sender and receiver is held, MLPs too." in words(figure)
    z = maps(figure)[0].z
    assert [[value is None for value in line] for line in z] == [[False, False], [True, False]]
    assert any("no path: the receiver does not come after" in text for line in figure.data[0].text for text in line)
    assert any(trace.name == "no path" and trace.showlegend for trace in figure.data)
    assert list(figure.layout.xaxis.ticktext) == ["L1 MLP", "logits"]


def test_positions_that_some_prompts_lack_are_blank_where_all_do():
    lacking = torch.ones(6, N, dtype=torch.bool)
    lacking[0] = False
    lacking[1, :4] = False
    made = grid("position", (0, 1, 2), present=lacking)
    trace = maps(made.plot())[0]
    assert trace.z[0][0] is None
    assert f"{N - 4} of {N - 4} prompts" in trace.text[0][1]


def test_tokens_and_the_groups_they_belong_to_stand_under_positions():
    made = grid("position", (0, 1, 2), tokens=["<bos>", "bomb", "<end>"], marks={"1": "object"})
    ticks = list(made.plot().layout.xaxis.ticktext)
    assert ticks == ["&lt;bos&gt;", "bomb <b>object</b>", "&lt;end&gt;"]
    own = patching_figure(made, tokens=["a", "b", "c"]).layout.xaxis.ticktext
    assert list(own) == ["a", "b <b>object</b>", "c"]
    from_the_end = grid("position", (-2, -1), tokens=["<bos>", "bomb", "<end>"], marks={"1": "object"})
    assert list(from_the_end.plot().layout.xaxis.ticktext) == ["bomb <b>object</b>", "&lt;end&gt;"]


def test_ticks_that_must_be_turned_take_no_height_from_the_cells():
    short, long = (
        grid("position", tuple(range(12)), tokens=[text] * 12, marks={}).plot()
        for text in ("a", "a long token, or its group")
    )
    assert short.layout.xaxis.tickangle == 0
    assert long.layout.xaxis.tickangle == -60
    assert long.layout.height - short.layout.height == pytest.approx(26 * 7.5 * 0.87, abs=1)


def test_a_precision_that_has_a_name_is_said():
    assert "(INT2-g32)" in grid(precision="INT2-g32").plot().layout.title.text
    assert "(" not in grid(precision="").plot().layout.title.text


def test_names_from_outside_are_escaped():
    figure = grid("group", ("<script>", "b"), metric="x").plot()
    assert "<script>" not in str(figure.to_dict())


def test_of_many_features_the_largest_are_drawn_in_order():
    figure = features().plot(top=10)
    effect = next(trace for trace in figure.data if trace.name == "effect")
    assert list(effect.x) == sorted(effect.x)
    assert min(map(abs, effect.x)) > 0.7
    assert list(figure.layout.yaxis.ticktext)[-1] == "feature 38"
    assert "The 10 largest effects of 40: being chosen for their size, they are overstated." in words(figure)
    assert "layer 2" in figure.layout.title.text


def test_patterns_are_drawn_query_by_key_for_each_head():
    figure = attention().plot()
    assert [a.text for a in figure.layout.annotations] == ["head 0", "head 1"]
    assert figure.layout.yaxis.title.text == "attends from"
    first = maps(figure)[0]
    assert [[value is None for value in line] for line in first.z] == [
        [False, True, True],
        [False, False, True],
        [False] * 3,
    ]
    one = attention().plot(choose={"head": 1})
    assert len(maps(one)) == 1
    assert "head 1" in one.layout.title.text
    many = attention(heads=9).plot()
    assert len(maps(many)) == 6
    assert "the 6 of 9 panels (head) with the largest effect" in words(many)
    assert [a.text for a in many.layout.annotations][-1] == "head 8"


def test_sites_stand_beside_each_other_on_one_scale():
    figure = grid(sites=("attn_out", "mlp_out")).plot()
    assert [a.text for a in figure.layout.annotations] == ["attn_out", "mlp_out"]
    assert len({trace.coloraxis for trace in maps(figure)}) == 1


def test_the_legend_has_room_above_the_titles_of_panels():
    one, two = grid().plot().layout, grid(sites=("attn_out", "mlp_out")).plot().layout
    assert one.legend.y == 1
    assert two.legend.y > 1
    assert two.margin.t > one.margin.t


def test_an_axis_or_value_that_was_not_swept_is_named():
    with pytest.raises(UnknownNameError, match=r"unknown axis 'heads'.*layer, head, position, key"):
        patching_figure(attention(), choose={"heads": 1})
    with pytest.raises(UnknownNameError, match=r"unknown head '7'.*0, 1"):
        patching_figure(attention(), choose={"head": 7})


def test_one_prompt_has_no_interval():
    made = layers()
    single = PatchingResult(
        **{
            "direction": "repair",
            "metric": "margin",
            "unit": "",
            "rows": made.rows,
            "axes": made.axes,
            "patched": made.patched[:, :1],
            "start": made.start[:1],
            "goal": made.goal[:1],
        }
    )
    figure = single.plot()
    assert "1 prompt." in words(figure)
    assert "[" not in figure.data[0].text[1]
    assert all(end != end for end in figure.data[0].error_y.array)


def test_a_cumulative_sweep_says_so():
    assert "up to each layer" in layers(cumulative=True).plot().layout.title.text


def test_noise_is_said_where_it_is_larger_than_what_is_called_equal():
    assert "up to 0.006 with what is run beside it" in layers(numerical_noise=0.0061).plot().layout.title.subtitle.text
    assert "beside it" not in layers(numerical_noise=1e-6).plot().layout.title.subtitle.text
