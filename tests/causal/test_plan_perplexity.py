"""Perplexity that is foretold: the same sums as are measured, and exact where errors are small."""

import math

import pytest
import torch

from tracelens.causal.matrices import Part, choose, matrices, restored
from tracelens.causal.prompts import PromptSet
from tracelens.causal.repair.plan_measure import token_losses
from tracelens.causal.repair.plan_perplexity import predicted_perplexity
from tracelens.causal.repair.runs import Runs
from tracelens.organism import sample
from tracelens.pair import PrecisionPair
from tracelens.precision import apply_precision

TEXTS = [prompt.text for prompt in sample(12, seed=2, where=lambda p: len(p.prompt.split()) in (10, 11))]


def perplexity(model, tokenizer):
    losses, counts = token_losses(model, TEXTS, tokenizer, 8)
    return math.exp(float(losses.sum() / counts.sum()))


@pytest.mark.parametrize("layers", [(1,), (2, 3, 4), (0, 1, 2, 3, 4)])
def test_foretold_and_measured(organism, layers):
    pair = PrecisionPair(organism, apply_precision(organism, "int8"))
    found = matrices(pair.reference, pair.quantized)
    names = [m.name for m in found if m.layer in layers]
    before = perplexity(pair.quantized, pair.tokenizer)
    with restored(Part(m) for m in choose(found, names)):
        measured = perplexity(pair.quantized, pair.tokenizer)
    foretold = predicted_perplexity(pair, TEXTS, names, Runs(pair, None, 8, None, False), "quantized")
    assert abs(measured - before) > 1e-4
    assert abs(foretold - measured) < 0.01 * abs(measured - before) + 1e-6


def test_nothing_restored_is_the_quantized_perplexity_itself(organism):
    """Only so are BOS, lengths and the mean over tokens those of what is measured."""
    pair = PrecisionPair(organism, apply_precision(organism, "int3-g32"))
    foretold = predicted_perplexity(pair, TEXTS, [], Runs(pair, None, 8, None, False), "quantized")
    assert foretold == pytest.approx(perplexity(pair.quantized, pair.tokenizer), rel=1e-6)


def test_the_loss_leaves_bos_out(organism):
    from tracelens.causal.readout import Context
    from tracelens.causal.repair.plan_perplexity import SummedLoss

    prompts = PromptSet.of(TEXTS[:1], organism, chat="never")
    ids = torch.tensor(prompts.tokens)
    logits = organism(ids)
    context = Context(torch.zeros(1, dtype=torch.long), lambda name: logits)
    found = SummedLoss(prompts.tokens, (1,))(logits, context)
    losses, counts = token_losses(organism, TEXTS[:1], organism.tokenizer, 8)
    assert found.item() == pytest.approx(losses.item(), rel=1e-5)
    assert counts.item() == ids.shape[1] - 2
    assert SummedLoss(prompts.tokens, (0,))(logits, context).item() > found.item()
