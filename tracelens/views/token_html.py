"""Tokens as HTML, for widgets and for pages: escaped, without scripts, readable on light and dark paper.

What the functions return needs `css()` once on the page. Tints are translucent, so that the page's own ink stays readable on them; values
are in the tooltips. Text runs in its own direction, spaces are as wide as they are, a newline is ↵ and a break.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tracelens.views.escaping import LONGEST, in_html, visible
from tracelens.views.style import QUANTIZED, REFERENCE, translucent

if TYPE_CHECKING:
    from tracelens.auditing.evidence import Merged, TokenTrace

MOST = 256
"""Tokens of a prompt that are shown: those in a row with the largest values."""
AROUND = 8
"""Tokens shown on each side of a token that is looked at."""
DARKEST = 0.62
"""Opacity of the tint of the largest value: dark ink on it has a contrast above 4.5 on white, light ink on dark."""
SILENT, NEW = "∅", "+"
MARKS = {SILENT: "falls silent", NEW: "newly fires"}

STYLE = f"""
.tl-t {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; margin: .25em 0; max-width: 100%;
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }}
.tl-t span[style] {{ border-radius: 3px; }}
.tl-h {{ display: block; white-space: normal; font-size: .86em; opacity: .85; line-height: 1.45; }}
.tl-k {{ display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em -.05em .1em; }}
.tl-c {{ display: inline-grid; grid-template-rows: auto auto auto; vertical-align: top; max-width: 100%;
  line-height: 1.4; margin-bottom: .35em; }}
.tl-c > span {{ padding: 0 1px; min-width: .4em; box-sizing: border-box; }}
.tl-c > i {{ font: 700 .72em/1.1 sans-serif; text-align: center; }}
.tl-gone {{ outline: 1.5px dashed {REFERENCE}; outline-offset: -1.5px; }}
.tl-new {{ outline: 1.5px solid {QUANTIZED}; outline-offset: -1.5px; }}
.tl-o {{ font-weight: 700; outline: 1.5px solid {QUANTIZED}; border-radius: 3px; }}
.tl-m {{ display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: .1em 1em; align-items: baseline; }}
.tl-g > span {{ display: inline-block; padding: 0 1.5px; max-width: 100%; box-sizing: border-box; }}
.tl-m > .tl-n {{ font-size: .86em; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.tl-l > span {{ display: inline-block; margin: 0 .9em .2em 0; white-space: pre-wrap; }}
.tl-l small {{ opacity: .8; font-variant-numeric: tabular-nums; }}
"""


def css() -> str:
    """A `<style>` element; once on a page is enough, twice does no harm."""
    return f"<style>{STYLE}</style>"


def strip(
    tokens: Sequence[str],
    values: Sequence[float] | np.ndarray,
    *,
    colour: str,
    top: float | int | None = None,
    title: str = "",
) -> str:
    """Tokens in a row, each tinted by |value| / `top` and with its value as tooltip.

    Args:
        colour: `#rrggbb` of the largest value; a value of 0 has no tint, a negative one is also underlined.
        top: the value of the full tint; the largest |value| without it. Give the same to strips that are to be compared.
        title: plain text above them.
    """
    if top is None:
        top = _largest(values)
    shown = _window([abs(float(v)) for v in values])
    cells = [_inline(token, float(v), colour, top) for token, v in zip(tokens, values, strict=True)]
    head = f'<span class="tl-h" dir="auto">{in_html(title)}</span>' if title else ""
    return f'<div class="tl-t">{head}<div dir="auto">{_cut(cells, shown)}</div></div>'


def paired_strips(trace: "TokenTrace", *, text: str = "", margins: tuple[float, float] | None = None) -> str:
    """One feature on one prompt: under each token of the reference the same token in the quantized model, on one scale.

    A token on which the feature falls silent has a dashed frame and ∅, one on which it newly fires a solid frame and +.

    Args:
        text: plain text above them, such as the prompt's behaviour or its number.
        margins: the prompt's margin in the reference and in the quantized model, in nats.
    """
    reference, quantized = ([float(v) for v in side] for side in (trace.reference, trace.quantized))
    top = _largest([*reference, *quantized])
    cells = [_column(token, r, q, top) for token, r, q in zip(trace.tokens, reference, quantized, strict=True)]
    shown = _window([max(abs(r), abs(q)) for r, q in zip(reference, quantized, strict=True)])
    head = [in_html(text)] if text else []
    if margins is not None:
        head.append(f"margin {margins[0]:+.2f} → {margins[1]:+.2f} nats")
    legend = (
        f'{_key(REFERENCE)}reference, above&emsp;{_key(QUANTIZED)}quantized, below&emsp;full tint = {top:.3g}'
        + "".join(f"&emsp;{mark} {MARKS[mark]}" for mark in MARKS if any(f"<i>{mark}" in cell for cell in cells))
    )  # fmt: skip
    heads = "".join(f'<span class="tl-h" dir="auto">{line}</span>' for line in ("; ".join(head), legend) if line)
    return f'<div class="tl-t tl-p">{heads}<div dir="{_direction(trace.tokens)}">{_cut(cells, shown)}</div></div>'


def merged_tokens(found: Sequence["Merged"], names: tuple[str, str] = ("i", "j")) -> str:
    """Each token with what stands around it, and the activations of the two features, reference → quantized.

    Tokens stand a little apart: those of tokenizers that split into words hold no spaces.
    """
    rows = []
    for one in found:
        start = max(0, one.position - AROUND)
        left, here, right = (
            "".join(f"<span{seen}>{_text(t, breaks=False)}</span>" for t in part)
            for part, seen in (
                (one.tokens[start : one.position], ""),
                (one.tokens[one.position : one.position + 1], ' class="tl-o"'),
                (one.tokens[one.position + 1 : one.position + 1 + AROUND], ""),
            )
        )
        more = one.position + 1 + AROUND < len(one.tokens)
        context = f"{'… ' * (start > 0)}{left}{here}{right}{' …' * more}"
        numbers = "<br>".join(
            f"{in_html(name)}: {r:.2f} → {q:.2f}"
            for name, r, q in zip(names, one.reference, one.quantized, strict=True)
        )
        rows.append(
            f'<div class="tl-t tl-g" dir="auto" title="prompt {one.prompt}, token {one.position}">{context}</div>'
            f'<div class="tl-n">{numbers}</div>'
        )
    return f'<div class="tl-m">{"".join(rows)}</div>'


def token_list(promoted: Sequence[tuple[str, float]]) -> str:
    """Tokens with a number each (a logit weight: per unit of activation), in the order given."""
    cells = "".join(
        f'<span><bdi title="{in_html(repr(visible(token, LONGEST)))}" style="background:{translucent(REFERENCE, 0.16)}">'
        f"{_text(token, breaks=False)}</bdi> <small>{value:+.2f}</small></span>"
        for token, value in promoted
    )
    return f'<div class="tl-t tl-l">{cells}</div>'


def _inline(token: str, value: float, colour: str, top: float) -> str:
    text = _text(token)
    if value == 0:
        return text
    if value != value:
        return f'<span title="not measured">{text}</span>'
    line = ";text-decoration:underline dashed" * (value < 0)
    return f'<span title="{value:.4g}" style="background:{_tint(colour, value, top)}{line}">{text}</span>'


def _column(token: str, reference: float, quantized: float, top: float) -> str:
    """The token twice, one above the other; a newline breaks the line after it."""
    text, end = _text(token, breaks=False), "<br>" * ("\n" in token)
    if not reference and not quantized:
        return f'<span class="tl-c"><span>{text}</span><span aria-hidden="true">{text}</span></span>{end}'
    mark = SILENT if reference and not quantized else NEW if quantized and not reference else ""
    frame = {SILENT: ' class="tl-gone"', NEW: ' class="tl-new"', "": ""}[mark]
    said = f"reference {reference:.4g}, quantized {quantized:.4g}" + (f": {MARKS[mark]}" if mark else "")
    sides = [
        f' style="background:{_tint(colour, value, top)}"' if value else ""
        for colour, value in ((REFERENCE, reference), (QUANTIZED, quantized))
    ]
    sign = f"<i>{mark}</i>" if mark else ""
    return (
        f'<span class="tl-c" title="{said}"><span{sides[0]}>{text}</span>'
        f'<span{sides[1]}{frame} aria-hidden="true">{text}</span>{sign}</span>{end}'
    )


def _text(token: str, *, breaks: bool = True) -> str:
    """The token, escaped; of an empty one a sign."""
    text = in_html(visible(token, LONGEST)) or "∅"
    return text.replace("↵", "↵\n") if breaks and "\n" in token else text


def _tint(colour: str, value: float, top: float) -> str:
    share = min(1.0, abs(value) / top) if top else 0.0
    # The least value that is not 0 can still be seen.
    return translucent(colour, round(0.08 + (DARKEST - 0.08) * share, 3))


def _key(colour: str) -> str:
    return f'<span class="tl-k" style="background:{translucent(colour, DARKEST)}"></span>'


def _largest(values: Sequence[float] | np.ndarray) -> float:
    return max((abs(float(v)) for v in values if v == v), default=0.0)


def _window(sizes: Sequence[float]) -> tuple[int, int]:
    """The `MOST` tokens in a row whose sizes have the largest sum; the middle one of several."""
    if len(sizes) <= MOST:
        return 0, len(sizes)
    totals = [0.0]
    for size in sizes:
        totals.append(totals[-1] + (size if size == size else 0.0))
    sums = [stop - start for start, stop in zip(totals, totals[MOST:], strict=False)]
    most = max(sums) * (1 - 1e-9)
    best = [i for i, found in enumerate(sums) if found >= most]
    start = best[len(best) // 2]
    return start, start + MOST


def _cut(cells: Sequence[str], shown: tuple[int, int]) -> str:
    start, stop = shown
    before = f'<span class="tl-h">… {start:,} tokens before</span>' if start else ""
    after = f'<span class="tl-h">… {len(cells) - stop:,} tokens after</span>' if stop < len(cells) else ""
    return before + "".join(cells[start:stop]) + after


def _direction(tokens: Sequence[str]) -> str:
    """The direction of the first letter that has one: blocks in a row have none of their own for `dir="auto"` to find."""
    from unicodedata import bidirectional

    for character in "".join(tokens):
        if (kind := bidirectional(character)) in ("L", "R", "AL"):
            return "ltr" if kind == "L" else "rtl"
    return "ltr"
