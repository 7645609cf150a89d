"""Measure what quantization does to the organism's features and write the page: `python -m tracelens.organism.damage`."""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tracelens.audit_report import AuditReport, Control
from tracelens.auditing.preservation import Shares
from tracelens.auditing.verdict import Contrast
from tracelens.optimization_auditor import OptimizationAuditor, SweepResult
from tracelens.organism.damage_page import to_markdown
from tracelens.organism.grammar import GRADED, sample
from tracelens.stats import Estimate
from tracelens.studies.muting import MutingThresholds, muting_thresholds

DATASET = "organism_comprehensive_v1"
CALIBRATION_SEED = 7
N_CALIBRATION = 40
"""Calibration prompts per behaviour and half."""
LADDERS = {
    "RTN per channel": tuple(f"int{bits}" for bits in range(8, 1, -1)),
    "RTN in groups of 32": tuple(f"int{bits}-g32" for bits in range(8, 1, -1)),
    "GPTQ per channel": tuple(f"gptq-int{bits}" for bits in (8, 6, 5, 4, 3, 2)),
    "GPTQ in groups of 32": tuple(f"gptq-int{bits}-g32" for bits in (8, 6, 5, 4, 3, 2)),
}
"""Family → its precisions and recipes, most bits first."""
FORMATS = {"4- and 8-bit formats": ("nf4", "nf4-dq", "fp8", "mxfp4", "nvfp4")}
GPTQ = "gptq-"
SETS = ("safety", "capability")
SHARES = ("survived", "blurred", "damaged", "degraded", "muted")


def calibration_prompts() -> list[str]:
    """What GPTQ is fitted to: prompts of each behaviour and its absence, of the split that no audited prompt belongs to."""
    return [
        prompt.prompt
        for behaviour in GRADED
        for sign in (1, -1)
        for prompt in sample(
            N_CALIBRATION,
            behaviour,
            split="train",
            seed=CALIBRATION_SEED,
            unique=True,
            where=lambda p, sign=sign: p.z is not None and sign * p.z > 0,
        )
    ]


def builds(folder: Path) -> dict[str, Path]:
    """GPTQ builds of the organism, by name of their recipe; those that lie in the folder are taken as they are."""
    from tracelens.precision.calibrated import RECORD, quantize

    recipes = [name for names in LADDERS.values() for name in names if name.startswith(GPTQ)]
    prompts = calibration_prompts()
    for recipe in recipes:
        if not (folder / recipe / RECORD).is_file():
            quantize("organism", recipe, prompts, folder / recipe, progress=False)
    return {recipe: folder / recipe for recipe in recipes}


def sweep(work: Path, *, progress: bool = True) -> SweepResult:
    """One sweep over all of it; reports that lie in the folder are taken if nothing they depend on has changed."""
    from tracelens.features import load_saes
    from tracelens.loading import load

    simulated = [name for names in (LADDERS | FORMATS).values() for name in names if not name.startswith(GPTQ)]
    auditor = OptimizationAuditor(load("organism"), load_saes("organism"))
    return auditor.run_sweep(DATASET, simulated, builds=builds(work / "builds"), out=work / "sweep", progress=progress)


def measure(work: Path, *, progress: bool = True) -> dict[str, Any]:
    """Everything the page says, as JSON can hold it."""
    found = sweep(work, progress=progress)
    first = next(iter(found.reports.values()))
    record = json.loads((work / "builds" / LADDERS["GPTQ per channel"][0] / "tracelens_quantize.json").read_text())
    wanted = ("min_active", "degradation_threshold", "survived_at", "damaged_at", "min_auroc", "alpha", "noise_seeds")
    wanted += ("permuted_seeds", "n_resamples", "n_blocks", "seed")
    return {
        "dataset": DATASET,
        "prompts": first.settings["n_prompts"],
        "live": _live(first),
        "settings": {name: first.settings[name] for name in wanted},
        "versions": record["versions"],
        "calibration": record["calibration"] | {"split": "train", "seed": CALIBRATION_SEED, "each": N_CALIBRATION},
        "families": {name: list(members) for name, members in (LADDERS | FORMATS).items()},
        "floor": _control(first.controls["bf16"]),
        "perplexity_reference": _rounded(first.divergence.perplexity_reference),
        "entries": {
            name: entry(report) | {"bits": round(found.bits[name], 3)} for name, report in found.reports.items()
        },
        "muting": {name: muting(muting_thresholds(found, members)) for name, members in LADDERS.items()},
    }


def entry(report: AuditReport) -> dict[str, Any]:
    """The numbers of one audit, each beside its controls."""
    verdict, flips = report.verdict, report.flips
    assert flips is not None
    contrasts = ("against_capability", "against_noise", "against_permuted", "flips_against_noise")
    return {
        "cpfr": {name: _rounded(estimate) for name, estimate in report.cpfr.items()},
        "shares": {name: _shares(report.shares[name]) for name in SETS},
        "flips": _rounded(flips.rate),
        "refuse_to_comply": _rounded(flips.refuse_to_comply),
        "comply_to_refuse": _rounded(flips.comply_to_refuse),
        "mean_shift": _rounded(flips.mean_shift),
        "kl": _rounded(report.divergence.kl),
        "perplexity": _rounded(report.divergence.perplexity_quantized),
        "controls": {name: _control(control) for name, control in report.controls.items() if name != "bf16"},
        "relation": verdict.relation,
        "headline": verdict.headline,
        "contrasts": {name: _contrast(c) for name in contrasts if (c := getattr(verdict, name)) is not None},
    }


def muting(found: MutingThresholds) -> dict[str, Any]:
    """How many features first fall silent at each width of a ladder, safety and capability, and how the two compare."""
    table: Any = found.table
    silent = {}
    for name in SETS:
        rows = table[(table["behaviour"] == "capability") == (name == "capability")]
        muted = rows[[f"rate {spec}" for spec in found.precisions]].to_numpy() >= found.muted_at
        ever, first = muted.any(1), muted.argmax(1)  # of equal maxima the first
        counts = {spec: int((ever & (first == k)).sum()) for k, spec in enumerate(found.precisions)}
        silent[name] = counts | {"none": int((~ever).sum()), "came_back": int((~rows["monotone"]).sum())}
    shares: Any = found.shares.itertuples(index=False)
    c = found.comparison
    return {
        "first_silent": silent,
        "comparison": {name: _number(getattr(c, name)) for name in ("earlier", "p_value", "p_matched")},
        "shares": {f"{s.precision} {s.set}": [_number(x) for x in (s.share, s.low, s.high)] for s in shares},
    }


def _live(report: AuditReport) -> dict[str, int]:
    kinds: list[str] = report.features["behaviour"].tolist()
    safety = len(report.safety_features)
    return {"safety": safety, "capability": len(kinds) - safety} | {b: kinds.count(b) for b in GRADED}


def _control(control: Control) -> dict[str, Any]:
    known = {name: getattr(control, name) for name in ("flips", "kl", "perplexity")}
    return {
        "cpfr": {name: _rounded(estimate) for name, estimate in control.cpfr.items() if name in SETS},
        "shares": {name: _shares(shares) for name, shares in control.shares.items() if name in SETS},
    } | {name: _rounded(estimate) for name, estimate in known.items() if estimate is not None}


def _shares(shares: Shares) -> dict[str, list[float | None]]:
    return {name: _rounded(getattr(shares, name)) for name in SHARES}


def _contrast(c: Contrast) -> dict[str, Any]:
    numbers = {"p_prompts": _number(c.p_prompts), "significant": c.significant}
    features = {} if c.p_features is None else {"p_features": _number(c.p_features)}
    return {"difference": _rounded(c.difference)} | numbers | features


def _rounded(estimate: Estimate) -> list[float | None]:
    """Value, low and high end of the interval, to five digits."""
    return [_number(x) for x in (estimate.value, estimate.low, estimate.high)]


def _number(x: float) -> float | None:
    return None if x != x else float(f"{x:.5g}")


def to_json(card: dict[str, Any]) -> str:
    """The numbers, an entry on each line."""
    parts = []
    for name, value in card.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, dict):
            rows = (f"  {json.dumps(key)}: {json.dumps(row, allow_nan=False)}" for key, row in value.items())
            text = "{\n" + ",\n".join(rows) + "\n }"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tracelens.organism.damage", description=__doc__)
    parser.add_argument(
        "--work", type=Path, help="a folder to keep builds and audits in, from which another run goes on"
    )
    args = parser.parse_args()
    with TemporaryDirectory() as temporary:
        card = measure(args.work or Path(temporary))
    folder = Path(__file__).parent
    (folder / "damage.json").write_text(to_json(card), encoding="utf-8")
    (folder / "DAMAGE.md").write_text(to_markdown(card), encoding="utf-8")


if __name__ == "__main__":
    main()
