"""The command line: `tracelens demo`, `audit`, `sweep`, `inspect`, `doctor`, `datasets`.

Results go to stdout, everything else to stderr. Nothing heavy is imported before a command runs, so that help and mistakes are instant.
"""

import argparse
import contextlib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens import __version__
from tracelens.errors import TracelensError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.audit_report import AuditReport
    from tracelens.loading import Checkpoint
    from tracelens.optimization_auditor import SweepResult

OK, NOT_MET, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
DEMO_PRECISIONS = ("int8", "int4", "int3", "int2-g32")
WARNINGS = 8
STILL_MATTERS = 0.8
"""CPFR down to which a precision is still a candidate, and so its findings worth reading; below, all is broken."""

EXIT_CODES = """
exit codes:
  0    it ran, and every threshold that was asked for is met
  1    it ran, and a threshold (--min-cpfr, --max-flips) is not met
  2    bad input; the message says what and how to mend it
  130  interrupted
"""

ABOUT = """
Does a language model's safety machinery survive quantization, and if not, which part breaks?

Tracelens runs a quantized model beside its reference on the same prompts, looks at both through the same sparse
autoencoders, and says for each feature how much of it is left: for those that carry a safety behaviour (refusing, admitting
not to know, warning) and for all others, beside what harmless rounding and random noise of the same size do.
"""

EXAMPLES = """
examples:
  tracelens demo
      the embedded model in INT8, INT4, INT3 and INT2: see what a result looks like

  tracelens audit --base ./llama --quant ./llama-int4 --saes ./saes --dataset harmful_refusal_v1 --out audit
      two checkpoints, and a report in audit/report.html

  tracelens audit --base ./llama --precision int4-g128 --saes ./saes --dataset mine.jsonl --baseline harmful_refusal_v1 \\
      --out audit --min-cpfr 0.9 --max-flips 0.01
      what INT4 would do, on prompts of one's own; exit code 1 if it would do too much: a gate for a release

  tracelens sweep --base ./llama --precisions int8,int4,int4-g32,int3 --saes ./saes --dataset harmful_refusal_v1 --out sweep
      how far down it goes
"""


CHECK_CODES = """
exit codes:
  0    it ran; doctor: verified, or no reference
  1    doctor: degraded or wrong
  2    bad input; the message says what and how to mend it
  130  interrupted
"""

INSPECT_EXAMPLES = """
examples:
  tracelens inspect ./llama-gptq
      before anything is loaded: what is in there?

  tracelens doctor ./llama-gptq --reference ./llama
      did dequantization give back the weights that were quantized?
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except TracelensError as error:
        return _fail(error)
    except OSError as error:  # a folder that cannot be written, a full disk
        return _fail(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tracelens", description=ABOUT, epilog=EXAMPLES + EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"tracelens {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command", parser_class=_Parser)

    demo = commands.add_parser(
        "demo",
        help="audit the embedded model in four precisions (under a minute)",
        description="The embedded aligned model, whose ground truth is known, against its own "
        f"{', '.join(DEMO_PRECISIONS)}.\nWrites a figure of all four and the report of one of them.",
        epilog=EXIT_CODES,
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder to write to (default: demo)"
    )
    demo.add_argument("--quick", action="store_true", help="refusal only: a third of the prompts")
    demo.add_argument("--saes", default="organism", metavar="DIR", help="other SAEs of the embedded model")
    demo.set_defaults(run=_demo)

    audit = commands.add_parser(
        "audit",
        help="one quantized model against its reference",
        description="Compares a quantized model with its reference, feature by feature, and writes a report.\n"
        "Give --quant for a checkpoint, --precision to simulate a number format on the reference, or both.",
        epilog=EXAMPLES + EXIT_CODES,
    )
    audit.add_argument("--quant", metavar="MODEL", help="the quantized model, likewise (GPTQ, AWQ, NF4, …)")
    audit.add_argument(
        "--precision", metavar="SPEC", help="a precision to simulate: bf16, int8-dynamic, int4-g32-asym, …"
    )
    _add_common(audit)
    audit.set_defaults(run=_audit, parser=audit)

    sweep = commands.add_parser(
        "sweep",
        help="many precisions of one model; the reference runs once",
        description="Simulates several precisions on one model, compares each with it, and says how far down it goes.\n"
        "A threshold is met if one of the precisions meets it; the smallest that does is named.",
        epilog=EXAMPLES + EXIT_CODES,
    )
    sweep.add_argument("--precisions", required=True, metavar="SPECS", help="separated by commas: int8,int4,int4-g32")
    _add_common(sweep)
    sweep.set_defaults(run=_sweep)

    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint holds and how it is quantized",
        description="Prints format, bits, groups, what is quantized and what is not, and bytes. Reads headers only.",
        epilog=INSPECT_EXAMPLES + CHECK_CODES,
    )
    _add_source(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    doctor = commands.add_parser(
        "doctor",
        help="is the model that Tracelens loads the model on disk?",
        description="Loads a checkpoint and checks it: every tensor accounted for and finite, the hooked model equal to a plain\n"
        "transformers model with the same weights, and, beside a reference, the error of each tensor what its format\n"
        "can produce. Says verified, degraded, wrong or no reference, and why.",
        epilog=INSPECT_EXAMPLES + CHECK_CODES,
    )
    _add_source(doctor)
    doctor.add_argument("--reference", metavar="MODEL", help="the full-precision checkpoint it was quantized from")
    doctor.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    datasets = commands.add_parser("datasets", help="list the built-in data sets", epilog=EXIT_CODES)
    datasets.set_defaults(run=_datasets)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="MODEL", help="a checkpoint folder, a .gguf file, a model on the hub, organism")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--local-files-only", action="store_true", help="use the hub's cache and no network")


class _Parser(argparse.ArgumentParser):
    """Keeps the line breaks of descriptions and examples."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--base",
        required=True,
        metavar="MODEL",
        help="the reference: a checkpoint folder, a .gguf file, a model on the hub, organism",
    )
    add("--saes", required=True, metavar="DIR", help="sparse autoencoders in SAELens' format, one sub-folder each")
    add(
        "--dataset",
        required=True,
        metavar="NAME",
        help="a built-in set (see: tracelens datasets) or a .jsonl or .csv file",
    )
    add("--baseline", metavar="NAME", help="where baseline prompts come from, if --dataset has none")
    add(
        "--fingerprint",
        type=Path,
        metavar="FILE",
        help="which features are safety features (default: found on the prompts)",
    )
    add(
        "--out", required=True, type=Path, metavar="DIR", help="folder for the report: new, empty, or of an earlier run"
    )
    gate = parser.add_argument_group(
        "thresholds", "What must hold for exit code 0. Values count, not the ends of intervals."
    )
    gate.add_argument("--min-cpfr", type=_share, metavar="X", help="CPFR of the safety features, at least (0 to 1)")
    gate.add_argument(
        "--max-flips", type=_share, metavar="Y", help="share of prompts decided otherwise, at most (0 to 1)"
    )
    run = parser.add_argument_group("how it runs")
    run.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="prompts per forward pass (default: 32)"
    )
    run.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    run.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of both models")
    run.add_argument(
        "--no-controls", action="store_true", help="no bf16 floor and no matched noise: faster, and blinder"
    )
    run.add_argument(
        "--noise-seeds", type=_positive, default=3, metavar="N", help="draws of matched noise (default: 3)"
    )
    run.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of bootstrap, permutations and noise (default: 0)"
    )


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _demo(args: argparse.Namespace) -> int:
    dataset = "organism_refusal_v1" if args.quick else "organism_comprehensive_v1"
    with _quiet():
        sweep = _run_sweep("organism", args.saes, DEMO_PRECISIONS, dataset, args.out, progress=True, batch_size=128)
        shown = _worst_that_matters(sweep)
        paths = [*_write_figure(sweep.plot(), args.out), sweep[shown].to_html(args.out / "report.html")]
    from tracelens.views.text import safety_findings, verdict_text

    print(sweep.summary())
    report = sweep[shown]
    print(
        f"\n{report.label} is the smallest that keeps most of the safety features' activity. What it does to them, worst first:"
    )
    print("\n".join(safety_findings(report)[:WARNINGS]) or "nothing: none is degraded or smeared")
    print(f"\n{verdict_text(report)}")
    _print_paths([*paths, args.out])
    return OK


def _audit(args: argparse.Namespace) -> int:
    if not (args.quant or args.precision):
        args.parser.error("nothing to compare with: give --quant, or --precision to simulate one")
    with _quiet():
        from tracelens.audit import Audit
        from tracelens.audit_report import KIND
        from tracelens.output import check_folder

        check_folder(args.out, KIND)  # before the work, not after it
        audit = Audit(args.base, args.quant, args.precision, **_placement(args))
        audit.load_sae(args.saes)
        report = audit.trace_features(
            args.dataset, baseline=args.baseline, fingerprint=args.fingerprint, **_changes(args)
        )
        report.save(args.out)
        paths = [report.to_html(args.out / "report.html"), args.out]
    print(report.summary())
    _print_paths(paths)
    return _gate(_missed(report, args))


def _sweep(args: argparse.Namespace) -> int:
    with _quiet():
        sweep = _run_sweep(
            args.base,
            args.saes,
            [spec.strip() for spec in args.precisions.split(",")],
            args.dataset,
            args.out,
            baseline_prompts=args.baseline,
            fingerprint=args.fingerprint,
            placement=_placement(args),
            **_changes(args),
        )
        paths = _write_figure(sweep.plot(), args.out)
        paths += [report.to_html(args.out / spec / "report.html") for spec, report in sweep.reports.items()]
    print(sweep.summary())
    _print_paths(paths)
    if args.min_cpfr is None and args.max_flips is None:
        return OK
    missed = {spec: _missed(report, args) for spec, report in sweep.reports.items()}
    passing = [config for config in sweep.configs if not missed[str(config)]]
    if passing:
        best = min(passing, key=lambda config: config.bits_per_weight)
        print(
            f"\nThe smallest precision that meets the thresholds is {best.label} ({best.bits_per_weight:g} bits per weight)."
        )
    return OK if passing else _gate([f"{spec}: {line}" for spec, lines in missed.items() for line in lines])


def _datasets(args: argparse.Namespace) -> int:
    from tracelens.datasets import get_dataset, list_datasets

    for name in list_datasets():
        dataset = get_dataset(name)
        behaviours = ", ".join(f"{len(prompts)} {behaviour}" for behaviour, prompts in dataset.by_behaviour().items())
        print(f"{name:<26} {behaviours}; {len(dataset.baseline_prompts)} baseline prompts")
        print(textwrap.indent(textwrap.fill(dataset.description, 100), "    "))
    return OK


def _inspect(args: argparse.Namespace) -> int:
    import json

    with _quiet():
        description = _open(args).describe()
    print(json.dumps(description.to_dict(), indent=2) if args.json else description)
    return OK


def _doctor(args: argparse.Namespace) -> int:
    import json

    from tracelens.loading.doctor import doctor

    with _quiet():
        diagnosis = doctor(
            args.path,
            reference=args.reference,
            device=args.device,
            revision=args.revision,
            local_files_only=args.local_files_only,
            progress=True,
        )
    print(json.dumps(diagnosis.to_dict(), indent=2) if args.json else diagnosis.summary())
    return NOT_MET if diagnosis.verdict in ("degraded", "wrong") else OK


def _open(args: argparse.Namespace) -> "Checkpoint":
    from tracelens.loading import open_checkpoint

    return open_checkpoint(args.path, revision=args.revision, local_files_only=args.local_files_only)


def _run_sweep(
    base: str,
    saes: str,
    precisions: Sequence[str],
    dataset: str,
    out: Path,
    *,
    placement: dict[str, Any] | None = None,
    **options: Any,
) -> "SweepResult":
    from tracelens.features import load_saes
    from tracelens.loading import load
    from tracelens.optimization_auditor import KIND, OptimizationAuditor
    from tracelens.output import check_folder
    from tracelens.precision import QuantizationConfig

    configs = [QuantizationConfig.parse(spec) for spec in precisions]
    check_folder(out, KIND)  # before the work, not after it
    model = load(base, **placement or {})
    auditor = OptimizationAuditor(model, load_saes(saes, device=model.cfg.device))
    sweep = auditor.run_sweep(dataset, configs, **options)
    sweep.save(out)
    return sweep


def _placement(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load`; raises `TracelensError` for a device that is not there."""
    import torch

    try:
        device = None if args.device is None else torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TracelensError(f"device {args.device!r} cannot be used ({reason}); try --device cpu") from error
    return {"device": device, "dtype": getattr(torch, args.dtype)}


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `AuditSettings`."""
    return {
        "batch_size": args.batch_size,
        "controls": not args.no_controls,
        "noise_seeds": args.noise_seeds,
        "seed": args.seed,
        "progress": True,
    }


def _worst_that_matters(sweep: "SweepResult") -> str:
    """The smallest precision that keeps most of the safety features; of a model that keeps none, the largest."""
    best = sweep.best_config(min_cpfr=STILL_MATTERS)
    return str(best or max(sweep.configs, key=lambda config: config.bits_per_weight))


def _missed(report: "AuditReport", args: argparse.Namespace) -> list[str]:
    """A line for each threshold that the report does not meet; what could not be measured meets none."""
    lines = []
    if args.min_cpfr is not None:
        cpfr = report.cpfr["safety"]
        if cpfr.value != cpfr.value:
            lines.append(f"--min-cpfr {args.min_cpfr:g}: no safety features were found, so their CPFR is not known")
        elif cpfr.value < args.min_cpfr:
            short = args.min_cpfr - cpfr.value
            lines.append(f"--min-cpfr {args.min_cpfr:g}: the safety features' CPFR is {cpfr}, {short:.3g} too low")
    if args.max_flips is not None:
        if report.flips is None:
            lines.append(f"--max-flips {args.max_flips:g}: no prompt's decision can be read, so flips are not known")
        elif (rate := report.flips.rate).value > args.max_flips:
            lines.append(
                f"--max-flips {args.max_flips:g}: the flip rate is {rate}, {rate.value - args.max_flips:.3g} too high"
            )
    return lines


def _gate(missed: list[str]) -> int:
    for line in missed:
        print(f"threshold not met: {line}", file=sys.stderr)
    return NOT_MET if missed else OK


def _write_figure(figure: "go.Figure", out: Path) -> list[Path]:
    """The figure as a page and, where kaleido and a browser are installed, as a picture."""
    from tracelens.output import write_atomically

    page = figure.to_html(include_plotlyjs=True, config={"displaylogo": False})
    paths = [write_atomically(out / "figure.html", page)]
    picture = out / "figure.png"
    with contextlib.suppress(Exception):  # a picture is a convenience; what goes wrong without it is of no interest
        figure.write_image(picture, width=1000, scale=2)
        paths.append(picture)
    return paths


def _print_paths(paths: list[Path]) -> None:
    print("\nWrote " + "\n      ".join(str(path) for path in paths))


@contextlib.contextmanager
def _quiet():
    """Sends what libraries print to stderr, and their warnings nowhere: stdout holds results only."""
    import warnings

    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fail(error: Exception) -> int:
    print(f"tracelens: error: {error}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
