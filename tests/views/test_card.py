"""What a feature's card says: the table's numbers beside their intervals and controls, and nothing that runs."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.views.made_up import made_up_report
from tests.views.made_up_evidence import S, report_with_evidence
from tests.views.made_up_large import large_report
from tracelens.audit_report import INTERVAL_COLUMNS
from tracelens.errors import UnknownNameError
from tracelens.metrics.cpfr import fidelity
from tracelens.stats import wilson
from tracelens.views.widgets.card import card_style, feature_card, partners
from tracelens.views.widgets.card_numbers import OVER_PROMPTS


class Elements(HTMLParser):
    """Names of elements, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def row(html: str, title: str) -> list[str]:
    """The cells of one statistic."""
    found = re.search(rf"<tr><th[^>]*><span>{re.escape(title)}</span></th>(.*?)</tr>", html)
    assert found, title
    return [Elements(cell).text for cell in re.findall(r"<td[^>]*>(.*?)</td>", found[1])]


def test_the_table_beside_its_controls():
    report = large_report(500)
    worst = report.features.iloc[0]
    html = feature_card(report, worst["site"], int(worst["feature"]))
    here = report.features[report.features["site"] == worst["site"]]
    value, interval, noise, median = row(html, "fidelity")
    assert (value, interval) == (
        f"{worst['fidelity']:.3f}",
        f"[{worst['fidelity_low']:.3f}, {worst['fidelity_high']:.3f}]",
    )
    draws = f"({worst['fidelity_noise_low']:.3f} to {worst['fidelity_noise_high']:.3f})"
    assert noise == f"{worst['fidelity_noise']:.3f}{draws}"
    assert median == f"{here['fidelity'].median():.3f}"
    muted = wilson(round(worst["muting_rate"] * worst["n_active"]), int(worst["n_active"]))
    assert row(html, "muting rate")[:2] == [f"{muted.value:.3f}", f"[{muted.low:.3f}, {muted.high:.3f}]"]
    for title, column in (("correlation", "correlation"), ("drift", "drift"), ("retention", "retention")):
        assert row(html, title)[0] == f"{worst[column]:.3f}"
    assert f"Rank 1 of {len(here)} live features" in Elements(html).text


def test_intervals_are_those_of_the_table():
    report = large_report(500)
    of = report.features.iloc[40]
    html = feature_card(report, *key(report, 40))
    for name in ("fidelity", "correlation", "drift", "retention"):
        assert row(html, name)[:2] == [f"{of[name]:.3f}", f"[{of[f'{name}_low']:.3f}, {of[f'{name}_high']:.3f}]"]
    assert html.count(OVER_PROMPTS) == 4
    assert "those of rates over tokens" in html


def test_a_report_without_intervals_has_that_of_the_correlation_over_tokens():
    report = large_report(500)
    report = replace(report, features=report.features.drop(columns=INTERVAL_COLUMNS))
    html = feature_card(report, *key(report, 40))
    low, high = map(float, re.findall(r"-?\d\.\d+", row(html, "correlation")[1]))
    assert low < float(row(html, "correlation")[0]) < high
    assert [row(html, name)[1] for name in ("fidelity", "drift", "retention")] == ["—"] * 3
    assert row(html, "fidelity")[2] == f"{report.features.iloc[40]['fidelity_noise']:.3f}"
    assert "those of rates and of the correlation over tokens" in html


def test_rates_follow_from_the_sums():
    report = large_report(500, seed=3)
    site, feature = key(report, 10)
    column = feature + next(iter(report.sites.values())) * (site != next(iter(report.sites)))
    html = feature_card(report, site, feature)
    m, n = report.moments, float(report.moments.n[0])
    assert row(html, "fires, reference")[0] == f"{float(m.n_ref[0, column]) / n:.3f}"
    assert row(html, "fires, quantized")[0] == f"{float(m.n_quant[0, column]) / n:.3f}"
    assert row(html, "mean, quantized")[0] == f"{float(m.sum_quant[0, column]) / n:.3g}"


def test_how_well_it_tells_its_behaviour():
    report = report_with_evidence()
    assert "AUROC 0.950 on prompts held out" in Elements(feature_card(report, S, 3)).text
    assert "In no fingerprint" in feature_card(report, S, 7)


def test_tokens_margins_and_flips():
    text = Elements(feature_card(report_with_evidence(), S, 3)).text
    assert "prompt 0, refusal (safety), flips: refuse→comply; margin +0.50 → -0.25 nats" in text
    assert "prompt 1, refusal (baseline), no flip" in text
    assert "#5 (+0.62)" in text.replace("\xa0", " ")
    assert "sorry" in text
    assert "-0.70" in text


def test_text_from_outside_stays_text():
    report = report_with_evidence(
        label="<img src=x onerror=alert(1)>",
        features=[(3, '<script>"x"</script>', 0.6, 0.3), (7, "capability", 0.1, 0.95)],
    )
    html = feature_card(report, S, 3)
    found = Elements(html)
    assert not {"script", "img", "textarea", "b-no"} & set(found.names)
    assert not [name for name in found.attributes if name.startswith("on")]
    for hostile in ("<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", '<script>"x"</script>'):
        assert hostile in found.text
    assert "line↵break" in found.text


def test_partners_are_those_of_the_report_before_those_of_lower_thresholds():
    found = partners(report_with_evidence(), S, 3)
    assert [(other, smeared) for other, _, _, smeared in found] == [(6, True), (7, False)]
    assert "below the audit’s thresholds" in feature_card(report_with_evidence(), S, 7)


def test_without_evidence_a_sentence_says_how_to_get_it():
    html = feature_card(made_up_report(), S, 3)
    assert "evidence_prompts=" in html
    assert row(html, "fidelity")[0] == "0.600"


def test_a_feature_that_is_not_described():
    html = feature_card(report_with_evidence(), S, 4)
    assert "3 of the 5 live features are described" in html
    assert "evidence_features=" in html
    assert row(html, "fidelity")[0] == "0.900"


def test_a_feature_that_is_not_live_has_what_its_sums_give():
    report = large_report(200)
    rows = report.features.iloc[1:].reset_index(drop=True)
    dead = report.features.iloc[0]
    html = feature_card(replace(report, features=rows), dead["site"], int(dead["feature"]))
    assert "Not live" in html
    assert row(html, "fidelity")[:3] == [f"{float(dead['fidelity']):.3f}", "—", "—"]
    offset = int(dead["feature"]) + 100 * (dead["site"] != next(iter(report.sites)))
    assert row(html, "fidelity")[0] == f"{float(fidelity(report.moments)[0, offset]):.3f}"


def test_numbers_that_are_none_are_dashes():
    report = large_report(50)
    table = report.features.assign(correlation=np.nan, fidelity_noise=np.nan, p_shift=np.nan, survival="")
    html = feature_card(replace(report, features=table), *key(report, 0))
    assert row(html, "correlation")[:2] == ["—", "—"]
    assert row(html, "fidelity")[2] == "—"
    assert "constant in the reference" in html
    assert "nan" not in Elements(html).text


def test_unknown_features_are_named_with_what_there_is():
    with pytest.raises(
        UnknownNameError, match=r"unknown site of this report 'nowhere'. Known: blocks.1.hook_resid_post"
    ):
        feature_card(made_up_report(), "nowhere", 1)
    with pytest.raises(
        UnknownNameError, match=r"unknown feature #8 of blocks.1.hook_resid_post; its SAE has 8 \(0 to 7\)"
    ):
        feature_card(made_up_report(), S, 8)


def test_the_style_has_no_address():
    assert "http" not in card_style()
    assert card_style().startswith("<style>")


def key(report, place: int) -> tuple[str, int]:
    found = report.features.iloc[place]
    return found["site"], int(found["feature"])
