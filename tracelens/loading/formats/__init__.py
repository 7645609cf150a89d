"""Quantized formats on disk: one file each, in a registry."""

from importlib import import_module
from pkgutil import iter_modules

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import FORMATS, Format, Layout, Quantized, Scheme, Stored, register

__all__ = ["FORMATS", "Format", "Layout", "Quantized", "Scheme", "Stored", "find_layout", "register"]

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")


def find_layout(stored: Stored) -> Layout | None:
    """How a checkpoint is quantized; None if it is not.

    Raises `CheckpointError` if its config says that it is quantized and no format knows it, and whatever the format
    that does know it finds wrong.
    """
    found = [known for known in FORMATS.values() if known.recognise(stored)]
    if len(found) > 1:
        names = " and ".join(known.name for known in found)
        raise CheckpointError(
            f"the tensors of {stored.path} look like {names} at once; they are a mixture nobody writes"
        )
    if found:
        return found[0].layout(stored)
    if stored.quantization:
        raise CheckpointError(
            f"{stored.path} says that it is quantized ({stored.method or 'no quant_method'}), in a layout that is not "
            f"known. Known formats: {', '.join(FORMATS)}. Load the full-precision original, or dequantize it with the "
            "library that wrote it and save that"
        )
    return None
