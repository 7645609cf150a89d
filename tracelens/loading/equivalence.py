"""What each weight of a quantized checkpoint should be, given its reference, where quantizers move factors between
weights without changing what the model computes.

AWQ and SmoothQuant divide a norm by s and multiply the columns of what reads it; AWQ also divides the rows of one weight
and multiplies the columns of the next. SpinQuant folds norms into what reads them and rotates the residual stream and
the values of each head. Only a change with its counterpart is followed: one without it stays a difference.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracelens.errors import TracelensError
from tracelens.loading.checkpoint import Checkpoint

Weight = Float[Tensor, "d_out d_in"]
Factors = Float[Tensor, " d"]

PAIRS = (
    *(("v_proj", "o_proj"), ("up_proj", "down_proj"), ("w3", "w2")),
    *(("dense_h_to_4h", "dense_4h_to_h"), ("c_fc", "c_proj"), ("fc1", "fc2")),
)
"""Modules of one parent that a factor can move between, from the outputs of one to the inputs of the other. In the
second line an activation stands between them, through which it moves unchanged (ReLU) or nearly so (GPTQModel's AWQ)."""
SAME_GAIN = 0.01
"""Relative difference of two norms below which they are one norm, rounded."""
SPREAD = 0.02
"""Least standard deviation of the logarithms of factors worth following."""
COUNTERPART = 0.3
"""Largest share of that which may be left when factors and their counterparts are multiplied."""
CLEARLY = 0.85
"""An error this many times another's is clearly smaller."""
ESTIMATE = 0.2
"""Largest error of the logarithm of a factor that is estimated from quantized weights."""
ANOTHER_BASIS = 0.9
"""Cosine of the embeddings below which the residual stream may be rotated."""
ROTATED = 0.3
"""Relative error of the embedding that a rotation may leave: that of 4-bit rounding."""


@dataclass(frozen=True)
class Wiring:
    """What a transformers model shows of its structure when it runs."""

    readers: Mapping[str, str]
    """Weight of a linear module -> weight of the norm whose output is its input."""
    gains: Mapping[str, Factors]
    """Weight of a norm -> its factor on each coordinate, whichever way the architecture stores it."""
    embedding: str
    """Weight of the token embedding."""


def wiring(model: Any, ids: Int[Tensor, "batch pos"]) -> Wiring:
    """The wiring of a plain model, from one forward pass on a few tokens."""
    seen = _Seen()
    handles = [
        module.register_forward_hook(partial(seen.see, name))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    ]
    try:
        with torch.inference_mode():
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return Wiring(seen.readers, {norm: _gain(module) for norm, module in seen.norms.items()}, f"{name}.weight")


class _Seen:
    """What modules were given and gave back in a forward pass."""

    def __init__(self) -> None:
        self.readers: dict[str, str] = {}
        self.norms: dict[str, Any] = {}
        self._outputs: dict[tuple[int, int], str] = {}
        self._kept: list[Tensor] = []

    def see(self, name: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook, once it knows the module's name."""
        given = args[0] if args and isinstance(args[0], Tensor) else None
        if given is None or not isinstance(output, Tensor):
            return
        axes = module.weight.ndim
        if axes == 1 and given.shape == output.shape and given.shape[-1] == len(module.weight):
            self.norms[f"{name}.weight"] = module
            # The memory must not be used again, or another tensor would pass for this one.
            self._kept.append(output)
            self._outputs[output.data_ptr(), output.numel()] = f"{name}.weight"
        elif axes == 2 and (source := self._outputs.get((given.data_ptr(), given.numel()))):
            self.readers[f"{name}.weight"] = source


def _gain(norm: Any) -> Factors:
    """A norm's factor on each coordinate, seen on ±1, which has mean 0 and mean square 1."""
    size = len(norm.weight)
    ones = torch.ones(size, dtype=norm.weight.dtype, device=norm.weight.device)
    ones[1::2] = -1
    with torch.inference_mode():
        # What is added does not change its sign with the input.
        return ((norm(ones[None]) - norm(-ones[None]))[0] / 2 * ones).float().cpu()


@dataclass
class Expectation:
    """Weights of the reference as the quantized checkpoint should hold them.

    Raises nothing: where no equivalence is found, the reference's own weight is what is expected.
    """

    reference: Checkpoint
    found: Checkpoint
    before: Wiring
    after: Wiring
    device: torch.device | str = "cpu"
    notes: list[str] = field(default_factory=list)
    """What was found to be moved, in words."""

    def __post_init__(self) -> None:
        self._folded = {name for name in self.before.gains if self._changed(name)}
        read = set(self.before.readers.values())
        # A norm that nothing we know of reads has no counterpart to be compared in.
        self._folded &= read
        self._factors: dict[str, Factors] = {}
        self._columns: dict[str, Factors] = {}
        self._head: dict[str, tuple[Weight, int]] = {}
        self._centred = False
        self._rotation = self._residual_rotation()
        if self._folded:
            self.notes.append(f"{len(self._folded)} norms are rescaled and compared with what reads them")
        if self._rotation is not None:
            centred = ", after its mean was taken from each embedding," if self._centred else ""
            self.notes.append(f"the residual stream is rotated{centred} and compared in the quantized model's basis")
        names = set(self.reference.names())
        moved = sum(
            self._follow(name, name.replace(f".{first}.", f".{second}."))
            for name in self.found.names()
            for first, second in PAIRS
            if name.endswith(f".{first}.weight")
            and name.replace(f".{first}.", f".{second}.") in names
            and name in names
        )
        if moved:
            self.notes.append(f"factors moved between the rows and the columns of {moved} pairs of weights")

    def linear(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """A weight of a checkpoint as (out, in), whichever way its model keeps it; other tensors as they are."""
        return turned(checkpoint, name, checkpoint.weight(name, device=self.device))

    def compared_elsewhere(self, name: str) -> bool:
        """Whether a norm has new factors, which show in the weights that read it."""
        return name in self._folded

    def moved(self, name: str) -> bool:
        """Whether factors were moved between this weight and another, estimated from what rounding left of both."""
        return name in self._factors or name in self._columns

    def of(self, name: str) -> Tensor:
        """What a tensor should be, (out, in) if it is a matrix."""
        tensor = self.linear(self.reference, name)
        tensor = self._rotate(name, self._fold(name, tensor))
        if name in self._head:
            rotation, axis = self._head[name]
            tensor = _each_head(tensor, rotation, axis)
        if name in self._factors:
            tensor = tensor * (self._factors[name][:, None] if tensor.ndim == 2 else self._factors[name])
        return tensor * self._columns[name] if name in self._columns else tensor

    def unmatched(self, name: str, found: Tensor, wanted: Tensor) -> str:
        """The norm with new factors whose inverses this weight, which reads it, does not have; empty if it has them."""
        norm = self.before.readers.get(name, "")
        if norm not in self._folded or self._rotation is not None or found.shape != wanted.shape:
            return ""
        unfolded = self.linear(self.reference, name)
        return norm if float((found - unfolded).norm()) < CLEARLY * float((found - wanted).norm()) else ""

    def resembles(self, name: str, found: Tensor) -> str:
        """Another weight of the reference that this one is much like; empty if there is none."""
        for other in self.reference.names():
            if other != name and self.reference.shape(other) == self.reference.shape(name):
                wanted = self.linear(self.reference, other)
                if float((found * wanted).sum()) > 0.7 * float(found.norm() * wanted.norm()):
                    return other
        return ""

    def _changed(self, norm: str) -> bool:
        a, b = self.before.gains[norm], self.after.gains.get(norm)
        return b is not None and a.shape == b.shape and bool(((a - b).abs() > SAME_GAIN * a.abs().mean()).any())

    def _quotient(self, norm: str) -> Factors:
        """Reference's over quantized's factors."""
        a, b = (gains[norm].to(self.device) for gains in (self.before.gains, self.after.gains))
        return torch.where(b != 0, a / torch.where(b != 0, b, 1.0), 1.0)

    def _fold(self, name: str, tensor: Tensor) -> Tensor:
        norm = self.before.readers.get(name)
        if norm in self._folded and tensor.ndim == 2 and self._rotation is None:
            return tensor * self._quotient(norm)
        # The bias of a norm takes the factors of its weight.
        if name.endswith(".bias") and (norm := name.removesuffix("bias") + "weight") in self._folded:
            return tensor / self._quotient(norm)
        return tensor

    def _residual_rotation(self) -> Weight | None:
        name = self.before.embedding
        if name not in self.reference.names() or name not in self.found.names():
            return None
        try:
            a, b = (checkpoint.weight(name, device=self.device) for checkpoint in (self.reference, self.found))
        except TracelensError:
            return None
        if a.shape != b.shape or float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30)) > ANOTHER_BASIS:
            return None
        candidates = []
        for start in (a, _centre(a)):
            rotation = _procrustes(start, b)
            candidates.append((float((start @ rotation - b).norm() / a.norm()), rotation))
        # llm-compressor takes the mean from each embedding before it rotates, RMS norm or not.
        self._centred = candidates[1][0] < candidates[0][0] / 2
        error, rotation = candidates[self._centred]
        if error >= ROTATED:
            return None
        return self._oriented(rotation) if self._centred else rotation

    def _oriented(self, rotation: Weight) -> Weight:
        """A rotation that was found from centred rows, which leave the sign of one direction open: that with which the
        weights that read the residual stream agree better."""
        mirrored = rotation - 2 * rotation.mean(0)
        self._rotation, errors = None, []
        name = next(iter(self.before.readers), "")
        if name not in self.reference or name not in self.found:
            return rotation
        found = self.linear(self.found, name)
        for candidate in (rotation, mirrored):
            self._rotation = candidate
            errors.append(float((self._rotate(name, self.linear(self.reference, name)) - found).norm()))
        return rotation if errors[0] <= errors[1] else mirrored

    def _rotate(self, name: str, tensor: Tensor) -> Tensor:
        rotation = self._rotation
        if rotation is None:
            return tensor
        size = len(rotation)
        if name == self.before.embedding:
            return (_centre(tensor) if self._centred else tensor) @ rotation
        if tensor.ndim == 2 and (norm := self.before.readers.get(name)):
            before, after = (wiring.gains[norm].to(self.device) for wiring in (self.before, self.after))
            return (tensor * before) @ rotation / torch.where(after != 0, after, 1.0)
        if tensor.ndim == 2 and tensor.shape[0] == size and name not in self.before.readers:
            return rotation.T @ tensor
        writes = name.removesuffix("bias") + "weight"
        if (
            tensor.ndim == 1
            and writes not in self.before.readers
            and writes not in self.before.gains
            and len(tensor) == size
        ):
            return tensor @ rotation if name.endswith(".bias") else tensor
        return tensor

    def _follow(self, first: str, second: str) -> bool:
        """Whether factors or rotations moved from the rows of one weight to the columns of another."""
        try:
            a, b = ((self.of(name), self.linear(self.found, name)) for name in (first, second))
        except TracelensError:
            # Who compares the tensor says why it cannot be read.
            return False
        if a[0].shape != a[1].shape or b[0].shape != b[1].shape or b[0].shape[1] % a[0].shape[0]:
            return False
        if self._rotation is not None and ".v_proj." in first and (head := self._head_size()):
            wanted, found = (w.unflatten(0, (-1, head)).transpose(0, 1).flatten(1) for w in a)
            rotation = _procrustes(wanted.T, found.T)
            self._head[first], self._head[second] = (rotation, 0), (rotation, 1)
            return False
        shared = b[0].shape[1] // a[0].shape[0]
        head = self._head_size() if shared > 1 else a[0].shape[0]
        if not head or a[0].shape[0] % head:
            return False
        rows, columns = _ratio(a[1], a[0], 1), _ratio(b[1], b[0], 0)
        if bool((rows <= 0).any() | (columns <= 0).any()):
            return False
        rows, columns = rows.log(), columns.log()
        # Heads that share their values stand one after the other.
        grouped = columns.view(-1, shared, head).mean(1).flatten()
        wide = rows.view(-1, 1, head).expand(-1, shared, -1).flatten()
        if float(rows.std()) < SPREAD or float((wide + columns).std()) > COUNTERPART * float(rows.std()):
            return False
        factors = self._exact((first.removesuffix("weight") + "bias"), ((rows - grouped) / 2).exp())
        self._factors[first] = factors
        self._columns[second] = 1 / factors.view(-1, 1, head).expand(-1, shared, -1).flatten()
        return True

    def _exact(self, bias: str, factors: Factors) -> Factors:
        """Factors as a bias that is not quantized has them, where it has one; those of quantized weights are estimates."""
        if bias not in self.reference or bias not in self.found:
            return factors
        before, after = (checkpoint.weight(bias, device=self.device) for checkpoint in (self.reference, self.found))
        exact = after / torch.where(before != 0, before, 1.0)
        known = (before != 0) & ((exact / factors).log().abs() < ESTIMATE)
        self._factors[bias] = factors = torch.where(known, exact, factors)
        return factors

    def _head_size(self) -> int | None:
        config = self.reference.config
        if size := config.get("head_dim"):
            return size
        width, heads = config.get("hidden_size"), config.get("num_attention_heads")
        return width // heads if width and heads else None


def turned(checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    """A tensor with outputs before inputs, if its model keeps it the other way round, or back; others as they are."""
    conv1d = tensor.ndim == 2 and checkpoint.stored.transposed(name.rpartition(".")[0])
    experts = tensor.ndim == 3 and checkpoint.config.get("model_type") == "gpt_oss"
    return tensor.mT if conv1d or experts else tensor


def _procrustes(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """The orthogonal matrix R for which a·R is closest to b."""
    left, _, right = torch.linalg.svd(a.T @ b)
    return left @ right


def _centre(rows: Weight) -> Weight:
    return rows - rows.mean(1, keepdim=True)


def _each_head(tensor: Tensor, rotation: Weight, axis: int) -> Tensor:
    """A rotation of the coordinates of each head, along the rows or along the columns."""
    size = len(rotation)
    heads = tensor.movedim(axis, -1).unflatten(-1, (-1, size)) @ rotation
    return heads.flatten(-2).movedim(-1, axis)


def _ratio(found: Weight, wanted: Weight, dim: int) -> Factors:
    power = wanted.square().sum(dim)
    return torch.where(power > 0, (found * wanted).sum(dim) / power.clamp_min(1e-38), 1.0)
