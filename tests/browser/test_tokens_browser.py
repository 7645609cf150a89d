"""Tokens and attention in a real JupyterLab: CircuitsVis without a network, drawn once per page, in place, in both themes."""

import pytest

START = """
import numpy as np
from tests.views.hostile import HOSTILE
from tracelens.views.widgets.attention import AttentionPair, attention_widget
from tracelens.views.widgets.tokens import tokens_widget

def causal(seed, *shape):
    raw = np.exp(np.random.default_rng(seed).normal(size=shape)) * np.tril(np.ones(shape[-2:]))
    return raw / raw.sum(-1, keepdims=True)
"""
TOKENS = "tokens = tokens_widget(['how', ' do', ' i', '\\n', ' pick'], [0, 1, -2, 0.5, 3]); tokens"
KINDS = "kinds = tokens_widget(['one', ' two'], [[1, 2, 3], [3, 2, 1]], labels=['a', 'b', 'c']); kinds"
HEADS = "heads = attention_widget(); heads.show(['a', 'b', 'c'], causal(0, 4, 3, 3), ['first', 'second', 'third', 'last']); heads"
PAIR = """
pair = AttentionPair()
r = causal(1, 3, 4, 24, 24); q = r.copy(); q[1, 2] = causal(2, 24, 24); q[1, 0] = (r[1, 0] + causal(3, 24, 24)) / 2
pair.show([f' t{i}' for i in range(24)], r, q); pair
"""
PICTURE = "document.querySelectorAll('.tracelens-attention-pair canvas')[{}].toDataURL()"


@pytest.fixture(scope="module")
def shown(lab):
    page = lab.show(START, TOKENS, KINDS, HEADS, PAIR, size=(1366, 1600))
    page.wait("document.querySelectorAll('.tracelens-attention-pair canvas').length === 3", 30)
    page.wait("document.querySelectorAll('.tracelens-attention canvas').length === 5", 30)
    page.wait("document.querySelectorAll('.colored-tokens').length === 2", 30)
    return page


def test_all_is_drawn_without_a_network(shown, lab):
    shown.no_widget_failed()
    assert lab.blocked == []
    assert lab.server.sockets() == []
    assert shown.text(".tracelens-tokens .colored-tokens").replace("\xa0", " ").split() == ["how", "do", "i↵", "pick"]
    assert "first" in shown.text(".tracelens-attention")
    assert not shown.overflows(".tracelens-attention-pair")
    assert shown.height(".tracelens-attention-pair") < 620


def test_the_library_ran_once(shown):
    """However many widgets start together: they share one load, and every one its own React root."""
    assert shown.value("globalThis.__tracelens_circuitsvis.libraries.size") == 1
    assert shown.count(".tracelens-circuitsvis > div[id^=tracelens-circuitsvis]") == 6


def test_a_tooltip_has_the_value(shown):
    shown.page.hover(".tracelens-tokens .colored-tokens > span >> nth=2")
    shown.wait("document.querySelector('.tracelens-tokens').innerText.includes('-2')")


def test_other_tokens_are_drawn_in_place(shown):
    shown.value("window.place = document.querySelector('.tracelens-tokens .colored-tokens'), 1")
    shown.does("tokens.show([' other', ' words'], [1.0, 2.0])")
    shown.wait_text(".tracelens-tokens", "other")
    assert shown.value("window.place === document.querySelector('.tracelens-tokens .colored-tokens')")
    assert "pick" not in shown.text(".tracelens-tokens")
    shown.does("kinds.show([' three'], [[7.0, 8.0, 9.0]])")
    shown.wait("document.body.innerText.includes('three')")


def test_another_head_is_drawn(shown):
    assert shown.ask("(pair.layer.value, pair.head.value)") == [1, 2]
    for index in (1, 2, 0):
        shown.value(f"window.before = {PICTURE.format(1)}, 1")
        shown.page.locator(".tracelens-head select").select_option(index=index)
        shown.wait(f"{PICTURE.format(1)} !== window.before")


def test_identical_patterns_have_an_empty_difference(shown):
    shown.choose(".tracelens-layer", "0 (up to 0.000)")
    shown.wait_text(".tracelens-attention-pair", "The two patterns are the same.")
    shown.wait(f"{PICTURE.format(0)} !== {PICTURE.format(2)}")


def test_nothing_white_is_left_in_the_dark(shown):
    shown.theme(dark=True)
    style = "getComputedStyle(document.querySelector('.tracelens-tokens .tracelens-circuitsvis > div')).filter"
    shown.wait(f"{style}.startsWith('invert')")
    shown.theme(dark=False)
    shown.wait(f"{style} === 'none'")


def test_a_closed_widget_leaves_the_others(shown):
    shown.does("kinds.box.close(); kinds._view.close()")
    shown.does("tokens.show([' still', ' here'], [1.0, 2.0])")
    shown.wait_text(".tracelens-tokens", "still")


def test_tokens_are_text(lab):
    show = "hostile = tokens_widget(list(HOSTILE.values()), np.arange(len(HOSTILE))); hostile"
    both = "tokens_widget(list(HOSTILE.values()), np.eye(len(HOSTILE)), labels=list(HOSTILE.values()))"
    many = "v = attention_widget(); v.show(list(HOSTILE.values()), causal(0, 2, len(HOSTILE), len(HOSTILE)), ['<b>', '<img/src=x>']); v"
    with lab.show(START, show, both, many, size=(1366, 1600)) as page:
        page.wait("document.querySelectorAll('.colored-tokens').length === 2", 30)
        page.wait("document.querySelectorAll('.tracelens-attention canvas').length === 3", 30)
        page.no_widget_failed()
        text = (
            page.value("document.querySelector('.colored-tokens').textContent")
            .replace("\u2060", "")
            .replace("\xa0", " ")
        )
        from tests.views.hostile import HOSTILE
        from tracelens.views.escaping import LONGEST, visible

        for token in HOSTILE.values():
            assert visible(token, LONGEST) in text
        assert page.count(".colored-tokens :is(script, img, svg, a, b, i)") == 0
        for index in range(page.count(".colored-tokens >> nth=0 >> :scope > span")):
            page.page.locator(".colored-tokens").first.locator(":scope > span").nth(index).hover()
        assert page.value("window.hacked") is None
        assert not lab.blocked


def test_it_comes_back_with_its_kernel(lab):
    with lab.show(START, TOKENS, kernel="own") as page:
        page.wait_text(".colored-tokens", "pick")
        page.save()
        path = page.path
    with lab.open(path, kernel="own") as again:
        again.wait_text(".colored-tokens", "pick", 30)
    lab.forget(path)
