"""Options that the measuring commands share, and what they mean to the library."""

import argparse
from pathlib import Path
from typing import Any

from tracelens.cli.parsing import checked_device, count, gigabytes, layer_list, names, positive, share

PRECISION_HELP = "a precision to simulate: bf16, int4-g128, nf4-dq, fp8, int8+a8+kv8, … (a wrong one lists all)"
BASE_HELP = "the reference: a checkpoint folder, a .gguf file, a model on the hub, organism"


def add_common(parser: argparse.ArgumentParser) -> None:
    """What `audit` and `sweep` take alike."""
    parser.add_argument("--base", required=True, metavar="MODEL", help=BASE_HELP)
    add_material(parser)
    add_fingerprint(parser)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder for the report: new, empty, or of an earlier run"
    )
    gate = parser.add_argument_group(
        "thresholds", "What must hold for exit code 0. Values count, not the ends of intervals."
    )
    gate.add_argument("--min-cpfr", type=share, metavar="X", help="CPFR of the safety features, at least (0 to 1)")
    gate.add_argument(
        "--max-flips", type=share, metavar="Y", help="share of prompts decided otherwise, at most (0 to 1)"
    )
    add_survival(parser)
    run = add_running(parser)
    run.add_argument(
        "--memory", type=gigabytes, metavar="GB", help="for what is kept of the reference; what is more goes to disk"
    )
    run.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of both models")
    run.add_argument(
        "--no-controls",
        dest="controls",
        action="store_false",
        help="no bf16 floor, matched noise or permuted error: faster, and blinder",
    )
    run.add_argument("--noise-seeds", type=positive, default=5, metavar="N", help="draws of matched noise (default: 5)")
    run.add_argument(
        "--permuted-seeds", type=positive, default=1, metavar="N", help="shuffles of the true error (default: 1)"
    )
    run.add_argument(
        "--evidence-prompts",
        type=count,
        metavar="N",
        help="prompts of which the report keeps what features do token by token, a random sample of more; 0 for none (default: 512)",
    )
    run.add_argument(
        "--evidence-features",
        type=count,
        metavar="N",
        help="features of which it does: all safety features, and the worst of the others up to N (default: 1000)",
    )


def add_material(parser: argparse.ArgumentParser) -> None:
    """SAEs and prompts."""
    add = parser.add_argument
    add(
        "--saes",
        required=True,
        metavar="SOURCE",
        help="sparse autoencoders: a folder with one or a sub-folder for each, a release of SAELens by name "
        "(gpt2-small-res-jb), RELEASE/SAE_ID, a repository on the hub, organism",
    )
    add("--layers", type=layer_list, metavar="N,N", help="take only the SAEs of these layers: 6,8 (default: all)")
    add(
        "--sites", type=names, metavar="HOOKS", help="take only the SAEs at these hook points: blocks.6.hook_resid_post"
    )
    add(
        "--dataset",
        required=True,
        metavar="NAME",
        help="a built-in set (see: tracelens datasets) or a .jsonl or .csv file",
    )
    add("--baseline", metavar="NAME", help="where baseline prompts come from, if --dataset has none")
    add(
        "--calibration",
        metavar="FILE",
        help="prompts for the static scales of activations (int8+a8-static): a .jsonl, .csv or .txt file, or a built-in set",
    )


def add_fingerprint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fingerprint",
        type=Path,
        metavar="FILE",
        help="which features are safety features (default: found on the prompts)",
    )


def add_survival(parser: argparse.ArgumentParser) -> None:
    survival = parser.add_argument_group("survival", "Of a feature: correlation of its activation in both models.")
    survival.add_argument(
        "--survived-at", type=share, default=0.9, metavar="R", help="from which it has survived (default: 0.9)"
    )
    survival.add_argument(
        "--damaged-at", type=share, default=0.5, metavar="R", help="below which it is damaged (default: 0.5)"
    )


def add_running(parser: argparse.ArgumentParser) -> Any:
    """How it runs, as a group to which a command may add."""
    run = parser.add_argument_group("how it runs")
    run.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="prompts per forward pass (default: 32)"
    )
    run.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of whatever is drawn at random (default: 0)")
    return run


def placement(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load`; raises `TracelensError` for a device that is not there."""
    import torch

    device = None if args.device is None else checked_device(args.device)
    return {"device": device, "dtype": getattr(torch, getattr(args, "dtype", "float32"))}


def selection(args: argparse.Namespace) -> dict[str, Any]:
    """Which SAEs of the source, as arguments of `load_saes`."""
    return {"layers": args.layers, "sites": args.sites}


def calibration(args: argparse.Namespace) -> list[list[int]] | None:
    """The prompts of --calibration as token ids, in the chat template of the reference."""
    if args.calibration is None:
        return None
    from tracelens.loading import open_checkpoint
    from tracelens.precision.calibration_prompts import read_calibration

    return read_calibration(args.calibration, open_checkpoint(args.base), seed=args.seed).ids


SETTINGS = [
    *("batch_size", "controls", "noise_seeds", "permuted_seeds", "survived_at", "damaged_at", "seed", "memory"),
    *("evidence_prompts", "evidence_features"),
]
"""Options that are fields of `AuditSettings` by the same name."""


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `AuditSettings`: those that the command has an option for, and that were given or have a default."""
    given = {name: value for name in SETTINGS if (value := getattr(args, name, None)) is not None}
    return given | {"progress": True}
