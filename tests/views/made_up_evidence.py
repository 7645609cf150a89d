"""Evidence made by hand for `made_up_report`, with tokens that must never run: scripts, quotes, emoji, right-to-left text, newlines."""

from dataclasses import replace

import numpy as np
import pandas as pd

from tests.views.made_up import SITE, made_up_report
from tracelens.audit_report import PAIR_COLUMNS, AuditReport
from tracelens.auditing.evidence import Evidence, Firings

HOSTILE = (
    "<script>window.hacked=1</script>",
    "\"quoted'",
    " 😀",
    "שלום",
    "line\nbreak",
    "<img src=x onerror=window.hacked=1>",
    "</textarea>${1}`",
)
S = str(SITE)


def made_up_evidence() -> Evidence:
    """Features 3, 6 and 7 on two prompts; 3 and 6 merge on token 2 of the first."""
    entries = np.array(
        # feature, prompt, position, reference, quantized
        [
            (0, 0, 1, 2.0, 1.0),
            (0, 0, 2, 1.5, 1.5),
            (0, 1, 0, 0.5, 0.4),
            (1, 0, 2, 0.0, 1.2),
            (1, 1, 3, 1.0, 1.0),
            (2, 1, 4, 3.0, 0.0),
        ]
    )
    features = ((S, 3), (S, 6), (S, 7))
    pairs = [
        (S, 3, 6, "refusal", "capability", 0.1, 0.7, 0.6, 40),
        (S, 3, 7, "refusal", "capability", 0.2, 0.45, 0.25, 30),
        (S, 4, 5, "warning", "refusal", 0.3, 0.42, 0.12, 20),
    ]
    return Evidence(
        features=features,
        n_live=5,
        prompts=(0, 1),
        n_prompts=2,
        tokens=(HOSTILE, ("what", " is", " a", " lock", "?")),
        firings=Firings(*entries[:, :3].astype(np.int64).T, entries[:, 3], entries[:, 4]),
        near={key: [(5, 0.62), (4, 0.31)] for key in features},
        promoted={key: [("<b>no</b>", 0.8), (" sorry", 0.5)] for key in features},
        suppressed={key: [(" sure", -0.7)] for key in features},
        importance={(S, 3): 0.9, (S, 6): 0.1, (S, 7): 0.02},
        pairs=pd.DataFrame(pairs, columns=pd.Index(PAIR_COLUMNS)),
        pair_tau=0.3,
        pair_delta=0.1,
    )


def report_with_evidence(**changes) -> AuditReport:
    return replace(made_up_report(**changes), evidence=made_up_evidence())
