"""What the muting explorer says of one feature."""

import numpy as np

from tracelens.views.escaping import in_html, visible
from tracelens.views.widgets.choosing import short
from tracelens.views.widgets.muting_table import MUTED, MutedTable

NONE = '<div class="tl-card"><p>No live feature is chosen.</p></div>'


def label(t: MutedTable, row: int) -> str:
    """A feature in a line: where it falls silent, or how near it comes; as text."""
    rates = t.rates[:, row]
    if t.censored[row] == "never muted":
        worst = int(np.nanargmax(rates)) if np.isfinite(rates).any() else 0
        what = f"at most {rates[worst]:.0%} silent ({t.precisions[worst]})"
    elif t.censored[row] == "always muted":
        what = f"muted from {max(t.bits):.4g} bits on"
    else:
        what = f"muted at {t.muted_below[row]:.4g} bits"
    name = f"#{t.feature[row]} {visible(str(t.behaviour[row]), 24)}"
    return f"{name} · {what} · {t.n_active[row]:,} tokens · {visible(short(str(t.site[row])), 40)}"


def feature_card(table: MutedTable, row: int, step: int) -> str:
    """HTML of one feature; `step`: the row of `table.state` that is shown."""
    shown = table.precisions[step - 1] if step else "reference"
    parts = [f"<h3>#{table.feature[row]} <bdi>{in_html(table.behaviour[row])}</bdi>, {in_html(table.site[row])}</h3>"]
    if step:
        low, high = table.interval(row)[:, step - 1]
        state = "Muted" if table.state[step, row] >= MUTED else "Fires"
        parts.append(
            f"<p>{state} in {in_html(shown)}: silent on {table.rates[step - 1, row]:.1%} ({low:.1%} to {high:.1%}, Wilson, tokens "
            f"taken as independent) of the {table.n_active[row]:,} tokens on which the reference fires it.</p>"
        )
    else:
        parts.append(f"<p>The reference fires it on {table.n_active[row]:,} tokens.</p>")
    ends = {
        "never muted": "Never muted on this ladder.",
        "always muted": "Muted in every precision of this ladder.",
    }
    between = f"Fires at {table.kept_at[row]:.4g} bits, muted at {table.muted_below[row]:.4g}."
    parts.append(f"<p>{ends.get(str(table.censored[row]), between)}</p>")
    if not table.monotone[row]:
        parts.append("<p>Not monotone: it is muted in one precision and fires in one of fewer bits.</p>")
    for name, counts in table.cause.items():
        moved, clipped = counts[row]
        if moved + clipped:
            parts.append(
                f"<p>Silenced firings in {in_html(name)}: {moved:,} as it moved, {clipped:,} clipped by the format.</p>"
            )
    parts.append(
        "<p>Control: rates of single features under matched noise are not stored. The band in the figure of shares is that of random "
        "capability features of the same sites and firing rates.</p>"
    )
    return f'<article class="tl-card">{"".join(parts)}</article>'
