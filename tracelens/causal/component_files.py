"""Results per component on disk: one safetensors file, with all but the tensors as JSON in its metadata."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tracelens.errors import ResultFileError
from tracelens.output import encode, reading

VERSION = 1
T = TypeVar("T")


def write_tensors(path: str | Path, kind: str, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes a result, whole or not at all, and returns its path."""
    from safetensors.torch import save

    path = Path(path)
    text = json.dumps({kind: VERSION} | encode(dict(data)), allow_nan=False)
    written = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {kind: text})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(written)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def read_tensors(path: str | Path, kind: str, made: Callable[[dict[str, Any], dict[str, Tensor]], T]) -> T:
    """What `made` makes of what `write_tensors` wrote; raises `ResultFileError` for anything else."""
    from safetensors import safe_open

    with reading(path, f"a {kind} file that Tracelens wrote"), safe_open(path, "pt") as file:
        data = json.loads((file.metadata() or {})[kind])
        if (found := data.pop(kind)) != VERSION:
            raise ResultFileError(f"{path} is of version {found}; this Tracelens reads version {VERSION}")
        return made(data, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
