"""Perplexity as first order foretells it with some matrices restored."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.causal.attribution import At, attribute_weights
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import Context, Metric, wide
from tracelens.causal.repair.plan_measure import token_losses
from tracelens.causal.repair.runs import Runs


@dataclass(frozen=True)
class SummedLoss(Metric):
    """Negative log-likelihood of a text's next tokens, in nats, summed as `token_losses` does: BOS foretells nothing."""

    tokens: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]
    """Of each text, the first position that is no BOS."""
    name = "summed loss"
    unit = "nats"
    whole = True

    def __call__(self, logits: Float[Tensor, "row pos d_vocab"], context: Context) -> Float[Tensor, "row"]:
        indices = context.prompt.tolist()
        ids = torch.tensor([self.tokens[i] for i in indices], device=logits.device)
        first = torch.tensor([self.first[i] for i in indices], device=logits.device)
        shown = wide(logits[:, :-1])
        losses = shown.logsumexp(-1) - shown.gather(2, ids[:, 1:, None]).squeeze(2)
        return losses.where(torch.arange(losses.shape[1], device=logits.device) >= first[:, None], 0).sum(1)


def predicted_perplexity(pair: Any, texts: Sequence[Any], names: Iterable[str], runs: Runs, at: At) -> float:
    """exp of the quantized model's mean NLL, less what the matrices `names` account for of it (`attribute_weights`)."""
    prompts = PromptSet.of(texts, pair.quantized, tokenizer=pair.tokenizer, chat="never")
    none = ((),) * len(prompts)
    metric = SummedLoss(prompts.tokens, tuple(len(bos) for bos in prompts.frame.get("bos", none)))
    options = {"batch_size": runs.batch_size, "memory_budget": runs.memory_budget, "progress": runs.progress}
    found = attribute_weights(pair, prompts, metric=metric, at=at, **options)
    row = {name: i for i, name in enumerate(found.names)}
    losses, counts = token_losses(pair.quantized, texts, pair.tokenizer, runs.batch_size)
    undone = found.first_order[[row[name] for name in names]].sum()
    return math.exp(float((losses.sum() - undone) / counts.sum()))
