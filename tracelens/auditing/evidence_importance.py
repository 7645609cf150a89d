"""How much of the reference's margin each feature carries, to first order."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracelens.auditing.question import Question
from tracelens.causal.gradients import frozen
from tracelens.causal.memory import rows_that_fit, run_bytes
from tracelens.errors import MemoryBudgetError
from tracelens.features.sae_sites import is_transcoder
from tracelens.features.saes import SAEs
from tracelens.features.stream import encode_sparse
from tracelens.pair import tokenize
from tracelens.sites import Site

log = logging.getLogger(__name__)

PROMPTS, FEWEST = 64, 16
"""Prompts that an audit takes gradients on: an eighth of its prompts, at most and at least so many."""
_CELLS = 2**24
"""Numbers of decoder rows that are picked out at a time (64 MB)."""


def margin_carried(
    model: Any, saes: SAEs, question: Question, tokenizer: Any, prompts: Sequence[int], *, batch_size: int = 32
) -> dict[Site, Float[Tensor, "feature"]]:
    """What each feature carries of the margin: mean over `prompts` of |first-order effect of removing it|, in nats, float64.

    The effect on a prompt is Σ over tokens of r · (∇ margin · d), with r the feature's activation in the model, d its decoder row and the
    gradient at the feature's site: attribution patching (Nanda 2023) towards an activation of zero. It is exact where the margin is
    linear in what is removed; strong features and saturated softmaxes are where it is not. A feature counts for all that it does on the
    way to the margin, later SAEs' features included, so the numbers of several sites do not add up. BOS is not read.

    Without the sites where d is not what the feature writes (transcoders, SAEs that normalise their input), and empty where no margin
    can be read, the margin has no gradient, or memory does not hold the graph of one prompt.

    Args:
        prompts: rows of the question; those whose behaviour's answers cannot be read are passed over.
    """
    names = list(question.answer_tokens)
    rows = [p for p in prompts if question.behaviours[p] in names]
    sites = [site for site, sae in saes.items() if _writes_its_row(sae)]
    if not rows or not sites:
        return {}
    total = {site: torch.zeros(saes[site].W_dec.shape[0], dtype=torch.float64) for site in sites}
    try:
        for batch in _batches(model, question, tokenizer, rows, batch_size):
            states, gradients = _gradients(model, question, batch, sites)
            for site in sites:
                total[site] += _magnitudes(saes[site], states[site], gradients[site], batch).cpu()
    except (_NoGradientError, MemoryBudgetError, torch.OutOfMemoryError) as error:
        log.warning("what features carry of the margin is not measured: %s", error)
        return {}
    return {site: values / len(rows) for site, values in total.items()}


class _NoGradientError(Exception):
    pass


@dataclass(frozen=True)
class _Batch:
    tokens: Int[Tensor, "batch pos"]
    """Padded on the right."""
    length: Int[Tensor, "batch"]
    column: Int[Tensor, "batch"]
    """Of the question's readout."""
    row: Int[Tensor, "token"]
    """Cells of the flattened rectangle that hold a token other than BOS."""
    prompt: Int[Tensor, "token"]


def _writes_its_row(sae: Any) -> bool:
    how = getattr(getattr(sae, "cfg", None), "normalize_activations", None)
    return how in ("none", "expected_average_only_in", None) and not is_transcoder(sae)


def _batches(
    model: Any, question: Question, tokenizer: Any, prompts: Sequence[int], batch_size: int
) -> Iterator[_Batch]:
    cfg = model.cfg
    tokens = tokenize([question.texts[p] for p in prompts], tokenizer, cfg.n_ctx, cfg.d_vocab)
    bos = None if tokenizer is None else tokenizer.bos_token_id
    names = list(question.answer_tokens)
    column = [names.index(question.behaviours[p]) for p in prompts]
    longest = max(map(len, tokens))
    graph = (2 * cfg.n_layers + 1) * run_bytes(cfg, longest, ())
    size = min(batch_size, rows_that_fit(None, 0, graph, longest, torch.device(cfg.device)))
    order = sorted(range(len(tokens)), key=lambda k: len(tokens[k]))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens[k]) for k in part], batch_first=True)
        length = torch.tensor([len(tokens[k]) for k in part])
        first = [next((at for at, token in enumerate(tokens[k]) if token != bos), len(tokens[k])) for k in part]
        place = torch.arange(padded.shape[1])
        real = (place < length[:, None]) & (place >= torch.tensor(first)[:, None])
        row = real.flatten().nonzero().squeeze(1)
        columns = torch.tensor([column[k] for k in part])
        yield _Batch(padded, length, columns, row, row // padded.shape[1])


def _gradients(
    model: Any, question: Question, batch: _Batch, sites: Sequence[Site]
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """What the model holds at the sites, at the batch's tokens, and the gradient there of each prompt's margin."""
    states: dict[Site, Tensor] = {}
    zeros: dict[Site, Tensor] = {}

    def watch(site: Site) -> Any:
        def add_zero(value: Tensor, hook: Any) -> Tensor:
            # A zero that asks for its gradient gives that of the value, and leaves the path from earlier sites whole.
            zeros[site] = torch.zeros_like(value, requires_grad=True)
            states[site] = value.detach().flatten(0, 1)[batch.row.to(value.device)]
            return value + zeros[site]

        return add_zero

    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), frozen(model.parameters()):
            margins = _margins(model, question, batch, [(str(site), watch(site)) for site in sites])
            if not margins.requires_grad:
                raise _NoGradientError("the model's logits have no gradient")
            found = torch.autograd.grad(margins.sum(), [zeros[site] for site in sites], allow_unused=True)
    finally:
        model.train(was_training)
    gradients = {}
    for site, gradient in zip(sites, found, strict=True):
        gradient = torch.zeros_like(zeros[site]) if gradient is None else gradient
        gradients[site] = gradient.flatten(0, 1)[batch.row.to(gradient.device)]
    return states, gradients


def _margins(model: Any, question: Question, batch: _Batch, hooks: list[Any]) -> Float[Tensor, "batch"]:
    tokens = batch.tokens.to(model.cfg.device)
    length, rows = batch.length.to(tokens.device), torch.arange(len(tokens), device=tokens.device)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]

    def last(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # Only what the margin reads is unembedded: logits of all positions are the largest tensors there are.
        fits = args and isinstance(args[0], Tensor) and args[0].shape[:2] == tokens.shape
        return (args[0][rows, length - 1][:, None], *args[1:]) if fits else None

    unembed = getattr(model, "unembed", None)
    handle = unembed.register_forward_pre_hook(last) if isinstance(unembed, torch.nn.Module) else None
    try:
        logits = model.run_with_hooks(tokens, attention_mask=mask.long(), return_type="logits", fwd_hooks=hooks)
    finally:
        if handle is not None:
            handle.remove()
    logits = logits[:, 0] if logits.shape[1] == 1 else logits[rows, length - 1]
    columns = question.readout(logits)
    return columns.gather(1, batch.column.to(columns.device)[:, None]).squeeze(1)


def _magnitudes(
    sae: Any, state: Float[Tensor, "token ..."], gradient: Float[Tensor, "token ..."], batch: _Batch
) -> Float[Tensor, "feature"]:
    """Σ over prompts of |effect|: a prompt's tokens add up before the sign is dropped."""
    seen = encode_sparse(sae, state)
    token, feature = seen.places()
    rows, gradient = sae.W_dec.detach(), gradient.flatten(1).to(sae.W_dec)
    effect = torch.zeros(len(batch.tokens), len(rows), dtype=torch.float64, device=rows.device)
    prompt = batch.prompt.to(rows.device)
    step = max(1, _CELLS // rows.shape[1])
    for part in torch.arange(len(token), device=rows.device).split(step):
        # Where the feature fires alone: the product of all gradients with all rows would be a thousand times the work.
        t, f = token[part], feature[part]
        change = seen.value[part] * torch.einsum("ed,ed->e", gradient[t], rows[f])
        effect.index_put_((prompt[t], f), change.double(), accumulate=True)
    return effect.abs().sum(0)
