"""`Evidence` as files in a report's folder: numbers of tokens as safetensors, pairs as CSV, the rest as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tracelens.auditing.evidence import Evidence, Firings, Key

NAME = "evidence"
_TEXT = ("site", "behaviour_i", "behaviour_j")
_FIRINGS = ("feature", "prompt", "position", "reference", "quantized")


def summary_of(evidence: Evidence) -> dict[str, Any]:
    """How much evidence there is, as JSON can hold it."""
    return {
        "features": len(evidence.features),
        "n_live": evidence.n_live,
        "prompts": len(evidence.prompts),
        "n_prompts": evidence.n_prompts,
        "firings": len(evidence.firings.feature),
        "pairs": len(evidence.pairs),
        "pairs_left_out": evidence.pairs_left_out,
        "pair_tau": evidence.pair_tau,
        "pair_delta": evidence.pair_delta,
        "importance": bool(evidence.importance),
    }


def write_evidence(evidence: Evidence, folder: Path) -> None:
    """Three files named `evidence` in the folder."""
    from safetensors.numpy import save_file

    described = evidence.features
    data = {
        "features": described,
        "n_live": evidence.n_live,
        "prompts": evidence.prompts,
        "n_prompts": evidence.n_prompts,
        "tokens": evidence.tokens,
        **{name: _by_feature(getattr(evidence, name), described) for name in ("near", "promoted", "suppressed")},
        "importance": _by_feature(evidence.importance, described),
        "pair_tau": evidence.pair_tau,
        "pair_delta": evidence.pair_delta,
        "pairs_left_out": evidence.pairs_left_out,
    }
    save_file({name: getattr(evidence.firings, name) for name in _FIRINGS}, folder / f"{NAME}.safetensors")
    evidence.pairs.to_csv(folder / f"{NAME}.csv", index=False)
    (folder / f"{NAME}.json").write_text(json.dumps(data) + "\n", encoding="utf-8")


def read_evidence(folder: Path) -> Evidence:
    """What `write_evidence` wrote; raises `OSError`, `KeyError`, `ValueError` or `SafetensorError` for anything else."""
    import pandas as pd
    from safetensors.numpy import load_file

    data = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    features = tuple((site, index) for site, index in data.pop("features"))
    numbers = load_file(folder / f"{NAME}.safetensors")
    # pandas' own parser of numbers is off by a last bit, the one in Python is not.
    pairs = pd.read_csv(folder / f"{NAME}.csv", engine="python", dtype=dict.fromkeys(_TEXT, str), keep_default_na=False)
    ranked = {
        name: {key: [tuple(row) for row in rows] for key, rows in _keyed(data.pop(name), features).items()}
        for name in ("near", "promoted", "suppressed")
    }
    return Evidence(
        features=features,
        firings=Firings(**{name: numbers[name] for name in _FIRINGS}),
        tokens=tuple(tuple(tokens) for tokens in data.pop("tokens")),
        prompts=tuple(data.pop("prompts")),
        importance=_keyed(data.pop("importance"), features),
        pairs=pairs,
        **ranked,
        **data,
    )


def _by_feature(values: Mapping[Key, Any], features: Sequence[Key]) -> list[Any]:
    """By the features' numbers; None where there is none."""
    return [values.get(key) for key in features]


def _keyed(values: Sequence[Any], features: Sequence[Key]) -> dict[Key, Any]:
    return {key: value for key, value in zip(features, values, strict=True) if value is not None}
