"""Results of patching: what the table says by hand, and files that come back as they were."""

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tracelens.causal.effects import versus
from tracelens.causal.patching_result import KIND, PatchingResult
from tracelens.errors import MetricInputError, ResultFileError
from tracelens.stats import benjamini_hochberg


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def result(**changes):
    fields = {
        "direction": "repair",
        "metric": "margin",
        "unit": "nats",
        "rows": tuple({"layer": layer, "site": "z", "head": 1} for layer in range(3)),
        "axes": ("layer", "head"),
        "patched": doubles([0, 0, 0, 5], [1, -2, 2, 5], [0.5, 0, 2, 9]),
        "start": doubles(0, 0, 0, 5),
        "goal": doubles(1, -2, 2, 5),
        "placebo": doubles([0, 0, 0, 5], [0.1, 0, 0, 5], [0, 0, 0, 5]),
        "placebo_kind": "displacement",
        "present": torch.tensor([[True] * 4, [True] * 4, [True, False, True, True]]),
        "prompts": ("a", "b", "c", "d"),
        "settings": {"seed": 3, "groups": ["object"], "memory_budget": None},
    }
    return PatchingResult(**(fields | changes))


def test_the_table_by_hand():
    table = result().table
    assert table["effect"].tolist() == pytest.approx([0, 1, (0.5 + 4) / 5])
    assert table["change"].tolist() == pytest.approx([0, 5 / 3, 2.5 / 2])
    assert table["ratio_of_means"].tolist() == pytest.approx([0, 1, 2.5 / 3])
    assert table["placebo_effect"].tolist() == pytest.approx([0, 0.1 / 9, 0])
    assert table["n_usable"].tolist() == [3, 3, 2]
    assert table["n_prompts"].tolist() == [4, 4, 3]
    assert table["p_versus_placebo"][0] == 1
    assert (table["p_adjusted"] >= table["p_value"]).all()
    assert list(table)[:3] == ["layer", "site", "head"]


def test_prompts_that_lack_a_position_do_not_water_down_its_effect():
    whole, part = (result(present=present) for present in (None, result().present))
    assert whole.table["effect"][2] == pytest.approx(4.5 / 9)
    assert part.table["effect"][2] == pytest.approx(4.5 / 5)
    assert part.per_prompt()[2].isnan().tolist() == [False, True, False, True]
    assert part.effects.effect[2].low >= 0.5


def test_order_and_words():
    found = result()
    assert found.top(2)["layer"].tolist() == [1, 2]
    assert found.n_undetermined == 1
    assert repr(found) == (
        "PatchingResult(repair of the margin by layer, head: 3 arms, 4 prompts, 1 of them undetermined)"
    )


def test_nothing_to_bring_back():
    same = result(goal=doubles(0, 0, 0, 5))
    assert same.n_undetermined == 4
    assert same.table[["effect", "p_value", "p_adjusted", "placebo_effect"]].isna().all(axis=None)
    assert (same.table["n_usable"] == 0).all()
    assert len(same.top(2)) == 2
    json.dumps(same.to_dict(), allow_nan=False)


@pytest.mark.parametrize("changes", [{}, {"placebo": None, "present": None, "placebo_kind": ""}])
def test_files_come_back_as_they_were(tmp_path, changes):
    before = result(**changes)
    path = before.save(tmp_path / "new" / "result.safetensors")
    after = PatchingResult.load(path)
    assert [p.name for p in path.parent.iterdir()] == ["result.safetensors"]
    assert after.table.equals(before.table)
    assert (after.rows, after.axes, after.prompts) == (before.rows, before.axes, before.prompts)
    assert after.settings == before.settings
    assert after.to_dict() == before.to_dict()


def test_as_json():
    data = json.loads(json.dumps(result(patched=doubles([0, 0, 0, math.nan], [1, -2, 2, 5], [1, 1, 1, 1])).to_dict()))
    assert data["patched"][0] == [0, 0, 0, None]
    assert data["start"] == [0, 0, 0, 5]
    assert data["rows"][1] == {"layer": 1, "site": "z", "head": 1}
    assert data["n_undetermined"] == 1


def test_other_files_are_refused(tmp_path):
    tensors = {"patched": doubles([1.0])}
    plain, pickled, older = (tmp_path / name for name in ("plain", "pickled", "older"))
    save_file(tensors, plain)
    pickled.write_bytes(pickle.dumps(tensors))
    save_file(tensors, older, {KIND: json.dumps({KIND: 99})})
    for path in (plain, pickled, tmp_path / "none"):
        with pytest.raises(ResultFileError, match="is not a tracelens_patching file that Tracelens wrote"):
            PatchingResult.load(path)
    with pytest.raises(ResultFileError, match="is of version 99; this Tracelens reads version 1"):
        PatchingResult.load(older)


def test_shapes_are_checked():
    with pytest.raises(MetricInputError, match=r"patched has shape \[3, 4\]; expected \[arm, prompt\], \[2, 4\]"):
        result(rows=result().rows[:2])


def test_ps_are_adjusted_over_all_arms_that_have_one():
    table = result().table
    p = {
        arm: versus(
            doubles(*result().patched[arm].tolist())[None][:, rows],
            result().placebo[arm][None][:, rows],
            result().start[rows],
            result().goal[rows],
        ).item()
        for arm, rows in enumerate(([0, 1, 2], [0, 1, 2], [0, 2]))
    }
    assert table["p_versus_placebo"].tolist() == pytest.approx([p[0], p[1], p[2]])
    for name in ("p_value", "p_versus_placebo"):
        adjusted = benjamini_hochberg(torch.tensor(table[name].to_numpy()))
        assert table[f"{name}_adjusted".replace("p_value_", "p_")].tolist() == pytest.approx(adjusted.tolist())
    assert not table["p_adjusted"].equals(table["p_value"])


def test_what_is_called_equal_is_up_to_the_user():
    found = result(min_difference=1.5)
    assert found.n_undetermined == 2
    table = found.table
    assert table["n_usable"].tolist() == [2, 2, 1]
    assert table["effect"].tolist() == pytest.approx([0, 1, 1])
    assert math.isnan(table["effect_low"][2])
    # Two prompts flip signs in four ways, two of which are as far from 0.
    assert table["p_versus_placebo"].tolist() == pytest.approx([1, 0.5, 1], abs=0.02)
    assert found.per_prompt()[1].isnan().tolist() == [True, False, False, True]
