"""What the parsers of all commands share: line breaks kept, checked numbers, epilogues."""

import argparse
from typing import Any

from tracelens.errors import TracelensError

EXIT_CODES = """
exit codes:
  0    it ran, and every threshold that was asked for is met
  1    it ran, and a threshold (--min-cpfr, --max-flips) is not met
  2    bad input; the message says what and how to mend it
  130  interrupted
"""

ALL_CODES = """
exit codes:
  0    it ran, and nothing that was asked for failed
  1    it ran, and audit or sweep missed a threshold (--min-cpfr, --max-flips), doctor found a degraded or wrong model, or
       sae-health an SAE that does not fit
  2    bad input; the message says what and how to mend it
  130  interrupted
"""

HEALTH_CODES = """
exit codes:
  0    it ran, and every SAE fits both models
  1    it ran, and an SAE does not fit: the reference, the quantized model, or both
  2    bad input; the message says what and how to mend it
  130  interrupted
"""

RAN_CODES = """
exit codes:
  0    it ran
  2    bad input; the message says what and how to mend it
  130  interrupted
"""

CHECK_CODES = """
exit codes:
  0    it ran; doctor: verified, or no reference
  1    doctor: degraded or wrong
  2    bad input; the message says what and how to mend it
  130  interrupted
"""


class Parser(argparse.ArgumentParser):
    """Keeps the line breaks of descriptions and examples."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="MODEL", help="a checkpoint folder, a .gguf file, a model on the hub, organism")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--local-files-only", action="store_true", help="use the hub's cache and no network")


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def layer_list(text: str) -> list[int]:
    """`6,8` as numbers."""
    layers = names(text)
    if not all(layer.isdecimal() for layer in layers):
        raise argparse.ArgumentTypeError(f"{text} is no list of layers; write their numbers with commas: 6,8")
    return [int(layer) for layer in layers]


def names(text: str) -> list[str]:
    """What stands between commas; at least one."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("the list is empty")
    return found


def gigabytes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def checked_device(name: str) -> Any:
    """The torch device of this name; raises `TracelensError` for one that is not there."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TracelensError(f"device {name!r} cannot be used ({reason}); try --device cpu") from error
