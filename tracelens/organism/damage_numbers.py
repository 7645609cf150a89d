"""How the page of damage writes its numbers and breaks its lines."""

from textwrap import fill

WIDTH = 130


def number(estimate: list[float | None], form: str = ".3f") -> str:
    """`0.848 [0.844, 0.850]`."""
    value, low, high = ("–" if x is None else format(x, form) for x in estimate)
    return f"{value} [{low}, {high}]"


def percent(estimate: list[float | None]) -> str:
    """`80.6% [79.1, 83.0]`."""
    value, low, high = ("–" if x is None else f"{100 * x:.1f}" for x in estimate)
    return f"{value}% [{low}, {high}]"


def p(value: float | None) -> str:
    """`0.012`, `<.001`."""
    return "–" if value is None else f"{value:.3f}" if value >= 0.001 else "<.001"


def zero_of(n: int) -> float:
    """Upper end of the 95 % Wilson interval of 0 of `n`."""
    z = 1.959964
    return z**2 / (n + z**2)


def bullet(text: str) -> str:
    """An item of a list, its lines broken."""
    return fill(f"- {text}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def paragraph(text: str) -> str:
    return fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
