"""What was measured, and with what: hashes of weights and versions of libraries, for the record."""

import hashlib
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tracelens import __version__

_LIBRARIES = ("torch", "transformers", "transformer-lens", "sae-lens")
_PIECE = 2**26
"""Bytes that are hashed at a time, by one thread; of a GPU's memory at most a piece per thread is copied at once."""


class WeightHasher:
    """Hashes of models that share tensors: what is a tensor of the first model is hashed once.

    The hash is SHA-256 over each parameter's name, shape, dtype and the SHA-256 of the bytes of each of its pieces (as many rows as 64
    MiB hold), parameters by name. Device, process and number of threads do not matter; the wrapper does, because names differ. Buffers
    (masks, tables of rotations) follow from the config and are not part of it, and what a simulated precision does to activations is
    not either.
    """

    def __init__(self, first: Any) -> None:
        self._first = {id(parameter): parameter for parameter in first.parameters()}
        self._known: dict[int, str] = {}

    def __call__(self, model: Any) -> str:
        """64 hexadecimal digits."""
        parameters = dict(sorted(model.named_parameters()))
        fresh = {name: p for name, p in parameters.items() if id(p) not in self._known}
        # As many threads as torch may use: hashing lets go of the interpreter.
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
            pieces = {name: list(_pieces(p)) for name, p in fresh.items()}
            flat = iter(list(threads.map(_digest, [piece for parts in pieces.values() for piece in parts])))
            found = {name: "".join(next(flat) for _ in parts) for name, parts in pieces.items()}
        self._known |= {id(p): found[name] for name, p in fresh.items() if id(p) in self._first}
        whole = hashlib.sha256()
        for name, p in parameters.items():
            bytes_ = found[name] if name in found else self._known[id(p)]
            whole.update(f"{name}{tuple(p.shape)}{p.dtype}{bytes_}\n".encode())
        return whole.hexdigest()


def weights_hash(model: Any) -> str:
    """The hash of a single model (`WeightHasher`)."""
    return WeightHasher(model)(model)


def versions() -> dict[str, str]:
    """Of Tracelens, Python and the libraries that models and SAEs come from; none of what is not installed. Imports nothing."""
    found = {"tracelens": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _pieces(parameter: Tensor) -> Iterator[Tensor]:
    """Views of some rows each."""
    rows = parameter.detach().reshape(1) if parameter.dim() == 0 else parameter.detach()
    if rows.numel():
        yield from rows.split(max(1, _PIECE * len(rows) // (rows.numel() * rows.element_size())))


def _digest(piece: Tensor) -> str:
    return hashlib.sha256(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
