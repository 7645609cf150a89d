"""A made-up look at one prompt, all of whose texts come from somebody who means harm."""

import numpy as np

from tests.views.hostile import EVIL, HOSTILE
from tests.views.made_up_evidence import S
from tracelens.auditing.prompt_reading import PromptReading
from tracelens.auditing.prompt_result import Answer, FeatureChange, Margin, NextToken, PromptLook

TOKENS = ("<bos>", *HOSTILE.values())


def made_up_look(site: str = S) -> PromptLook:
    """Two behaviours of which one flips, three next tokens, four features, answers that part at the second token."""
    rng = np.random.default_rng(0)
    n = len(TOKENS)
    kl = rng.random(n) * 0.1
    kl[0] = np.nan
    pattern = np.tril(np.ones((n, n)))
    pattern /= pattern.sum(-1, keepdims=True)
    features = [
        FeatureChange(
            site, i, (EVIL,) if i < 2 else (), TOKENS, np.r_[0.0, rng.random(n - 1)], np.r_[0.0, rng.random(n - 1)]
        )
        for i in range(4)
    ]
    return PromptLook(
        reading=PromptReading(EVIL, EVIL, tuple(range(n)), TOKENS, 1, False),
        labels=(EVIL, EVIL),
        margins=(Margin("refusal", 1.25, -0.5), Margin(EVIL, -2.0, -2.5)),
        next_tokens=tuple(NextToken(i, text, 0.5 / (i + 1), 0.4 / (i + 1)) for i, text in enumerate([EVIL, "a", "b"])),
        kl=kl,
        features=tuple(features),
        n_moved={site: 4},
        patterns=(np.broadcast_to(pattern, (2, 3, n, n)), np.broadcast_to(pattern, (2, 3, n, n))),
        answers={
            "reference": Answer(EVIL, ("x", EVIL), "end"),
            "quantized": Answer("x", ("x",), "stopped"),
        },
        notes=(EVIL,),
    )
