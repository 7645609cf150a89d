import re
import socket
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.views.made_up_evidence import HOSTILE, S, made_up_evidence
from tracelens.auditing.evidence import Merged, TokenTrace
from tracelens.errors import MetricInputError, MissingLibraryError
from tracelens.views import token_html
from tracelens.views.escaping import LONGEST, in_figure, in_html, visible
from tracelens.views.style import QUANTIZED, REFERENCE
from tracelens.views.widgets import attention, circuitsvis
from tracelens.views.widgets.attention import AttentionPair, attention_widget, total_variation
from tracelens.views.widgets.tokens import MOST, tokens_widget


class Fragment(HTMLParser):
    """What a browser makes of HTML: its text, the tags it opens, and tooltips."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.titles, self.open = "", [], [], []
        self.feed(html)
        assert not self.open, "tags are closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are closed in order"

    def handle_data(self, data):
        self.text += data


def tints(html: str) -> list[float]:
    return [float(alpha) for alpha in re.findall(r'style="background:rgba\([^)]*, ([\d.]+)\)', html)]


def test_text_is_shown_character_by_character():
    assert visible("a\nb\x00c\u2028d\u202ee\ud800") == "a↵b␀c↵d⟨U+202E⟩e\ufffd"
    assert visible("👩‍👧 שלום é") == "👩‍👧 שלום é", "what can be seen stays as it is"
    assert visible("x" * 500, 10) == "x" * 10 + "… (500 characters)"
    assert in_html("<b>\"'&") == "&lt;b&gt;&quot;&#x27;&amp;"


def test_text_in_a_figure_is_no_tag_no_template_and_no_formula():
    shown = in_figure('<b>"$x$" %{y} &lt;')
    assert shown == '&lt;b&gt;"&#36;x&#36;" %&#123;y} &amp;lt;'
    assert "&quot;" not in in_figure('"'), "which plotly would show as it is"


@pytest.mark.parametrize("make", [
    lambda t: token_html.strip(t, np.arange(len(t)), colour=REFERENCE, title=t[0]),
    lambda t: token_html.paired_strips(TokenTrace(0, tuple(t), np.arange(1.0 * len(t)), np.ones(len(t))), text=t[0]),
    lambda t: token_html.merged_tokens([Merged(0, i, tuple(t), (1.0, 0.0), (1.0, 1.0)) for i in range(len(t))], (t[0], t[5])),
    lambda t: token_html.token_list([(token, 0.5) for token in t]),
], ids=["strip", "paired", "merged", "list"])  # fmt: skip
def test_tokens_are_text_in_all_html(make):
    found = Fragment(make(HOSTILE))
    assert set(found.tags) <= {"div", "span", "br", "i", "bdi", "small"}
    for token in HOSTILE:
        assert visible(token) in found.text.replace("↵\n", "↵")


def test_a_strip_tints_by_value_and_says_it():
    html = token_html.strip(["a", " b", "c", "d"], [0.0, 1.0, 2.0, -1.0], colour=QUANTIZED)
    low, high, negative = tints(html)
    assert low < high == token_html.DARKEST
    assert negative == low
    assert "underline" in html.split("c</span>")[1]
    found = Fragment(html)
    assert found.text == "a bcd"
    assert found.titles == ["1", "2", "-1"]
    assert tints(token_html.strip(["a"], [1.0], colour=QUANTIZED, top=2.0))[0] < token_html.DARKEST


def test_a_strip_without_values_or_with_unknown_ones():
    assert Fragment(token_html.strip([], [], colour=QUANTIZED)).text == ""
    assert tints(token_html.strip(["a"], [0.0], colour=QUANTIZED)) == []
    assert Fragment(token_html.strip(["a"], [float("nan")], colour=QUANTIZED)).titles == ["not measured"]


def test_both_models_are_on_one_scale_and_marked():
    trace = TokenTrace(0, ("same", "gone", "new", "less"), np.array([1.0, 2.0, 0, 4]), np.array([1.0, 0, 2.0, 2]))
    html = token_html.paired_strips(trace, margins=(0.5, -0.25))
    same_r, same_q, gone, new, less_r, less_q = tints(html)[2:]
    assert same_r == same_q < gone == new == less_q < less_r
    found = Fragment(html)
    assert "margin +0.50 → -0.25 nats" in found.text
    assert found.titles[1:3] == ["reference 2, quantized 0: falls silent", "reference 0, quantized 2: newly fires"]
    assert html.count("tl-gone") == html.count("tl-new") == 1
    for word in ("reference, above", "quantized, below", "full tint = 4", "∅ falls silent", "+ newly fires"):
        assert word in found.text


def test_marks_are_explained_only_where_there_are_any():
    html = token_html.paired_strips(TokenTrace(0, ("a",), np.ones(1), np.ones(1)))
    assert "silent" not in html
    assert "newly" not in html


def test_the_tokens_that_matter_are_shown_of_a_long_prompt():
    values = np.zeros(1000)
    values[700] = 1.0
    found = Fragment(token_html.strip([f" t{i}" for i in range(1000)], values, colour=QUANTIZED))
    assert " t700" in found.text
    assert found.text.count(" t") == token_html.MOST + 2  # two sentences say what is left out
    before, after = (int(n) for n in re.findall(r"… (\d+) tokens", found.text))
    assert before + token_html.MOST + after == 1000
    assert before < 700 - token_html.AROUND


def test_text_runs_in_its_own_direction():
    trace = TokenTrace(0, ("שלום", " hello"), np.ones(2), np.ones(2))
    assert 'dir="rtl"' in token_html.paired_strips(trace)
    assert 'dir="ltr"' in token_html.paired_strips(replace(trace, tokens=("123", " hello")))


def test_merged_tokens_say_both_activations():
    html = token_html.merged_tokens(made_up_evidence().merged(S, 3, 6), ("#3", "#6"))
    assert "#3: 1.50 → 1.50" in html
    assert "#6: 0.00 → 1.20" in html


def test_words_without_spaces_stand_apart():
    html = token_html.merged_tokens([Merged(0, 1, ("give", "me", "tips"), (1.0, 0.0), (1.0, 1.0))])
    assert '<span>give</span><span class="tl-o">me</span><span>tips</span>' in html
    assert 'class="tl-t tl-g"' in html
    assert ".tl-g > span { display: inline-block; padding: 0 1.5px;" in token_html.css()


# CircuitsVis


def test_no_network_is_asked_for(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was tried"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    view = tokens_widget(HOSTILE, np.arange(len(HOSTILE)))
    view._repr_mimebundle_()
    assert "circuitsvis" not in sys.modules, "it is read, not imported"


def test_the_bundle_is_sent_once_per_kernel():
    views = [tokens_widget(["a"], [1.0])._view for _ in range(3)]
    assert len({view.host for view in views}) == 1
    sizes = [len(str(view.get_state())) for view in views]
    assert max(sizes) < 20_000
    circuitsvis._host.close()
    assert tokens_widget(["a"], [1.0])._view.host != views[0].host


def test_without_circuitsvis_the_error_names_the_fix(monkeypatch):
    monkeypatch.setattr(circuitsvis, "find_spec", lambda name: None)
    monkeypatch.setattr(circuitsvis, "_host", None)
    circuitsvis._packed.cache_clear()
    with pytest.raises(MissingLibraryError, match=r"pip install .*circuitsvis"):
        tokens_widget(["a"], [1.0])
    assert "a" in token_html.strip(["a"], [1.0], colour=QUANTIZED)
    circuitsvis._packed.cache_clear()


def test_tokens_and_values_reach_the_component():
    view = tokens_widget(["a", "b\n"], [1.0, -2.0])
    props = view._view.props
    assert props["tokens"] == ["a", "b↵\n"]
    assert props["values"] == [1.0, -2.0]
    assert (props["minValue"], props["maxValue"]) == (-2.0, 2.0)
    view.show(["c"], [float("nan")])
    assert view._view.props["values"] == [0.0]
    assert "1 values that are not numbers" in view._note.value
    kinds = tokens_widget(["a", "b"], [[1.0, 2.0], [3.0, 4.0]], labels=["p", "q"])
    assert kinds._view.component == "ColoredTokensMulti"
    assert kinds._view.props["labels"] == ["p", "q"]


def test_many_tokens_are_cut_and_it_says_so():
    view = tokens_widget(["a"] * 2000, np.ones(2000))
    assert len(view._view.props["tokens"]) == MOST
    assert "first 512 of 2,000" in view._note.value
    assert len(tokens_widget(["x" * 10_000], [1.0])._view.props["tokens"][0]) < LONGEST + 30


@pytest.mark.parametrize(
    ("tokens", "values", "said"),
    [(["a"], [1.0, 2.0], "shape [2] for 1 tokens"), (["a"], [[[1.0]]], "shape [1, 1, 1]")],
)
def test_values_that_do_not_fit(tokens, values, said):
    with pytest.raises(MetricInputError, match=re.escape(said)):
        tokens_widget(tokens, values)


def causal(seed: int, *shape: int) -> np.ndarray:
    """Random causal attention patterns, [..., query, key]."""
    raw = np.exp(np.random.default_rng(seed).normal(size=shape)) * np.tril(np.ones(shape[-2:]))
    return raw / raw.sum(-1, keepdims=True)


def test_total_variation_by_hand():
    p = np.array([[[1.0, 0.0], [0.5, 0.5]]])
    q = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    assert total_variation(p, q) == pytest.approx([0.25])
    a, b = causal(0, 3, 4, 6, 6), causal(1, 3, 4, 6, 6)
    assert np.allclose(total_variation(a, b), total_variation(b, a))
    assert (total_variation(a, a) == 0).all()
    assert ((total_variation(a, b) > 0) & (total_variation(a, b) < 1)).all()


def test_the_head_that_differs_most_comes_first():
    reference = causal(0, 3, 4, 6, 6)
    quantized = reference.copy()
    quantized[1, 2] = causal(5, 6, 6)
    quantized[1, 0] = 0.9 * reference[1, 0] + 0.1 * causal(6, 6, 6)
    pair = AttentionPair()
    pair.show(["t"] * 6, reference, quantized, names=["a", "b", "c"])
    assert pair.layer.value == 1
    assert [value for _, value in pair.head.options][:2] == [2, 0]
    assert pair.head.value == 2
    shown = [np.array(view.props["attention"]) for view in pair._views]
    assert np.allclose(shown[0], reference[1, 2], atol=1e-4)
    assert np.allclose(shown[2], quantized[1, 2] - reference[1, 2], atol=1e-4)
    pair.layer.value = 0
    assert pair.distances[0].max() == 0
    assert "the same" in pair._note.value


def test_an_earlier_prompt_leaves_nothing_behind():
    pair = AttentionPair()
    pair.show(["t"] * 6, causal(0, 3, 4, 6, 6), causal(1, 3, 4, 6, 6))
    pair.layer.value = 2
    pair.show(["u"] * 3, causal(2, 1, 2, 3, 3), causal(3, 1, 2, 3, 3))
    assert pair.layer.value == 0
    assert len(pair.head.options) == 2
    assert {len(view.props["tokens"]) for view in pair._views} == {3}


def test_long_prompts_and_many_heads_are_cut_and_it_says_so():
    view = attention_widget()
    view.show(["t"] * 512, causal(0, 12, 512, 512))
    shown = np.array(view._view.props["attention"])
    assert shown.size <= attention.MOST_CELLS
    assert shown.shape[1:] == (attention.MOST_TOKENS,) * 2
    for said in ("last 64 of 512 tokens", f"first {len(shown)} of 12 heads"):
        assert said in view._note.value


@pytest.mark.parametrize(
    ("patterns", "said"),
    [(np.zeros((2, 3, 4)), "expected [head, 3, 3]"), (np.full((1, 3, 3), np.nan), "not numbers")],
)
def test_patterns_that_do_not_fit(patterns, said):
    with pytest.raises(MetricInputError, match=re.escape(said)):
        attention_widget().show(["a", "b", "c"], patterns)
    with pytest.raises(MetricInputError, match="the same"):
        AttentionPair().show(["a"], np.zeros((1, 1, 1, 1)), np.zeros((1, 2, 1, 1)))
