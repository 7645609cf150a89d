"""The reference's pass, kept, so that any number of models can be compared with it one after the other."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.features.stream import Seen
from tracelens.metrics.spool import Kept, Spool
from tracelens.metrics.support import SparseActivations
from tracelens.pair import AlignedBatch
from tracelens.sites import Site

log = logging.getLogger(__name__)


class KeptPass:
    """Takes what the reference does batch by batch, and gives it back in the same order, equal to the bit.

    Features are kept sparse. Logits are kept where half of the spool's memory holds them; beyond, and on a GPU, what the unembedding
    reads is kept instead, and the reference's unembedding is done again for each further model. Whether that gives the same logits to
    the bit is tried on the first such batch; of a model that computes them otherwise the logits are kept, on disk if need be.
    """

    def __init__(self, model: Any, spool: Spool) -> None:
        self._model, self._spool = model, spool
        self._batches: list[tuple[Kept, Callable[[AlignedBatch], Tensor]]] = []
        self._logits_in_memory = 0
        self._input: Tensor | None = None
        self._can_redo: bool | None = None
        unembed = getattr(model, "unembed", None)
        self._hook = unembed.register_forward_hook(self._remember) if unembed is not None else None

    def _remember(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        # What the unembedding really read: the rows of real tokens, which `stream_aligned` picks for it.
        self._input = args[0] if args and isinstance(args[0], Tensor) and args[0].dim() == 3 else None

    def put(self, batch: AlignedBatch, seen: Seen) -> None:
        """Takes the next batch, right after the model ran on it."""
        arrays = [_numpy(batch.token_id)]
        for sparse in seen.features.values():
            arrays += [_numpy(sparse.entry), _numpy(sparse.value)]
        self._batches.append((self._spool.put(arrays), self._keep_logits(batch, seen.logits)))

    def close(self) -> None:
        """Ends the taking: the model is left as it was."""
        if self._hook is not None:
            self._hook.remove()
        self._input = None

    def get(self, index: int, batch: AlignedBatch, features: dict[Site, int]) -> Seen:
        """What the reference did on a batch; `features`: how many each site has."""
        kept, logits = self._batches[index]
        token_id, *arrays = (torch.from_numpy(array).to(batch.token_id.device) for array in kept())
        assert torch.equal(token_id, batch.token_id), "models were run on other batches than the reference"
        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        sparse = {
            site: SparseActivations(len(token_id), n, entry, value)
            for (site, n), (entry, value) in zip(features.items(), pairs, strict=True)
        }
        return Seen(sparse, logits(batch))

    def _keep_logits(self, batch: AlignedBatch, logits: Tensor) -> Callable[[AlignedBatch], Tensor]:
        size = logits.numel() * logits.element_size()
        # From a GPU's memory and back takes longer than doing them again.
        fits = logits.device.type == "cpu" and self._logits_in_memory + size <= self._spool.limit // 2
        x, self._input = self._input, None
        if not fits and self._redoes(batch, x, logits):
            assert x is not None
            return self._redone(x)
        self._logits_in_memory += size
        dtype, kept = logits.dtype, self._spool.put([_numpy(logits)])
        return lambda batch: torch.from_numpy(kept()[0]).view(dtype).to(batch.token_id.device)

    def _redone(self, x: Tensor) -> Callable[[AlignedBatch], Tensor]:
        dtype, kept = x.dtype, self._spool.put([_numpy(x)])

        def redo(batch: AlignedBatch) -> Tensor:
            return self._unembed(torch.from_numpy(kept()[0]).view(dtype), batch)

        return redo

    def _redoes(self, batch: AlignedBatch, x: Tensor | None, logits: Tensor) -> bool:
        if self._can_redo is None:
            rows = x is not None and x.shape[:2] == (1, len(batch.token_id))
            again = self._unembed(x, batch) if x is not None and rows else None
            self._can_redo = again is not None and torch.equal(again, logits)
            if not self._can_redo:
                log.info("the reference's logits cannot be had from its unembedding alone and are kept")
        return self._can_redo and x is not None

    @torch.no_grad()
    def _unembed(self, x: Float[Tensor, "1 token d_model"], batch: AlignedBatch) -> Float[Tensor, "token d_vocab"]:
        logits = self._model.unembed(x.to(batch.token_id.device))
        if (cap := getattr(self._model.cfg, "output_logits_soft_cap", 0.0) or 0.0) > 0:
            logits = cap * torch.tanh(logits / cap)
        return logits[0]


def _numpy(x: Tensor) -> np.ndarray:
    """The tensor's values or, of a type that numpy does not know (bfloat16), its bits."""
    x = x.detach().cpu()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
