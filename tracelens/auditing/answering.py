"""Greedy answers of a model, token by token, on any hook-point-compatible model."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SAME = 5e-2
"""Largest relative L2 difference of logits between a step beside a cache and a whole pass: sums in another order, after which a rounding
of activations may fall to the other side. A cache that the model does not read costs far more."""

Step = Callable[[list[int]], Float[Tensor, "d_vocab"]]
"""Tokens that come next → logits after the last of them."""


def greedy(
    model: Any, ids: Sequence[int], logits: Float[Tensor, "d_vocab"], *, n: int, stop: Sequence[int] = ()
) -> Iterator[int]:
    """Up to `n` tokens, the likeliest each time; ends with a token of `stop`, which is given too, and at the end of the context.

    Keys and values are kept between steps where the model can do it, which is found out by trying, and whole passes are made where not.
    A tie goes to the lower id.

    Args:
        ids: the prompt.
        logits: after the prompt's last token, as a whole pass gives them.
    """
    step, given, after_prompt = None, list(ids), logits
    n = min(n, int(model.cfg.n_ctx) - len(given))
    for done in range(n):
        if done:
            if step is None:
                step = _step(model, given[:-1], after_prompt)
            logits = step(given[-1:])
        else:
            after_prompt = logits
        token = int(logits.float().argmax())
        given.append(token)
        yield token
        if token in stop:
            return


def _step(model: Any, prompt: list[int], logits: Tensor) -> Step:
    """How the model goes on after the prompt: with the first kind of cache that gives the prompt's own logits again."""
    for cached in (_lens_cache, _transformers_cache):
        try:
            step = cached(model)
            if len(prompt) > 1:
                step(prompt[:-1])
            again = step(prompt[-1:])
        except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, ImportError):
            continue
        # A cache that is not read leaves a step with its own token alone: other logits, bar a prompt of one token.
        if len(prompt) > 1 and (again - logits).float().norm() <= SAME * logits.float().norm():
            return step
    given = list(prompt)

    def whole(tokens: list[int]) -> Tensor:
        given.extend(tokens)
        return _last(model, given, attention_mask=_ones(model, len(given)))

    return whole


def _lens_cache(model: Any) -> Step:
    """With the cache of TransformerLens' own models."""
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    cache = TransformerLensKeyValueCache.init_cache(model.cfg, torch.device(model.cfg.device), 1)

    def step(tokens: list[int]) -> Tensor:
        return _last(model, tokens, past_kv_cache=cache, attention_mask=_ones(model, len(tokens)))

    return step


def _transformers_cache(model: Any) -> Step:
    """With the cache of transformers, for models that run one of its models inside."""
    from transformers import DynamicCache

    cache, seen = DynamicCache(), 0

    def step(tokens: list[int]) -> Tensor:
        nonlocal seen
        seen += len(tokens)
        return _last(model, tokens, past_key_values=cache, use_cache=True, attention_mask=_ones(model, seen))

    return step


def _last(model: Any, tokens: list[int], **options: Any) -> Tensor:
    with torch.no_grad():
        out = model(torch.tensor([tokens], device=model.cfg.device), return_type="logits", **options)
    return (out[0] if isinstance(out, tuple) else out)[0, -1]


def _ones(model: Any, n: int) -> Tensor:
    """A mask that is always explicit: a model left to itself guesses it from its tokenizer's pad token."""
    return torch.ones(1, n, dtype=torch.long, device=model.cfg.device)
