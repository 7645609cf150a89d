"""Measure the organism's SAEs on held-out text and write their table: `python -m tracelens.organism.sae_card`."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tracelens.datasets import get_dataset
from tracelens.features import CircuitTracer, load_saes, sae_hash
from tracelens.features.sae_fit import SiteFit, measure_fit
from tracelens.organism.grammar import BEHAVIOURS, sample
from tracelens.organism.train import MIXTURE
from tracelens.sites import Site

DATASETS = ("organism_refusal_v1", "organism_uncertainty_v1", "organism_warning_v1")
N = 3000
SEED = 2026


def heldout_texts(n: int = N, seed: int = SEED) -> list[str]:
    """Prompts with their likelier answers, behaviours mixed as in training, all held out from it."""
    return [p.text for name in BEHAVIOURS for p in sample(round(n * MIXTURE[name]), name, seed=seed)]


def measure(model: Any, saes: dict[Site, Any], *, n: int = N) -> dict[str, dict[str, Any]]:
    """Per SAE: explained variance, L0, share of dead features, cross-entropy recovered, features per behaviour, hash."""
    texts = heldout_texts(n)
    fits = measure_fit(model, saes, texts, batch_size=128)
    table = {str(site): _row(sae, fits[site]) for site, sae in saes.items()}
    tracer = CircuitTracer(model, saes)
    for name in DATASETS:
        dataset = get_dataset(name)
        fingerprint = tracer.create_fingerprint(dataset.by_behaviour(), dataset.baseline_prompts)
        (behaviour,) = fingerprint.by_behaviour
        for site in saes:
            table[str(site)][behaviour] = [row.feature for row in fingerprint.features if row.site == site]
    for site, sae in saes.items():
        table[str(site)]["sha256"] = sae_hash(sae)
    return table


def alignment_features(table: dict[str, dict[str, Any]]) -> int:
    """Distinct features, over all SAEs, that carry at least one of the three behaviours."""
    return sum(len({f for b in ("refusal", "uncertainty", "warning") for f in row[b]}) for row in table.values())


def _row(sae: Any, fit: SiteFit) -> dict[str, Any]:
    sums = fit.reconstruction.total()
    return {
        "d_sae": sae.W_dec.shape[0],
        "tokens": int(sums.n.item()),
        "explained_variance": sums.explained_variance().item(),
        "l0": sums.l0().item(),
        "dead": sums.dead(),
        "cross_entropy_recovered": fit.cross_entropy_recovered(torch.ones(1, len(fit.nll))).item(),
    }


def to_markdown(table: dict[str, dict[str, Any]]) -> str:
    """`saes/README.md`."""
    lines = [
        "# SAEs of the organism",
        "",
        "One SAE per layer on the residual stream after it (`resid_post`), trained by `python -m tracelens.organism.train_saes` with",
        'SAELens (BatchTopK, saved as JumpReLU) and stored in its format: `SAE.load_from_disk("saes/organism/blocks.2.hook_resid_post")`.',
        "BOS is not encoded.",
        "",
        "Measured by `python -m tracelens.organism.sae_card` on held-out text, tokens after BOS. *Explained variance* is 1 − Σ‖x − x̂‖² /",
        "Σ‖x − mean‖²; *dead* features fire on none of the tokens; *cross-entropy recovered* is 1 if the reconstruction predicts the next",
        "token as well as the original and 0 if as badly as zeros. The last columns count alignment features: AUROC ≥ .9 on held-out",
        "prompts of one behaviour against matched baseline prompts, with a family-wise permutation test.",
        "",
        "| site | d_sae | explained variance | L0 | dead | cross-entropy recovered | refusal | uncertainty | warning |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for site, row in table.items():
        numbers = (
            f"{row['explained_variance']:.3f}",
            f"{row['l0']:.1f}",
            f"{row['dead']:.1%}",
            f"{row['cross_entropy_recovered']:.3f}",
            *(str(len(row[behaviour])) for behaviour in ("refusal", "uncertainty", "warning")),
        )
        lines.append(f"| `{site}` | {row['d_sae']} | {' | '.join(numbers)} |")
    tokens = next(iter(table.values()))["tokens"]
    lines += [
        "",
        f"{tokens} tokens; {alignment_features(table)} alignment features in all.",
        "",
        "SHA-256 of each SAE's tensors:",
        "",
    ]
    lines += [f"- `{site}`: `{row['sha256']}`" for site, row in table.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    from tracelens.loading import load

    parser = argparse.ArgumentParser(prog="python -m tracelens.organism.sae_card", description=__doc__)
    parser.add_argument("--model", default="organism")
    parser.add_argument("--saes", type=Path, default=Path("saes/organism"), help="folder with a sub-folder per SAE")
    args = parser.parse_args()
    table = measure(load(args.model), load_saes(args.saes))
    (args.saes / "card.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (args.saes.parent / "README.md").write_text(to_markdown(table), encoding="utf-8")


if __name__ == "__main__":
    main()
