"""Models on one stream of prompts, seen through their SAEs: batches of sparse features."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.features.saes import SAEs, encode
from tracelens.metrics.support import SparseActivations
from tracelens.pair import AlignedBatch, PaddingSide, stream_aligned
from tracelens.sites import Site

_CELLS = 2**24
"""Dense feature activations that exist at a time (64 MB)."""


@dataclass(frozen=True)
class Seen:
    """What one model does on the tokens of a batch."""

    features: dict[Site, SparseActivations]
    logits: Float[Tensor, "token d_vocab"]


@dataclass(frozen=True)
class FeatureStream:
    """Prompts and how they are run; the same batches each time, whichever models run."""

    saes: SAEs
    prompts: Sequence[Any]
    tokenizer: Any = None
    batch_size: int = 32
    padding_side: PaddingSide | None = None

    def run(self, models: Mapping[str, Any]) -> Iterator[tuple[AlignedBatch, dict[str, Seen]]]:
        """Runs each model once; yields which tokens a batch holds (without activations and logits), and each model on them.

        Raises as `stream_aligned`, at once.
        """
        batches = stream_aligned(
            models,
            self.prompts,
            sites=self.saes,
            tokenizer=self.tokenizer,
            batch_size=self.batch_size,
            padding_side=self.padding_side,
        )
        return (self._seen(batch) for batch in batches)

    def _seen(self, batch: AlignedBatch) -> tuple[AlignedBatch, dict[str, Seen]]:
        seen = {
            name: Seen({site: encode_sparse(self.saes[site], x) for site, x in at.items()}, batch.logits[name])
            for name, at in batch.activations.items()
        }
        return replace(batch, activations={}, logits={}), seen


def encode_sparse(sae: Any, activations: Float[Tensor, "token ..."]) -> SparseActivations:
    """What is not zero of `encode(sae, activations)`, by groups of tokens, so that the dense features of a batch never exist together."""
    rows = max(1, _CELLS // max(1, sae.W_dec.shape[0]))
    with torch.no_grad():
        return SparseActivations.stack([SparseActivations.of(encode(sae, part)) for part in activations.split(rows)])
