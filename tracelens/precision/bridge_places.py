"""The places of `places.py` in a `TransformerBridge`, whose modules are those of transformers in a shell of hook points.

Which modules of such a model compute anything is not told by their names (a fused projection stays beside the three that
replace it), so a run over two tokens finds out.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tracelens.errors import PrecisionSpecError
from tracelens.precision.places import Place

_FUSED = ("qkv", "gate_up_proj")
"""Projections that a bridge keeps, and does not use, beside the parts that it splits them into."""


def is_bridge(model: Any) -> bool:
    return hasattr(model, "original_model") and hasattr(model, "blocks")


def bridge_linear_inputs(model: Any) -> Iterator[Place]:
    """What enters the linear layers of the blocks.

    Raises `PrecisionSpecError` for layers that are not modules of their own: the experts of transformers are one tensor.
    """
    for name, module in _in_blocks(model):
        if any(parameter.squeeze().ndim > 2 for parameter in module.parameters(recurse=False)):
            raise PrecisionSpecError(
                f"{name} holds several linear layers in one tensor, and a TransformerBridge does not show their inputs; "
                "load the model with wrapper='hooked'"
            )
    reached = _reached(model)
    for name, module in _linear_shells(model):
        if id(module) in reached:
            # The shell's own hook point, so that whoever captures there sees what the layer reads.
            yield Place(name, module.hook_in)
        elif name.rpartition(".")[2] not in _FUSED:
            raise _unreached(name)
    shells = {id(module.original_component) for _, module in _linear_shells(model)}
    for name, module in _in_blocks(model):
        if type(module).__name__ in ("Linear", "Conv1D") and id(module) not in shells and id(module) in reached:
            yield Place(name, module, "input")


def bridge_keys_and_values(model: Any) -> Iterator[Place]:
    """Keys behind their rotation, and values. Raises `PrecisionSpecError` where a bridge does not show rotated keys."""
    reached, d_head = _reached(model), model.cfg.d_head
    for i, block in enumerate(model.blocks):
        attention, name = block.attn, f"blocks.{i}.attn"
        rotated = getattr(attention, "hook_rot_k", None)
        key = attention.k.hook_out if rotated is None else rotated
        if id(key) not in reached:
            raise _unreached(f"{name}.hook_rot_k")
        yield Place(f"{name}.hook_k" if rotated is None else f"{name}.hook_rot_k", key, width=d_head)
        yield Place(f"{name}.hook_v", attention.v.hook_out, width=d_head)


def bridge_stored_tensors(model: Any) -> Iterator[Place]:
    """What every component takes and gives. Where a block adds up its residual stream between attention and MLP there is
    no hook point: the sum is rounded where it is read and at the end of the block."""
    reached = _reached(model)
    for name, module in model.named_modules():
        shown = name.endswith((".hook_in", ".hook_out", ".hook_rot_q", ".hook_rot_k"))
        if shown and (name.startswith("blocks.") or name.startswith("ln_final.")) and id(module) in reached:
            yield Place(name, module)


def _in_blocks(model: Any) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name.startswith("blocks."))


def _linear_shells(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in _in_blocks(model):
        inner = getattr(module, "original_component", None)
        if type(inner).__name__ in ("Linear", "Conv1D") and hasattr(module, "hook_in"):
            yield name, module


def _reached(model: Any) -> set[int]:
    """Ids of the modules that take part in a forward pass and give a floating-point tensor."""
    found: set[int] = set()

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            found.add(id(module))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device)
            model(ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _unreached(name: str) -> PrecisionSpecError:
    return PrecisionSpecError(
        f"a forward pass of this TransformerBridge does not go through {name}, so nothing can be rounded there; load the "
        "model with wrapper='hooked'"
    )
