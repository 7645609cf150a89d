"""Runs in the background: one at a time, the last that was asked for is the one that is shown."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tracelens.errors import TracelensError

if TYPE_CHECKING:
    from tracelens.auditing.prompt_result import PromptLook

    Work = Callable[[str, Callable[[PromptLook, int], bool]], PromptLook]

MODELS = threading.Lock()
"""Held while a run uses the models: hooks are the model's, and two runs would see each other's."""
SHOWN_EVERY = 0.1
"""Seconds between two pictures of a run that is under way."""


class Superseded(Exception):
    """The run has been given up for another."""


class Run:
    """One run of a text.

    Attributes:
        stopped: whether it shall end and show what it has.
        dropped: whether it shall end and show nothing.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.stopped, self.dropped = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None


class Runner:
    """Runs work in a thread and tells about it where the page's events are handled.

    Args:
        work: the text and a function that is told about the progress → the result.
        progress: called with what there is so far, and the number of tokens.
        done: called with the result, or with the error.

    While a run is under way the models are its own: whoever runs them at the same time finds its hooks on them.
    """

    def __init__(
        self,
        work: "Work",
        *,
        progress: "Callable[[PromptLook, int], None]",
        done: "Callable[[str, PromptLook | Exception], None]",
    ) -> None:
        self._work, self._progress, self._done = work, progress, done
        self._current: Run | None = None
        # Where no loop runs, threads tell their results themselves.
        self._turn = threading.RLock()

    @property
    def running(self) -> bool:
        return self._current is not None

    def start(self, text: str) -> None:
        """Begins a run; one that is under way is given up."""
        run = self._next(text)
        loop = _loop()
        run.thread = threading.Thread(target=self._run, args=(run, loop), daemon=True, name="tracelens-prompt")
        run.thread.start()

    def stop(self) -> None:
        """Ends the run after its current step; what it has is shown."""
        if self._current is not None:
            self._current.stopped.set()

    def now(self, text: str) -> "PromptLook":
        """Runs in this thread, and blocks; a run that is under way is given up. Raises what the work raises."""
        run = self._next(text)
        try:
            with MODELS:
                result = self._work(text, self._tick(run, None))
        except BaseException as error:
            if isinstance(error, Exception):
                self._end(run, error)
            else:
                self._current = None
            raise
        self._end(run, result)
        return result

    def wait(self, seconds: float | int | None = None) -> None:
        """Until the run's thread has ended. In a notebook what it found is shown once the cell is done."""
        if self._current is not None and self._current.thread is not None:
            self._current.thread.join(seconds)

    def _next(self, text: str) -> Run:
        with self._turn:
            if self._current is not None:
                self._current.dropped.set()
            self._current = Run(text)
            return self._current

    def _run(self, run: Run, loop: asyncio.AbstractEventLoop | None) -> None:
        try:
            with MODELS:
                if run.dropped.is_set():
                    return
                result: PromptLook | Exception = self._work(run.text, self._tick(run, loop))
        except Superseded:
            return
        except Exception as error:  # shown in place, whatever it is: nobody sees a thread's traceback
            result = error
        _tell(loop, lambda: self._end(run, result))

    def _tick(self, run: Run, loop: asyncio.AbstractEventLoop | None) -> "Callable[[PromptLook, int], bool]":
        last = 0.0

        def tick(look: "PromptLook", n: int) -> bool:
            nonlocal last
            if run.dropped.is_set():
                raise Superseded
            if n == 0 or time.monotonic() - last >= SHOWN_EVERY:
                last = time.monotonic()
                _tell(loop, lambda: self._show(run, look, n))
            return not run.stopped.is_set()

        return tick

    def _show(self, run: Run, look: "PromptLook", n: int) -> None:
        with self._turn:
            if run is self._current:
                self._progress(look, n)

    def _end(self, run: Run, result: "PromptLook | Exception") -> None:
        with self._turn:
            if run is self._current:
                self._current = None
                self._done(run.text, result)


def said(error: Exception) -> str:
    """The error as a sentence for the page."""
    text = str(error)
    return text[:1].upper() + text[1:] if isinstance(error, TracelensError) else f"{type(error).__name__}: {text}"


def _loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _tell(loop: asyncio.AbstractEventLoop | None, what: Callable[[], None]) -> None:
    """In the thread of the loop, where widgets' events are handled, so that nothing is changed from two sides; without a loop, here."""
    if loop is None:
        what()
    elif not loop.is_closed():
        loop.call_soon_threadsafe(what)
