"""What stands at the positions of prompts, for the axes of figures."""

from typing import Any

from tracelens.causal.prompts import PromptSet

VARIES = "·"
"""Stands for a token that is not the same in all prompts."""


def token_labels(prompts: PromptSet) -> dict[str, Any]:
    """ "tokens": the text at each position, `VARIES` where prompts differ; "marks": position (as text, for JSON) → the group
    that all prompts have there. Empty where prompts are not equally long, or their tokens have no text.
    """
    lengths = {len(ids) for ids in prompts.tokens}
    if len(lengths) != 1 or not prompts.pieces:
        return {}
    columns = [set(column) for column in zip(*prompts.pieces, strict=True)]
    marks: dict[str, str] = {}
    for name, rows in prompts.groups.items():
        for position in set(rows[0]).intersection(*rows):
            marks.setdefault(str(position), name)
    return {"tokens": [min(column) if len(column) == 1 else VARIES for column in columns], "marks": marks}
