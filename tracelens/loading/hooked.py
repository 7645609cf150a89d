"""Float tensors of a checkpoint -> a `HookedTransformer`, without a transformers model in between.

transformer-lens' own loader takes hub names only and branches on substrings of a path; here the architecture in
config.json decides. Weights are not processed: no folding, no centring.
"""

import logging
import warnings
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tracelens.errors import CheckpointError
from tracelens.loading.architectures import Architecture, Axes, Source, architecture_of
from tracelens.loading.checkpoint import Checkpoint, shortened

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

logger = logging.getLogger(__name__)


def build_hooked(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    n_ctx: int | None = None,
    share: Any = None,
    progress: bool = False,
) -> Any:
    """A `HookedTransformer` with the checkpoint's weights in `dtype` on `device`, in eval mode, without gradients.

    Memory: the model, plus one tensor at a time. Tied embeddings become two parameters, so that an edit of one leaves
    the other alone.

    Args:
        n_ctx: context length in tokens; by default that of config.json, or what a model with longrope rotates alike.
            A table of learned positions is cut to it.
        progress: show a bar over the tensors.
        share: a hooked model. Parameters that are the same there, bit for bit, and that are not quantized here are
            its own tensors, so that a pair takes the memory of one model and of what differs. An edit in place, such
            as folding norms, then changes both.

    Raises:
        UnsupportedArchitectureError: no row in `ARCHITECTURES`.
        CheckpointError: missing, extra or mis-shaped tensors; a config that is not understood, or that a hooked model
            cannot represent.
        NonFiniteError: NaN or infinity in a tensor.
    """
    architecture = architecture_of(checkpoint.architecture, checkpoint.config)
    config = architecture.config(checkpoint.config)
    fields = architecture.fields(config, n_ctx)
    sources = architecture.all_sources(config, checkpoint.names())
    axes = architecture.axes(config, fields)
    _check_names(checkpoint, architecture, sources, tied=bool(config.get("tie_word_embeddings")))
    _check_shapes(checkpoint, sources, axes)

    model = _empty_model(checkpoint, fields, dtype=dtype, device=device, mlp_bias="blocks.0.mlp.b_gate" in sources)
    _fill(
        model,
        checkpoint,
        sources,
        axes,
        device=device,
        others=dict(share.named_parameters()) if share is not None else {},
        progress=progress,
    )
    attach_tokenizer(model, checkpoint.tokenizer)
    return model.eval().requires_grad_(False)


def _check_names(
    checkpoint: Checkpoint, architecture: Architecture, sources: Mapping[str, Source], *, tied: bool
) -> None:
    present, needed = set(checkpoint.names()), {source.name for source in sources.values()}
    described = f"{checkpoint.architecture} as {checkpoint.path / 'config.json'} describes it"
    if missing := sorted(needed - present):
        raise CheckpointError(
            f"the weights lack {len(missing)} tensors of {described}: {shortened(missing)}; get the whole checkpoint"
        )
    extra = {name for name in present - needed if not architecture.is_buffer(name, checkpoint.shape(name))}
    if foreign := {name for name in extra if architecture.is_foreign(name)}:
        logger.info("%s: %d tensors that are no part of the language model are left out", checkpoint.name, len(foreign))
        extra -= foreign
    embed, unembed = architecture.embed, architecture.unembed
    if tied and unembed in extra:
        if not torch.equal(checkpoint.weight(unembed), checkpoint.weight(embed)):
            raise CheckpointError(
                f"config.json says tie_word_embeddings, but {unembed} differs from {embed}; "
                "set tie_word_embeddings to false if the checkpoint is meant to have both"
            )
        extra.remove(unembed)
    extra = {name for name in extra if not checkpoint.adds_nothing(name)}
    if extra:
        raise CheckpointError(
            f"the weights hold {len(extra)} tensors that are no part of {described}: {shortened(sorted(extra))}; "
            "a model without them would be another model: check config.json (biases, number of layers, architecture)"
        )


def _check_shapes(checkpoint: Checkpoint, sources: Mapping[str, Source], axes: Axes) -> None:
    expected = {source.name: source.disk_shape(axes) for source in sources.values()}
    wrong = [
        f"{name} is {list(checkpoint.shape(name))}, expected {list(shape)}"
        for name, shape in expected.items()
        if checkpoint.shape(name) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors of {checkpoint.path} do not have the shape that config.json asks for: "
            f"{', '.join(wrong)}; config and weights belong to different models"
        )


class _Unallocated(TorchFunctionMode):
    """Uninitialized tensors take no memory: they are made on the meta device, to be replaced one by one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("dtype") is not torch.bool:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _empty_model(
    checkpoint: Checkpoint, fields: dict[str, Any], *, dtype: torch.dtype, device: torch.device, mlp_bias: bool
) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig

    from tracelens.loading.alibi import slope_as_trained
    from tracelens.loading.biased_mlp import add_mlp_biases
    from tracelens.loading.long_rope import stretch

    stretched = fields.pop("long_rope", None)
    cfg = HookedTransformerConfig(
        **fields,
        model_name=checkpoint.name,
        original_architecture=checkpoint.architecture,
        dtype=dtype,
        device=str(device),
        init_weights=False,
        # Without a tokenizer object HookedTransformer goes looking for one by this name; it gets ours afterwards.
        tokenizer_name=None,
    )
    with warnings.catch_warnings(), torch.device(device), _Unallocated():
        # SAELens needs HookedTransformer, so its users need not hear that transformer-lens 4 drops it.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, move_to_device=False)
        # Folding a LayerNorm puts biases on both projections of a gated MLP, where transformer-lens' own has none.
        if mlp_bias or (cfg.gated_mlp and cfg.normalization_type == "LN"):
            add_mlp_biases(model)
        if cfg.positional_embedding_type == "alibi":
            slope_as_trained(model)
        if stretched:
            stretch(model, *stretched)
    return model


def _fill(
    model: Any,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    axes: Axes,
    *,
    device: torch.device,
    others: Mapping[str, Tensor],
    progress: bool,
) -> None:
    """Read each tensor once, in the order of the files, into every parameter that is made from it."""
    from tqdm.auto import tqdm

    targets: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    dtype, wanted = model.cfg.dtype, _by_tensor(sources, targets, axes)
    names = [name for name in checkpoint.names() if name in wanted]
    for disk in tqdm(names, desc=f"loading {checkpoint.name}", unit="tensor", disable=not progress):
        made, shareable = wanted.pop(disk), checkpoint.quantized(disk) is None
        adopted = _can_adopt(checkpoint, disk, made, targets, dtype)
        # Allocated below what is read, so that the allocator gets back what is freed instead of a hole for each tensor.
        fresh = {
            name: torch.empty(targets[name].shape, dtype=dtype, device=device)
            for name, _ in made
            if not adopted and targets[name].is_meta and not (shareable and name in others)
        }
        exact = any(source.shift for _, source in made)
        tensor = values = checkpoint.weight(disk, dtype=torch.float32 if exact else dtype, device=device)
        for name, source in made:
            values, target = source.pick(tensor, axes), targets.pop(name)
            other = others.get(name) if shareable and isinstance(target, nn.Parameter) else None
            if other is not None and _identical(values.to(target.dtype), other):
                target = other.data
            elif adopted:
                target = values
            elif target.is_meta:
                target = fresh[name] if name in fresh else torch.empty(values.shape, dtype=dtype, device=device)
                target.copy_(values)
            else:
                target.data.copy_(values)
                continue
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(target, requires_grad=False))
        # Freed before the next is read.
        del tensor, values, fresh
    # What is left was made with a value, such as a bias of zeros.
    unfilled = [name for name, target in targets.items() if target.is_meta]
    assert not wanted, f"tensors that were not read: {sorted(wanted)}"
    assert not unfilled, f"parameters without a value: {unfilled}"


def _can_adopt(
    checkpoint: Checkpoint,
    disk: str,
    made: list[tuple[str, Source]],
    targets: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> bool:
    """Whether the parameters can be views of the tensor that was read, which saves a transposed copy: the tensor is
    new memory, and they use each of its values once and as it is."""
    return (
        checkpoint.gives_new_memory(disk, dtype)
        and sum(targets[name].numel() for name, _ in made) == prod(checkpoint.shape(disk))
        and all(targets[name].is_meta and not (source.shift or source.root_of) for name, source in made)
    )


def _by_tensor(
    sources: Mapping[str, Source], targets: Mapping[str, Tensor], axes: Axes
) -> dict[str, list[tuple[str, Source]]]:
    """Tensor -> the parameters that are made from it, under the names that they have in the model."""
    wanted: dict[str, list[tuple[str, Source]]] = defaultdict(list)
    for name, source in sources.items():
        # Grouped-query attention keeps its narrow keys and values under names with an underscore.
        name = name if name in targets else name.replace("attn.", "attn._")
        shape = source.pick(torch.empty(source.disk_shape(axes), device="meta"), axes).shape
        assert targets[name].shape == shape, (name, targets[name].shape, shape)
        wanted[source.name].append((name, source))
    return wanted


def _identical(values: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bit for bit, -0 and 0 apart."""
    if (values.shape, values.dtype, values.device) != (other.shape, other.dtype, other.device):
        return False
    bits = BITS[values.dtype.itemsize]
    return torch.equal(values.view(bits), other.data.view(bits))


def attach_tokenizer(model: Any, tokenizer: Any) -> None:
    """Give the model the tokenizer as it is, so that `model.to_tokens(text)` is `tokenizer(text).input_ids`.

    `HookedTransformer.set_tokenizer` would open another tokenizer by name, with a BOS switched on, and prepend BOS
    for tokenizers that do not.
    """
    model.tokenizer = tokenizer
    if tokenizer is None:
        logger.info("%s has no tokenizer; the model takes token ids only", model.cfg.model_name)
        return
    ids = tokenizer("").input_ids
    prepends = bool(ids) and ids[0] == tokenizer.bos_token_id
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = prepends
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= model.cfg.d_vocab:
        # Batches need some token the model has an embedding for; padding is masked, so which one does not matter.
        known = (t for t in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) if t is not None)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(next((t for t in known if t < model.cfg.d_vocab), 0))
