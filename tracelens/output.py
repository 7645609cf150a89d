"""Writing results: folders that are ours, files that are whole or not there, dataclasses as JSON and back."""

import json
import os
import shutil
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from tracelens.errors import OutputError, ResultFileError
from tracelens.stats import Estimate

MARKER = "report.json"
"""The file that tells a folder of ours; it is written last."""
UNFINISHED = "unfinished"
"""What a marker says in place of a version while other files are being replaced."""


def check_folder(folder: str | Path, kind: str) -> Path:
    """The folder, if a result of this kind may be written to it; makes nothing.

    Raises `OutputError` if it is a file or holds something else than such a result.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()):
        marker = folder / MARKER
        if not marker.is_file() or f'"{kind}"' not in marker.read_text(encoding="utf-8", errors="replace")[:200]:
            raise OutputError(f"{folder} exists and was not written by Tracelens; give a new or empty folder")
    return folder


@contextmanager
def staged(folder: str | Path, kind: str) -> Iterator[Path]:
    """A new folder to write a result of this kind to, whose files go to `folder` once the block ends, the marker last.

    Whatever interrupts the block leaves `folder` as it was, so that it can be written again; whatever interrupts the move leaves
    markers that say so, and never one of earlier files beside newer ones. Files of other names in it stay.
    Raises `OutputError` as `check_folder`.
    """
    folder = check_folder(folder, kind)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder.resolve().with_name(f".{folder.resolve().name}.{os.getpid()}")
    beside.mkdir()
    try:
        yield beside
        files = [path.relative_to(beside) for path in beside.rglob("*") if path.is_file()]
        for name in files:
            if name.name == MARKER:
                first = next(iter(json.loads((beside / name).read_text(encoding="utf-8"))))
                write_atomically(folder / name, json.dumps({first: UNFINISHED}) + "\n")
        # Markers last, and that of the folder itself after those of its sub-folders.
        for name in sorted(files, key=lambda name: (name.name == MARKER, -len(name.parts))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).replace(folder / name)
    finally:
        shutil.rmtree(beside)


@contextmanager
def replaced(folder: str | Path, marker: str) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place once the block ends; an interrupted block leaves it as it was.

    `marker` is a file that tells a folder of ours, which is replaced as a whole.
    Raises `OutputError` for a file, and for a folder that holds something and no marker.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise OutputError(f"{folder} exists and was not written by Tracelens; give a new or empty folder")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    before = beside.with_name(f"{beside.name}.before")
    beside.mkdir(parents=True)
    try:
        yield beside
        if folder.exists():
            folder.rename(before)
        beside.rename(folder)
    finally:
        if before.exists() and not folder.exists():
            before.rename(folder)
        for left in (beside, before):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Around the reading of a result: whatever is missing or malformed becomes a `ResultFileError` that says what was expected."""
    try:
        yield
    except ResultFileError:
        raise
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise ResultFileError(f"{path} is not {what}: {error!r}") from error


def read_marker(folder: Path, kind: str, version: int) -> dict[str, Any]:
    """The contents of a result folder's marker; raises `ResultFileError` for another version, `KeyError` for another kind."""
    data = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    if (found := data.pop(kind)) == UNFINISHED:
        raise ResultFileError(f"{folder} was not written to the end; write it again")
    if found != version:
        raise ResultFileError(f"{folder} was written by another version of Tracelens; this one reads version {version}")
    return data


def write_atomically(path: Path, text: str) -> Path:
    """Writes the text beside its place and moves it there, so that an interrupted run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def encode(value: Any) -> Any:
    """A result as JSON can hold it: dataclasses as dicts of their fields, NaN as None."""
    if isinstance(value, Estimate):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def decode(kind: Any, value: Any) -> Any:
    """What `encode` wrote, as the type `kind` (a dataclass, `dict[str, X]`, `tuple[X, ...]`, `X | None`, a plain type)."""
    if kind is Estimate:
        return Estimate.from_dict(value)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{f.name: decode(hints[f.name], value[f.name]) for f in fields(kind)})  # pyright: ignore[reportCallIssue]
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = [arg for arg in args if arg is not type(None)]
        return None if value is None else decode(inner, value)
    if origin is dict:
        return {key: decode(args[1], item) for key, item in value.items()}
    if origin in (list, tuple):
        return origin(decode(args[0], item) for item in value)
    return float("nan") if kind is float and value is None else value
