"""Several models on one stream of tokens: what each computes at the same token, row by row.

`stream_aligned` is the engine, `PrecisionPair` the checked case of two. Batches hold real tokens only: no padding,
and no BOS unless asked for, so whatever is summed over them has nothing to mask.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tracelens.errors import PairMismatchError, PromptError, UnknownNameError
from tracelens.sites import HOOKS, Site

PaddingSide = Literal["left", "right"]

UNKNOWN_SHARE = 0.05
"""Largest share of unknown tokens in a set of prompts."""

_NOT_PER_TOKEN = ("pattern", "attn_scores")


@dataclass(frozen=True)
class AlignedBatch:
    """Some prompts as seen by every model; the rows of all tensors are the same tokens, prompt after prompt, in
    reading order.

    Prompts come sorted by length, not in the caller's order: `prompt` says which one a row belongs to.
    """

    prompt: Int[Tensor, "token"]
    """Index into the prompts as given."""
    position: Int[Tensor, "token"]
    """Index into the prompt's tokens, BOS counted."""
    token_id: Int[Tensor, "token"]
    next_token: Int[Tensor, "token"]
    """The token that follows, −1 at the prompt's end."""
    last: Int[Tensor, "prompt"]
    """Row of each prompt's final token."""
    activations: dict[str, dict[Site, Float[Tensor, "token ..."]]]
    """Model → site → what the model computes there, heads as a further axis."""
    logits: dict[str, Float[Tensor, "token d_vocab"]]
    """Model → logits; empty if they were not asked for."""


@dataclass(frozen=True)
class PairBatch(AlignedBatch):
    """An `AlignedBatch` of the models `reference` and `quantized`."""

    @property
    def reference(self) -> dict[Site, Tensor]:
        return self.activations["reference"]

    @property
    def quantized(self) -> dict[Site, Tensor]:
        return self.activations["quantized"]


def stream_aligned(
    models: Mapping[str, Any],
    prompts: Sequence[Any],
    *,
    sites: Iterable[Site | str],
    tokenizer: Any = None,
    batch_size: int = 32,
    padding_side: PaddingSide | None = None,
    include_bos: bool = False,
    logits: bool = True,
    progress: bool = False,
) -> Iterator[AlignedBatch]:
    """Runs each model once over `prompts`, batch by batch, and yields aligned activations at `sites` and logits.

    `prompts`: texts, objects with the text as `.prompt`, or sequences of token ids. Texts become tokens by the
    default call of `tokenizer` (by default that of the first model), which decides about BOS. Padding goes to the
    right unless `padding_side` says otherwise; it is masked, and the numbers are the same on either side. Without
    `logits` the models run only as deep as the sites need. Memory does not depend on the number of prompts. The
    models must agree in vocabulary and device; `PrecisionPair` checks it.

    Of a model it needs `cfg` (`n_ctx`, `n_layers`, `d_vocab`, `device`), `tokenizer` and `run_with_hooks`. Raises, at
    once and not at the first batch, `PromptError` for no prompts, an empty one, one longer than the context, token
    ids outside the vocabulary and words the tokenizer does not know; `UnknownNameError` for a site that the models do
    not have.
    """
    first = next(iter(models.values()))
    wanted = list(dict.fromkeys(Site.parse(site) for site in sites))
    for model in models.values():
        _check_sites(wanted, model)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    tokenizer = first.tokenizer if tokenizer is None else tokenizer
    tokens = tokenize(prompts, tokenizer, min(model.cfg.n_ctx for model in models.values()), first.cfg.d_vocab)
    bos = None if tokenizer is None or include_bos else tokenizer.bos_token_id
    starts = [_leading(ids, bos) for ids in tokens]
    for index, (ids, start) in enumerate(zip(tokens, starts, strict=True)):
        if start == len(ids):
            raise PromptError(f"prompt {index} is empty (no token besides BOS); drop it")
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def run() -> Iterator[AlignedBatch]:
        from tqdm.auto import tqdm

        with _evaluating(models.values()), tqdm(total=len(order), unit="prompt", disable=not progress) as bar:
            for indices in batches:
                layout = _Layout.of([tokens[i] for i in indices], [starts[i] for i in indices], padding_side or "right")
                runs = {name: _run(model, layout, wanted, logits) for name, model in models.items()}
                prompt = torch.tensor(indices).repeat_interleave(layout.counts)
                rows = {"prompt": prompt, "position": layout.position, "token_id": layout.token_id}
                rows |= {"next_token": layout.next_token, "last": layout.counts.cumsum(0) - 1}
                yield AlignedBatch(
                    **{name: row.to(first.cfg.device) for name, row in rows.items()},
                    activations={name: activations for name, (activations, _) in runs.items()},
                    logits={name: out for name, (_, out) in runs.items() if out is not None},
                )
                bar.update(len(indices))

    return run()


@dataclass(frozen=True)
class _Layout:
    """Prompts of one batch padded into a rectangle, and the way back from it to rows of real tokens."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    keep: Int[Tensor, "token"]
    """Indices of the kept tokens in the flattened rectangle."""
    position: Int[Tensor, "token"]
    token_id: Int[Tensor, "token"]
    next_token: Int[Tensor, "token"]
    counts: Int[Tensor, "batch"]
    """Kept tokens of each prompt."""

    @classmethod
    def of(cls, prompts: list[list[int]], starts: list[int], side: PaddingSide) -> "_Layout":
        lengths = torch.tensor([len(ids) for ids in prompts])
        width = int(lengths.max())
        # Column of each cell counted from the prompt's first token; negative or ≥ length where there is padding.
        column = torch.arange(width).expand(len(prompts), width)
        offset = (width - lengths)[:, None] if side == "left" else torch.zeros(len(prompts), 1, dtype=torch.long)
        position = column - offset
        real = (position >= 0) & (position < lengths[:, None])
        flat = torch.tensor([token for ids in prompts for token in ids])
        tokens = torch.zeros(real.shape, dtype=torch.long).masked_scatter_(real, flat)
        following = torch.where(position == lengths[:, None] - 1, -1, tokens.roll(-1, 1))
        begin = torch.tensor(starts)
        kept = real & (position >= begin[:, None])
        keep = kept.flatten().nonzero().squeeze(1)
        return cls(
            tokens=tokens,
            attention_mask=real,
            keep=keep,
            position=position.flatten()[keep],
            token_id=tokens.flatten()[keep],
            next_token=following.flatten()[keep],
            counts=lengths - begin,
        )


def _run(
    model: Any, layout: _Layout, sites: list[Site], logits: bool
) -> tuple[dict[Site, Float[Tensor, "token ..."]], Float[Tensor, "token d_vocab"] | None]:
    """One forward pass; what it leaves at the sites, and the logits, at the kept tokens."""
    device = model.cfg.device
    keep = layout.keep.to(device)
    found: dict[Site, Tensor] = {}

    def reader(site: Site) -> Callable[..., None]:
        def store(value: Tensor, hook: Any) -> None:
            found[site] = value

        return store

    depth = {} if logits else {"stop_at_layer": max((site.layer for site in sites), default=-1) + 1}
    # Not inference mode: the rows are ordinary tensors, which a probe may train on.
    with torch.no_grad(), _unembedding_only(model, keep, layout.tokens.shape):
        output = model.run_with_hooks(
            layout.tokens.to(device),
            # Always explicit: a model left to itself guesses the mask from its tokenizer's pad token, which may be
            # its EOS.
            attention_mask=layout.attention_mask.to(device).long(),
            return_type="logits",
            fwd_hooks=[(str(site), reader(site)) for site in sites],
            **depth,
        )
        rows = {site: found.pop(site).flatten(0, 1).index_select(0, keep) for site in sites}
    if not logits:
        return rows, None
    gathered = output.shape[:2] == (1, len(keep))
    return rows, output[0] if gathered else output.flatten(0, 1).index_select(0, keep)


@contextmanager
def _unembedding_only(model: Any, keep: Int[Tensor, "token"], shape: torch.Size) -> Iterator[None]:
    """The model unembeds the kept cells of the rectangle alone: logits are the largest tensors there are, and those of
    padding would be computed, and the others copied, for nothing. A model without a module `unembed` is left alone.
    """

    def gather(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3 or args[0].shape[:2] != shape:
            return None
        return (args[0].flatten(0, 1).index_select(0, keep)[None], *args[1:])

    unembed = getattr(model, "unembed", None)
    handle = unembed.register_forward_pre_hook(gather) if isinstance(unembed, nn.Module) else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _evaluating(models: Iterable[Any]) -> Iterator[None]:
    """The models in evaluation mode; those that were training go back to it."""
    with ExitStack() as stack:
        for model in models:
            if getattr(model, "training", False):
                stack.callback(model.train)
                model.eval()
        yield


def _check_sites(sites: list[Site], model: Any) -> None:
    for site in sites:
        site.check(model.cfg.n_layers)
        if site.name in _NOT_PER_TOKEN:
            known = [name for name in HOOKS if name not in _NOT_PER_TOKEN]
            raise UnknownNameError(
                f"site {site} holds pairs of tokens and cannot be aligned by token. Known: {', '.join(known)}"
            )
        if str(site) not in getattr(model, "hook_dict", {str(site)}):
            raise UnknownNameError(f"the model has no hook point {site} (its blocks may have no {site.name!r})")


def _leading(ids: list[int], token: int | None) -> int:
    """How many times `ids` begins with `token`."""
    return next((i for i, other in enumerate(ids) if other != token), len(ids))


def tokenize(prompts: Sequence[Any], tokenizer: Any, n_ctx: int, d_vocab: int) -> list[list[int]]:
    """Token ids of prompts as `stream_aligned` takes them; raises `PromptError` as it says."""
    if isinstance(prompts, str):
        raise PromptError("prompts is one string; give a list of prompts: [prompt]")
    texts = [getattr(prompt, "prompt", prompt) for prompt in prompts]
    if not texts:
        raise PromptError("there are no prompts; give at least one")
    as_text = [isinstance(text, str) for text in texts]
    if any(as_text) and not all(as_text):
        raise PromptError("some prompts are texts and some token ids; give either texts or token ids")
    if all(as_text):
        if tokenizer is None:
            raise PromptError(
                "prompts are texts, but the model has no tokenizer; pass tokenizer=... or lists of token ids"
            )
        tokens = [list(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
        _check_known(texts, tokens, tokenizer)
    else:
        tokens = [torch.as_tensor(ids).tolist() for ids in texts]
    for index, ids in enumerate(tokens):
        if not ids:
            raise PromptError(f"prompt {index} is empty; drop it")
        if len(ids) > n_ctx:
            raise PromptError(
                f"prompt {index} has {len(ids)} tokens, but the model's context holds {n_ctx} (n_ctx); shorten or "
                "drop it: "
                f"{_excerpt(texts[index])}"
            )
        if max(ids) >= d_vocab or min(ids) < 0:
            outside = next(token for token in ids if not 0 <= token < d_vocab)
            raise PromptError(
                f"prompt {index} has token id {outside}, but the model's vocabulary is 0 to {d_vocab - 1}; tokenize "
                "it with the "
                "model's own tokenizer"
            )
    return tokens


def _check_known(texts: list[str], tokens: list[list[int]], tokenizer: Any) -> None:
    unknown = tokenizer.unk_token_id
    # Byte-level tokenizers name their end of text as unknown token, and have no unknown words.
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return
    total, count = sum(map(len, tokens)), sum(ids.count(unknown) for ids in tokens)
    if count <= UNKNOWN_SHARE * total:
        return
    words = dict.fromkeys(
        word for text, ids in zip(texts, tokens, strict=True) if unknown in ids for word in text.split()
    )
    examples: list[str] = []
    for word in words:
        if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]:
            examples.append(repr(word))
        if len(examples) == 5:
            break
    raise PromptError(
        f"{count} of {total} tokens ({count / total:.0%}, at most {UNKNOWN_SHARE:.0%} are accepted) are unknown to "
        "the model's "
        f"tokenizer, for example {', '.join(examples)}; use prompts in the model's vocabulary"
    )


def _excerpt(prompt: Any, length: int = 60) -> str:
    text = prompt if isinstance(prompt, str) else str(list(prompt))
    return repr(text if len(text) <= length else text[: length - 1] + "…")


class PrecisionPair:
    """A reference and a quantized model that may be compared: same shape, vocabulary, BOS, weight processing, dtype
    and device.

    `tokenizer` replaces the models' own. Raises `PairMismatchError` with a list of all that differs.
    """

    def __init__(self, reference: Any, quantized: Any, *, tokenizer: Any = None):
        differences = [
            f"{name}: reference {ours}, quantized {theirs}"
            for name, ours, theirs in _settings(reference, quantized)
            if ours != theirs
        ]
        if tokenizer is None:
            differences += _tokenizer_differences(reference.tokenizer, quantized.tokenizer)
        if differences:
            raise PairMismatchError(
                "reference and quantized cannot be compared, they differ in\n"
                + "\n".join(f"- {line}" for line in differences)
                + "\nLoad both from the same base model, with the same dtype, device and weight processing."
            )
        self.reference, self.quantized = reference, quantized
        self.tokenizer = reference.tokenizer if tokenizer is None else tokenizer

    @classmethod
    def load(cls, reference: Any, quantized: Any, *, tokenizer: Any = None, **options: Any) -> "PrecisionPair":
        """The pair of two checkpoints, such as a model and its GPTQ build, whatever `tracelens.load` takes.

        `options` are those of `tracelens.load` and hold for both. Tensors that quantization left alone are held once,
        by both models: edit neither in place. Raises what `load` raises, and `PairMismatchError`.
        """
        from tracelens.loading import load

        ours = load(reference, **options)
        if options.get("wrapper", "hooked") == "hooked":
            options = {**options, "share": ours}
        return cls(ours, load(quantized, **options), tokenizer=tokenizer)

    @property
    def settings(self) -> dict[str, str]:
        """What the two models share, for the record: shape, normalisation, BOS, dtype, device."""
        return {name: str(ours) for name, ours, _ in _settings(self.reference, self.quantized)}

    def stream(
        self,
        prompts: Sequence[Any],
        *,
        sites: Iterable[Site | str],
        batch_size: int = 32,
        padding_side: PaddingSide | None = None,
        include_bos: bool = False,
        logits: bool = True,
        progress: bool = False,
    ) -> Iterator[PairBatch]:
        """`stream_aligned` over the two models, under the names `reference` and `quantized`; see there."""
        batches = stream_aligned(
            {"reference": self.reference, "quantized": self.quantized},
            prompts,
            sites=sites,
            tokenizer=self.tokenizer,
            batch_size=batch_size,
            padding_side=padding_side,
            include_bos=include_bos,
            logits=logits,
            progress=progress,
        )
        return (PairBatch(**vars(batch)) for batch in batches)


_SHARED = (
    *("d_model", "n_layers", "n_heads", "n_key_value_heads", "d_head", "d_mlp", "d_vocab", "n_ctx", "act_fn"),
    *("positional_embedding_type", "normalization_type", "default_prepend_bos", "dtype", "device"),
)


def _settings(reference: Any, quantized: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, the reference's value, the quantized model's) of all that a pair must share, tokenizers aside."""
    for name in _SHARED:
        ours, theirs = (getattr(model.cfg, name, None) for model in (reference, quantized))
        label = "normalization_type (…Pre: norm weights folded)" if name == "normalization_type" else name
        yield (label, str(ours), str(theirs)) if name == "device" else (label, ours, theirs)
    # Centring leaves no trace in the config, but in the weights: the mean over the centred axis is gone.
    yield "centring of the writing weights", is_centred(reference, "W_E"), is_centred(quantized, "W_E")
    yield "centring of the unembedding", is_centred(reference, "W_U"), is_centred(quantized, "W_U")


def is_centred(model: Any, name: str) -> bool | None:
    """Whether the weight called `name` has no mean along its last axis; None if the model has no such weight."""
    weight = getattr(model, name, None)
    if weight is None:
        return None
    # For independent entries the ratio is about 1; centred weights leave what their dtype rounds, .002 in bf16.
    return bool(weight.mean(-1).norm() * weight.shape[-1] < 0.05 * weight.norm())


def _tokenizer_differences(reference: Any, quantized: Any) -> list[str]:
    if reference is quantized:
        return []
    if reference is None or quantized is None:
        return [
            f"tokenizer: the {'reference' if reference is None else 'quantized model'} has none; pass tokenizer=..."
        ]
    differences = []
    ours, theirs = reference.get_vocab(), quantized.get_vocab()
    if ours != theirs:
        unlike = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        examples = ", ".join(f"{token!r} ({ours.get(token)} and {theirs.get(token)})" for token in unlike[:3])
        differences.append(f"vocabulary: {len(unlike)} tokens have other ids or are in one only: {examples}")
    if reference.special_tokens_map != quantized.special_tokens_map:
        differences.append(
            f"special tokens: reference {reference.special_tokens_map}, quantized {quantized.special_tokens_map}"
        )
    ours, theirs = reference("")["input_ids"], quantized("")["input_ids"]
    if ours != theirs:
        differences.append(f"tokens added to every text (BOS): reference {ours}, quantized {theirs}")
    return differences
