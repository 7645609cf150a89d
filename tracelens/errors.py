"""Every error Tracelens raises on purpose.

A message names the thing, what was expected and what to do about it. Each class also derives from the built-in exception that a
caller would guess, so `except FileNotFoundError` and `except KeyError` work as they read.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TracelensError(Exception):
    """Base class: `except TracelensError` catches all that Tracelens raises on purpose."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message, quotes and escaped newlines included.
        return str(self.args[0]) if self.args else ""


class CheckpointError(TracelensError, ValueError):
    """A checkpoint cannot be read as what it claims to be."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint is at the given place."""


class UnsupportedArchitectureError(CheckpointError):
    """The checkpoint's architecture has no conversion to a hooked model."""


class NonFiniteError(TracelensError, ValueError):
    """A tensor holds NaN or infinity."""


class UnknownNameError(TracelensError, KeyError, ValueError):
    """A name (precision, data set, site, behaviour, ...) that does not exist; the message lists those that do."""

    @classmethod
    def of(cls, kind: str, name: object, known: Iterable[object]) -> "UnknownNameError":
        names = [str(n) for n in known]
        close = get_close_matches(str(name), names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return cls(f"unknown {kind} {str(name)!r}.{hint} Known: {', '.join(names)}")


class PrecisionSpecError(UnknownNameError):
    """A precision specification that cannot be parsed."""


class PairMismatchError(TracelensError, ValueError):
    """The two models of a pair differ in something they must share."""


class PromptError(TracelensError, ValueError):
    """Prompts that cannot be run: none, too long, or in words the model does not know."""


class PromptFileNotFoundError(PromptError, FileNotFoundError):
    """No prompt file is at the given place."""


class SAEError(TracelensError, ValueError):
    """A sparse autoencoder that cannot be read or does not fit the model."""


class SAENotFoundError(SAEError, FileNotFoundError):
    """No sparse autoencoders are at the given place."""


class ResultFileError(TracelensError, ValueError):
    """A saved result that cannot be read as what it claims to be."""


class OutputError(TracelensError, FileExistsError):
    """An output place that must not be written to."""


class QuantizeError(TracelensError, RuntimeError):
    """A calibrated quantization that cannot be carried out: its library is missing, or fails on this model."""


class MetricInputError(TracelensError, ValueError):
    """Activations, logits, scores or thresholds for which a metric or statistic is not defined."""


class MemoryBudgetError(TracelensError, MemoryError):
    """What was asked for does not fit into its memory budget."""


class PlanError(TracelensError, ValueError):
    """A plan of what to keep in 16 bit that cannot be made, exported or carried out."""


class ExportError(TracelensError, RuntimeError):
    """A figure that cannot be written as a picture: kaleido or its browser is missing, or fails."""


class MissingLibraryError(TracelensError, ImportError):
    """A library that draws something is not installed, or not whole."""
