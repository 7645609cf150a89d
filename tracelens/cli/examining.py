"""Commands that look closer at one precision: `decompose` (which step did it?) and `sae-health` (do the SAEs still fit?)."""

import argparse
from pathlib import Path
from typing import Any

from tracelens.cli.options import (
    BASE_HELP,
    PRECISION_HELP,
    add_fingerprint,
    add_material,
    add_running,
    add_survival,
    calibration,
    changes,
    placement,
    selection,
)
from tracelens.cli.parsing import HEALTH_CODES, RAN_CODES, names
from tracelens.cli.printing import print_paths, quiet, write_page
from tracelens.errors import TracelensError

OK, BROKEN = 0, 1

DECOMPOSE_EXAMPLES = """
examples:
  tracelens decompose organism --precision int4-g32+a8+kv8 --saes organism --dataset organism_refusal_v1 --out steps.json
      bf16, then INT4 weights, then INT8 activations, then an INT8 cache: what does each add?

  tracelens decompose ./llama --precision int8+a8-static --saes ./saes --dataset mine.jsonl --calibration prompts.txt
      with scales of activations found on prompts

  tracelens decompose ./llama --precision int4+a8 --order activations,weights --compute none --saes ./saes --dataset mine.jsonl
      the other way round: what two steps do together counts for the later one
"""

HEALTH_EXAMPLES = """
examples:
  tracelens sae-health organism --precision int2 --saes organism --dataset organism_refusal_v1
      is the drift at INT2 the model's, or have the SAEs stopped fitting?

  tracelens sae-health ./llama ./llama-gptq --saes ./saes --layers 6,8 --dataset mine.jsonl --out health.json
      two of the SAEs, on a build
"""


def add(commands: argparse._SubParsersAction) -> None:
    decompose = commands.add_parser(
        "decompose",
        help="which step of a precision did it: bf16, weights, activations, KV cache?",
        description="Takes a precision step by step, from the reference over bf16, weights and activations to the key-value cache,\n"
        "and says what each step changes of every metric, with paired intervals over prompts. No controls are measured.",
        epilog=DECOMPOSE_EXAMPLES + RAN_CODES,
    )
    decompose.add_argument("base", metavar="MODEL", help=BASE_HELP)
    decompose.add_argument("--precision", required=True, metavar="SPEC", help=PRECISION_HELP)
    add_material(decompose)
    add_fingerprint(decompose)
    decompose.add_argument(
        "--compute",
        choices=("bf16", "fp16", "none"),
        default="bf16",
        help="what kernels compute in, where the precision does not say; none leaves this step out (default: bf16)",
    )
    decompose.add_argument(
        "--order",
        type=names,
        metavar="STEPS",
        help="in which steps are taken (default: compute,weights,activations,kv_cache); those not named come last",
    )
    _add_out(decompose)
    add_survival(decompose)
    add_running(decompose)
    decompose.set_defaults(run=_decompose, parser=decompose)

    health = commands.add_parser(
        "sae-health",
        help="do the SAEs still fit the quantized model?",
        description="Measures on the same tokens how well the frozen SAEs fit the reference and the quantized model: explained variance,\n"
        "cross-entropy recovered, features per token. Where an SAE has stopped fitting, drift is the ruler's too.",
        epilog=HEALTH_EXAMPLES + HEALTH_CODES,
    )
    health.add_argument("base", metavar="MODEL", help=BASE_HELP)
    health.add_argument("quant", nargs="?", metavar="QUANT", help="the quantized model, likewise; or give --precision")
    health.add_argument("--precision", metavar="SPEC", help=PRECISION_HELP)
    add_material(health)
    health.add_argument(
        "--ablation",
        choices=("zero", "mean"),
        default="zero",
        help="what stands for nothing at a site, where cross-entropy recovered is 0 (default: zero)",
    )
    _add_out(health)
    add_running(health)
    health.set_defaults(run=_health, parser=health)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write the numbers there, and the figure beside it as .html"
    )


def _decompose(args: argparse.Namespace) -> int:
    from tracelens.studies.steps import STEPS

    _check_out(args.out)
    order = args.order or []
    order += [step for step in STEPS if step not in order]
    with quiet():
        from tracelens.features import load_saes
        from tracelens.loading import load
        from tracelens.precision import QuantizationConfig
        from tracelens.studies import decompose

        precision = QuantizationConfig.parse(args.precision)  # before anything is loaded
        model = load(args.base, **placement(args))
        found = decompose(
            model,
            precision,
            saes=load_saes(args.saes, **selection(args), device=model.cfg.device, progress=True),
            dataset=args.dataset,
            baseline=args.baseline,
            fingerprint=args.fingerprint,
            compute=None if args.compute == "none" else args.compute,
            order=order,
            calibration=calibration(args),
            **changes(args),
        )
    return _show(found, args.out)


def _health(args: argparse.Namespace) -> int:
    if not (args.quant or args.precision):
        args.parser.error("nothing to compare with: name a quantized model, or give --precision to simulate one")
    _check_out(args.out)
    with quiet():
        from tracelens.audit import Audit
        from tracelens.auditing.running import model_label
        from tracelens.features import load_saes, sae_health

        audit = Audit(args.base, args.quant, args.precision, calibration=calibration(args), **placement(args))
        found = sae_health(
            audit.pair,
            load_saes(args.saes, **selection(args), device=audit.reference.cfg.device, progress=True),
            _texts(args, audit.pair.tokenizer),
            ablation=args.ablation,
            names=("the reference", model_label(audit.quantized)),
            batch_size=args.batch_size,
            seed=args.seed,
            progress=True,
        )
    _show(found, args.out)
    return OK if found.ok() else BROKEN


def _texts(args: argparse.Namespace, tokenizer: Any) -> list[str]:
    """All prompts of the data set as the models see them; no baseline is needed."""
    from tracelens.chat import as_chat
    from tracelens.datasets import check_vocabulary, resolve_dataset

    dataset = resolve_dataset(args.dataset, baseline=args.baseline, need_baseline=False)
    texts = as_chat(dataset.prompts, tokenizer, "auto")
    check_vocabulary(dataset, tokenizer)
    return texts


def _check_out(out: Path | None) -> None:
    """Raises `TracelensError`, before the work, for a place that is not for a JSON file."""
    if out is not None and (out.suffix != ".json" or out.is_dir()):
        raise TracelensError(
            f"--out {out}: one JSON file is written; give a name that ends in .json, such as {out}.json"
        )


def _show(found: Any, out: Path | None) -> int:
    print(found.summary())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found.save(out)
        print_paths([out, write_page(found.plot(), out.with_suffix(".html"))])
    return OK
