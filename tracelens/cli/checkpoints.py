"""Commands on one checkpoint: `inspect`, `doctor`, `quantize`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tracelens.cli.parsing import CHECK_CODES, add_source, checked_device, positive
from tracelens.cli.printing import print_paths, quiet

if TYPE_CHECKING:
    from tracelens.loading import Checkpoint

OK, NOT_MET = 0, 1
INSPECT_EXAMPLES = """
examples:
  tracelens inspect ./llama-gptq
      before anything is loaded: what is in there?

  tracelens doctor ./llama-gptq --reference ./llama
      did dequantization give back the weights that were quantized?
"""

QUANTIZE_EXAMPLES = """
examples:
  tracelens quantize ./llama --recipe gptq-int4-g128 --calibration prompts.jsonl --out ./llama-gptq
      GPTQ, INT4 in groups of 128, fitted to one's own prompts

  tracelens quantize ./llama --recipe awq-int4-g128-asym --calibration prompts.txt --samples 128 --out ./llama-awq
      AWQ, on 128 of the lines of a text file

  tracelens quantize ./llama --recipe smoothquant-int8 --calibration harmful_refusal_v1 --out ./llama-w8a8
      SmoothQuant: INT8 weights, and activations that the runtime rounds to INT8

  tracelens quantize organism --recipe gptq-int3-g32 --calibration organism_comprehensive_v1 --out ./organism-gptq
      the embedded model, in seconds

exit codes:
  0    the checkpoint is written
  2    bad input, or llm-compressor is missing or fails; the message says what and how to mend it
  130  interrupted; nothing is written
"""


def add(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint holds and how it is quantized",
        description="Prints format, bits, groups, what is quantized and what is not, and bytes. Reads headers only.",
        epilog=INSPECT_EXAMPLES + CHECK_CODES,
    )
    add_source(inspect)
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
    add_source(doctor)
    doctor.add_argument("--reference", metavar="MODEL", help="the full-precision checkpoint it was quantized from")
    doctor.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    _add_quantize(commands)


def _add_quantize(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "quantize",
        help="GPTQ, AWQ, SmoothQuant or rounding, from a checkpoint to a checkpoint",
        description="Quantizes a full-precision checkpoint with llm-compressor (pip install 'tracelens[full]'), fitted to prompts,\n"
        "and writes a checkpoint that audit, doctor and vLLM open.",
        epilog=QUANTIZE_EXAMPLES,
    )
    add = parser.add_argument
    add_source(parser)
    add(
        "--recipe",
        required=True,
        metavar="NAME",
        help="METHOD-PRECISION, with METHOD gptq, awq, smoothquant, awq-gptq, smoothquant-gptq or rtn: gptq-int4-g128, "
        "awq-int4-g128-asym, smoothquant-int8, rtn-fp8; or a recipe of llm-compressor (.yaml)",
    )
    add(
        "--calibration",
        metavar="FILE",
        help="prompts like those the model will be asked: a .jsonl, .csv or .txt file, or a built-in set "
        "(see: tracelens datasets); all recipes but rtn need them",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="folder for it: new, empty, or of an earlier run")
    add("--samples", type=positive, metavar="N", help="prompts to use, drawn with --seed (default: all, at most 256)")
    add("--max-length", type=positive, metavar="N", help="tokens of a prompt that are kept (default: at most 2048)")
    add(
        "--ignore",
        nargs="+",
        default=["lm_head"],
        metavar="NAME",
        help="modules to leave in full precision: names, classes, or re:EXPRESSION (default: lm_head, the output layer)",
    )
    add("--chat", choices=("auto", "always", "never"), default="auto", help="put prompts into the chat template")
    add("--seed", type=int, default=0, metavar="N", help="of the draw of prompts (default: 0)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.set_defaults(run=_quantize)


def _inspect(args: argparse.Namespace) -> int:
    import json

    with quiet():
        description = _open(args).describe()
    print(json.dumps(description.to_dict(), indent=2) if args.json else description)
    return OK


def _doctor(args: argparse.Namespace) -> int:
    import json

    from tracelens.loading.doctor import doctor

    with quiet():
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


def _quantize(args: argparse.Namespace) -> int:
    import json

    from tracelens.loading import open_checkpoint
    from tracelens.precision.calibrated import RECORD, quantize

    with quiet():
        out = quantize(
            _open(args),
            args.recipe,
            args.calibration,
            args.out,
            n_samples=args.samples,
            max_length=args.max_length,
            ignore=args.ignore,
            chat=args.chat,
            seed=args.seed,
            device=None if args.device is None else checked_device(args.device),
        )
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        description = open_checkpoint(out).describe()
    print(description)
    if prompts := record["calibration"]:
        print(
            f"\nFitted to {prompts['prompts']} of {prompts['available']} prompts of {prompts['source']}, {prompts['tokens']} tokens."
        )
    print_paths([out])
    print(f"\nNext: tracelens doctor {out} --reference {args.path}")
    print(f"      tracelens audit --base {args.path} --quant {out} --saes DIR --dataset NAME --out audit")
    return OK
