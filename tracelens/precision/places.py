"""Where in a model a kernel rounds: the inputs of linear layers, keys and values, and all that is stored on the way.

A `Place` is a module whose output, or whose input, is such a tensor. Rounding there is a torch hook on the module.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracelens.errors import PrecisionSpecError

_QUERY_KEY_VALUE = ("query_input", "key_input", "value_input")
_FOLDED = ("LNPre", "RMSPre")

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """A tensor on its way through a model.

    Attributes:
        name: of the module.
        side: whether the tensor is what the module takes or what it gives.
        width: numbers that share a scale when each token has its own, contiguous in memory; None for the last axis.
        shared: places of one such name share a static scale: the experts of a layer do, as in fused kernels.
        clip: bound of magnitudes that the model applies only afterwards, but before it stores the tensor.
    """

    name: str
    module: nn.Module
    side: Literal["input", "output"] = "output"
    width: int | None = None
    shared: str = ""
    clip: float | None = None

    @property
    def range_name(self) -> str:
        """Under which the range of a static scale is kept."""
        return self.shared or self.name

    def attach(self, change: Change) -> RemovableHandle:
        """Registers a hook that puts `change(tensor)` in the tensor's place."""
        if self.side == "input":
            return self.module.register_forward_pre_hook(_on_inputs(change), with_kwargs=True)

        def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
            return change(output)

        return self.module.register_forward_hook(hook)


def as_rows(x: Float[Tensor, "*shape"], width: int | None, clip: float | None) -> Float[Tensor, "row width"]:
    """The tensor of a place as rows that share a scale."""
    rows = x.reshape(-1, x.shape[-1] if width is None else width)
    return rows if clip is None else rows.clamp(-clip, clip)


def _on_inputs(change: Change) -> Callable[..., tuple]:
    """A hook that changes a module's first argument, or an attention's three inputs; each tensor once."""

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        named = {name: kwargs[name] for name in _QUERY_KEY_VALUE if name in kwargs}
        changed: dict[int, Tensor] = {}
        for x in (*args[:1], *named.values()):
            changed[id(x)] = changed[id(x)] if id(x) in changed else change(x)
        first = [changed[id(x)] for x in args[:1]]
        return (*first, *args[1:]), kwargs | {name: changed[id(x)] for name, x in named.items()}

    return hook


def check_blocks(model: Any, what: str) -> None:
    """Raises `PrecisionSpecError` unless the blocks of `model` are those of a `HookedTransformer`; `what` is for the error."""
    blocks = getattr(model, "blocks", None)
    # The encoder's blocks have much the same modules, and normalise elsewhere.
    if not blocks or not all(hasattr(block, "apply_mlp") and hasattr(block, "hook_resid_pre") for block in blocks):
        raise PrecisionSpecError(
            f"precision {what} rounds activations inside the blocks, and those of a {type(model).__name__} are not "
            "known; load the model with wrapper='hooked'"
        )


def check_unfolded(model: Any, what: str) -> None:
    """Raises `PrecisionSpecError` if norm weights are folded: then the inputs of linear layers are not those of a kernel."""
    if model.cfg.normalization_type in _FOLDED or getattr(model, "compatibility_mode", False):
        raise PrecisionSpecError(
            f"precision {what} rounds the inputs of linear layers, and this model's norm weights are folded into them "
            f"(normalization_type {model.cfg.normalization_type}), so that its inputs are not what a kernel rounds; load "
            "the model without weight processing, as tracelens.load does"
        )


def linear_inputs(model: Any) -> Iterator[Place]:
    """What enters the linear layers of a hooked model's blocks, behind the norm and its weight; the unembedding and the
    routers of experts read full precision.

    The output of the norm where there is one before the layer; the input of the attention or the MLP where norms stand
    behind them (OLMo 2).
    """
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    cfg = model.cfg
    after = cfg.original_architecture in POST_NORM_ARCHITECTURES
    # Shortformer adds positions between the norm and the projections.
    bare = after or cfg.positional_embedding_type == "shortformer"
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        yield Place(f"{name}.attn", block.attn, "input") if bare else Place(f"{name}.ln1", block.ln1)
        # All heads together are one input of W_O.
        yield Place(f"{name}.attn.hook_z", block.attn.hook_z, width=cfg.n_heads * cfg.d_head)
        mlp = getattr(block, "mlp", None)
        if mlp is None:
            continue
        for j, expert in enumerate(getattr(mlp, "experts", ())):
            shared = f"{name}.mlp.experts"
            yield Place(f"{shared}.{j}", expert, "input", shared=shared)
            yield Place(f"{shared}.{j}.hook_post", expert.hook_post, shared=f"{shared}.hook_post")
        if not hasattr(mlp, "experts"):
            yield Place(f"{name}.mlp", mlp, "input") if after else Place(f"{name}.ln2", block.ln2)
            yield Place(f"{name}.mlp.hook_post", mlp.hook_post)


def keys_and_values(model: Any) -> Iterator[Place]:
    """Keys as they are cached, behind norm and rotation, and values; one scale per token and key-value head.

    Raises `PrecisionSpecError` where keys are changed after the last place at which they can be reached.
    """
    cfg = model.cfg
    rotary = cfg.positional_embedding_type == "rotary"
    if not rotary and (cfg.use_qk_norm or cfg.clip_qkv is not None):
        raise PrecisionSpecError(
            "the keys of this model are normalised or clipped behind its last hook point for them, and not rotated: "
            "a rounded key-value cache cannot be simulated on it; leave +kv out"
        )
    for i, block in enumerate(model.blocks):
        key = "hook_rot_k" if rotary else "hook_k"
        yield Place(f"blocks.{i}.attn.{key}", getattr(block.attn, key))
        yield Place(f"blocks.{i}.attn.hook_v", block.attn.hook_v, clip=cfg.clip_qkv)


_STORED = (
    *(
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "ln1",
        "ln2",
        "attn",
        "mlp",
        "hook_attn_out",
        "hook_mlp_out",
    ),
    *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.q_norm", "attn.k_norm", "attn.hook_rot_q", "attn.hook_rot_k"),
    *("attn.hook_z", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"),
)


def stored_tensors(model: Any) -> Iterator[Place]:
    """All that a half-precision kernel stores: inputs and outputs of linear layers, norms and the residual stream.
    Attention scores and weights, which a fused kernel keeps to itself, and logits are not among them."""
    for i, block in enumerate(model.blocks):
        modules = dict(block.named_modules())
        for name in _STORED:
            if modules.get(name) is not None:
                yield Place(f"blocks.{i}.{name}", modules[name])
        for name, module in modules.items():
            if name.startswith("mlp.experts.") and name.endswith((".hook_gate", ".hook_pre", ".hook_post")):
                yield Place(f"blocks.{i}.{name}", module)
    if hasattr(model, "ln_final"):
        yield Place("ln_final", model.ln_final)
