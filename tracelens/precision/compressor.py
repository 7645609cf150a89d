"""llm-compressor, kept quiet and put back as it was: it logs to stdout, keeps a global session, and picks its own device."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch

from tracelens.errors import QuantizeError
from tracelens.precision.recipes import Smoothing

PARALLELISM = "TOKENIZERS_PARALLELISM"

logger = logging.getLogger(__name__)


@contextmanager
def opened(device: str | torch.device | None, progress: bool) -> Iterator[list[str]]:
    """llm-compressor, imported and ready to run; yields the list of what it warns of, which grows as it runs.

    Its progress bars go to stderr if they are wanted, what it logs goes to `logging`, and nothing goes to stdout.
    Raises `QuantizeError` if it is not installed.
    """
    warned: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        if not progress:
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # It sets this for good, and says so, unless it is there.
        if PARALLELISM not in os.environ:
            os.environ[PARALLELISM] = "false"
            stack.callback(os.environ.pop, PARALLELISM)
        _import()
        stack.enter_context(_logged(warned))
        from llmcompressor.core import reset_session

        reset_session()
        stack.callback(reset_session)  # it holds on to the model
        _place(stack, device)
        yield warned


def smoothed_architectures(smoothing: Smoothing) -> list[str]:
    """Architectures for which it knows which layer feeds which."""
    if smoothing == "awq":
        from llmcompressor.modifiers.transform.awq.dynamic_mappings import AWQ_DYNAMIC_MAPPING_REGISTRY as dynamic
        from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY as fixed
    else:
        from llmcompressor.modifiers.transform.smoothquant.dynamic_mappings import (
            SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY as dynamic,
        )
        from llmcompressor.modifiers.transform.smoothquant.utils import MAPPINGS_REGISTRY as fixed
    return sorted({*dynamic, *fixed})


def _import() -> None:
    first = "llmcompressor" not in sys.modules
    try:
        import llmcompressor  # noqa: F401
        from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: F401
        from loguru import logger as loguru
    except ImportError as error:
        raise QuantizeError(
            f"calibrated quantization is done by llm-compressor, which cannot be imported ({error}); "
            "pip install -U 'tracelens[full]'"
        ) from error
    if first:
        loguru.remove()  # importing it has replaced every handler by one that writes to stdout


@contextmanager
def _logged(warned: list[str]) -> Iterator[None]:
    """What it logs, in `logging` at level INFO at most: much of what it warns of (no GPU) is none of a user's concern."""
    from loguru import logger as loguru

    def write(message: Any) -> None:
        level, text = message.record["level"], message.record["message"]
        if level.name in ("WARNING", "ERROR", "CRITICAL") and text not in warned:
            warned.append(text)
        # Layers that fell back to rounding are not what was asked for.
        loud = level.no >= logging.ERROR or "Hessian inversion failed" in text
        logger.log(
            logging.WARNING if loud else logging.DEBUG if level.no <= logging.DEBUG else logging.INFO, "%s", text
        )

    own = loguru.add(
        write, level="DEBUG", filter=lambda r: str(r["name"]).startswith(("llmcompressor", "compressed_tensors"))
    )
    try:
        yield
    finally:
        loguru.remove(own)


def _place(stack: ExitStack, device: str | torch.device | None) -> None:
    """Makes it compute on the device that was asked for instead of the first accelerator it finds."""
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.pipelines.data_free import pipeline as data_free
    from llmcompressor.pipelines.sequential import pipeline as sequential

    def put(owner: Any, name: str, value: Any) -> None:
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    if device is not None:
        for pipeline in (sequential, data_free):
            put(pipeline, "get_main_device", lambda: torch.device(device))
    if not torch.accelerator.is_available():
        # AWQ pins memory whether or not there is an accelerator to pin it for, which torch refuses.
        put(IntermediatesCache, "pin_memory", lambda *_args, **_options: None)
