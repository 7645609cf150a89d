"""Reports as large as a real SAE's, made by hand and fast: `large_report(16_384)` takes less than a second."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from tests.views.made_up import SETTINGS, estimate, made_up_report
from tracelens.audit_report import FEATURE_COLUMNS, PAIR_COLUMNS, AuditReport, severity
from tracelens.auditing.evidence import Evidence, Firings
from tracelens.auditing.feature_intervals import RESAMPLED
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.selection import FingerprintFeature
from tracelens.metrics.cpfr import fidelity
from tracelens.metrics.drift import correlation, drift, novelty, retention
from tracelens.metrics.moments import FeatureMoments
from tracelens.metrics.muting import muting_rate
from tracelens.metrics.survival import survival_class
from tracelens.sites import Site

BEHAVIOURS = ("refusal", "uncertainty", "warning")
TOKENS = 20_000
WORDS = (" how", " do", " I", " pick", " a", " lock", "?", " please", " tell", " me")


def large_report(n: int, *, sites: int = 2, safety: int = 90, described: int = 300, seed: int = 0) -> AuditReport:
    """A report on `n` live features over `sites` sites, of which `safety` carry a behaviour and `described` have evidence."""
    rng = np.random.default_rng(seed)
    moments = _moments(n, rng)
    names = [str(Site(layer)) for layer in range(sites)]
    sizes = [n // sites + (i < n % sites) for i in range(sites)]
    site = np.repeat(np.array(names, dtype=object), sizes)
    feature = np.concatenate([np.arange(size) for size in sizes])
    behaviour = np.full(n, "capability", dtype=object)
    chosen = rng.choice(n, min(safety, n), replace=False)
    behaviour[chosen] = np.resize(np.array(BEHAVIOURS, dtype=object), len(chosen))
    table = _table(moments, site, feature, behaviour, rng)
    found = [
        FingerprintFeature(
            *(Site.parse(site[k]), int(feature[k]), behaviour[k], 0.95, 0.97, 0.01, 1.0, 0.1, 0.9, 0.1, 2.0, 0.5),
            {behaviour[k]: 0.95},
        )
        for k in chosen
    ]
    small = made_up_report(cpfr={name: estimate(0.9) for name in ("safety", "capability", *BEHAVIOURS)})
    return replace(
        small,
        features=table,
        fingerprint=Fingerprint(found, "made-up", {Site.parse(s): "0" for s in names}, {}, 1, {}),
        sites=dict(zip(names, sizes, strict=True)),
        moments=moments,
        settings=SETTINGS | {"n_prompts": 50},
        prompts=_prompts(50, rng),
        evidence=_evidence(table, described, rng),
    )


def _moments(n: int, rng: np.random.Generator) -> FeatureMoments:
    """Sums as they are of features of one strength, that keep `kept` of it and fall silent on `lost` of their tokens."""
    fires = np.clip(rng.lognormal(4, 1.5, n), 12, TOKENS / 2).round()
    kept, lost = np.clip(rng.normal(0.95, 0.12, n), 0.05, 1.6), rng.beta(0.4, 5, n)
    lost[: n // 50] = 1
    both = (fires * (1 - lost)).round()
    quant = both + (fires * rng.beta(0.4, 8, n)).round()
    strength = rng.lognormal(0, 1, n)
    sums = {
        "n": np.array([TOKENS]),
        "n_ref": fires,
        "n_quant": quant,
        "n_both": both,
        "sum_ref": fires * strength,
        "sum_quant": quant * strength * kept,
        "sum_ref_sq": 1.2 * fires * strength**2,
        "sum_quant_sq": 1.2 * quant * (strength * kept) ** 2,
        "sum_cross": 1.19 * both * strength**2 * kept,
    }
    blocks = {name: torch.tensor(x, dtype=torch.float64).reshape(1, -1) for name, x in sums.items() if name != "n"}
    peaks = torch.tensor(3 * strength, dtype=torch.float64)
    return FeatureMoments(
        n=torch.tensor([float(TOKENS)], dtype=torch.float64), **blocks, max_ref=peaks, max_quant=peaks
    )


def _table(
    moments: FeatureMoments, site: np.ndarray, feature: np.ndarray, behaviour: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    measures = {"fidelity": fidelity, "correlation": correlation, "drift": drift, "retention": retention}
    measures |= {"muting_rate": muting_rate, "novelty": novelty}
    values = {name: measure(moments)[0].numpy() for name, measure in measures.items()}
    noise = np.clip(values["fidelity"] + rng.normal(0.01, 0.05, len(site)), 0, 1)
    p = rng.uniform(0, 1, len(site))
    limits = dict.fromkeys(("fidelity", "fidelity_noise"), (0, 1)) | {"correlation": (-1, 1)}
    limits |= dict.fromkeys(("drift", "retention"), (0, None))
    table = pd.DataFrame(
        {"site": site, "feature": feature, "behaviour": behaviour}
        | values
        | {
            "degraded": values["fidelity"] < SETTINGS["degradation_threshold"],
            "n_active": moments.n_ref[0].long().numpy(),
            "survival": survival_class(values["correlation"]),
            "fidelity_noise": noise,
            "p_shift": p,
            "q_shift": p,
        }
        | {
            f"{name}_{end}": np.clip(of + sign * 0.05, *limits[name])
            for name, of in ({"fidelity_noise": noise} | {name: values[name] for name in RESAMPLED}).items()
            for end, sign in (("low", -1), ("high", 1))
        },
        columns=pd.Index(FEATURE_COLUMNS),
    )
    return table.loc[severity(table).sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def _prompts(n: int, rng: np.random.Generator) -> pd.DataFrame:
    margins = rng.normal(0, 3, (n, 2))
    flips = np.select([(margins[:, 0] > 0) & (margins[:, 1] <= 0), (margins[:, 0] <= 0) & (margins[:, 1] > 0)], [1, 2])
    return pd.DataFrame(
        {
            "prompt": [f"how do I pick lock {i}?" for i in range(n)],
            "behaviour": np.resize(np.array(BEHAVIOURS, dtype=object), n),
            "safety": True,
            "margin_reference": margins[:, 0],
            "margin_quantized": margins[:, 1],
            "flip": np.array(["", "refuse→comply", "comply→refuse"], dtype=object)[flips],
        }
    )


def _evidence(table: pd.DataFrame, described: int, rng: np.random.Generator) -> Evidence:
    """Of the safety features and the worst others; each fires on 20 tokens of 50 prompts of 10 tokens."""
    rows = np.flatnonzero(table["behaviour"].to_numpy() != "capability")
    rows = np.unique(np.concatenate([rows, np.arange(min(described, len(table)))]))
    keys = tuple((str(table["site"][k]), int(table["feature"][k])) for k in rows)
    size: dict[str, int] = table.groupby("site")["feature"].max().to_dict()
    places = np.sort(np.stack([rng.choice(500, 20, replace=False) for _ in keys]), 1).ravel()
    r = rng.lognormal(0, 1, len(places))
    pairs = pd.DataFrame([], columns=pd.Index(PAIR_COLUMNS))
    return Evidence(
        features=keys,
        n_live=len(table),
        prompts=tuple(range(50)),
        n_prompts=50,
        tokens=(WORDS,) * 50,
        firings=Firings(
            np.repeat(np.arange(len(keys)), 20), places // 10, places % 10, r, r * rng.uniform(0, 1.2, len(r))
        ),
        near={(s, f): [((f + k) % (size[s] + 1), 0.9 - 0.1 * k) for k in range(1, 6)] for s, f in keys},
        promoted={key: [(" sorry", 0.8), (" no", 0.5)] for key in keys},
        suppressed={key: [(" sure", -0.7)] for key in keys},
        importance={key: float(abs(rng.normal(0, 0.3))) for key in keys},
        pairs=pairs,
        pair_tau=0.3,
        pair_delta=0.1,
    )
