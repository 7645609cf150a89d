"""The command line: `tracelens demo`, `audit`, `sweep`, `decompose`, `sae-health`, `plan`, `report`, `inspect`, `doctor`, `quantize`,
`datasets`.

Results go to stdout, everything else to stderr. Nothing heavy is imported before a command runs, so that help and mistakes are instant.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence

from tracelens import __version__
from tracelens.cli import checkpoints, examining, measuring, repairing, reporting
from tracelens.cli.parsing import ALL_CODES, RAN_CODES, Parser
from tracelens.errors import TracelensError

BAD_INPUT, INTERRUPTED = 2, 130

ABOUT = """
Does a language model's safety machinery survive quantization, and if not, which part breaks?

Tracelens runs a quantized model beside its reference on the same prompts, looks at both through the same sparse
autoencoders, and says for each feature how much of it is left: for those that carry a safety behaviour (refusing, admitting
not to know, warning) and for all others, beside what harmless rounding and random noise of the same size do.
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
    usage = "tracelens command [options]\n       tracelens command --help"
    parser = Parser(prog="tracelens", usage=usage, description=ABOUT, epilog=measuring.EXAMPLES + ALL_CODES)
    parser.add_argument("--version", action="version", version=f"tracelens {__version__}")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="command [options]", prog="tracelens", parser_class=Parser
    )
    measuring.add(commands)
    examining.add(commands)
    repairing.add(commands)
    reporting.add(commands)
    checkpoints.add(commands)
    datasets = commands.add_parser("datasets", help="list the built-in data sets", epilog=RAN_CODES)
    datasets.set_defaults(run=_datasets)
    return parser


def _datasets(args: argparse.Namespace) -> int:
    from tracelens.datasets import get_dataset, list_datasets

    for name in list_datasets():
        dataset = get_dataset(name)
        behaviours = ", ".join(f"{len(prompts)} {behaviour}" for behaviour, prompts in dataset.by_behaviour().items())
        print(f"{name:<26} {behaviours}; {len(dataset.baseline_prompts)} baseline prompts")
        print(textwrap.indent(textwrap.fill(dataset.description, 100), "    "))
    return 0


def _fail(error: Exception) -> int:
    print(f"tracelens: error: {error}", file=sys.stderr)
    return BAD_INPUT
