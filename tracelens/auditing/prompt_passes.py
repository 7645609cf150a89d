"""The two passes of a `PromptLook`, and what is read off them."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.auditing.prompt_reading import PromptReading
from tracelens.auditing.prompt_result import FeatureChange, Margin, NextToken
from tracelens.auditing.running import model_label, model_name
from tracelens.auditing.token_text import TokenText
from tracelens.behaviour.refusal import OPENERS, AnswerTokens, answer_tokens_for, margin
from tracelens.errors import NonFiniteError, PromptError
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import SAEs, encode
from tracelens.metrics.divergence import token_divergence
from tracelens.pair import PrecisionPair
from tracelens.sites import Site

PATTERN_CELLS = 2**25
"""Cells of attention patterns that are kept of each model (128 MB)."""
FEATURE_CELLS = 2**24
"""Dense feature activations that exist at a time."""


def compared(
    pair: PrecisionPair,
    saes: SAEs,
    reading: PromptReading,
    answer_tokens: Mapping[str, AnswerTokens],
    fingerprint: Fingerprint | None,
    top_features: int,
    top_tokens: int,
) -> tuple[dict[str, Any], list[Float[Tensor, "d_vocab"]]]:
    """Fields of a `PromptLook`, and the logits of both models after the prompt."""
    heads, note = _pattern_sites(pair, len(reading.ids))
    passes = [
        _pass(getattr(pair, name), reading.ids, [*saes, *heads], name if name == "reference" else "quantized model")
        for name in ("reference", "quantized")
    ]
    (logits_r, found_r), (logits_q, found_q) = passes
    kl = np.full(len(reading.ids), np.nan)
    kl[reading.start :] = token_divergence(logits_r[reading.start :], logits_q[reading.start :])[0].cpu().numpy()
    last = [logits_r[-1], logits_q[-1]]
    carried = _carried(fingerprint)
    features, n_moved = [], {}
    for site, sae in saes.items():
        rows = [found[site][reading.start :] for found in (found_r, found_q)]
        changes, n_moved[str(site)] = _moved(sae, rows, top_features)
        for index, sides in changes.items():
            spread = [np.concatenate([np.zeros(reading.start), side]) for side in sides]
            key = (str(site), index)
            features.append(FeatureChange(*key, carried.get(key, ()), reading.tokens, *spread))
    seen = {
        "labels": (model_name(pair.reference), model_label(pair.quantized)),
        "margins": tuple(
            Margin(name, *(margin(side[None], tokens).item() for side in last))
            for name, tokens in readable(pair.tokenizer, answer_tokens).items()
        ),
        "next_tokens": _next_tokens(last, pair.tokenizer, top_tokens),
        "kl": kl,
        "features": tuple(features),
        "n_moved": n_moved,
        "patterns": None if not heads else tuple(_stacked(found, heads) for found in (found_r, found_q)),
        "notes": tuple(filter(None, [note, "" if saes else NO_SAES, "" if reading.templated else _untemplated(pair)])),
    }
    return seen, last


NO_SAES = "No SAEs are loaded, so no features are shown: audit.load_sae(folder) takes some."


def readable(tokenizer: Any, given: Mapping[str, AnswerTokens]) -> dict[str, AnswerTokens]:
    """Answer tokens of every behaviour whose decision can be read in this vocabulary."""
    found = dict(given)
    for behaviour in OPENERS:
        if behaviour not in found:
            try:
                found[behaviour] = answer_tokens_for(tokenizer, behaviour)
            except PromptError:
                continue
    return found


def _untemplated(pair: PrecisionPair) -> str:
    if getattr(pair.tokenizer, "chat_template", None):
        return ""
    return "The tokenizer has no chat template: the models read the text as it is."


def _pattern_sites(pair: PrecisionPair, n: int) -> tuple[list[Site], str]:
    """Where the attention patterns are, and a sentence if they are not kept."""
    cfg = pair.reference.cfg
    sites = [Site(layer, "pattern") for layer in range(cfg.n_layers)]
    for model in (pair.reference, pair.quantized):
        sites = [site for site in sites if str(site) in getattr(model, "hook_dict", {})]
    if not sites:
        return [], "The models show no attention patterns: they have no hook points there."
    most = int((PATTERN_CELLS / (len(sites) * cfg.n_heads)) ** 0.5)
    if n > most:
        return [], f"Attention patterns are kept for prompts of up to {most:,} tokens; this one has {n:,}."
    return sites, ""


def _pass(
    model: Any, ids: Sequence[int], sites: Sequence[Site], role: str
) -> tuple[Float[Tensor, "token d_vocab"], dict[Site, Tensor]]:
    """One forward pass: logits, and what the sites hold.

    Raises `NonFiniteError`, naming the first of the sites that holds NaN or infinity, or the logits.
    """
    found: dict[Site, Tensor] = {}
    thread = threading.get_ident()

    def reader(site: Site) -> Callable[..., None]:
        def store(value: Tensor, hook: Any) -> None:
            # Hooks are the model's: what another thread runs through it meanwhile is not meant.
            if threading.get_ident() == thread:
                found[site] = value[0]

        return store

    tokens = torch.tensor([ids], device=model.cfg.device)
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        with torch.no_grad():
            logits = model.run_with_hooks(
                tokens,
                # Always explicit: a model left to itself guesses the mask from its tokenizer's pad token.
                attention_mask=torch.ones_like(tokens),
                return_type="logits",
                fwd_hooks=[(str(site), reader(site)) for site in sites],
            )[0]
    finally:
        if training:
            model.train()
    for site in sorted(found):
        if not found[site].isfinite().all():
            raise NonFiniteError(f"the {role} computes NaN or infinity at {site} on this prompt{_MEND}")
    # A logit of −inf is a token of probability 0.
    if bool((logits.isnan() | (logits == torch.inf)).any()):
        raise NonFiniteError(f"the {role}'s logits hold NaN or infinity on this prompt{_MEND}")
    return logits, found


_MEND = "; load or quantize it again, in a wider dtype if it overflowed"


def _stacked(found: Mapping[Site, Tensor], heads: Sequence[Site]) -> Float[np.ndarray, "layer head query key"]:
    return torch.stack([found[site].float() for site in heads]).cpu().numpy()


def _next_tokens(last: Sequence[Float[Tensor, "d_vocab"]], tokenizer: Any, k: int) -> tuple[NextToken, ...]:
    show = TokenText(tokenizer)
    p = torch.stack([side.float() for side in last]).softmax(-1)
    chosen = p.topk(min(k, p.shape[-1])).indices.unique().tolist()
    rows = [NextToken(i, show(i), p[0, i].item(), p[1, i].item()) for i in chosen]
    return tuple(sorted(rows, key=lambda row: -max(row.reference, row.quantized)))


def _carried(fingerprint: Fingerprint | None) -> dict[tuple[str, int], tuple[str, ...]]:
    rows = fingerprint.features if fingerprint else ()
    return {(str(row.site), row.feature): tuple(row.behaviours) for row in rows}


def _moved(sae: Any, rows: Sequence[Tensor], k: int) -> tuple[dict[int, list[np.ndarray]], int]:
    """The `k` features that move most at the last token and the `k` that move most over all, with their activations in both models;
    and how many move at all."""
    total, last = None, None
    for r, q in _encoded(sae, rows):
        change = (r - q).abs()
        total = change.sum(0) if total is None else total + change.sum(0)
        last = change[-1]
    assert total is not None
    assert last is not None
    chosen = torch.cat([side.topk(min(k, len(side))).indices for side in (last, total)]).unique()
    chosen = chosen[total[chosen] > 0]
    parts = [[side[:, chosen].cpu() for side in sides] for sides in _encoded(sae, rows)]
    r, q = (torch.cat(side).double().numpy() for side in zip(*parts, strict=True))
    return {i: [r[:, c], q[:, c]] for c, i in enumerate(chosen.tolist())}, int((total > 0).sum())


def _encoded(sae: Any, rows: Sequence[Tensor]) -> Iterator[list[Float[Tensor, "token d_sae"]]]:
    """Features of both models, by groups of tokens."""
    size = max(1, FEATURE_CELLS // max(1, sae.W_dec.shape[0]))
    for parts in zip(*(side.split(size) for side in rows), strict=True):
        yield [encode(sae, part) for part in parts]
