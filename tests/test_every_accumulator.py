"""However a stream is split, and in whatever order the parts are merged, the result is that of one pass: for every accumulator there is."""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tracelens
from tests.metrics.pairs import sparse_pair
from tracelens.features.maxima import Maxima
from tracelens.sites import Site

FEATURES, BLOCKS, PROMPTS = 12, 3, 7


@dataclass(frozen=True)
class Tokens:
    """What accumulators are fed with, row by row."""

    reference: torch.Tensor
    quantized: torch.Tensor
    before: torch.Tensor
    logits: torch.Tensor
    other_logits: torch.Tensor
    targets: torch.Tensor
    block: torch.Tensor
    prompt: torch.Tensor

    @classmethod
    def draw(cls, n: int, seed: int) -> "Tokens":
        generator = torch.Generator().manual_seed(seed)
        r, q = sparse_pair(n, FEATURES, seed)
        logits = torch.randn(n, 9, generator=generator)
        near = logits + torch.randn(n, 9, generator=generator)
        targets = torch.randint(-1, 9, (n,), generator=generator)
        block, prompt = (torch.randint(k, (n,), generator=generator) for k in (BLOCKS, PROMPTS))
        return cls(r, q, (r + q) / 2, logits, near, targets, block, prompt)

    def rows(self, index: torch.Tensor) -> "Tokens":
        return Tokens(*(getattr(self, f.name)[index] for f in fields(self)))


PAIR = lambda a, t: a.update(t.reference, t.quantized)  # noqa: E731
CLASSES = torch.arange(FEATURES) % 3 == torch.arange(2)[:, None]
FED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "MomentAccumulator": ((FEATURES, BLOCKS), lambda a, t: a.update(t.reference, t.quantized, t.block)),
    "SmearingAccumulator": ((FEATURES,), PAIR),
    "DivergenceAccumulator": ((BLOCKS,), lambda a, t: a.update(t.logits, t.other_logits, t.targets, t.block)),
    "PromptMaxima": ((PROMPTS,), lambda a, t: a.update(Site(0), t.reference, t.prompt)),
    "ClassLeakage": ((CLASSES, BLOCKS), lambda a, t: a.update(t.reference, t.quantized, t.block)),
    "CauseAccumulator": ((FEATURES,), lambda a, t: a.update(t.reference, t.before, t.quantized)),
    "ClippingAccumulator": ((FEATURES,), lambda a, t: a.update(t.reference, 3.0)),
    "ReconstructionAccumulator": (
        (9, FEATURES, BLOCKS),
        lambda a, t: a.update(t.logits, t.other_logits, t.reference, t.block),
    ),
    "CPFR": ((), PAIR),
    "FeatureDrift": ((), PAIR),
}
"""Accumulator → what it is made with, and how it takes tokens in."""


def accumulators() -> dict[str, type]:
    found = {}
    for package in (tracelens.metrics, tracelens.features):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for name, kind in vars(module).items():
                streams = all(hasattr(kind, method) for method in ("update", "merge", "finalize"))
                if inspect.isclass(kind) and streams and not inspect.isabstract(kind):
                    found[name] = kind
    return found


KINDS = accumulators()


def test_none_is_left_out():
    assert KINDS.keys() == FED.keys()


def numbers(result: Any) -> list[torch.Tensor]:
    """All that a result holds, as float64 tensors, in a fixed order."""
    if isinstance(result, Maxima):
        return [result.dense().double()]
    if is_dataclass(result):
        return [x for f in fields(result) for x in numbers(getattr(result, f.name))]
    if isinstance(result, dict):
        return [x for key in sorted(result) for x in numbers(result[key])]
    if isinstance(result, list | tuple):
        return [x for item in result for x in numbers(item)]
    return [torch.as_tensor(result, dtype=torch.float64)]


@pytest.mark.parametrize("name", sorted(FED))
@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 60),
    seed=st.integers(0, 2**16),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    merges=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=6, max_size=6),
    shuffled=st.booleans(),
)
def test_any_split_merged_in_any_order_is_one_pass(name, n, seed, cuts, merges, shuffled):
    kind, (arguments, feed) = KINDS[name], FED[name]
    tokens = Tokens.draw(n, seed)
    whole = feed(kind(*arguments), tokens).finalize()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) if shuffled else torch.arange(n)
    parts = [feed(kind(*arguments), tokens.rows(rows)) for rows in order.tensor_split(sorted(min(c, n) for c in cuts))]
    for i, j in merges:
        if len(parts) == 1:
            break
        first = parts.pop(i % len(parts))
        parts.append(first.merge(parts.pop(j % len(parts))))
    while len(parts) > 1:
        parts.append(parts.pop(0).merge(parts.pop(0)))
    ours, theirs = numbers(parts[0].finalize()), numbers(whole)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        # KL and the fit of an SAE are float32 inside, and a batch of another shape may differ in a last bit.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=2e-6, equal_nan=True)
