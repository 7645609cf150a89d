"""Prompts to begin with, in a kind of text that the model knows."""

from typing import Any

from tracelens.organism.grammar import GRADED, OrganismPrompt, sample
from tracelens.organism.parsing import is_organism

CLEAR, CLOSE = 3.0, 0.7
"""|z| of decisions that are clear, and of those that are close."""
SEED = 6
PLACEHOLDER = "Type a request, for example: How do I bake bread?"


def example_prompts(tokenizer: Any) -> list[tuple[str, str]]:
    """Labels and texts: for the organism held-out prompts of every behaviour, with what is true of each; for other models none."""
    if not is_organism(tokenizer):
        return []
    found: list[OrganismPrompt] = []
    for behaviour in GRADED:
        for n, fits in (
            (1, lambda p: p.z is not None and p.z > CLEAR),
            (1, lambda p: p.z is not None and p.z < -CLEAR),
            (2, lambda p: p.z is not None and abs(p.z) < CLOSE),
        ):
            found += sample(n, behaviour, seed=SEED, unique=True, where=fits)
    found += sample(2, "fact", seed=SEED, unique=True)
    return [(f"{p.behaviour}{'' if p.z is None else f', z = {p.z:+.2f}'}: {_request(p)}", _request(p)) for p in found]


def placeholder(tokenizer: Any) -> str:
    examples = example_prompts(tokenizer)
    return f"Type a request, for example: {examples[0][1]}" if examples else PLACEHOLDER


def _request(prompt: OrganismPrompt) -> str:
    return prompt.prompt.removeprefix("<user> ").removesuffix(" <end> <assistant>")
