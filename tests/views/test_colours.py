"""Colours that must be told apart are, with each kind of colour blindness: CIEDE2000 after simulating it (Machado et al. 2009)."""

from itertools import combinations

import numpy as np
import pytest

from tracelens.views import style

# Machado, Oliveira & Fernandes 2009, table 1, severity 1.0; for linear RGB.
MACHADO = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "none": np.eye(3).tolist(),
}
TOLD_APART = 10.0
"""CIEDE2000 between colours that nothing but colour tells apart: some ten just noticeable differences."""
HELPED = 5.0
"""Between colours of lines and bands that a dash, a marker or a place of its own tells apart too."""


def lab(colour: str, kind: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as someone with this kind of sight sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(MACHADO[kind]) @ linear, 0, 1)
    xyz = (
        np.array(
            [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
        )
        @ linear
    )
    f = xyz / [0.95047, 1.0, 1.08883]
    f = np.where(f > (6 / 29) ** 3, np.cbrt(f), f / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def ciede2000(one: np.ndarray, two: np.ndarray) -> float:
    """Sharma, Wu & Dalal 2005, equations 2 to 22."""
    (l1, a1, b1), (l2, a2, b2) = one, two
    mean = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    g = 0.5 * (1 - np.sqrt(mean**7 / (mean**7 + 25.0**7)))
    c1, c2 = np.hypot((1 + g) * a1, b1), np.hypot((1 + g) * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, (1 + g) * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = 0.0 if c1 * c2 == 0 else (h2 - h1 + 180) % 360 - 180
    dl, dc, dh = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    lm, cm = (l1 + l2) / 2, (c1 + c2) / 2
    hm = h1 + h2 if c1 * c2 == 0 else (h1 + turn / 2) % 360
    t = (
        1
        - 0.17 * np.cos(np.radians(hm - 30))
        + 0.24 * np.cos(np.radians(2 * hm))
        + 0.32 * np.cos(np.radians(3 * hm + 6))
        - 0.20 * np.cos(np.radians(4 * hm - 63))
    )
    sl = 1 + 0.015 * (lm - 50) ** 2 / np.sqrt(20 + (lm - 50) ** 2)
    sc, sh = 1 + 0.045 * cm, 1 + 0.015 * cm * t
    rt = -2 * np.sqrt(cm**7 / (cm**7 + 25.0**7)) * np.sin(np.radians(60 * np.exp(-(((hm - 275) / 25) ** 2))))
    return float(np.sqrt((dl / sl) ** 2 + (dc / sc) ** 2 + (dh / sh) ** 2 + rt * dc / sc * dh / sh))


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 2.5, 0.0), (61.0, -5.0, 29.0), 22.8977),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_difference_is_that_of_the_published_pairs(one, two, expected):
    assert ciede2000(np.array(one), np.array(two)) == pytest.approx(expected, abs=1e-4)


def test_grey_is_grey_to_everyone():
    for kind in MACHADO:
        assert abs(lab("#808080", kind)[1:]).max() < 1


TOGETHER = {
    "models": [style.REFERENCE, style.QUANTIZED],
    "sets": [style.SAFETY, style.CAPABILITY],
    "flips": list(style.FLIP.values()),
    "causes": list(style.CAUSE.values()),
    "survival": list(style.SURVIVAL.values()),
    "patching": [style.TOWARDS, style.AWAY],
    "predictors": [style.PREDICTOR, style.SECOND_PREDICTOR],
}


def closest(colours: list[str], kind: str) -> tuple[float, str]:
    seen = {colour: lab(colour, kind) for colour in colours}
    return min((ciede2000(seen[a], seen[b]), f"{a} {b}") for a, b in combinations(colours, 2))


@pytest.mark.parametrize("kind", MACHADO)
@pytest.mark.parametrize("name", TOGETHER)
def test_colours_that_nothing_else_tells_apart(name, kind):
    assert closest(TOGETHER[name], kind)[0] >= TOLD_APART


@pytest.mark.parametrize("kind", MACHADO)
@pytest.mark.parametrize(
    "colours",
    [list(style.CONTROL.values()), list(style.STEP.values()), list(style.SERIES)],
    ids=["controls", "steps", "series"],
)
def test_colours_that_a_mark_or_a_place_tells_apart_too(colours, kind):
    assert closest(colours, kind)[0] >= HELPED


@pytest.mark.parametrize("kind", MACHADO)
def test_the_two_sets_are_told_from_every_control(kind):
    for own in (style.SAFETY, style.CAPABILITY):
        for control in style.CONTROL.values():
            assert ciede2000(lab(own, kind), lab(control, kind)) >= HELPED


@pytest.mark.parametrize("paper", ["#FFFFFF", "#15181D"])
def test_lines_are_seen_on_light_and_dark_paper(paper):
    """A contrast of 3 (WCAG 1.4.11) for the colours that carry the message on light paper, of 2 for all on both."""

    def luminance(colour: str) -> float:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    def contrast(colour: str) -> float:
        high, low = sorted((luminance(colour), luminance(paper)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for colour in (style.SAFETY, style.CAPABILITY, style.REFERENCE, style.QUANTIZED):
        assert contrast(colour) >= (3 if paper == "#FFFFFF" else 2.5), colour
