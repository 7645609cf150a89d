"""From what was kept during an audit to its `Evidence`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tracelens.audit_report import AuditReport
from tracelens.audit_settings import AuditSettings
from tracelens.auditing.evidence import Evidence, Firings, Key
from tracelens.auditing.evidence_importance import FEWEST, PROMPTS, margin_carried
from tracelens.auditing.feature_facts import FeatureFacts
from tracelens.auditing.question import Question
from tracelens.auditing.token_text import TokenText
from tracelens.features.firings import PromptSample, TokenFirings
from tracelens.features.saes import SAEs
from tracelens.pair import tokenize
from tracelens.sites import Site

if TYPE_CHECKING:
    import pandas as pd

PAIR_TAU, PAIR_DELTA = 0.3, 0.1
"""Thresholds of the pairs that are kept for looking at; never above the audit's own."""
MAX_PAIRS = 20_000
MEMORY_SHARE = 0.125
"""Of `AuditSettings.memory`, that the firings of one model may take (20 bytes for a feature on a token)."""


def pair_floors(settings: AuditSettings) -> tuple[float, float]:
    """τ and δ of the pairs that are found: the audit's own without evidence, lower ones with it."""
    if not settings.evidence_prompts:
        return settings.smearing_tau, settings.smearing_delta
    return min(PAIR_TAU, settings.smearing_tau), min(PAIR_DELTA, settings.smearing_delta)


@dataclass
class EvidenceSource:
    """What evidence is made of that all variants of a reference share; each part is worked out once.

    Attributes:
        sample: the prompts that are kept, the same for all variants.
    """

    reference: Any
    saes: SAEs
    question: Question
    tokenizer: Any
    settings: AuditSettings
    sample: PromptSample
    _carried: dict[Site, Float[Tensor, "feature"]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._text = TokenText(self.tokenizer)
        self._facts = FeatureFacts(self.reference, self.saes, self._text)

    @classmethod
    def of(
        cls, reference: Any, saes: SAEs, question: Question, tokenizer: Any, settings: AuditSettings
    ) -> "EvidenceSource | None":
        """None if the settings ask for no evidence."""
        if not settings.evidence_prompts:
            return None
        limit = int(1e9 * MEMORY_SHARE * settings.memory)
        sample = PromptSample.draw(len(question.texts), settings.evidence_prompts, seed=settings.seed, limit=limit)
        return cls(reference, saes, question, tokenizer, settings, sample)

    def evidence(self, report: AuditReport, kept: TokenFirings, pairs: "pd.DataFrame") -> Evidence:
        """The evidence on one variant.

        Args:
            report: on the variant, without evidence.
            pairs: those above the lower thresholds, as `tables.pair_table` gives them.
        """
        features = described(report, self.settings.evidence_features)
        some, left_out = _largest(pairs, self.settings, MAX_PAIRS)
        promoted, suppressed = self._facts.logits(features)
        tau, delta = pair_floors(self.settings)
        return Evidence(
            features=tuple(features),
            n_live=len(report.features),
            prompts=tuple(kept.prompts.tolist()),
            n_prompts=len(self.question.texts),
            tokens=self._tokens(kept.prompts),
            firings=_firings(kept, features, report.sites),
            near=self._facts.near(features),
            promoted=promoted,
            suppressed=suppressed,
            importance=self._importance(features),
            pairs=some,
            pair_tau=tau,
            pair_delta=delta,
            pairs_left_out=left_out,
        )

    def _tokens(self, prompts: np.ndarray) -> tuple[tuple[str, ...], ...]:
        if not len(prompts):
            return ()
        cfg, texts = self.reference.cfg, [self.question.texts[p] for p in prompts.tolist()]
        tokens = tokenize(texts, self.tokenizer, cfg.n_ctx, cfg.d_vocab)
        return tuple(tuple(self._text(token) for token in ids) for ids in tokens)

    def _importance(self, features: list[Key]) -> dict[Key, float]:
        if self._carried is None:
            asked = [p for p, label in enumerate(self.question.labels) if label is not None]
            # Each costs about three forward passes: of a small audit they are not to be most of the work.
            n = min(PROMPTS, max(FEWEST, len(self.question.texts) // 8))
            readable = [p for p in asked if self.question.behaviours[p] in self.question.answer_tokens]
            self._carried = margin_carried(
                self.reference,
                self.saes,
                self.question,
                self.tokenizer,
                self.sample.first(readable, n),
                batch_size=self.settings.batch_size,
            )
        carried: Mapping[str, Any] = {str(site): values.tolist() for site, values in self._carried.items()}
        return {(site, i): carried[site][i] for site, i in features if site in carried}


def described(report: AuditReport, n: int) -> list[Key]:
    """The live features that evidence is kept of, sorted: all safety features, and up to `n` in all.

    Of what they leave, half goes to the features of the worst smeared pairs, the rest to the worst features (`severity`).
    """
    chosen = dict.fromkeys(_keys(report.safety_features, "feature"))
    pairs = report.smeared_pairs
    both = [key for pair in zip(_keys(pairs, "feature_i"), _keys(pairs, "feature_j"), strict=True) for key in pair]
    middle = len(chosen) + (n - len(chosen)) // 2
    for keys, size in ((both, middle), (_keys(report.features, "feature"), n)):
        for key in keys:
            if len(chosen) >= size:
                break
            chosen[key] = None
    order = list(report.sites)
    return sorted(chosen, key=lambda key: (order.index(key[0]), key[1]))


def _keys(table: "pd.DataFrame", column: str) -> list[Key]:
    return list(zip(table["site"].tolist(), table[column].tolist(), strict=True))


def _largest(pairs: "pd.DataFrame", settings: AuditSettings, n: int) -> tuple["pd.DataFrame", int]:
    """At most `n` of the pairs, largest increase first, and how many are left out: never one of the audit's own before another."""
    own = (pairs["cos_quant"] >= settings.smearing_tau) & (pairs["increase"] >= settings.smearing_delta)
    order = np.lexsort((-pairs["increase"].to_numpy(float), ~own.to_numpy(bool)))[:n]
    some = pairs.iloc[np.sort(order)]
    some = some.iloc[np.argsort(-some["increase"].to_numpy(float), kind="stable")]
    return some.reset_index(drop=True), len(pairs) - len(some)


def _firings(kept: TokenFirings, features: list[Key], sites: Mapping[str, int]) -> Firings:
    starts = dict(zip(sites, np.cumsum([0, *sites.values()]).tolist(), strict=False))
    index = np.full(sum(sites.values()), -1, dtype=np.int32)
    index[[starts[site] + i for site, i in features]] = np.arange(len(features), dtype=np.int32)
    rows = np.flatnonzero(index[kept.feature] >= 0)
    feature = index[kept.feature[rows]]
    prompt = np.searchsorted(kept.prompts, kept.prompt[rows]).astype(np.int32)
    order = np.lexsort((kept.position[rows], prompt, feature))
    rows = rows[order]
    return Firings(feature[order], prompt[order], kept.position[rows], kept.reference[rows], kept.quantized[rows])
