"""Where a hooked parameter lies on disk: the tensor, the part of it, and the order of its axes, as data."""

import math
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Axes = Mapping[str, int | slice]
"""Sizes of named axes, and which part of `heads` or `pos` each name stands for."""


class Source(NamedTuple):
    """Where a hooked parameter comes from.

    Axes are named as in einops: `head` (of queries), `kv` (heads of keys and values), `d_head`, `d_model`, `d_mlp`,
    `vocab`, `expert`, `qkv` (3), `two` (gate and up), `heads` (queries', keys' and values' in a row), `pos` (rows of a
    table of positions) and `one`.
    """

    name: str
    """Tensor in the plain model; `{layer}` and `{expert}` stand for numbers."""
    disk: str
    """Its axes there."""
    hooked: str
    """The axes of the hooked parameter."""
    take: tuple[tuple[str, int | str], ...] = ()
    """What of an axis is taken: an index, which drops the axis, or the name of a slice among the `Axes`."""
    shift: float = 0.0
    """Added to every value, in float32."""
    root_of: str | None = None
    """Axis by the square root of whose size values are multiplied, in the model's dtype."""

    def at(self, **numbers: int) -> "Source":
        """This source with `{layer}` and `{expert}` filled in."""
        take = tuple((axis, part.format(**numbers) if isinstance(part, str) else part) for axis, part in self.take)
        return self._replace(name=self.name.format(**numbers), take=take)

    def disk_shape(self, axes: Axes) -> tuple[int, ...]:
        """Shape that the tensor must have on disk."""
        groups = re.findall(r"\([^)]*\)|\S+", self.disk)
        return tuple(math.prod(_size(axes, axis) for axis in group.strip("()").split()) for group in groups)

    def pick(self, tensor: Tensor, axes: Axes) -> Tensor:
        """The hooked parameter's values: a view of `tensor`, unless they are shifted or scaled."""
        from einops import rearrange

        split = self.disk.replace("(", "").replace(")", "").split()
        sizes = {axis: _size(axes, axis) for axis in split}
        parts = {axis: axes.get(str(part)) or int(part) for axis, part in self.take}
        whole = rearrange(tensor, f"{self.disk} -> {' '.join(split)}", **sizes)
        taken = whole[tuple(parts.get(axis, slice(None)) for axis in split)]
        left = [axis for axis in split if not isinstance(parts.get(axis), int)]
        if left != self.hooked.split():
            taken = rearrange(taken, f"{' '.join(left)} -> {self.hooked}")
        if self.shift:
            taken = taken.float() + self.shift
        if self.root_of:
            taken = taken * torch.tensor(_size(axes, self.root_of) ** 0.5, dtype=taken.dtype, device=taken.device)
        return taken


def _size(axes: Axes, axis: str) -> int:
    size = axes[axis]
    assert isinstance(size, int), axis
    return size


Sources = dict[str, Source]
"""Hooked parameter -> its source; `{layer}` and `{expert}` stand for numbers."""


def same(name: str, axis: str = "d_model") -> Source:
    return Source(name, axis, axis)


def linear(name: str, d_in: str = "d_model", d_out: str = "d_mlp") -> Source:
    """The weight of an `nn.Linear`, which the hooked model keeps as (in, out)."""
    return Source(name, f"{d_out} {d_in}", f"{d_in} {d_out}")


def attention(module: str, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj", o: str = "o_proj") -> Sources:
    """Weights of attention with a projection each."""
    into = {"Q": (q, "head"), "K": (k, "kv"), "V": (v, "kv")}
    return {
        f"attn.W_{x}": Source(f"{module}.{name}.weight", f"({heads} d_head) d_model", f"{heads} d_model d_head")
        for x, (name, heads) in into.items()
    } | {"attn.W_O": Source(f"{module}.{o}.weight", "d_model (head d_head)", "head d_head d_model")}


def qkv_bias(module: str, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj") -> Sources:
    """Biases of attention with a projection each, but the output's."""
    into = {"Q": (q, "head"), "K": (k, "kv"), "V": (v, "kv")}
    return {
        f"attn.b_{x}": Source(f"{module}.{name}.bias", f"({heads} d_head)", f"{heads} d_head")
        for x, (name, heads) in into.items()
    }


def fused_qkv(module: str, weight: str, bias: str) -> Sources:
    """One weight and one bias for queries, keys and values with as many heads each, of these axes on disk."""
    return {
        f"attn.{letter}_{x}": Source(f"{module}.{kind}", disk, hooked, (("qkv", i),))
        for letter, kind, disk, hooked in (
            ("W", "weight", weight, "head d_model d_head"),
            ("b", "bias", bias, "head d_head"),
        )
        for i, x in enumerate("QKV")
    }


def heads_in_a_row(module: str, kind: Literal["weight", "bias"]) -> Sources:
    """One tensor with the heads of queries, then those of keys, then those of values."""
    letter, tail = ("W", " d_model") if kind == "weight" else ("b", "")
    return {
        f"attn.{letter}_{x}": Source(
            f"{module}.{kind}", f"(heads d_head){tail}", f"heads{tail} d_head", (("heads", part),)
        )
        for x, part in {"Q": "queries", "K": "keys", "V": "values"}.items()
    }


def layer_norm(hooked: str, name: str) -> Sources:
    """Weight and bias of a LayerNorm."""
    return {f"{hooked}.w": same(f"{name}.weight"), f"{hooked}.b": same(f"{name}.bias")}


def in_blocks(prefix: str, sources: Sources) -> dict[str, Source]:
    """Sources inside a block, and inside what `prefix` says on disk, as those of the whole model."""
    return {f"blocks.{{layer}}.{name}": s._replace(name=prefix + s.name) for name, s in sources.items()}
