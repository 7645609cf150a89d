"""A GGUF file -> metadata and lazily read tensors, as stored (version 2 and 3, little-endian, one file).

The header is read here and not by `gguf.GGUFReader`, which makes NumPy arrays of every token: 10 s and 1 GB for the
vocabulary of Llama 3. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.files import TensorFiles
from tracelens.loading.gguf_config import config_of

SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
STRING, ARRAY = 8, 9
LONGEST_ARRAY = 2**21
"""Numbers of an array that are read: more than there are tokens in any vocabulary."""
DENSE = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}
"""Types of tensors that hold one number per element; all others hold blocks."""


def open_gguf(path: Path) -> tuple[dict[str, Any], "GgufFiles"]:
    """Config of the plain transformers model, as config.json would have it, and the tensors.

    Raises `CheckpointError` for a file that is no whole GGUF file or says what is not understood, and
    `UnsupportedArchitectureError`.
    """
    files = GgufFiles(path)
    return config_of(path, files.values, files), files


class Skipped(NamedTuple):
    """An array that was left in the file: strings, or very many numbers."""

    length: int


@dataclass(frozen=True)
class _Place:
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GgufFiles(TensorFiles):
    """Tensors of one GGUF file, mapped into memory: `values` is its metadata, names and types are GGUF's own."""

    def __init__(self, path: Path) -> None:
        import numpy as np

        self._path = path
        try:
            with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                header = _Header(path, data)
                self.metadata, self.values = {}, header.metadata()
                self._places = header.tensors(self.values)
            # Private pages: torch takes writable memory without a warning, and nothing reaches the file.
            self._data = np.memmap(path, mode="c", dtype=np.uint8)
        except PermissionError as error:
            raise CheckpointError(f"{path} may not be read ({error}); mend its permissions") from error
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is not a whole GGUF file ({error}); download it again") from error

    def names(self) -> list[str]:
        return list(self._places)

    def kind(self, name: str) -> str:
        """GGUF's name of a tensor's type: `F16`, `Q4_K`, …"""
        return self._places[name].kind

    def elements(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as numbers, outermost axis first: (out, in) of a matrix."""
        return self._places[name].shape

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as it is read: for tensors of blocks, the last axis counts bytes."""
        place = self._places[name]
        if place.kind in DENSE:
            return place.shape
        rows = 1
        for size in place.shape[:-1]:
            rows *= size
        return (*place.shape[:-1], place.nbytes // max(rows, 1))

    def dtype(self, name: str) -> torch.dtype:
        return DENSE.get(self._places[name].kind, torch.uint8)

    def home(self, name: str) -> str:
        return self._path.name

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        octets = torch.from_numpy(self._data[place.start : place.start + place.nbytes])
        return octets.view(self.dtype(name)).reshape(self.shape(name))


class _Header:
    """Reads a header from its beginning; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap) -> None:
        self.path, self.data, self.at = path, data, 0
        self._check_kind()
        self.n_tensors, self.n_values = self._number("<Q"), self._number("<Q")

    def _check_kind(self) -> None:
        if (magic := bytes(self.data[:4])) != b"GGUF":
            raise CheckpointError(f"{self.path} is no GGUF file: it begins with {magic!r}, not b'GGUF'; get it again")
        self.at = 4
        version = self._number("<I")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path} is a big-endian GGUF file, which is not supported; convert it with "
                "`gguf_convert_endian.py FILE little` of llama.cpp"
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path} is GGUF version {version}; versions 2 and 3 are supported. Convert the model again with "
                "a present llama.cpp"
            )

    def metadata(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(self.n_values):
            key = self._string()
            if key in values:
                raise CheckpointError(f"{self.path} has the metadata key {key!r} twice; get the file again")
            values[key] = self._value(self._number("<I"))
        return values

    def tensors(self, metadata: Mapping[str, Any]) -> dict[str, _Place]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        found: dict[str, _Place] = {}
        for _ in range(self.n_tensors):
            name, n_axes = self._string(), self._number("<I")
            if name in found or n_axes > 8:
                raise CheckpointError(f"{self.path} has tensor {name!r} twice, or with {n_axes} axes; get it again")
            shape = tuple(reversed([self._number("<Q") for _ in range(n_axes)]))
            code, start = self._number("<I"), self._number("<Q")
            try:
                kind = GGMLQuantizationType(code)
            except ValueError:
                raise CheckpointError(
                    f"tensor {name!r} in {self.path} has the type {code}, which the installed gguf does not know; "
                    "update it (`pip install -U gguf`), or get another quantization of the model"
                ) from None
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
            count = 1
            for size in shape:
                count *= size
            if (shape[-1] if shape else 1) % per_block:
                raise CheckpointError(
                    f"tensor {name!r} in {self.path} has rows of {shape[-1]}, which {kind.name} cannot divide into "
                    f"blocks of {per_block}; the file is damaged: get it again"
                )
            found[name] = _Place(kind.name, shape, start, count // per_block * block_bytes)
        return self._placed(found, metadata.get("general.alignment", 32))

    def _placed(self, found: dict[str, _Place], alignment: int) -> dict[str, _Place]:
        """With places counted from the beginning of the file; they lie in the file, and apart."""
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise CheckpointError(f"{self.path} has general.alignment {alignment!r}, expected a multiple of 8")
        base = self.at + -self.at % alignment
        placed = {name: _Place(p.kind, p.shape, base + p.start, p.nbytes) for name, p in found.items()}
        free = base
        for name, place in sorted(placed.items(), key=lambda item: item[1].start):
            if place.start < free or place.start % alignment:
                raise CheckpointError(f"tensor {name!r} in {self.path} lies over another one; the file is damaged")
            free = place.start + place.nbytes
            if free > len(self.data):
                raise CheckpointError(
                    f"{self.path} is cut off: tensor {name!r} ends at byte {free:,} and the file at "
                    f"{len(self.data):,}; download it again"
                )
        return placed

    def _take(self, count: int) -> int:
        start = self.at
        if count > len(self.data) - start:
            raise CheckpointError(
                f"{self.path} is cut off or damaged in its header (byte {start:,}); download it again"
            )
        self.at += count
        return start

    def _number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        length = self._number("<Q")
        start = self._take(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged in its header (byte {start:,}): {error}") from error

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise CheckpointError(
                f"{self.path} is damaged in its header (byte {self.at:,}): there is no type of value {kind}; "
                "download it again"
            )
        inner, length = self._number("<I"), self._number("<Q")
        if inner not in SCALARS:
            for _ in range(length):
                if inner == STRING:
                    self._take(self._number("<Q"))
                else:
                    self._value(inner)
            return Skipped(length)
        form = SCALARS[inner]
        start = self._take(length * struct.calcsize(form))
        if length > LONGEST_ARRAY:
            return Skipped(length)
        return struct.unpack_from(f"<{length}{form[1]}", self.data, start)
