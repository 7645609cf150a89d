"""`tracelens report`: the page of an audit that was saved."""

import argparse
from pathlib import Path

from tracelens.cli.parsing import RAN_CODES
from tracelens.cli.printing import print_paths, quiet

EXAMPLES = """
examples:
  tracelens report audit
      the page audit/report.html, and its numbers beside it

  tracelens report audit --plan plan.json --sweep sweep --out int4.html
      with the plan that `tracelens plan --out plan.json` made, and the other precisions of `tracelens sweep --out sweep`
"""


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="the page of a saved audit, with a repair plan and a sweep if there are",
        description="Writes one page that opens without a network: verdict, what changed, the worst features with evidence, smeared\n"
        "pairs, muted features, flipped prompts, repair plan, how it was measured. Beside it every number on it as JSON.",
        epilog=EXAMPLES + RAN_CODES,
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="what `tracelens audit --out` or AuditReport.save wrote"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE.json", help="what `tracelens plan --out` wrote")
    parser.add_argument("--sweep", type=Path, metavar="DIR", help="what `tracelens sweep --out` wrote")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page (default: report.html in FOLDER)")
    parser.set_defaults(run=_report, parser=parser)


def _report(args: argparse.Namespace) -> int:
    out: Path = args.out or args.folder / "report.html"
    if out.suffix not in (".html", ".htm") or out.is_dir():
        args.parser.error(f"--out {out}: give the name of a page, such as {out.with_suffix('')}.html")
    with quiet():
        from tracelens.audit_report import AuditReport
        from tracelens.views.report import numbers_path

        report = AuditReport.load(args.folder)
        plan = sweep = None
        if args.plan is not None:
            from tracelens.causal.repair import RepairPlan

            plan = RepairPlan.load(args.plan)
        if args.sweep is not None:
            from tracelens.optimization_auditor import SweepResult

            sweep = SweepResult.load(args.sweep)
        page = report.to_html(out, plan, sweep)
    print(f"{report.verdict.headline}.")
    print_paths([page, numbers_path(page)])
    return 0
