"""What is shipped about damage to the organism's features: complete, in agreement with its page, and still what is measured."""

import json
import math
from pathlib import Path

import pytest

from tracelens import OptimizationAuditor, load_saes
from tracelens.datasets import get_dataset
from tracelens.loading import open_checkpoint
from tracelens.organism import damage
from tracelens.organism.damage_page import to_markdown
from tracelens.precision.calibration_prompts import read_calibration

FOLDER = Path(damage.__file__).parent
SET_CONTROLS = {"random", "labels"}


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((FOLDER / "damage.json").read_text())


def estimates(value):
    """Every [value, low, high] in the card."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from estimates(inner)
    elif isinstance(value, list) and len(value) == 3 and all(x is None or isinstance(x, float) for x in value):
        yield value


def test_every_family_is_there_at_every_width_with_every_control(recorded):
    assert recorded["families"] == {name: list(found) for name, found in (damage.LADDERS | damage.FORMATS).items()}
    assert sorted(recorded["entries"]) == sorted(name for names in recorded["families"].values() for name in names)
    for family in ("int{}", "int{}-g32", "gptq-int{}", "gptq-int{}-g32"):
        assert {family.format(bits) for bits in (8, 4, 3, 2)} <= recorded["entries"].keys()
    assert "nf4" in recorded["entries"]
    for name, e in recorded["entries"].items():
        assert set(e["controls"]) == {"noise", "permuted", *SET_CONTROLS}, name
        for control, found in e["controls"].items():
            sets = {"safety"} if control in SET_CONTROLS else {"safety", "capability"}
            assert set(found["cpfr"]) == set(found["shares"]) == sets
            assert {"flips", "kl", "perplexity"} <= set(found) or control in SET_CONTROLS
        assert {"against_capability", "against_noise", "against_permuted", "flips_against_noise"} == set(e["contrasts"])
        assert e["relation"] in ("worse than noise of the same size", "like noise", "better than noise")
    assert {"safety", "capability"} == set(recorded["floor"]["cpfr"])
    assert (FOLDER / "damage.json").stat().st_size < 150_000


def test_every_number_is_one_and_every_interval_has_two_ends(recorded):
    found = list(estimates(recorded))
    assert len(found) > 1000
    assert all(None not in estimate and estimate[1] <= estimate[2] for estimate in found)
    # An interval over prompts of a single model holds its value.
    for name, e in recorded["entries"].items():
        for value, low, high in (
            e["flips"],
            e["kl"],
            *e["shares"]["safety"].values(),
            *e["shares"]["capability"].values(),
        ):
            assert low <= value <= high, name


def test_thresholds_count_every_live_feature_once_and_agree_with_the_audits(recorded):
    assert recorded["muting"].keys() == damage.LADDERS.keys()
    for name, found in recorded["muting"].items():
        widest = damage.LADDERS[name][0]
        for kind, counts in found["first_silent"].items():
            assert sum(counts.values()) - counts["came_back"] == recorded["live"][kind]
            for spec in damage.LADDERS[name]:
                share = recorded["entries"][spec]["shares"][kind]["muted"][0]
                assert found["shares"][f"{spec} {kind}"][0] == pytest.approx(share, abs=1e-4)
            # What is silent at the most bits fell silent there.
            share = recorded["entries"][widest]["shares"][kind]["muted"][0]
            assert counts[widest] == pytest.approx(share * recorded["live"][kind], abs=0.1)


def test_the_page_is_made_of_the_numbers(recorded):
    assert (FOLDER / "DAMAGE.md").read_text() == to_markdown(recorded)
    assert (FOLDER / "damage.json").read_text() == damage.to_json(recorded)


def test_no_audited_prompt_is_among_the_calibration_prompts(recorded):
    prompts = damage.calibration_prompts()
    assert len(prompts) == len(set(prompts)) == recorded["calibration"]["prompts"]
    assert not set(prompts) & set(get_dataset(damage.DATASET).prompts)
    # GPTQ was fitted to just these.
    now = read_calibration(prompts, open_checkpoint("organism")).to_dict()
    assert now["sha256_token_ids"] == recorded["calibration"]["sha256_token_ids"]


def test_the_same_is_measured_now(recorded, organism):
    """Without controls, which nothing of this depends on. Sums that are added in another order may move a token or two across an SAE's
    threshold: .005 of CPFRs, one safety feature for shares, one prompt for flips, half a per cent of KL and perplexity."""
    auditor = OptimizationAuditor(organism, load_saes("organism"))
    (report,) = auditor.run_sweep(damage.DATASET, ["int4"], controls=False).reports.values()
    now, known = damage.entry(report), recorded["entries"]["int4"]
    live = damage._live(report)
    assert live == recorded["live"]
    for name in ("safety", "capability"):
        assert now["cpfr"][name] == pytest.approx(known["cpfr"][name], abs=0.005)
        for share, estimate in now["shares"][name].items():
            assert estimate == pytest.approx(known["shares"][name][share], abs=1 / live["safety"] + 1e-4), (name, share)
    assert abs(now["flips"][0] - known["flips"][0]) * recorded["prompts"] < 1.01
    for name in ("kl", "perplexity"):
        assert math.isclose(now[name][0], known[name][0], rel_tol=0.005)
    assert (
        now["contrasts"]["against_capability"]["significant"] == known["contrasts"]["against_capability"]["significant"]
    )
