"""Arrays kept until they are wanted: in memory as far as it goes, then on disk."""

import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tracelens.errors import OutputError

Kept = Callable[[], list[np.ndarray]]


class Spool:
    """Takes arrays and gives them back; the first `limit` bytes stay in memory, what comes later goes to a file.

    The file has no name, so nothing is left of it however the process ends; it goes when the last of what it holds is let go.
    """

    def __init__(self, limit: int, folder: str | Path | None = None) -> None:
        """`folder`: where the file lies; the system's for temporary files by default, which may be in memory itself."""
        self.limit, self.folder = limit, folder
        self.in_memory = self.on_disk = 0
        """Bytes so far."""
        self._file = None

    def put(self, arrays: Sequence[np.ndarray]) -> Kept:
        """A function that gives the arrays back, equal to the bit; edit neither them nor what it gives.

        Raises `OutputError` if there is no room on the disk.
        """
        kept = [np.ascontiguousarray(array) for array in arrays]
        size = sum(array.nbytes for array in kept)
        if self.in_memory + size <= self.limit:
            self.in_memory += size
            return lambda: kept
        try:
            return self._write(kept)
        except OSError as error:
            raise OutputError(
                f"{size / 1e9:.2f} GB more could not be kept in {self.folder or tempfile.gettempdir()} ({error.strerror}); "
                "give a folder with more room, more memory, or fewer prompts"
            ) from error

    def _write(self, arrays: list[np.ndarray]) -> Kept:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
            self._close = weakref.finalize(self, self._file.close)
        start = self._file.seek(0, 2)
        for array in arrays:
            self._file.write(array.reshape(-1).view(np.uint8).data)
        self._file.flush()
        self.on_disk += sum(array.nbytes for array in arrays)
        layout = [(array.dtype, array.shape) for array in arrays]

        def read() -> list[np.ndarray]:
            assert self._file is not None
            self._file.seek(start)
            flat = [np.fromfile(self._file, dtype, int(np.prod(shape))) for dtype, shape in layout]
            return [array.reshape(shape) for array, (_, shape) in zip(flat, layout, strict=True)]

        return read
