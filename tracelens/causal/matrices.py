"""The weight matrices in which the two models of a pair differ, and runs of the quantized model with some put back."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracelens.errors import PairMismatchError, UnknownNameError
from tracelens.precision.weights import weight_matrices

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Matrix:
    """One linear layer's weight in both models.

    Attributes:
        name: of the parameter, the same in both models; a bridge's as transformers calls it.
        layer: the block it lies in.
        shape: (out, in), as `nn.Linear` holds it.
        reference, quantized: the parameters themselves, in the layout of the model.
        out_axes, in_axes: how the parameter's axes make the matrix.
    """

    name: str
    layer: int
    shape: tuple[int, int]
    reference: Tensor = field(repr=False)
    quantized: Tensor = field(repr=False)
    out_axes: tuple[int, ...] = (0,)
    in_axes: tuple[int, ...] = (1,)

    @property
    def n_weights(self) -> int:
        return self.reference.numel()

    def flat(self, parameter: Float[Tensor, "..."]) -> Float[Tensor, "out in"]:
        """A tensor of the parameter's layout as the matrix (out, in)."""
        return parameter.permute(*self.out_axes, *self.in_axes).reshape(self.shape)

    def unflat(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "..."]:
        """The inverse of `flat`."""
        axes = self.out_axes + self.in_axes
        shape = self.reference.shape
        return (
            matrix.reshape([shape[a] for a in axes])
            .permute(sorted(range(len(axes)), key=axes.__getitem__))
            .contiguous()
        )

    @property
    def error(self) -> Float[Tensor, "out in"]:
        """Quantized − reference, float32."""
        return self.flat(self.quantized.detach().float() - self.reference.detach().float())


@dataclass(frozen=True)
class Part:
    """A matrix, or some of its rows (output channels), to put back."""

    matrix: Matrix
    rows: Int[Tensor, "row"] | None = None


def matrices(reference: Any, quantized: Any) -> list[Matrix]:
    """Every weight matrix inside the blocks, in the models' order; those that quantization left alone too.

    Raises `PairMismatchError` if the models do not have the same ones.
    """
    ours, theirs = _found(reference), _found(quantized)
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise PairMismatchError(
            f"the models do not have the same weight matrices: {', '.join(odd[:4])} are in one only; load both with the same wrapper"
        )
    return [
        Matrix(name, int(_LAYER.findall(name)[0]), _shape(parameter, out, in_), parameter, theirs[name][0], out, in_)
        for name, (parameter, out, in_) in ours.items()
    ]


@contextmanager
def restored(parts: Iterable[Part]) -> Iterator[None]:
    """Within it the quantized model holds the reference's weights in these parts; afterwards its own again.

    Hooks, and with them the rounding of activations, stay as they are. A parameter that both models share is left alone.
    """
    undo: list[tuple[Tensor, Tensor]] = []
    try:
        for part in parts:
            ours, theirs = part.matrix.reference, part.matrix.quantized
            if ours is theirs or ours.data_ptr() == theirs.data_ptr():
                continue
            if part.rows is None:
                new = ours.detach().to(theirs)
            else:
                flat = part.matrix.flat(theirs.data).clone()
                flat[part.rows] = part.matrix.flat(ours.detach())[part.rows].to(flat)
                new = part.matrix.unflat(flat)
            undo.append((theirs, theirs.data))
            theirs.data = new
        yield
    finally:
        for parameter, own in reversed(undo):
            parameter.data = own


def choose(found: Iterable[Matrix], names: Iterable[str]) -> list[Matrix]:
    """Matrices by name, in the order of `names`; raises `UnknownNameError` for one that does not exist."""
    by_name = {matrix.name: matrix for matrix in found}
    for name in (names := list(names)):
        if name not in by_name:
            raise UnknownNameError.of("weight matrix", name, by_name)
    return [by_name[name] for name in names]


def _found(model: Any) -> dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
    if any(name.startswith("blocks.") for name, _ in model.named_parameters()):
        return {w.name: (w.parameter, w.out_axes, w.in_axes) for w in weight_matrices(model)}
    # A bridge's parameters have the names of transformers, whose Conv1D keeps (in, out) and whose experts lie in one tensor.
    owner = {id(p): type(m).__name__ for m in model.modules() for p in m.parameters(recurse=False)}
    named = {name.replace("._original_component", ""): parameter for name, parameter in model.named_parameters()}
    axes = {2: ((0,), (1,)), 3: ((0, 1), (2,))}
    return {
        name: (parameter, (1,), (0,)) if owner[id(parameter)] == "Conv1D" else (parameter, *axes[parameter.ndim])
        for name, parameter in named.items()
        if parameter.ndim in axes
        and _LAYER.search(name)
        and not _idle(name, named)
        and "Router" not in owner[id(parameter)]
    }


def _idle(name: str, named: Mapping[str, Tensor]) -> bool:
    """Whether a bridge only keeps this weight: it runs on the parts into which it has split it."""
    joint = {".qkv.weight": ".q.weight", ".gate_up_proj.weight": ".gate.weight"}
    return any(name.endswith(whole) and name.removesuffix(whole) + part in named for whole, part in joint.items())


def _shape(parameter: Tensor, out: tuple[int, ...], in_: tuple[int, ...]) -> tuple[int, int]:
    sizes = [torch.tensor([parameter.shape[a] for a in axes]).prod().item() for axes in (out, in_)]
    return int(sizes[0]), int(sizes[1])
