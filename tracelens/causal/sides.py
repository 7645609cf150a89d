"""`Side`: one of the two runs that patching moves between."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.rerun import Edit, Rerunner


@dataclass(frozen=True)
class Side:
    """A model on prompts, with its embedding corrupted or not."""

    model: Any
    prompts: PromptSet
    edits: Callable[[Batch], Mapping[str, Edit]] | None = None

    def logits(self, batch: Batch, *, whole: bool) -> Tensor:
        """Those of the unpatched run: [prompt, d_vocab] at the last position, or of all positions if `whole`."""
        tokens = torch.tensor([self.prompts.tokens[i] for i in batch.prompt.tolist()])
        edits = self.edits(batch) if self.edits else None
        out = Rerunner(self.model).run(tokens, edits=edits, whole=whole)[0]
        assert out is not None
        return out
