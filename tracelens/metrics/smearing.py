"""Pairs of features that quantization makes fire alike: their cosine over tokens rises.

Only the pairs above τ matter, so no Gram matrix is held. Activations are logged sparsely, in segments of bounded size, of which the
older ones go to disk. A pair whose cosine over all tokens reaches τ reaches it in one segment at least, for
Σ_s x_s·y_s < τ Σ_s ‖x_s‖‖y_s‖ ≤ τ ‖x‖‖y‖ otherwise (Cauchy–Schwarz). So the segments, one by one, name the candidates, and a second
round takes the exact cosines of those.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from tracelens.errors import MetricInputError
from tracelens.metrics.result import Result
from tracelens.metrics.spool import Kept, Spool
from tracelens.metrics.support import Activations, JointSupport, shape_of

_ENTRIES = 2**21
"""Entries of the columns whose products are taken at once (50 MB)."""

_PRODUCTS = 2**23
"""Multiplications of a tile of the Gram matrix, which has at most as many entries."""

_ROUNDING = 1e-9
"""How far below a threshold a cosine may be and still meet it, so that identical columns have a cosine of 1."""

_SEGMENT = 2**22
"""Entries of a segment: 50 MB of log, and about 400 MB while it is searched."""


@dataclass(frozen=True, slots=True)
class SmearedPair:
    """Features i < j and their cosine over tokens in both models, each in [0, 1]."""

    i: int
    j: int
    cos_ref: float
    cos_quant: float

    @property
    def increase(self) -> float:
        return self.cos_quant - self.cos_ref


@dataclass(frozen=True, eq=False)
class PairCosines:
    """Pairs of features i < j and their cosines over tokens in both models, each in [0, 1]."""

    i: Int[np.ndarray, "pair"]
    j: Int[np.ndarray, "pair"]
    cos_ref: Float[np.ndarray, "pair"]
    cos_quant: Float[np.ndarray, "pair"]

    def __len__(self) -> int:
        return len(self.i)

    @property
    def increase(self) -> Float[np.ndarray, "pair"]:
        return self.cos_quant - self.cos_ref

    def take(self, rows: np.ndarray) -> "PairCosines":
        """A selection, by numbers of rows or a mask."""
        return PairCosines(self.i[rows], self.j[rows], self.cos_ref[rows], self.cos_quant[rows])

    def above(self, tau: float, delta: float) -> "PairCosines":
        """The pairs whose cosine rises by at least `delta` to at least `tau`, in the order in which they stand."""
        return self.take((self.cos_quant >= tau - _ROUNDING) & (self.increase >= delta - _ROUNDING))

    def to_list(self) -> list[SmearedPair]:
        columns = (column.tolist() for column in (self.i, self.j, self.cos_ref, self.cos_quant))
        return [SmearedPair(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True, eq=False)
class SmearingResult(Result):
    pairs: list[SmearedPair]
    """Pairs with cos_quant ≥ tau and increase ≥ delta, largest increase first."""
    leakage: float
    """Σ over tokens and i ≠ j of r_i q_j: activation mass that one feature lends to others across the models."""
    leakage_reference: float
    """The same of the reference with itself: what `leakage` is to be compared with."""
    tau: float
    delta: float
    min_active: int

    @property
    def smeared_pairs(self) -> list[SmearedPair]:
        return self.pairs

    @property
    def num_smeared_pairs(self) -> int:
        return len(self.pairs)


class _Segment(NamedTuple):
    """Both models on some tokens, float64 [token, feature]; tokens without any entry are left out."""

    reference: sparse.csr_array
    quantized: sparse.csr_array


class SmearingAccumulator:
    """Streams pairs of sparse activations; `finalize` finds the smeared pairs.

    Time is about Σ over tokens of L0²/2 multiplications. Memory does not grow with the tokens: full segments of `segment` entries, 12
    bytes each, are kept by `spool` (by default the first four in memory, the rest on disk), and `finalize` works on one at a time. The
    split into segments changes sums in the last bit only.
    """

    def __init__(self, n_features: int, *, segment: int = _SEGMENT, spool: Spool | None = None) -> None:
        self.n_features = n_features
        self.segment = segment
        self._log: list[tuple[np.ndarray, ...]] = []
        self._logged = 0
        self._full: list[Kept] = []
        self._spool = spool or Spool(limit=48 * segment)
        self._sums = np.zeros((4, n_features))
        self._leakage = np.zeros(2)

    def update(self, reference: Activations, quantized: Activations) -> "SmearingAccumulator":
        """Adds activations ≥ 0 of the same tokens in both models, dense, scipy.sparse or `SparseActivations`.

        Raises `MetricInputError` for shapes that differ, another number of features and negative activations,
        `NonFiniteError` for NaN and infinity.
        """
        return self.add(JointSupport.of(reference, quantized))

    def add(self, support: JointSupport) -> "SmearingAccumulator":
        """`update` with a support that is already there, as when moments are taken of the same activations."""
        if support.n_features != self.n_features:
            raise MetricInputError(f"activations have {support.n_features} features, expected {self.n_features}")
        token, feature, r, q = (
            x.cpu().numpy() for x in (support.token, support.feature, support.reference, support.quantized)
        )
        rows = np.bincount(token, minlength=support.n_tokens)
        mass_r, mass_q = (np.bincount(token, x, support.n_tokens) for x in (r, q))
        r64, q64 = r.astype(np.float64), q.astype(np.float64)
        self._leakage += (mass_r @ mass_q - r64 @ q64, mass_r @ mass_r - r64 @ r64)
        for sums, weights in zip(self._sums, (r > 0, q > 0, r64 * r64, q64 * q64), strict=True):
            sums += np.bincount(feature, weights, self.n_features)
        self._log.append((r, q, feature.astype(np.int32), rows[rows > 0].astype(np.int32)))
        self._logged += len(r)
        if self._logged >= self.segment:
            self.seal()
        return self

    def merge(self, other: "SmearingAccumulator") -> "SmearingAccumulator":
        """Adds what another accumulator has seen; raises `MetricInputError` for another number of features."""
        if self.n_features != other.n_features:
            raise MetricInputError(f"cannot merge smearing of {other.n_features} features into {self.n_features}")
        self._full += other._full
        self._log += other._log
        self._logged += other._logged
        self._leakage = self._leakage + other._leakage
        self._sums = self._sums + other._sums
        if self._logged >= self.segment:
            self.seal()
        return self

    def seal(self) -> "SmearingAccumulator":
        """Gives what was added last to the spool too, as when nothing more comes for a while."""
        if self._log:
            self._full.append(self._spool.put(self._joined()))
            self._log, self._logged = [], 0
        return self

    def finalize(self, tau: float = 0.5, delta: float = 0.2, min_active: int = 1) -> SmearingResult:
        """The pairs whose cosine rose by at least `delta` to at least `tau`, among features that fire on at least
        `min_active` tokens in both models. More may be added afterwards.

        Raises `MetricInputError` unless tau and delta are in (0, 1].
        """
        return SmearingResult(
            pairs=self.cosines(tau, delta, min_active).to_list(),
            leakage=float(self._leakage[0]),
            leakage_reference=float(self._leakage[1]),
            tau=tau,
            delta=delta,
            min_active=min_active,
        )

    def cosines(self, tau: float = 0.5, delta: float = 0.2, min_active: int = 1) -> PairCosines:
        """The pairs of `finalize` as arrays, as one wants them for thresholds so low that there are very many. Raises as `finalize`."""
        if not (0 < tau <= 1 and 0 < delta <= 1):
            raise MetricInputError(f"tau is {tau} and delta {delta}; both are cosines and must be in (0, 1]")
        n_ref, n_quant, sq_ref, sq_quant = self._sums
        active = (n_ref >= max(1, min_active)) & (n_quant >= max(1, min_active))
        i, j = self._candidates(tau, active)
        dots = np.zeros((2, len(i)))
        for segment in self._segments():
            dots += [_pair_dots(side.tocsc(), i, j) for side in segment]
        cos_ref, cos_quant = _cosine(dots[0], sq_ref[i], sq_ref[j]), _cosine(dots[1], sq_quant[i], sq_quant[j])
        found = PairCosines(i, j, cos_ref, cos_quant).above(tau, delta)
        return found.take(np.lexsort((found.j, found.i, -found.increase)))

    def _candidates(self, tau: float, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs i < j of active features whose quantized cosine reaches τ in some segment, in order."""
        found = np.empty(0, dtype=np.int64)
        for segment in self._segments():
            near = [found]
            quantized = _only(segment.quantized, active)
            squares = np.bincount(quantized.indices, quantized.data**2, self.n_features)
            for start, gram in _gram(quantized):
                i, j = (c + start for c in gram.coords)
                keep = (i < j) & (_cosine(gram.data, squares[i], squares[j]) >= tau - _ROUNDING)
                near.append(i[keep].astype(np.int64) * self.n_features + j[keep])
            found = np.unique(np.concatenate(near))
        return np.divmod(found, max(1, self.n_features))

    def _segments(self) -> Iterator[_Segment]:
        for kept in self._full:
            yield self._matrices(kept())
        if self._log:
            yield self._matrices(self._joined())

    def _joined(self) -> list[np.ndarray]:
        """The open segment as single arrays: both values, feature, and how many entries each token has."""
        if len(self._log) > 1:
            self._log = [tuple(np.concatenate(column) for column in zip(*self._log, strict=True))]
        return list(self._log[0])

    def _matrices(self, log: list[np.ndarray]) -> _Segment:
        *values, feature, rows = log
        ends = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        matrices = []
        for side in values:
            # Each has its own support: what is zero on this side only would cost its share of every product.
            on = side != 0
            ends_on = np.concatenate([[0], np.cumsum(on)])[ends].astype(np.int32)
            shape = (len(rows), self.n_features)
            matrices.append(sparse.csr_array((side[on].astype(np.float64), feature[on], ends_on), shape=shape))
        return _Segment(*matrices)


class FeatureSmearing:
    """`FeatureSmearing().detect_smearing(features_ref, features_quant)`; for a stream use `SmearingAccumulator`."""

    def __init__(self, tau: float = 0.5, delta: float = 0.2, min_active: int = 1) -> None:
        self.tau, self.delta, self.min_active = tau, delta, min_active

    def detect_smearing(self, reference: Activations, quantized: Activations) -> SmearingResult:
        """Raises as `SmearingAccumulator.update` and `.finalize`."""
        seen = SmearingAccumulator(shape_of(reference)[-1]).update(reference, quantized)
        return seen.finalize(self.tau, self.delta, self.min_active)


def _only(x: sparse.csr_array, features: np.ndarray) -> sparse.csr_array:
    """The matrix with nothing in the columns of other features."""
    on = features[x.indices]
    ends = np.concatenate([[0], np.cumsum(on)])[x.indptr]
    return sparse.csr_array((x.data[on], x.indices[on], ends), shape=shape_of(x))


def _gram(x: sparse.csr_array) -> Iterator[tuple[int, sparse.coo_array]]:
    """XᵀX by tiles of rows: (first row, the tile's rows and the columns from there on)."""
    n_features = shape_of(x)[1]
    by_column = x.tocsc()
    entries = np.diff(x.indptr)
    products = np.bincount(x.indices, np.repeat(entries, entries), n_features).cumsum()
    start = 0
    while start < n_features:
        done = products[start - 1] if start else 0
        # At least 8 tiles, so that nearly half of the symmetric product is skipped.
        stop = min(int(np.searchsorted(products, done + _PRODUCTS, "right")), start + -(-n_features // 8))
        stop = max(stop, start + 1)
        yield start, (by_column[:, start:stop].T @ x).tocoo()
        x = x[:, stop - start :]
        start = stop


def _cosine(dots: np.ndarray, squares_i: np.ndarray, squares_j: np.ndarray) -> np.ndarray:
    """In [0, 1]; 0 where either never fires."""
    norms = np.sqrt(squares_i) * np.sqrt(squares_j)
    return np.minimum(np.divide(dots, norms, out=np.zeros_like(norms), where=norms > 0), 1)


def _pair_dots(x: sparse.csc_array, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """x[:, i] · x[:, j] for each pair."""
    lengths = np.diff(x.indptr)
    part_of = (lengths[i] + lengths[j]).cumsum() // _ENTRIES
    edges = [*np.flatnonzero(np.diff(part_of, prepend=-1)), len(i)]
    dots = [np.zeros(0)]
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        dots.append(np.asarray(x[:, i[part]].multiply(x[:, j[part]]).sum(0)).ravel())
    return np.concatenate(dots)
