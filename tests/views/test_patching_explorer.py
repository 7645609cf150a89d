"""The patching explorer without a browser: its controls are moved, and what its figures and card then say is read."""

import pytest
import torch

from tests.views.made_up_evidence import HOSTILE
from tests.views.test_patching_figures import N, attention, features, grid, layers, paths
from tracelens.causal.patching_result import PatchingResult
from tracelens.errors import MetricInputError, UnknownNameError
from tracelens.views.widgets.patching import PatchingExplorer
from tracelens.views.widgets.patching_table import Shown

SITES = ("attn_out", "mlp_out")


@pytest.fixture(scope="module")
def several():
    """Repair and damage of two sites by group, and repair by layer."""
    return {
        "repair": grid(sites=SITES),
        "damage": grid(sites=SITES, direction="damage"),
        "layers": layers(),
    }


def seen(live) -> list:
    return [trace for trace in live.data if trace.visible is not False]


def test_what_the_results_have_in_common_is_not_offered(several):
    explorer = PatchingExplorer(several)
    assert set(explorer.facets) == {"direction", "site", "sweep"}
    assert list(explorer.facets["direction"].options) == ["repair", "damage"]
    assert list(explorer.facets["site"].options) == [*SITES, "resid_post"]
    assert PatchingExplorer(layers()).facets == {}


def test_switching_shows_the_other_results_numbers(several):
    explorer = PatchingExplorer(several)
    for direction in ("damage", "repair"):
        explorer.facets["direction"].value = direction
        for site in SITES:
            explorer.facets["site"].value = site
            table = several[direction].table.query("site == @site")
            z = [value for line in explorer.figure.data[1].z for value in line]
            assert z == pytest.approx(table["effect"].tolist())


def test_a_choice_that_rules_out_others_moves_to_the_nearest_and_says_so(several):
    explorer = PatchingExplorer(several)
    explorer.facets["direction"].value = "damage"
    explorer.facets["sweep"].value = "layer"
    assert explorer.facets["direction"].value == "repair"
    assert explorer.facets["site"].value == "resid_post"
    assert "There is no such result for layer" in explorer.message
    explorer.measure.value = "closed"
    assert explorer.message == ""
    assert explorer.figure.data[1].visible is False
    assert list(explorer.figure.data[4].y) == pytest.approx(several["layers"].table["closed"].tolist())


def test_results_alike_are_told_apart_by_their_names():
    explorer = PatchingExplorer({"seed 0": layers(), "seed 1": layers()})
    assert list(explorer.facets["result"].options) == ["seed 0", "seed 1"]


def test_the_measures_are_those_of_the_table():
    made = grid()
    explorer = PatchingExplorer(made)
    for measure in ("closed", "change"):
        explorer.measure.value = measure
        assert [v for line in explorer.figure.data[1].z for v in line] == pytest.approx(made.table[measure].tolist())
    explorer.measure.value = "versus placebo"
    expected = made.table["effect"] - made.table["placebo_effect"]
    assert [v for line in explorer.figure.data[1].z for v in line] == pytest.approx(expected.tolist())
    assert explorer.figure.layout.coloraxis.colorbar.title.text == "versus placebo"
    assert "versus placebo" not in [value for _, value in PatchingExplorer(grid(placebo=False)).measure.options]


def test_versus_placebo_has_the_interval_of_the_paired_difference():
    table = Shown(grid()).table
    assert (table["versus placebo_low"] <= table["versus placebo"]).all()
    assert (table["versus placebo"] <= table["versus placebo_high"]).all()
    # Noise is all that differs where the placebo does the same.
    same = Shown(layers()).table.iloc[0]
    assert same["versus placebo"] == pytest.approx(0)


def test_the_mask_hides_what_is_not_told_apart():
    made = grid()
    explorer = PatchingExplorer(made)
    explorer.mask.value = True
    shown = [value is not None for line in explorer.figure.data[1].z for value in line]
    assert shown == (made.table["p_versus_placebo_adjusted"] < 0.05).tolist()
    assert not all(shown)
    explorer.test.value = "0"
    shown = [value is not None for line in explorer.figure.data[1].z for value in line]
    assert shown == (made.table["p_adjusted"] < 0.05).tolist()


def test_a_cell_shows_its_prompts_and_its_numbers():
    made = grid()
    explorer = PatchingExplorer(made)
    explorer.select(layer=1, group="verb")
    row = made.table.iloc[4]
    assert explorer.arm == 4 == explorer.top.value
    assert f"{row.effect:.3f} [{row.effect_low:.3f}, {row.effect_high:.3f}]" in explorer.card.value
    assert f"{row.placebo_effect:.3f}" in explorer.card.value
    assert f"{N} of {N} prompts usable" in explorer.card.value
    patched = explorer.strip.data[5]
    assert sorted(patched.x) == pytest.approx(sorted(made.patched[4].tolist()))
    moved = made.patched[4] - made.start
    assert list(patched.x) == pytest.approx(made.patched[4][moved.argsort()].tolist())
    # The ring is on the cell.
    assert (explorer.figure.data[6].x, explorer.figure.data[6].y) == ((1,), (1,))


def test_clicks_lists_and_methods_do_the_same():
    explorer = PatchingExplorer(grid())
    explorer._clicked([(1, 2)], explorer._map.cells.get)
    assert explorer.result.rows[explorer.arm] == {"layer": 1, "site": "resid_post", "group": "answer"}
    explorer.top.value = 0
    assert explorer.arm == 0
    explorer._picked([N - 1])
    assert explorer.alone == explorer._rows[N - 1]
    explorer._picked([explorer._rows.index(explorer.alone)])
    assert explorer.alone is None


def test_a_click_moves_the_ring_alone():
    explorer = PatchingExplorer(grid())
    messages = []
    explorer.figure.observe(lambda change: change["new"] and messages.append(change["new"]), "_py2js_update")
    row, column = next(cell for cell, arm in explorer._map.cells.items() if arm != explorer.arm)
    explorer._clicked([(row, column)], explorer._map.cells.get)
    assert [message["style_traces"] for message in messages] == [[6]]
    assert set(messages[0]["style_data"]) == {"x", "y"}
    assert messages[0]["layout_data"] == {}
    ring = explorer.figure.data[-1]
    assert (ring.x, ring.y) == ((column,), (row,))
    assert explorer._make_map().figure.data[-1].x == ring.x


@pytest.mark.parametrize("make", [grid, layers, features])
def test_the_ring_is_where_a_drawn_map_would_have_it(make):
    explorer = PatchingExplorer(make())
    for _, arm in explorer.top.options[:5]:
        explorer.select(arm)
        ring = explorer._make_map().figure.data[-1]
        assert (explorer.figure.data[-1].x, explorer.figure.data[-1].y) == (ring.x, ring.y)


def test_buttons_go_through_the_list():
    explorer = PatchingExplorer(grid())
    arms = [arm for _, arm in explorer.top.options]
    assert (explorer.previous.disabled, explorer.next.disabled) == (True, False)
    explorer.next.click()
    assert explorer.arm == explorer.top.value == arms[1]
    assert not explorer.previous.disabled
    explorer.previous.click()
    explorer.previous.click()
    assert explorer.arm == arms[0]
    explorer.select(arms[-1])
    assert explorer.next.disabled


def test_the_list_has_the_largest_first():
    made = grid()
    explorer = PatchingExplorer(made)
    order = [arm for _, arm in explorer.top.options]
    assert order == made.table["effect"].abs().sort_values(ascending=False).index.tolist()


def with_tokens(made: PatchingResult, **changes) -> PatchingResult:
    from dataclasses import replace

    tokens = (HOSTILE, *[("<user>", " find", " chlorine", "\n")] * (N - 1))
    places = {"object": tuple((2,) for _ in range(N))}
    return replace(made, tokens=tokens, places=places, prompts=("".join(HOSTILE), *made.prompts[1:]), **changes)


def test_one_prompt_has_its_own_effects_and_tokens():
    made = with_tokens(grid("position", (-3, -2, -1)))
    explorer = PatchingExplorer(made)
    explorer.show_prompt(3)
    z = [value for line in explorer.figure.data[1].z for value in line]
    assert z == pytest.approx(made.per_prompt()[:, 3].tolist())
    assert list(explorer.figure.layout.xaxis.ticktext) == ["find", "chlorine <b>object</b>", "↵"]
    assert "no interval and no test" in explorer.line.value
    explorer.show_prompt(None)
    assert "chlorine" not in "".join(explorer.figure.layout.xaxis.ticktext)
    with pytest.raises(UnknownNameError, match="no prompt 99; give 0 to 11"):
        explorer.show_prompt(99)


def test_a_group_is_read_out_for_one_prompt():
    explorer = PatchingExplorer(with_tokens(grid()))
    explorer.show_prompt(1)
    assert "object: chlorine" in list(explorer.figure.layout.xaxis.ticktext)


def test_text_from_outside_stays_text():
    made = with_tokens(grid("position", (-7, -6, -5, -4, -3, -2, -1), precision="<b>int3</b>"))
    explorer = PatchingExplorer({"<i>a</i>": made, "b": with_tokens(grid("position", (-7, -1)))})
    explorer.show_prompt(0)
    explorer.select(explorer.entry.arms[-1])
    # The kernel's words in HTML, and plotly's, which reads tags.
    text = explorer.card.value + explorer.line.value + explorer.figure.to_json() + explorer.strip.to_json()
    assert not [tag for tag in ("<script", "<img", "<i>", "<b>int3") if tag in text.replace("\\u003c", "<")]
    assert "&lt;script" in explorer.card.value
    assert "${1}" not in explorer.strip.to_json()


def test_prompts_without_a_difference_are_counted_and_said():
    made = grid()
    goal = made.goal.clone()
    goal[:2] = made.start[:2]
    from dataclasses import replace

    explorer = PatchingExplorer(replace(made, goal=goal))
    assert "2 of them undetermined" in explorer.line.value
    assert "10 of 12 prompts usable; 2 undetermined" in explorer.card.value
    grey = [colour for colour in explorer.strip.data[5].marker.color if colour == "#8A8F98"]
    assert len(grey) == 2
    explorer.show_prompt(0)
    assert "0/0" in explorer.card.value
    assert "no effect can be said" in explorer.figure.layout.annotations[0].text


def test_prompts_that_lack_the_positions_are_left_out():
    present = torch.ones(6, N, dtype=torch.bool)
    present[0, :4] = False
    explorer = PatchingExplorer(grid(present=present))
    explorer.select(0)
    assert len(explorer.strip.data[5].x) == N - 4
    assert "4 more lack these positions" in explorer.card.value


@pytest.mark.parametrize("kind", [layers, grid, paths, attention, features])
@pytest.mark.parametrize("options", [{}, {"same": True}, {"placebo": False}])
def test_every_kind_of_sweep_is_drawn(kind, options):
    explorer = PatchingExplorer(kind(**options))
    for control in (explorer.measure, explorer.test, explorer.panel):
        for _, value in control.options:
            control.value = value
            assert seen(explorer.figure)
    explorer.show_prompt(1)
    assert explorer.still().to_json()
    assert "nan" not in (explorer.card.value + explorer.line.value + str(explorer)).lower()
    assert explorer.message == ""


def test_axes_beyond_two_are_chosen():
    made = attention(heads=3)
    explorer = PatchingExplorer(made)
    assert [label for label, _ in explorer.panel.options] == ["head 0", "head 1", "head 2"]
    explorer.select(head=2, position=1, key=0)
    assert explorer.panel.value == (2,)
    known = [value for line in explorer.figure.data[1].z for value in line if value is not None]
    assert known == pytest.approx(made.table.query("head == 2")["effect"].tolist())


def test_what_is_not_there_is_refused_with_what_is():
    with pytest.raises(MetricInputError, match="give at least one PatchingResult"):
        PatchingExplorer()
    explorer = PatchingExplorer(grid())
    with pytest.raises(UnknownNameError, match=r"nothing was replaced at \{'layer': 9\}"):
        explorer.select(layer=9)
    with pytest.raises(UnknownNameError, match="row 77 is not of the sweep"):
        explorer.select(77)


def test_tokens_and_places_are_saved_and_files_without_them_load(tmp_path):
    made = with_tokens(grid())
    loaded = PatchingResult.load(made.save(tmp_path / "new.safetensors"))
    assert loaded.tokens == made.tokens
    assert loaded.places == made.places
    import json

    from safetensors.torch import load_file, save_file

    from tracelens.causal.patching_result import KIND

    path = grid().save(tmp_path / "old.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()[KIND])
    del data["tokens"], data["places"]
    save_file(load_file(path), path, {KIND: json.dumps(data)})
    old = PatchingResult.load(path)
    assert old.tokens == ()
    explorer = PatchingExplorer(old)
    explorer.show_prompt(0)
    assert explorer.figure.layout.xaxis.ticktext == ("object", "verb", "answer")
