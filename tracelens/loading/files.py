"""Files that hold tensors -> names, shapes and lazily read tensors, as stored. Nothing is unpickled but tensors."""

import json
import pickle
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tracelens.errors import CheckpointError

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "BOOL": torch.bool},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
}
OPEN_SHARDS = 2
"""Shards kept open at a time: the codes of a weight may lie in one and its scales in the next."""


class TensorFiles(ABC):
    """Named tensors in one or more files. Opening reads headers only."""

    metadata: Mapping[str, str]
    """Text that the files carry beside tensors."""
    values: Mapping[str, Any]
    """What the files hold that is no tensor: numbers, strings, shapes."""

    @abstractmethod
    def names(self) -> list[str]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype: ...

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor as stored; it may lie in memory mapped from the file, so it is never written to."""

    @abstractmethod
    def home(self, name: str) -> str:
        """Name of the file that holds a tensor."""

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes on disk."""
        count = 1
        for size in self.shape(name):
            count *= size
        return count * self.dtype(name).itemsize


class SafetensorFiles(TensorFiles):
    """Safetensors. At most `OPEN_SHARDS` are mapped at a time, so that memory does not grow with their number."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = {path.name: path for path in paths}
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._info: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
        metadata: dict[str, str] = {}
        self.metadata, self.values = metadata, {}
        for file in self._paths:
            shard = self._shard(file)
            metadata.update(shard.metadata() or {})
            for name in shard.keys():  # noqa: SIM118
                if name in self._info:
                    raise CheckpointError(
                        f"tensor {name!r} is in {self._info[name][0]} and in {file}; get the checkpoint again"
                    )
                part = shard.get_slice(name)
                if (kind := part.get_dtype()) not in DTYPES:
                    raise CheckpointError(f"tensor {name!r} in {self._paths[file]} has the unknown dtype {kind}")
                self._info[name] = (file, tuple(part.get_shape()), DTYPES[kind])

    def _shard(self, file: str) -> Any:
        if file not in self._open:
            try:
                # safetensors says of a file that may not be read that it does not exist.
                self._paths[file].open("rb").close()
                self._open[file] = safe_open(self._paths[file], framework="pt")
            except PermissionError as error:
                raise CheckpointError(f"{self._paths[file]} may not be read ({error}); mend its permissions") from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self._paths[file]} is not a whole safetensors file ({error}); copy or download it again"
                ) from error
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file]

    def names(self) -> list[str]:
        return list(self._info)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._info[name][2]

    def home(self, name: str) -> str:
        return self._info[name][0]

    def read(self, name: str) -> Tensor:
        return self._shard(self.home(name)).get_tensor(name)


class TorchFiles(TensorFiles):
    """Files of `torch.save`, read with `weights_only=True`; dicts in dicts are flattened to names with dots."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._homes: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        self.metadata, self.values = {}, values
        for path in paths:
            for name, value in _flat(_unpickle(path)):
                if name in self._homes:
                    raise CheckpointError(
                        f"tensor {name!r} is in {self._homes[name]} and in {path.name}; get the checkpoint again"
                    )
                if isinstance(value, Tensor):
                    self._homes[name], self._tensors[name] = path.name, value
                else:
                    values[name] = value

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def home(self, name: str) -> str:
        return self._homes[name]

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def _unpickle(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read ({error}); mend its permissions") from error
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged, and was not unpickled: opening it as written could run code "
            f"({reason}). Get the checkpoint as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not a whole file of torch.save ({reason}); download it again") from error


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [
            pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value)]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; raises `CheckpointError` for whatever else the file holds."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise CheckpointError(f"{file} may not be read ({error}); mend its permissions") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; get it again")
    return content
