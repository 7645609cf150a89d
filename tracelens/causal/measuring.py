"""The metric of runs of one batch of prompts, with the logits of unpatched runs at hand for metrics that read them."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracelens.causal.prompts import Batch
from tracelens.causal.readout import Context, Metric, checked


class Measure:
    """Reads a metric off logits; raises what `readout.checked` does.

    `baselines`: name → logits [prompt, d_vocab] of an unpatched run for a batch, computed once and only if the metric asks.
    """

    def __init__(self, metric: Metric, batch: Batch, baselines: Mapping[str, Callable[[Batch], Tensor]]) -> None:
        self.metric, self.batch, self.baselines = metric, batch, baselines
        self._logits: dict[str, Tensor] = {}

    def __call__(
        self,
        logits: Float[Tensor, "row *pos d_vocab"],
        prompt: Int[Tensor, "row"] | None = None,
        replaced: Callable[[int], str] | None = None,
    ) -> Float[Tensor, "row"]:
        """The metric of each row; `prompt` says which of the batch it runs (by default each in turn), `replaced`, for
        messages, what its run has replaced.
        """
        prompt = torch.arange(len(self.batch)) if prompt is None else prompt
        rows = prompt.to(logits.device)

        def baseline(name: str) -> Tensor:
            if name not in self._logits:
                self._logits[name] = self.baselines[name](self.batch)
            return self._logits[name][rows]

        context = Context(self.batch.prompt[prompt].to(logits.device), baseline)
        return checked(self.metric, self.metric(logits, context), logits, context, replaced)
