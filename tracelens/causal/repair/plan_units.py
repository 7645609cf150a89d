"""What can be kept in 16 bit or not: linear layers as quantizers know them, what each costs, and how much of it is error."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tracelens.causal.matrices import Matrix
from tracelens.causal.repair.module_names import modules_of
from tracelens.errors import PlanError, UnknownNameError

Granularity = Literal["module", "fused", "layer"]
GRANULARITIES = ("module", "fused", "layer")
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_EXPERTS = re.compile(r"(.*\.experts)\.")
UNKNOWN_SIZE = (
    "2 bytes for each weight: what its quantized form takes is not known (give bits=, or quantized_checkpoint=)"
)


@dataclass(frozen=True)
class Unit:
    """Linear layers that are kept or quantized together.

    Attributes:
        name: of its module; of several, what they share and then their last parts.
        modules: of transformers.
        matrices: the parameters of the loaded model.
        layer: the block.
        kind: the module's name within the block.
        n_weights: in all of them.
        bytes: that keeping them in 16 bit adds to the quantized build.
        error: ‖W_quantized − W_reference‖_F.
        relative_error: that over ‖W_reference‖_F.
        gain: predicted recovery on the choosing prompts if it alone is restored; NaN if nothing was predicted.
    """

    name: str
    modules: tuple[str, ...]
    matrices: tuple[str, ...]
    layer: int
    kind: str
    n_weights: int
    bytes: int
    error: float
    relative_error: float
    gain: float = math.nan


@dataclass(frozen=True)
class Sizes:
    """What quantized weights take."""

    bits: float | None = None
    """Of a weight, scales included."""
    checkpoint: Any = None
    """The quantized `Checkpoint`, which knows it of each tensor."""

    @property
    def basis(self) -> str:
        """How bytes are counted, in words."""
        if self.checkpoint is not None:
            return f"2 bytes for each weight, less what {self.checkpoint.name} stores of it"
        if self.bits is not None:
            return f"16 − {self.bits:g} bits for each weight, scales included"
        return UNKNOWN_SIZE

    def extra(self, module: str, n_weights: int) -> int:
        """Bytes that keeping a module in 16 bit adds."""
        if self.checkpoint is not None:
            return max(0, 2 * n_weights - self._stored(module))
        return math.ceil(n_weights * (16 - (self.bits or 0.0)) / 8)

    def _stored(self, module: str) -> int:
        known = self.checkpoint
        name = f"{module}.weight" if f"{module}.weight" in known else module
        return sum(known.stored.files.nbytes(part) for part in known.parts(name))


def sizes_of(pair: Any, bits: float | None, checkpoint: Any) -> Sizes:
    """What the quantized model's weights take: as given, by its checkpoint, or by the precision that it simulates.

    Raises `PlanError` for weights that take 16 bits or more already.
    """
    if checkpoint is not None:
        from tracelens.loading import open_checkpoint

        return Sizes(checkpoint=open_checkpoint(checkpoint))
    precision = getattr(pair.quantized, "precision", None)
    if bits is None and precision is not None:
        bits = precision.bits_per_weight
    if bits is not None and not 0 < bits < 16:
        raise PlanError(
            f"the quantized model takes {bits:g} bits a weight; there is something to keep in 16 bit from above 0 to below 16"
        )
    return Sizes(None if bits is None else float(bits))


def units_of(
    found: Sequence[Matrix], architecture: str, granularity: str, sizes: Sizes
) -> tuple[list[Unit], dict[str, Matrix]]:
    """All units in which the two models differ, in the models' order, and their matrices by name.

    Layers that one module holds (`qkv_proj`) are one unit whatever the granularity, and their bytes are those of all of it.
    """
    if granularity not in GRANULARITIES:
        raise UnknownNameError.of("granularity", granularity, GRANULARITIES)
    by_name = {matrix.name: matrix for matrix in found}
    # A model that does not say what it is can be planned for, and not exported.
    modules = modules_of(by_name, architecture) if architecture else {name: name for name in by_name}
    groups: dict[str, list[str]] = defaultdict(list)
    for name, module in modules.items():
        groups[_group(module, by_name[name].layer, granularity)].append(name)
    units = [_unit(names, modules, by_name, sizes) for names in groups.values()]
    return [unit for unit in units if unit.error > 0], by_name


def _group(module: str, layer: int, granularity: str) -> str:
    if granularity == "layer":
        return str(layer)
    if granularity == "fused":
        if experts := _EXPERTS.match(module):
            return experts[1]
        prefix, _, last = module.rpartition(".")
        for together in _TOGETHER:
            if last in together:
                return f"{prefix}.{together[0]}"
    return module


def _unit(names: Sequence[str], modules: dict[str, str], by_name: dict[str, Matrix], sizes: Sizes) -> Unit:
    held = tuple(dict.fromkeys(modules[name] for name in names))
    count = {module: sum(by_name[n].n_weights for n in names if modules[n] == module) for module in held}
    squares = [
        (float(m.error.square().sum()), float(m.reference.detach().float().square().sum()))
        for m in map(by_name.__getitem__, names)
    ]
    error, size = (math.sqrt(sum(column)) for column in zip(*squares, strict=True))
    layer = by_name[names[0]].layer
    return Unit(
        name=_joined(held),
        modules=held,
        matrices=tuple(names),
        layer=layer,
        kind=_kind(held, layer),
        n_weights=sum(count.values()),
        bytes=sum(sizes.extra(module, n) for module, n in count.items()),
        error=error,
        relative_error=error / size if size else math.nan,
    )


def _joined(modules: Sequence[str]) -> str:
    """`a.q_proj`, `a.k_proj` → `a.q_proj+k_proj`."""
    first = modules[0]
    prefixes = {module.rpartition(".")[0] for module in modules}
    if len(modules) == 1:
        return first
    if len(prefixes) == 1:
        return f"{prefixes.pop()}.{'+'.join(module.rpartition('.')[2] for module in modules)}"
    return f"{first} and {len(modules) - 1} more"


def _kind(modules: Sequence[str], layer: int) -> str:
    """Where in the block it is: the same for all layers."""
    inside = [module.partition(f".{layer}.")[2] or module for module in modules]
    if len(inside) == 1 or len({name.rpartition(".")[0] for name in inside}) == 1:
        return _joined(inside)
    experts = {_EXPERTS.match(f"{name}.") for name in inside}
    return "experts" if all(experts) else "whole layer"
