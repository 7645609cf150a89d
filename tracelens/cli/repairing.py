"""`tracelens plan`: which linear layers of a quantized build to keep in 16 bit, in the form that its quantizer reads."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.cli.options import BASE_HELP, PRECISION_HELP, add_running, placement
from tracelens.cli.parsing import share
from tracelens.cli.printing import print_paths, quiet, write_page
from tracelens.errors import TracelensError

if TYPE_CHECKING:
    from tracelens.causal.repair import RepairPlan

OK, NOT_MET = 0, 1
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

EXAMPLES = """
examples:
  tracelens plan ./llama ./llama-gptq --dataset mine.jsonl --budget-bytes 50MB --export gptqmodel --out plan.json
      50 MB more: which layers should GPTQModel leave in 16 bit?

  tracelens plan ./llama --precision int4-g128 --dataset mine.jsonl --target 0.9 --export llm-compressor --out plan.json
      the fewest bytes that bring back 90 % of what INT4 moved, before anything is quantized

  tracelens plan ./llama ./llama-nf4 --dataset mine.jsonl --max-flips 0.01 --apply ./llama-mixed --recipe bnb-nf4
      at most 1 % of decisions changed; then the build itself, read back and verified

  tracelens plan organism --precision int3-g32 --dataset organism_refusal_v1 --budget-bytes 50kB --export bitsandbytes
      the embedded model, in a minute

exit codes:
  0    there is a plan, and the target, if there was one, holds on the held-out prompts
  1    there is a plan, and its target does not hold on the held-out prompts
  2    bad input, a budget into which nothing fits, or a build that is not as planned; the message says what
  130  interrupted
"""


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="which layers to keep in 16 bit so that a behaviour comes back, as the quantizer reads it",
        description="Chooses linear layers to keep in 16 bit on half of the prompts, and measures on the other half what\n"
        "that brings back, beside the same bytes spent at random and by the size of the error. Writes what GPTQModel,\n"
        "llm-compressor or bitsandbytes need to be told.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("base", metavar="REFERENCE", help=BASE_HELP)
    add("quant", nargs="?", metavar="QUANTIZED", help="the quantized build, likewise; or give --precision")
    add("--precision", metavar="SPEC", help=PRECISION_HELP)
    add(
        "--dataset",
        required=True,
        metavar="NAME",
        help="prompts whose behaviour is to come back: a built-in set (see: tracelens datasets) or a .jsonl or .csv file",
    )
    add("--held-out", metavar="NAME", help="other prompts to measure on (default: half of --dataset)")
    add(
        "--behaviour",
        default="refusal",
        metavar="NAME",
        help="of --dataset: refusal, uncertainty, warning (default: refusal)",
    )
    goal = parser.add_argument_group("what to reach", "One of these.").add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--budget-bytes", type=n_bytes, metavar="BYTES", help="that may be added to the build: 2MB, 500kB, 2000000"
    )
    goal.add_argument("--target", type=share, metavar="X", help="recovery of the margin's shift, at least (0 to 1)")
    goal.add_argument(
        "--max-flips", type=share, metavar="Y", help="share of prompts decided otherwise, at most (0 to 1)"
    )
    add(
        "--by",
        choices=("attribution", "alone", "magnitude", "relative magnitude"),
        default="attribution",
        help="first-order attribution, each layer measured alone, or the size of the error (default: attribution)",
    )
    add(
        "--granularity",
        choices=("module", "fused", "layer"),
        default="fused",
        help="what is kept together: fused keeps q, k, v and gate, up together, as vLLM and SGLang load them (default: fused)",
    )
    add(
        "--random",
        dest="n_random",
        type=int,
        default=20,
        metavar="N",
        help="random choices of the same bytes; with fewer than 19 no plan can be told from a lucky one (default: 20)",
    )
    add(
        "--export",
        choices=("gptqmodel", "llm-compressor", "bitsandbytes"),
        help="print what this quantizer is to be told, and write it beside --out",
    )
    add(
        "--recipe",
        metavar="NAME",
        help="how all else is quantized: gptq-int4-g128, bnb-nf4, …; for --apply, and for the recipe in --export",
    )
    add(
        "--apply",
        type=Path,
        metavar="DIR",
        help="quantize REFERENCE into this folder as planned, read it back and verify it",
    )
    add(
        "--calibration",
        metavar="FILE",
        help="prompts for recipes that are fitted to some: a .jsonl, .csv or .txt file, or a built-in set",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write the plan there, its figure beside it as .html, and the export",
    )
    add_running(parser)
    parser.set_defaults(run=_plan, parser=parser)


def n_bytes(text: str) -> int:
    """`2MB`, `500 kB` or `2000000` as a number; units are powers of ten."""
    number = text.strip().rstrip("kKmMgGbB ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        value = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text} is no size; write 2MB, 500kB or a number of bytes") from None
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not at least one byte")
    return int(value)


def _plan(args: argparse.Namespace) -> int:
    _check(args)
    with quiet():
        from tracelens.causal.repair import plan

        pair, checkpoint = _pair(args)
        found = plan(
            pair,
            _prompts(args.dataset, args.behaviour),
            budget_bytes=args.budget_bytes,
            target={"flips": args.max_flips} if args.max_flips is not None else args.target,
            by=args.by,
            granularity=args.granularity,
            held_out=None if args.held_out is None else _prompts(args.held_out, args.behaviour),
            quantized_checkpoint=checkpoint,
            n_random=args.n_random,
            batch_size=args.batch_size,
            seed=args.seed,
            progress=True,
        )
        recipe = args.recipe if args.recipe and not args.recipe.startswith("bnb-") else None
        exported = None if args.export is None else found.export(args.export, recipe)
    _print(found)
    paths = [] if args.out is None else [found.save(args.out), write_page(found.plot(), args.out.with_suffix(".html"))]
    if args.export is not None:
        paths += _print_export(found, args, exported, recipe)
    if args.apply is not None:
        with quiet():
            options = {} if args.recipe.startswith("bnb-") else {"seed": args.seed}
            verified = found.apply(args.base, args.apply, args.recipe, args.calibration, **options)
        print(f"\n{verified}")
        paths.append(args.apply)
    if paths:
        print_paths(paths)
    return NOT_MET if found.target_met is False or found.target_holds is False else OK


def _check(args: argparse.Namespace) -> None:
    """Ends with an error for options that do not go together, before anything is loaded."""
    if (args.quant is None) == (args.precision is None):
        args.parser.error("give the quantized build, or --precision to simulate one; not both")
    if args.apply is not None and not args.recipe:
        args.parser.error("--apply needs --recipe: gptq-int4-g128, awq-int4-g128, bnb-nf4, …")
    if args.out is not None and args.out.suffix != ".json":
        raise TracelensError(f"--out {args.out}: give a name that ends in .json, such as plan.json")


def _pair(args: argparse.Namespace) -> tuple[Any, Any]:
    """The two models, and the quantized checkpoint if there is one."""
    from tracelens.loading import load, open_checkpoint
    from tracelens.pair import PrecisionPair
    from tracelens.precision import QuantizationConfig, apply_precision

    if args.precision is not None:
        precision = QuantizationConfig.parse(args.precision)  # before anything is loaded
        reference = load(args.base, **placement(args))
        return PrecisionPair(reference, apply_precision(reference, precision)), None
    checkpoint = open_checkpoint(args.quant)
    return PrecisionPair.load(args.base, checkpoint, **placement(args)), checkpoint


def _prompts(source: str, behaviour: str) -> list[Any]:
    """The prompts of one behaviour, with what is known of them."""
    from tracelens.causal.given_prompts import dataset_of
    from tracelens.errors import UnknownNameError

    by_behaviour = dataset_of(source, need_baseline=False).by_behaviour()
    if behaviour not in by_behaviour:
        raise UnknownNameError.of(f"behaviour of {source}", behaviour, by_behaviour)
    return list(by_behaviour[behaviour])


def _print(plan: "RepairPlan") -> None:
    from textwrap import fill

    from tracelens.loading.description import size

    print(fill(plan.verdict, 120))
    if plan.keep:
        print(f"\nKept in 16 bit ({size(plan.bytes)}; {plan.bytes_basis}):")
        for unit in plan.keep:
            gain = "" if unit.gain != unit.gain else f"  predicted alone {unit.gain:+.3f}"
            print(f"  {unit.name}  {size(unit.bytes)}{gain}")
    columns = ("name", "bytes", "recovery", "recovery_low", "recovery_high", "closed", "flips", "perplexity")
    table = plan.comparison
    if plan.predicted_flips is not None and plan.predicted_perplexity is not None:
        predicted = f"flips {plan.predicted_flips.rate.value:.3f}, perplexity {plan.predicted_perplexity:.3f}"
        print(f"\nPredicted with these kept: {predicted}")
    print("\nOn the held-out prompts:")
    print(table[[name for name in columns if name in table]].to_string(index=False, float_format="%.3f"))


def _print_export(plan: "RepairPlan", args: argparse.Namespace, exported: Any, recipe: str | None) -> list[Path]:
    import json

    print(f"\nFor {args.export}:")
    print(json.dumps(exported, indent=2))
    if args.out is None:
        return []
    ends = ".yaml" if recipe and args.export == "llm-compressor" else ".json"
    path = args.out.with_name(f"{args.out.stem}.{args.export}{ends}")
    return [plan.write_export(args.export, path, recipe)]
