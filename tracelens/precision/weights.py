"""The weight matrices of a hooked model's linear layers, as a quantizer sees them."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tracelens.errors import PrecisionSpecError

# TransformerLens parameter name → (axes of the output channel, axes of the input), in the order of nn.Linear's flat
# axes.
_AXES = {
    "W_Q": ((0, 2), (1,)),
    "W_K": ((0, 2), (1,)),
    "W_V": ((0, 2), (1,)),
    "_W_K": ((0, 2), (1,)),
    "_W_V": ((0, 2), (1,)),
    "W_O": ((2,), (0, 1)),
    "W_in": ((1,), (0,)),
    "W_gate": ((1,), (0,)),
    "W_out": ((1,), (0,)),
}
# Experts are modules of `nn.Linear`, which holds the matrix as it is. What chooses among them is left alone, as quantizers do.
_EXPERT = r"blocks\.\d+\.mlp\.experts\.\d+\.W_(in|gate|out)\.weight"
_ROUTER = r"blocks\.\d+\.mlp\.W_gate\.weight"


@dataclass(frozen=True)
class WeightMatrix:
    """One linear layer's weight: its parameter, and how the parameter's axes make the matrix (out, in) of
    `nn.Linear`.
    """

    name: str
    parameter: Tensor
    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...]

    @property
    def matrix(self) -> Float[Tensor, "out in"]:
        """The weight as `nn.Linear` holds it: heads folded into the output of Q, K, V and into the input of O."""
        shape = self.parameter.shape
        return self.parameter.permute(*self.out_axes, *self.in_axes).reshape(
            math.prod(shape[axis] for axis in self.out_axes), math.prod(shape[axis] for axis in self.in_axes)
        )

    def restore(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "..."]:
        """`matrix` in the layout of the parameter: the inverse of `.matrix`."""
        axes = self.out_axes + self.in_axes
        order = sorted(range(len(axes)), key=axes.__getitem__)
        return matrix.reshape([self.parameter.shape[axis] for axis in axes]).permute(order).contiguous()


def weight_matrices(model: Any) -> Iterator[WeightMatrix]:
    """The weights of the linear layers inside the blocks: embeddings, unembedding, norms, biases and the routers of experts
    are not among them.

    Raises `PrecisionSpecError` for a matrix inside a block that it does not know, rather than leaving it in full
    precision.
    """
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        inside = re.match(r"blocks\.\d+\.", name)
        if inside and last in _AXES and parameter.ndim == sum(map(len, _AXES[last])):
            yield WeightMatrix(name, parameter, *_AXES[last])
        elif re.fullmatch(_EXPERT, name):
            yield WeightMatrix(name, parameter, (0,), (1,))
        elif re.fullmatch(_ROUTER, name):
            continue
        elif parameter.ndim >= 2 and not re.fullmatch(r"_?b_\w+|W_E|W_U|W_pos", last):
            raise PrecisionSpecError(
                f"cannot tell the input axes of {name}, shape {tuple(parameter.shape)}: precisions are simulated on "
                "models with "
                f"TransformerLens parameter names ({', '.join(_AXES)}); load the model with wrapper='hooked'"
            )
