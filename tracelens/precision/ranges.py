"""Ranges of activations on calibration prompts, from which static scales are made."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.errors import NonFiniteError, PrecisionSpecError, PromptError
from tracelens.precision.places import Change, Place, as_rows


@torch.no_grad()
def observe_ranges(model: Any, places: Iterable[Place], prompts: Sequence[Any] | None) -> dict[str, Float[Tensor, ""]]:
    """Largest magnitude over all tokens of the prompts, BOS included, under the range name of each place.

    Prompts run one by one, so that no padding counts, and as they are: no chat template is put around them. Experts of a
    layer share a range, whichever of them read a token.
    Raises `PrecisionSpecError` for no prompts, `PromptError` for one that does not run, `NonFiniteError` for NaN.
    """
    places = list(places)
    if isinstance(prompts, str) or prompts is None or not len(prompts):
        raise PrecisionSpecError(
            f"static scales are found on calibration prompts, and there are none (got {prompts!r}): give texts or token "
            "ids that are like the prompts to come, calibration=[...], or leave -static out for one scale per token"
        )
    largest: dict[str, Tensor] = {}
    handles = [place.attach(_observer(largest, place)) for place in places]
    training = model.training
    try:
        model.eval()
        for index, prompt in enumerate(prompts):
            ids = _tokens(model, prompt, index)
            # Always explicit: a model left to itself may take its end-of-text token for padding.
            model(ids, attention_mask=torch.ones_like(ids))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    _check(largest, places)
    return largest


def _observer(largest: dict[str, Tensor], place: Place) -> Change:
    def observe(x: Tensor) -> Tensor:
        if x.numel():  # an expert may get no token
            here, name = as_rows(x, place.width, place.clip).abs().amax().float(), place.range_name
            largest[name] = torch.maximum(largest[name], here) if name in largest else here
        return x

    return observe


def _tokens(model: Any, prompt: Any, index: int) -> Tensor:
    prompt = getattr(prompt, "prompt", prompt)
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise PromptError("calibration prompts are texts, but the model has no tokenizer; give lists of token ids")
        prompt = model.tokenizer(prompt, verbose=False)["input_ids"]
    ids = torch.as_tensor(prompt, dtype=torch.long).reshape(1, -1)
    length, n_ctx, d_vocab = ids.shape[1], model.cfg.n_ctx, model.cfg.d_vocab
    if not 0 < length <= n_ctx:
        raise PromptError(
            f"calibration prompt {index} has {length} tokens; expected 1 to {n_ctx} (n_ctx): cut or drop it"
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < d_vocab:
        raise PromptError(
            f"calibration prompt {index} has token ids outside 0 to {d_vocab - 1}; use the model's tokenizer"
        )
    return ids.to(model.cfg.device)


def _check(largest: dict[str, Tensor], places: Sequence[Place]) -> None:
    for place in places:
        name = place.range_name
        assert name in largest, f"{name} was not reached"
        if not largest[name].isfinite():
            raise NonFiniteError(
                f"activations at {name} hold NaN or infinity on the calibration prompts; check the model's weights"
            )
