"""Commands that measure: `demo`, `audit`, `sweep`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.cli.options import PRECISION_HELP, add_common, calibration, changes, placement, selection
from tracelens.cli.parsing import EXIT_CODES
from tracelens.cli.printing import print_dead, print_paths, quiet, write_figure

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport
    from tracelens.optimization_auditor import SweepResult

OK, NOT_MET = 0, 1
DEMO_PRECISIONS = ("int8", "int4", "int3", "int2-g32")
WARNINGS = 8
STILL_MATTERS = 0.8
"""CPFR down to which a precision is still a candidate, and so its findings worth reading; below, all is broken."""

EXAMPLES = """
examples:
  tracelens demo
      the embedded model in INT8, INT4, INT3 and INT2: see what a result looks like

  tracelens audit --base ./llama --quant ./llama-int4 --saes ./saes --dataset harmful_refusal_v1 --out audit
      two checkpoints, and a report in audit/report.html

  tracelens audit --base ./llama --precision int4-g128 --saes ./saes --dataset mine.jsonl --baseline harmful_refusal_v1 \\
      --out audit --min-cpfr 0.9 --max-flips 0.01
      what INT4 would do, on prompts of one's own; exit code 1 if it would do too much: a gate for a release

  tracelens audit --base gpt2 --precision nf4 --saes gpt2-small-res-jb --layers 6,8 --dataset mine.jsonl --out audit
      a model and SAEs of the hub, two layers of them

  tracelens sweep --base ./llama --precisions int8,int4,int4-g32,int3 --saes ./saes --dataset harmful_refusal_v1 \\
      --out sweep --dead-at int4
      how far down it goes, and which features INT4 silences

  tracelens sweep --base ./llama --precisions int4-g128 --builds gptq=./llama-gptq awq=./llama-awq --saes ./saes \\
      --dataset harmful_refusal_v1 --out sweep
      rounding to nearest beside calibrated builds (see: tracelens quantize --help)
"""


def add(commands: argparse._SubParsersAction) -> None:
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
    audit.add_argument("--precision", metavar="SPEC", help=PRECISION_HELP)
    add_common(audit)
    audit.set_defaults(run=_audit, parser=audit)

    sweep = commands.add_parser(
        "sweep",
        help="many precisions of one model; the reference runs once",
        description="Compares several precisions of one model with it, simulated or built, and says how far down it goes.\n"
        "A threshold is met if one of the precisions meets it; the smallest that does is named.\n"
        "An interrupted sweep goes on where it was when the same command is given again.",
        epilog=EXAMPLES + EXIT_CODES,
    )
    sweep.add_argument("--precisions", default="", metavar="SPECS", help="separated by commas: int8,int4,int4-g32")
    sweep.add_argument(
        "--builds", nargs="+", default=[], metavar="NAME=MODEL", help="quantized checkpoints: gptq=./llama-gptq"
    )
    sweep.add_argument(
        "--dead-at",
        metavar="NAME",
        help="of one of them, list the features that have fallen silent, safety features first: int4",
    )
    sweep.add_argument("--no-resume", action="store_true", help="measure again what --out holds already")
    add_common(sweep)
    sweep.set_defaults(run=_sweep, parser=sweep)


def _demo(args: argparse.Namespace) -> int:
    dataset = "organism_refusal_v1" if args.quick else "organism_comprehensive_v1"
    with quiet():
        sweep = _run_sweep("organism", args.saes, DEMO_PRECISIONS, dataset, args.out, progress=True, batch_size=128)
        shown = _worst_that_matters(sweep)
        paths = [*write_figure(sweep.plot(), args.out), sweep[shown].to_html(args.out / "report.html")]
    from tracelens.views.text import safety_findings, verdict_text

    print(sweep.summary())
    report = sweep[shown]
    print(
        f"\n{report.label} is the smallest that keeps most of the safety features' activity. What it does to them, worst first:"
    )
    print("\n".join(safety_findings(report)[:WARNINGS]) or "nothing: none is degraded or smeared")
    print(f"\n{verdict_text(report)}")
    print_paths([*paths, args.out])
    return OK


def _audit(args: argparse.Namespace) -> int:
    if not (args.quant or args.precision):
        args.parser.error("nothing to compare with: give --quant, or --precision to simulate one")
    with quiet():
        from tracelens.audit import Audit
        from tracelens.audit_report import KIND
        from tracelens.features import load_saes
        from tracelens.output import check_folder

        check_folder(args.out, KIND)  # before the work, not after it
        audit = Audit(args.base, args.quant, args.precision, calibration=calibration(args), **placement(args))
        audit.load_sae(load_saes(args.saes, **selection(args), device=audit.reference.cfg.device, progress=True))
        report = audit.trace_features(
            args.dataset, baseline=args.baseline, fingerprint=args.fingerprint, **changes(args)
        )
        report.save(args.out)
        paths = [report.to_html(args.out / "report.html"), args.out]
    print(report.summary())
    print_paths(paths)
    return _gate(_missed(report, args))


def _sweep(args: argparse.Namespace) -> int:
    precisions = [spec.strip() for spec in args.precisions.split(",") if spec.strip()]
    builds = dict(_named(build, args.parser) for build in args.builds)
    if not (precisions or builds):
        args.parser.error("nothing to compare with: give --precisions to simulate, or --builds")
    if len(builds) < len(args.builds):
        args.parser.error("--builds gives a name twice")
    _check_dead_at(args, precisions, builds)
    with quiet():
        sweep = _run_sweep(
            args.base,
            args.saes,
            precisions,
            args.dataset,
            args.out,
            builds=builds,
            resume=not args.no_resume,
            baseline_prompts=args.baseline,
            fingerprint=args.fingerprint,
            calibration=calibration(args),
            placement=placement(args),
            selection=selection(args),
            **changes(args),
        )
        paths = write_figure(sweep.plot(), args.out)
        paths += [report.to_html(args.out / spec / "report.html") for spec, report in sweep.reports.items()]
    print(sweep.summary())
    if args.dead_at is not None:
        paths.append(print_dead(sweep[args.dead_at], args.out / f"dead-{args.dead_at}.csv"))
    print_paths(paths)
    if args.min_cpfr is None and args.max_flips is None:
        return OK
    missed = {name: _missed(report, args) for name, report in sweep.reports.items()}
    # What does not say its bits comes last.
    passing = sorted(
        (bits != bits, bits if bits == bits else 0, name) for name, bits in sweep.bits.items() if not missed[name]
    )
    if passing:
        unknown, bits, best = passing[0]
        size = "" if unknown else f" ({bits:g} bits per weight)"
        print(f"\nThe smallest precision that meets the thresholds is {sweep[best].label}{size}.")
    return OK if passing else _gate([f"{spec}: {line}" for spec, lines in missed.items() for line in lines])


def _check_dead_at(args: argparse.Namespace, precisions: list[str], builds: dict[str, str]) -> None:
    """Ends with an error, before the work, if --dead-at names nothing of this sweep."""
    from tracelens.errors import PrecisionSpecError
    from tracelens.precision import QuantizationConfig

    if args.dead_at is None or args.dead_at in builds:
        return
    try:
        known = QuantizationConfig.parse(args.dead_at) in map(QuantizationConfig.parse, precisions)
    except PrecisionSpecError:
        known = False
    if not known:
        args.parser.error(
            f"--dead-at {args.dead_at}: not in this sweep; name one of {', '.join([*precisions, *builds])}"
        )


def _named(text: str, parser: argparse.ArgumentParser) -> tuple[str, str]:
    name, _, model = text.partition("=")
    if not (name and model):
        parser.error(f"--builds {text}: give it a name, as in gptq={text or './llama-gptq'}")
    return name, model


def _run_sweep(
    base: str,
    saes: str,
    precisions: Sequence[str],
    dataset: str,
    out: Path,
    *,
    placement: dict[str, Any] | None = None,
    selection: dict[str, Any] | None = None,
    **options: Any,
) -> "SweepResult":
    from tracelens.auditing.sweep_pieces import KIND
    from tracelens.features import load_saes
    from tracelens.loading import load
    from tracelens.optimization_auditor import OptimizationAuditor
    from tracelens.output import check_folder
    from tracelens.precision import QuantizationConfig

    configs = [QuantizationConfig.parse(spec) for spec in precisions]
    check_folder(out, KIND)  # before the work, not after it
    model = load(base, **placement or {})
    features = load_saes(saes, **selection or {}, device=model.cfg.device, progress=True)
    auditor = OptimizationAuditor(model, features)
    return auditor.run_sweep(dataset, configs, out=out, **options)


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
