"""The stored tensors of one module of a compressed-tensors checkpoint, and the grid on which its scales lie."""

from dataclasses import dataclass, field

import torch

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Stored
from tracelens.loading.formats.ct_schemes import Group

Block = tuple[int, int] | None
"""(outputs, inputs) that share one scale, the last ones ragged; None if all do."""


@dataclass
class Module:
    """What is stored for one weight. Parts are taken by name, so that what nobody took can be refused."""

    stored: Stored
    name: str
    found: dict[str, str]
    """Part (`weight_packed`, `weight_scale`, ...) -> stored name."""
    group: Group | None
    """What config.json says about it."""
    taken: list[str] = field(default_factory=list)
    """Stored names, in the order in which they were taken."""

    def take(self, part: str) -> str:
        """Stored name of a part that must be there."""
        name = self.maybe(part)
        return name or self.stored.need(f"{self.name}.{part}")

    def maybe(self, part: str) -> str | None:
        """Stored name of a part, or None."""
        name = self.found.get(part)
        if name and name not in self.taken:
            self.taken.append(name)
        return name

    def left_over(self) -> list[str]:
        """Stored names that nothing has taken."""
        return [name for name in self.found.values() if name not in self.taken]

    def wrong(
        self, part: str, expected: str, fix: str = "its config.json and its tensors disagree: get both again"
    ) -> CheckpointError:
        """The error for a part whose shape or dtype is not what it must be."""
        name = f"{self.name}.{part}"
        return CheckpointError(
            f"{name} in {self.stored.path} is {_short(self.stored.dtype(name))} {list(self.stored.shape(name))}, "
            f"expected {expected}; {fix}"
        )

    def matrix(self, part: str) -> tuple[int, int]:
        """Shape of a part that must be a matrix."""
        shape = self.stored.shape(self.take(part))
        if len(shape) != 2 or not shape[0] or not shape[1]:
            raise self.wrong(part, "a matrix", "only modules with one matrix can be read: load the original")
        return shape[0], shape[1]

    def shape_stored_as(self, part: str) -> tuple[int, int]:
        """The (outputs, inputs) of the weight, as a small tensor says them."""
        sizes = self.stored.read(self.take(part)).flatten().tolist()
        if len(sizes) != 2 or min(sizes) < 1:
            raise CheckpointError(
                f"{self.name}.{part} in {self.stored.path} says that the weight is {sizes}, expected a matrix; "
                "only modules with one matrix can be read: load the original"
            )
        return int(sizes[0]), int(sizes[1])

    def block(self, shape: tuple[int, int], part: str = "weight_scale") -> Block:
        """The block that shares a scale: what config.json says, if the scales' shape agrees, and else what they show.

        Raises `CheckpointError`, naming both, if they disagree or, without a config group, the block cannot be told.
        """
        rows, columns = shape
        found = self.stored.shape(self.take(part))
        group = self.group
        if group is None:
            return self._shown_block(shape, part)
        if group.strategy == "tensor":
            block, expected = None, (1,)
            fits = len(found) <= 2 and all(size == 1 for size in found)
        else:
            if group.strategy == "block":
                assert group.block is not None
                block, size = group.block, f"block_structure {list(group.block)}"
            elif group.strategy == "channel":
                block, size = (1, columns), "a scale for each output"
            else:
                assert group.group_size is not None
                block, size = (1, group.group_size), f"group_size {group.group_size}"
            expected = (-(-rows // block[0]), -(-columns // block[1]))
            fits = found == expected or (group.strategy == "channel" and found == (rows,))
            # The library refuses to write a ragged group, so a width that is no multiple is a wrong one.
            fits = fits and (group.strategy == "block" or columns % block[1] == 0)
            if not fits:
                implied = f" (which is group_size {columns // found[1]})" if _divides(found, rows, columns) else ""
                raise self.wrong(
                    part,
                    f"{list(expected)} for the weight {list(shape)} with {size}, as config group {group.name!r} has it{implied}",
                )
        if not fits:
            raise self.wrong(part, f"{list(expected)}: config group {group.name!r} has one scale for the whole weight")
        return block

    def _shown_block(self, shape: tuple[int, int], part: str) -> Block:
        rows, columns = shape
        found = self.stored.shape(f"{self.name}.{part}")
        if all(size == 1 for size in found):
            return None
        if found == (rows,):
            return 1, columns
        if _divides(found, rows, columns):
            return 1, columns // found[1]
        raise self.wrong(
            part,
            f"[{rows}, 1] or a divisor of {columns} for the weight {list(shape)}",
            "no group of config.json names this module, so its blocks cannot be told: get the original config.json",
        )

    def check_like_scale(self, part: str, scale: str = "weight_scale") -> None:
        """Raises unless a part has as many values as the scale, in the same shape."""
        wanted = self.stored.shape(self.take(scale))
        if self.stored.shape(self.take(part)) != wanted:
            raise self.wrong(part, f"{list(wanted)}, one for each scale")

    def check_float(self, part: str) -> None:
        if (
            not self.stored.dtype(self.take(part)).is_floating_point
            or self.stored.dtype(f"{self.name}.{part}") == torch.float8_e8m0fnu
        ):
            raise self.wrong(part, "floating-point scales")

    def says(self, kind: str, bits: int | None = None) -> None:
        """Raises if the config group has other codes than the tensors."""
        group = self.group
        if group and (group.type != kind or (bits is not None and group.bits != bits)):
            raise CheckpointError(
                f"config group {group.name!r} of {self.stored.path} has {group.bits}-bit {group.type} weights, but the tensors of "
                f"{self.name} hold {'' if bits is None else f'{bits}-bit '}{kind} codes; get the original config.json"
            )


def _divides(found: tuple[int, ...], rows: int, columns: int) -> bool:
    return len(found) == 2 and found[0] == rows and found[1] > 0 and columns % found[1] == 0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
