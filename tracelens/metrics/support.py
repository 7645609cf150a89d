"""Sparse activations, and where either of two sets of them is not zero: the one scan that moments and smearing both build on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy import sparse
from torch import Tensor

from tracelens.errors import MetricInputError, NonFiniteError

Csr = sparse.csr_matrix | sparse.csr_array

_CHUNK = 2**18
"""Elements scanned at once on the CPU: the mask stays in cache."""


@dataclass(frozen=True, eq=False)
class SparseActivations:
    """What is not zero of activations [token, feature]: 12 bytes an entry in place of 4 bytes a cell.

    Raises `MetricInputError` if there is not one value for each entry.
    """

    n_tokens: int
    n_features: int
    entry: Int64[Tensor, "_"]
    """token × n_features + feature, ascending."""
    value: Float[Tensor, "..."]
    """In the dtype of the activations (float32 for half precision), NaN and negative values included."""

    def __post_init__(self) -> None:
        if self.value.shape != self.entry.shape:
            raise MetricInputError(f"{len(self.entry)} entries have {len(self.value)} values; expected one for each")

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_tokens, self.n_features

    @classmethod
    def of(cls, activations: "Activations") -> "SparseActivations":
        """Of a dense tensor, whose leading axes are all tokens, or a scipy.sparse matrix [token, feature]; itself if it is sparse already.

        Raises `MetricInputError` for a tensor of fewer than two axes.
        """
        if isinstance(activations, SparseActivations):
            return activations
        if not isinstance(activations, Tensor):
            n_tokens, n_features = shape_of(activations)
            return cls(n_tokens, n_features, *map(torch.from_numpy, _entries(activations)))
        if activations.dim() < 2:
            raise MetricInputError(f"activations have shape {tuple(activations.shape)}; expected [token, feature]")
        flat = activations.detach().reshape(-1)
        flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        entry = _nonzero(flat)
        return cls(activations.shape[:-1].numel(), activations.shape[-1], entry, flat.index_select(0, entry))

    @classmethod
    def stack(cls, parts: "list[SparseActivations]") -> "SparseActivations":
        """The tokens of the parts, one after the other; there must be at least one, all of as many features."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *(part.n_tokens for part in parts)])
        shifted = [part.entry + int(start) * part.n_features for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(int(starts[-1]), parts[0].n_features, torch.cat(shifted), torch.cat([part.value for part in parts]))

    def to(self, device: torch.device | str) -> "SparseActivations":
        return SparseActivations(self.n_tokens, self.n_features, self.entry.to(device), self.value.to(device))

    def places(self) -> tuple[Int64[Tensor, "_"], Int64[Tensor, "_"]]:
        """Token and feature of each entry."""
        return _places(self.entry, self.n_features)


Activations = Tensor | Csr | SparseActivations
"""Activations [token, feature] in any of the forms that `JointSupport.of` takes."""


@dataclass(frozen=True, eq=False)
class JointSupport:
    """The entries (token, feature) where the reference or the quantized model fires, in row order, with both values.

    SAE activations are zero nearly everywhere, so all that follows costs the entries and not the tensor.
    """

    n_tokens: int
    n_features: int
    token: Int64[Tensor, "_"]
    feature: Int64[Tensor, "_"]
    reference: Float[Tensor, "_"]
    """Finite and ≥ 0, in the dtype of the activations (float32 for half precision)."""
    quantized: Float[Tensor, "_"]

    def __post_init__(self) -> None:
        for side in ("reference", "quantized"):
            values = getattr(self, side)
            if not len(values):
                continue
            low, high = torch.stack(torch.aminmax(values)).tolist()
            if not (low >= 0 and high < float("inf")):
                self._refuse(side, values)

    def _refuse(self, side: str, values: Tensor) -> None:
        bad = int((~values.isfinite() | (values < 0)).nonzero()[0])
        value = values[bad].item()
        where = f"{side} activations hold {value:.4g} at token {int(self.token[bad])}, feature {int(self.feature[bad])}"
        if value < 0:
            raise MetricInputError(
                f"{where}; feature activations must be ≥ 0. Apply the SAE's activation function, or clamp to zero"
            )
        raise NonFiniteError(f"{where}; expected finite values. Look for an overflow in the {side} model")

    @classmethod
    def of(cls, reference: Activations, quantized: Activations) -> "JointSupport":
        """The joint support of activations of the same tokens, each dense, scipy.sparse or `SparseActivations`.

        The result does not depend on the form, to the bit. Raises `MetricInputError` for shapes that differ and for
        negative values, `NonFiniteError` for NaN or infinity.
        """
        _same_shape(shape_of(reference), shape_of(quantized))
        r = SparseActivations.of(reference)
        q = SparseActivations.of(quantized).to(r.value.device)
        entry, *places = _union(r.entry, q.entry)
        values = (
            x.value if len(entry) == len(x.entry) else x.value.new_zeros(len(entry)).index_copy_(0, place, x.value)
            for x, place in zip((r, q), places, strict=True)
        )
        return cls(r.n_tokens, r.n_features, *_places(entry, r.n_features), *values)


def shape_of(matrix: Any) -> tuple[int, ...]:
    """The shape of a tensor or scipy.sparse matrix, which scipy's annotations leave open."""
    return tuple(matrix.shape)


def _same_shape(reference: tuple[int, ...], quantized: tuple[int, ...]) -> None:
    if len(reference) < 2:
        raise MetricInputError(f"activations have shape {reference}; expected [token, feature]")
    if reference[-1] != quantized[-1] or np.prod(reference[:-1]) != np.prod(quantized[:-1]):
        raise MetricInputError(
            f"reference activations have shape {reference} and quantized ones {quantized}; "
            "both must be [token, feature] over the same tokens and the same SAE"
        )


def _places(entry: Int64[Tensor, "_"], n_features: int) -> tuple[Int64[Tensor, "_"], Int64[Tensor, "_"]]:
    token = torch.div(entry, max(1, n_features), rounding_mode="floor")
    return token, entry - token * n_features


def _union(a: Int64[Tensor, "_"], b: Int64[Tensor, "..."]) -> tuple[Tensor, Tensor, Tensor]:
    """What is in either of two ascending lists, ascending, and where in it each of them stands."""
    if torch.equal(a, b):
        here = torch.arange(len(a), device=a.device)
        return a, here, here
    both = torch.cat([a, b])
    if a.device.type != "cpu":
        union, place = both.unique(return_inverse=True)
        return union, place[: len(a)], place[len(a) :]
    # Two sorted runs: a stable sort merges them, far faster than they could be hashed or looked up.
    order = np.argsort(both.numpy(), kind="stable")
    merged = both.numpy()[order]
    first = np.diff(merged, prepend=-1) > 0
    place = np.empty_like(order)
    place[order] = np.cumsum(first) - 1
    union, place = torch.from_numpy(merged[first]), torch.from_numpy(place)
    return union, place[: len(a)], place[len(a) :]


def _nonzero(x: Float[Tensor, "_"]) -> Int64[Tensor, "_"]:
    """Flat indices of what is not zero (NaN included), ascending."""
    if x.device.type != "cpu":
        return x.nonzero().squeeze(1)
    # numpy finds the few set bytes of a sparse mask about ten times faster than torch does on a CPU.
    values = x.numpy()
    found = [np.empty(0, dtype=np.int64)]
    found += [np.flatnonzero(values[i : i + _CHUNK] != 0) + i for i in range(0, len(values), _CHUNK)]
    return torch.from_numpy(np.concatenate(found))


def _entries(matrix: Csr) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of what is stored, ascending, and the values."""
    csr = sparse.csr_array(matrix)
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    n_tokens, n_features = shape_of(csr)
    row = np.repeat(np.arange(n_tokens, dtype=np.int64), np.diff(csr.indptr))
    values = csr.data.astype(np.float32) if csr.data.dtype.itemsize < 4 else csr.data
    return row * n_features + csr.indices, values
