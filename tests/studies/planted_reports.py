"""Reports whose every feature's fate is known: made from activations, without a model."""

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tracelens.audit_report import AuditReport, DivergenceSummary
from tracelens.auditing.verdict import Contrast, judge
from tracelens.behaviour.flips import Flips
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import sae_hash
from tracelens.metrics import MomentAccumulator
from tracelens.metrics.drift import correlation
from tracelens.optimization_auditor import SweepResult
from tracelens.sites import Site
from tracelens.stats import Estimate

SITE = Site(1)
SETTINGS = {"min_active": 1, "survived_at": 0.9, "damaged_at": 0.5, "n_prompts": 10}


class Rows:
    """An SAE of which only the decoder is ever looked at."""

    def __init__(self, rows: Tensor) -> None:
        self.W_dec = rows

    def encode(self, x: Tensor) -> Tensor:
        raise AssertionError("nothing is to be encoded")


def decoder(n: int, d: int = 8, seed: int = 0) -> Rows:
    return Rows(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def activations(n_tokens: int, n_features: int, seed: int = 0) -> Tensor:
    """Sparse r ≥ 0 [token, feature]: firing rates of 2 to 40 %, sizes over a decade, and one token on which each feature peaks.

    The peak is drawn apart from the size of the other firings, and from how often there are any.
    """
    g = torch.Generator().manual_seed(seed)
    rate = 0.02 * 20 ** torch.rand(n_features, generator=g)
    size = 10 ** torch.rand(n_features, generator=g)
    r = size * (0.5 + torch.rand(n_tokens, n_features, generator=g))
    r *= torch.rand(n_tokens, n_features, generator=g) < rate
    r[torch.randint(n_tokens, (n_features,), generator=g), torch.arange(n_features)] = 20 * 10 ** torch.rand(
        n_features, generator=g
    )
    return r


def shuffled(r: Tensor, features: Tensor, seed: int = 1) -> Tensor:
    """r, in which the marked features fire on other tokens: their correlation is about 0."""
    order = torch.randperm(len(r), generator=torch.Generator().manual_seed(seed))
    return torch.where(features, r[order], r)


def planted(r: Tensor, q: Tensor, sae: Any, *, label: str = "INT4", safety: int = 0) -> AuditReport:
    """The report of reference activations r and quantized ones q; the first `safety` features carry refusal."""
    moments = MomentAccumulator(r.shape[1]).update(r, q).finalize()
    total = moments.total()
    live = total.n_ref[0] >= SETTINGS["min_active"]
    rho = correlation(total)[0]
    features = pd.DataFrame(
        {
            "site": str(SITE),
            "feature": range(r.shape[1]),
            "behaviour": ["refusal" if i < safety else "capability" for i in range(r.shape[1])],
            "correlation": rho.numpy(),
            "n_active": total.n_ref[0].long().numpy(),
        }
    )[live.numpy()]
    some = Estimate(0.8, 0.7, 0.9, 10, "bootstrap")
    margins = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    return AuditReport(
        label=label,
        reference="planted",
        quantized="planted",
        precision=None,
        features=features.sort_values("correlation").reset_index(drop=True),
        smeared_pairs=pd.DataFrame(),
        prompts=pd.DataFrame({"prompt": ["a b c", "d e f"]}),
        cpfr={"safety": some, "capability": some},
        flips=Flips.from_margins(margins, margins * torch.tensor([1, 1, 1, -1])),
        divergence=DivergenceSummary(some, some, Estimate(4.0, 3.9, 4.1), Estimate(4.5, 4.4, 4.6)),
        controls={},
        verdict=judge(Contrast("capability", some, 0.5, 0.5), None, some, label),
        fingerprint=Fingerprint([], "planted", {SITE: sae_hash(sae)}, {"refusal": 1}, 1, {}),
        sites={str(SITE): r.shape[1]},
        moments=moments,
        settings=SETTINGS,
    )


def noisy_sweep(r: Tensor, sae: Any, noise: dict[str, float], seed: int = 2) -> SweepResult:
    """Precisions that add Gaussian noise of a standard deviation to what fires: small features do not survive it."""
    g = torch.Generator().manual_seed(seed)
    reports = {}
    for spec, sigma in noise.items():
        q = torch.where(r > 0, (r + sigma * torch.randn(r.shape, generator=g)).clamp(min=0), 0)
        reports[spec] = planted(r, q, sae, label=spec.upper())
    return SweepResult(reports)
