"""compressed-tensors `sparse-24-bitmask` and `sparse-bitmask`: the weights that are not zero, and a bit for each place."""

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Quantized, Read, Scheme
from tracelens.loading.formats.ct_elements import elements
from tracelens.loading.formats.ct_module import Module

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def sparse(module: Module) -> Quantized:
    """How the weight of a module with `compressed` and `bitmask` is made; its values are weights, or codes with scales.

    Stored (rows, columns / 2) for two of four, or flat with `row_offsets` for any number.
    """
    shape = module.shape_stored_as("shape")
    values, mask = module.take("compressed"), module.take("bitmask")
    module.maybe("row_offsets")  # where each row begins, which the mask says too
    two_of_four = len(module.stored.shape(values)) == 2
    if two_of_four and (shape[1] % 4 or module.stored.shape(values) != (shape[0], shape[1] // 2)):
        raise module.wrong(
            "compressed", f"[{shape[0]}, {shape[1] / 2:g}], half of the weight {list(shape)} in its shape"
        )
    if module.stored.dtype(mask) != torch.uint8 or module.stored.shape(mask) != (shape[0], -(-shape[1] // 8)):
        raise module.wrong(
            "bitmask", f"uint8 [{shape[0]}, {-(-shape[1] // 8)}], a bit for each of {list(shape)} weights"
        )

    def dense(read: Read) -> Tensor:
        places, stored = _unpacked(read(mask), shape[1]), read(values).flatten()
        count = int(places.sum())
        if count != stored.numel() or (two_of_four and not _is_two_of_four(places)):
            raise CheckpointError(
                f"{mask} in {module.stored.path} marks {count} places, expected the {stored.numel()} of {values}"
                f"{', two in each four' if two_of_four else ''}; the checkpoint is damaged: get it again"
            )
        # 8-bit floats are moved as bytes.
        small = stored.dtype.itemsize == 1
        whole = torch.zeros(shape, dtype=torch.int8 if small else torch.float32, device=stored.device)
        whole.masked_scatter_(places, stored.view(torch.int8) if small else stored.float())
        return whole.view(stored.dtype) if small else whole

    note = "2:4 sparse" if two_of_four else "sparse"
    if "weight_scale" in module.found:
        return elements(module, shape, (values, *(name for name in module.taken if name != values)), dense, (note,))
    if module.stored.dtype(values) not in FLOATS:
        raise module.wrong(
            "compressed", "floating-point weights, or weight_scale beside it", "get the whole checkpoint"
        )
    bits = 8.0 * module.stored.dtype(values).itemsize
    parts = (values, *(name for name in module.taken if name != values))
    return Quantized(shape, parts, Scheme("float", bits, notes=(note,)), dense)


def _unpacked(mask: Tensor, columns: int) -> Tensor:
    """Bits of each byte, lowest first: bool (rows, columns)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :columns].bool()


def _is_two_of_four(places: Tensor) -> bool:
    return bool((places.unflatten(1, (-1, 4)).sum(-1) == 2).all())
