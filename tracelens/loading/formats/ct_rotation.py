"""compressed-tensors `transform_config`: rotations that act at run time are folded into the weights beside them.

A module with a transform T of its input computes (x T) Wᵀ, so that its effective weight is W Tᵀ; with a transform U
of its output it computes (x Wᵀ + b) U: weight Uᵀ W and bias b U (QuIP, SpinQuant R4). What acts on weights only is in
them already. Source: compressed-tensors 0.19, `transform/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Quantized, Read, Scheme, Stored
from tracelens.loading.formats.ct_schemes import is_embedding, matches

Side = Literal["input", "output"]
OFFLINE = ("weight_input", "weight_output")
"""Places where a transform is already in the weights."""
HADAMARDS = ("hadamard", "random-hadamard")
"""Types of transforms whose stored entries are ±1, to be divided by the square root of their size."""
ROWS = 1024
"""Rows of a weight that are rotated together, in float64."""
ROUTERS = ("gate", "router")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rotation:
    """A transform at one side of one module."""

    name: str
    """Key of its config group: `R4`, `u`, ..."""
    matrix: str
    """Stored name of the matrix, perhaps of another module that shares it."""
    permutation: str | None
    size: int
    """Rows of the matrix; where the module is wider it acts on blocks of so many."""
    hadamard: bool
    inverse: bool

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.matrix, *([self.permutation] if self.permutation else []))

    def read(self, read: Read, path: object) -> Tensor:
        """The matrix that a row vector is multiplied with, in float64. Raises if it is no Hadamard matrix but should be."""
        matrix = read(self.matrix).double()
        if not self.hadamard:
            return matrix
        if not bool((matrix.abs() == 1).all()) or not _orthogonal(matrix):
            raise CheckpointError(
                f"{self.matrix} in {path} is no Hadamard matrix, which {self.name} is to be; get it again"
            )
        if self.permutation:
            order = read(self.permutation).long()
            if not torch.equal(order.sort().values, torch.arange(self.size, device=order.device)):
                raise CheckpointError(
                    f"{self.permutation} in {path} is no permutation of {self.size}; get the checkpoint again"
                )
            matrix = matrix[order][:, order]
        return (matrix.T if self.inverse else matrix) / self.size**0.5


def fold_rotations(stored: Stored, tensors: Mapping[str, Quantized]) -> dict[str, Quantized]:
    """The tensors, with weights and biases of rotated modules replaced by effective ones.

    Raises `CheckpointError`, naming the transform, for what cannot be folded or whose matrix is missing.
    """
    folded, used = dict(tensors), set[str]()
    for module, sides in _rotated(stored, tensors).items():
        used.update(part for rotation in sides.values() for part in rotation.parts)
        weight = f"{module}.weight"
        folded[weight] = _fold_weight(stored, module, tensors.get(weight) or _plain(stored, weight), sides)
        if "output" in sides and f"{module}.bias" in stored:
            folded[f"{module}.bias"] = _fold_bias(stored, f"{module}.bias", sides["output"])
    _refuse_strays(stored, tensors, used)
    return folded


def offline_notes(stored: Stored) -> tuple[str, ...]:
    """What to know of transforms that are in the weights already."""
    inside = [
        name for name, group in _groups(stored).items() if any(entry["location"] in OFFLINE for entry in group["apply"])
    ]
    online = {
        name
        for name, group in _groups(stored).items()
        if any(entry["location"] in ("input", "output") for entry in group["apply"])
    }
    kept = [name for name in inside if name not in online]
    if not kept:
        return ()
    return (
        f"the weights hold the rotations {', '.join(kept)}: activations between them are in another basis than the original's",
    )


def _groups(stored: Stored) -> dict[str, dict[str, Any]]:
    """Name of a transform -> its scheme, with the defaults filled in."""
    config = stored.quantization.get("transform_config") or {}
    groups = config.get("config_groups") or {} if isinstance(config, Mapping) else config
    if not isinstance(groups, Mapping) or set(config) - {"config_groups"}:
        raise CheckpointError(
            f"transform_config of {stored.path} is not known: expected config_groups alone, got {sorted(config)}; "
            "load the full-precision original"
        )
    return {str(name): _scheme(stored, str(name), group) for name, group in groups.items()}


def _scheme(stored: Stored, name: str, group: Mapping[str, Any]) -> dict[str, Any]:
    entries = []
    for entry in group.get("apply") or ():
        lists = {
            key: [value] if isinstance(value := entry.get(key) or [], str) else value for key in ("targets", "ignore")
        }
        entries.append({"location": entry.get("location"), "inverse": bool(entry.get("inverse")), **lists})
    for entry in entries:
        if entry["location"] not in (*OFFLINE, "input", "output"):
            raise CheckpointError(
                f"transform {name!r} of {stored.path} acts on {entry['location']!r} (queries and keys at run time), which is in no "
                "weight and cannot be folded; load the full-precision original"
            )
    kind = group.get("type")
    if kind not in (*HADAMARDS, "random-matrix"):
        raise CheckpointError(
            f"transform {name!r} of {stored.path} is of the type {kind!r}, expected {', '.join(HADAMARDS)} or random-matrix; "
            "load the full-precision original"
        )
    if group.get("requires_grad"):
        raise CheckpointError(
            f"transform {name!r} of {stored.path} is learned (requires_grad) and its weights are stored unfused; "
            "load the full-precision original"
        )
    return {
        **{"type": kind, "apply": entries, "size": group.get("head_dim")},
        "permuted": bool(group.get("randomize") or group.get("randomize_modules")),
    }


def _rotated(stored: Stored, tensors: Mapping[str, Quantized]) -> dict[str, dict[Side, Rotation]]:
    """Module -> the transforms of its input and output."""
    rotated: dict[str, dict[Side, Rotation]] = {}
    for name, group in _groups(stored).items():
        for entry in group["apply"]:
            if entry["location"] in OFFLINE:
                continue
            targeted = [module for module in _linear(stored, tensors) if _applies(module, entry)]
            _refuse_unstored_head(stored, tensors, name, entry)
            if not targeted:
                raise CheckpointError(
                    f"transform {name!r} of {stored.path} acts on {entry['targets']}, and no module of it is stored; "
                    "load the full-precision original"
                )
            for module in targeted:
                sides = rotated.setdefault(module, {})
                if entry["location"] in sides:
                    raise CheckpointError(
                        f"two transforms, {sides[entry['location']].name!r} and {name!r}, act on the {entry['location']} of {module} "
                        f"in {stored.path}, in an order that is not written down; load the full-precision original"
                    )
                sides[entry["location"]] = _rotation(stored, tensors, name, group, entry, module)
    return rotated


def _refuse_unstored_head(
    stored: Stored, tensors: Mapping[str, Quantized], name: str, entry: Mapping[str, Any]
) -> None:
    head = "lm_head.weight"
    if (
        stored.config.get("tie_word_embeddings")
        and head not in tensors
        and head not in stored
        and _applies("lm_head", entry)
    ):
        raise CheckpointError(
            f"transform {name!r} of {stored.path} acts on lm_head, which shares the weight of the embedding, so it cannot be "
            "folded into it; load the full-precision original"
        )


def _applies(module: str, entry: Mapping[str, Any]) -> bool:
    return matches(module, entry["targets"]) and not matches(module, entry["ignore"])


def _linear(stored: Stored, tensors: Mapping[str, Quantized]) -> list[str]:
    """Modules that have a matrix, quantized or plain."""
    plain = [name for name in stored.names if name.endswith(".weight") and len(stored.shape(name)) == 2]
    return [
        name.removesuffix(".weight")
        for name in dict.fromkeys([*tensors, *plain])
        if name in tensors or not _is_matrix(stored, tensors, name)
    ]


def _is_matrix(stored: Stored, tensors: Mapping[str, Quantized], name: str) -> bool:
    """Whether a stored tensor is the matrix of a transform: a module within a module that has a weight itself."""
    outer, _, inner = name.rpartition(".")[0].rpartition(".")
    ends = inner.endswith(tuple(f"_{place}" for place in ("input", "output", "q_attn", "k_cache")))
    return ends and (
        f"{outer}.weight" in tensors or f"{outer}.weight" in stored or inner.endswith(("_q_attn", "_k_cache"))
    )


def _rotation(
    stored: Stored,
    tensors: Mapping[str, Quantized],
    name: str,
    group: Mapping[str, Any],
    entry: Mapping[str, Any],
    module: str,
) -> Rotation:
    side: Side = entry["location"]
    weight = f"{module}.weight"
    shape = tensors[weight].shape if weight in tensors else stored.shape(weight)
    # Routers have classes of their own, which a target `Linear` passes by; none is quantized.
    router = weight not in tensors and module.rpartition(".")[2] in ROUTERS
    if is_embedding(module) or stored.transposed(module) or router:
        raise CheckpointError(
            f"transform {name!r} of {stored.path} acts on {module}, which may be no Linear; load the full-precision original"
        )
    width = shape[1] if side == "input" else shape[0]
    size = group["size"] or width
    if width % size:
        raise CheckpointError(
            f"transform {name!r} of {stored.path} acts on blocks of {size} (head_dim), which do not divide the {width} of the "
            f"{side} of {module}; get the original config.json"
        )
    matrix = _shared(stored, group, name, entry, module, "weight", (size, size))
    if matrix is None:
        raise CheckpointError(
            f"transform {name!r} of {stored.path} acts on the {side} of {module}, but neither {module}.{name}_{side}.weight nor "
            f"another matrix of size {size} is stored; get the whole checkpoint, or load the full-precision original"
        )
    permutation = _shared(stored, group, name, entry, module, "perm", (size,)) if group["permuted"] else None
    if group["permuted"] and permutation is None:
        raise CheckpointError(
            f"transform {name!r} of {stored.path} is randomized, but no {module}.{name}_{side}.perm of size {size} is stored; "
            "load the full-precision original"
        )
    return Rotation(name, matrix, permutation, size, group["type"] in HADAMARDS, entry["inverse"])


def _shared(
    stored: Stored,
    group: Mapping[str, Any],
    name: str,
    entry: Mapping[str, Any],
    module: str,
    part: str,
    shape: tuple[int, ...],
) -> str | None:
    """Stored name of a tensor of a transform: the module's own, or that of the module under which it was stored once."""
    own = f"{module}.{name}_{entry['location']}.{part}"
    if own in stored:
        if stored.shape(own) != shape:
            raise CheckpointError(
                f"{own} in {stored.path} is {list(stored.shape(own))}, expected {list(shape)}; get it again"
            )
        return own
    for other in group["apply"]:
        # A random matrix and its inverse are two matrices; Hadamard matrices are transposed instead.
        if other["location"] in OFFLINE or (group["type"] not in HADAMARDS and other["inverse"] != entry["inverse"]):
            continue
        end = f".{name}_{other['location']}.{part}"
        found = [
            stored_name
            for stored_name in stored.names
            if stored_name.endswith(end) and stored.shape(stored_name) == shape
        ]
        holders = [stored_name for stored_name in found if _applies(stored_name.removesuffix(end), other)]
        if len(holders) > 1 and group["type"] != "hadamard":
            raise CheckpointError(
                f"{own} is not stored in {stored.path}, and {len(holders)} matrices could stand for it; load the original"
            )
        if holders:
            return holders[0]
    return None


def _plain(stored: Stored, weight: str) -> Quantized:
    """A weight that is not quantized, as one that is made from itself."""
    dtype = stored.dtype(weight)
    if dtype not in FLOATS:
        raise CheckpointError(
            f"{weight} in {stored.path} is {dtype}, expected floating-point weights; get the original"
        )
    return Quantized(
        stored.shape(weight), (weight,), Scheme("float", 8.0 * dtype.itemsize), lambda read: read(weight).float()
    )


def _fold_weight(stored: Stored, module: str, base: Quantized, sides: Mapping[Side, Rotation]) -> Quantized:
    def dequantize(read: Read) -> Tensor:
        weight = base.dequantize(read)
        if "input" in sides:
            weight = _times(weight, sides["input"].read(read, stored.path).T)
        if "output" in sides:
            weight = _times(weight.T, sides["output"].read(read, stored.path)).T
        return weight.contiguous()

    parts = tuple(dict.fromkeys([*base.parts, *(part for rotation in sides.values() for part in rotation.parts)]))
    scheme = replace(base.scheme, notes=(*base.scheme.notes, "rotated"))
    return Quantized(base.shape, parts, scheme, dequantize)


def _fold_bias(stored: Stored, bias: str, rotation: Rotation) -> Quantized:
    def dequantize(read: Read) -> Tensor:
        return _times(read(bias).float().unsqueeze(0), rotation.read(read, stored.path)).squeeze(0)

    scheme = Scheme("float", 8.0 * stored.dtype(bias).itemsize, notes=("rotated",))
    return Quantized(stored.shape(bias), (bias, *rotation.parts), scheme, dequantize)


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Each row, in blocks of the matrix's size, times the matrix: computed in float64, float32."""
    size = matrix.shape[0]
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for start in range(0, rows.shape[0], ROWS):
        part = rows[start : start + ROWS].double().unflatten(1, (-1, size))
        out[start : start + ROWS] = (part @ matrix).flatten(1)
    return out


def _orthogonal(matrix: Tensor) -> bool:
    """Whether Hᵀ H v = n v for one vector, which any wrong entry would break."""
    size = matrix.shape[0]
    vector = torch.linspace(1, 2, size, dtype=torch.float64, device=matrix.device)
    return bool(torch.allclose(matrix.T @ (matrix @ vector), size * vector, rtol=1e-9))


def _refuse_strays(stored: Stored, tensors: Mapping[str, Quantized], used: set[str]) -> None:
    """Raises for matrices of transforms that no config group names."""
    for name in stored.names:
        if name.endswith((".weight", ".perm")) and name not in used and _is_matrix(stored, tensors, name):
            shared = {(part.rpartition(".")[0].rpartition(".")[2], stored.shape(part)) for part in used}
            if (name.rpartition(".")[0].rpartition(".")[2], stored.shape(name)) in shared:
                continue
            raise CheckpointError(
                f"{name} in {stored.path} is the matrix of a rotation, and transform_config names none that uses it; "
                "get the original config.json"
            )
