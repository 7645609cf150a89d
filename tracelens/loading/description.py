"""What a checkpoint holds, in words: `Checkpoint.describe()` and `tracelens inspect`."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracelens.loading.checkpoint import Checkpoint


@dataclass(frozen=True)
class Description:
    """A checkpoint's format and what it does to which weights."""

    name: str
    format: str
    architecture: str
    schemes: dict[str, dict[str, Any]]
    """Scheme in words -> `tensors`, `parameters`, `bytes` (codes, scales and zero points) and `modules`, their names
    with the layer number as `*`."""
    plain: dict[str, dict[str, Any]]
    """Stored dtype -> the same, of tensors that are not quantized."""
    runtime: dict[str, int]
    """Stored tensors that only kernels use, with `*` for the layer number -> how many."""
    notes: tuple[str, ...] = field(default=())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized weights, scales and zero points included, over their number; 0 if none is."""
        parameters = sum(group["parameters"] for group in self.schemes.values())
        return 8 * sum(group["bytes"] for group in self.schemes.values()) / parameters if parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{"name": self.name, "format": self.format, "architecture": self.architecture},
            **{"bits_per_weight": self.bits_per_weight, "schemes": self.schemes, "plain": self.plain},
            **{"runtime": self.runtime, "notes": list(self.notes)},
        }

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.architecture}, {self.format}"]
        lines += [line for title, groups in (("quantized", self.schemes), ("not quantized", self.plain))
                  for line in _rows(title, groups)]  # fmt: skip
        if self.bits_per_weight:
            lines.append(f"{self.bits_per_weight:.2f} bits for each quantized weight, scales and zero points included")
        if self.runtime:
            lines.append("used by kernels only: " + ", ".join(f"{n} × {name}" for name, n in self.runtime.items()))
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def describe(checkpoint: "Checkpoint") -> Description:
    """The description of an open checkpoint; reads no tensor data."""
    stored = checkpoint.stored
    schemes: dict[str, dict[str, Any]] = {}
    plain: dict[str, dict[str, Any]] = {}
    counted: set[str] = set()  # rotations are stored once and used by many weights
    for name in checkpoint.names():
        quantized = checkpoint.quantized(name)
        parts = checkpoint.parts(name)
        groups, key = (schemes, str(quantized.scheme)) if quantized else (plain, _dtype(stored.dtype(parts[0])))
        group = groups.setdefault(key, {"tensors": 0, "parameters": 0, "bytes": 0, "modules": {}})
        group["tensors"] += 1
        group["parameters"] += _count(checkpoint.shape(name))
        group["bytes"] += sum(stored.files.nbytes(part) for part in parts if part not in counted)
        counted.update(parts)
        group["modules"].setdefault(_without_number(name))
    for group in (*schemes.values(), *plain.values()):
        group["modules"] = list(group["modules"])
    layout = checkpoint.layout
    return Description(
        name=checkpoint.name,
        format=checkpoint.format,
        architecture=(checkpoint.config.get("architectures") or ["unknown architecture"])[0],
        schemes=schemes,
        plain=plain,
        runtime=dict(Counter(_without_number(name) for name in layout.runtime)) if layout else {},
        notes=layout.notes if layout else (),
    )


def _rows(title: str, groups: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for key, group in groups.items():
        rows.append(
            f"{title}: {key}: {group['tensors']} tensors, {group['parameters']:,} parameters, {size(group['bytes'])}"
        )
        rows += [f"    {module}" for module in group["modules"]]
    return rows


def size(count: int | float) -> str:
    """Bytes in words: 1,234,567 -> `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for axis in shape:
        count *= axis
    return count


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _without_number(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
