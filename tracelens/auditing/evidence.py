"""`Evidence`: what an audit keeps of single tokens, so that a widget or a page can show why a number is what it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    import pandas as pd

Key = tuple[str, int]
"""A feature: its site's hook name and its index."""


@dataclass(frozen=True, eq=False)
class TokenTrace:
    """One feature on one prompt, token by token, in both models."""

    prompt: int
    """Row of `AuditReport.prompts`."""
    tokens: tuple[str, ...]
    """As the tokenizer decodes each by itself; whatever a prompt may hold, to be escaped wherever it is shown."""
    reference: Float[np.ndarray, "token"]
    quantized: Float[np.ndarray, "token"]

    @property
    def moved(self) -> float:
        """Σ over the tokens of |r − q|."""
        return float(np.abs(self.reference - self.quantized).sum())


@dataclass(frozen=True, eq=False)
class Merged:
    """A token on which the reference fires one feature of a pair only, or neither, and the quantized model both."""

    prompt: int
    position: int
    tokens: tuple[str, ...]
    """Of the whole prompt."""
    reference: tuple[float, float]
    """Activations of features i and j."""
    quantized: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Firings:
    """Where a described feature fires in either model: one entry per feature and token, sorted by feature, prompt, position."""

    feature: Int[np.ndarray, "entry"]
    """Index into `Evidence.features`."""
    prompt: Int[np.ndarray, "entry"]
    """Index into `Evidence.prompts`."""
    position: Int[np.ndarray, "entry"]
    reference: Float[np.ndarray, "entry"]
    quantized: Float[np.ndarray, "entry"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Token-level evidence for some features on some prompts.

    Attributes:
        features: the features that are described: all safety features, the worst of the others, those of the worst smeared pairs.
        n_live: live features there are, described or not.
        prompts: rows of `AuditReport.prompts` whose tokens were kept: all of them, or a random sample.
        n_prompts: prompts there are.
        tokens: of each kept prompt.
        firings: of the described features on the kept prompts.
        near: feature → the features of its site with the most similar decoder directions, and their cosines in [-1, 1].
        promoted: feature → the tokens whose logits its decoder direction raises most, and by how much per unit of activation
            (logit weights: W_dec through the final norm's scale, where it has one, and W_U, centred over the vocabulary).
        suppressed: likewise those that it lowers most.
        importance: feature → what it carries of the margin in the reference, in nats; empty where that was not measured.
        pairs: the columns of `AuditReport.smeared_pairs` for every pair whose cosine reaches `pair_tau` and rises by `pair_delta`, lower
            than the audit's own thresholds, so that these can be moved.
        pairs_left_out: pairs beyond a limit of size that are not in `pairs`.
    """

    features: tuple[Key, ...] = field(repr=False)
    n_live: int
    prompts: tuple[int, ...] = field(repr=False)
    n_prompts: int
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    firings: Firings = field(repr=False)
    near: Mapping[Key, Sequence[tuple[int, float]]] = field(repr=False)
    promoted: Mapping[Key, Sequence[tuple[str, float]]] = field(repr=False)
    suppressed: Mapping[Key, Sequence[tuple[str, float]]] = field(repr=False)
    importance: Mapping[Key, float] = field(repr=False)
    pairs: "pd.DataFrame" = field(repr=False)
    pair_tau: float
    pair_delta: float
    pairs_left_out: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {key: i for i, key in enumerate(self.features)})

    def __contains__(self, key: Key) -> bool:
        return key in self._index  # pyright: ignore[reportAttributeAccessIssue]

    def traces(self, site: str, feature: int, k: int = 3) -> list[TokenTrace]:
        """The feature on the `k` kept prompts on which it moves most (`TokenTrace.moved`); none of a feature that is not described."""
        rows = self._rows((site, feature))
        f = self.firings
        change = np.abs(f.reference[rows] - f.quantized[rows])
        moved = np.bincount(f.prompt[rows], weights=change, minlength=len(self.prompts))
        return [self._trace(rows, int(p)) for p in np.argsort(-moved, kind="stable")[:k] if moved[p] > 0]

    def merged(self, site: str, i: int, j: int, k: int = 12) -> list[Merged]:
        """The `k` tokens on which features i and j were told apart and no longer are: q_i q_j rises most over r_i r_j."""
        found: dict[tuple[int, int], list[tuple[float, float]]] = {}
        f = self.firings
        for side, feature in enumerate((i, j)):
            for row in range(*self._rows((site, feature)).indices(len(f.feature))):
                both = found.setdefault((int(f.prompt[row]), int(f.position[row])), [(0.0, 0.0), (0.0, 0.0)])
                both[side] = (float(f.reference[row]), float(f.quantized[row]))
        rows = [
            (qi * qj - ri * rj, p, t, (ri, rj), (qi, qj))
            for (p, t), ((ri, qi), (rj, qj)) in found.items()
            if not (ri > 0 and rj > 0) and qi > 0 and qj > 0
        ]
        rows.sort(key=lambda row: -row[0])
        return [Merged(self.prompts[p], t, self.tokens[p], r, q) for _, p, t, r, q in rows[:k]]

    def _rows(self, key: Key) -> slice:
        index = self._index.get(key)  # pyright: ignore[reportAttributeAccessIssue]
        if index is None:
            return slice(0, 0)
        start, stop = np.searchsorted(self.firings.feature, [index, index + 1])
        return slice(int(start), int(stop))

    def _trace(self, rows: slice, prompt: int) -> TokenTrace:
        f = self.firings
        here = np.flatnonzero(f.prompt[rows] == prompt) + rows.start
        tokens = self.tokens[prompt]
        sides = []
        for values in (f.reference, f.quantized):
            side = np.zeros(len(tokens))
            side[f.position[here]] = values[here]
            sides.append(side)
        return TokenTrace(self.prompts[prompt], tokens, *sides)
