"""compressed-tensors `int-quantized`, `float-quantized`, `naive-quantized` and `mxfp8-quantized`: one code per weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Quantized, Read, Scheme, exponents
from tracelens.loading.formats.ct_module import Module
from tracelens.loading.formats.ct_packed import act_order, check_range
from tracelens.loading.formats.ct_scales import scaled

POWERS = (torch.uint8, torch.float8_e8m0fnu)
"""How scales that are powers of two are stored."""


def elements(
    module: Module,
    shape: tuple[int, int],
    parts: tuple[str, ...],
    codes: Callable[[Read], Tensor],
    notes: tuple[str, ...] = (),
) -> Quantized:
    """How a weight is made whose codes, int8 or E4M3, `codes` reads as a matrix of `shape` from `parts`."""
    dtype = module.stored.dtype(parts[0])
    if dtype == torch.int8:
        return _integers(module, shape, parts, codes, notes)
    if dtype == torch.float8_e4m3fn:
        return _floats(module, shape, parts, codes, notes)
    raise CheckpointError(
        f"{parts[0]} in {module.stored.path} is {dtype}, expected int8 or float8_e4m3fn codes beside scales; a checkpoint "
        "that was saved before it was compressed has to be compressed first, or load the full-precision original"
    )


def _integers(
    module: Module,
    shape: tuple[int, int],
    parts: tuple[str, ...],
    codes: Callable[[Read], Tensor],
    notes: tuple[str, ...],
) -> Quantized:
    module.says("int")
    bits = module.group.bits if module.group else 8
    module.check_float("weight_scale")
    scale, block = module.take("weight_scale"), module.block(shape)
    zero = _zero(module)
    order = act_order(module, shape[1], -(-shape[1] // block[1]) if block else 1)

    def dequantize(read: Read) -> Tensor:
        stored = codes(read)
        if bits < 8:
            check_range(stored, bits, parts[0], module.stored.path)
        zeros = None if zero is None else read(zero).to(torch.int16)
        order_read = None if order is None else read(order).long()
        return scaled(shape, lambda rows: stored[rows], read(scale), zeros, block, order_read)

    scheme = Scheme(f"int{bits}", float(bits), block, zero is None, (*notes, *(("act-order",) if order else ())))
    return Quantized(shape, (*parts, *(name for name in module.taken if name not in parts)), scheme, dequantize)


def _zero(module: Module) -> str | None:
    """Stored name of the zero points, one integer for each scale."""
    group, name = module.group, module.maybe("weight_zero_point")
    if name is None:
        if group and not group.symmetric:
            raise CheckpointError(
                f"the weights of {module.stored.path} lack {module.name + '.weight_zero_point'!r}, though config group "
                f"{group.name!r} is not symmetric; get the whole checkpoint"
            )
        return None
    if module.stored.dtype(name) not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise module.wrong("weight_zero_point", "integers")
    module.check_like_scale("weight_zero_point")
    return name


def _floats(
    module: Module,
    shape: tuple[int, int],
    parts: tuple[str, ...],
    codes: Callable[[Read], Tensor],
    notes: tuple[str, ...],
) -> Quantized:
    module.says("float", 8)
    if module.maybe("weight_zero_point"):
        raise CheckpointError(
            f"{module.name}.weight_zero_point in {module.stored.path} belongs to no format of float codes; get the original"
        )
    scale, block = module.take("weight_scale"), module.block(shape)
    power = module.stored.dtype(scale) in POWERS
    if power and (block is None or block != (1, 32)):
        raise module.wrong("weight_scale", f"a power of two for each 32 of {shape[1]} columns")
    if not power:
        module.check_float("weight_scale")

    def dequantize(read: Read) -> Tensor:
        stored, scales = codes(read), read(scale)
        scales = exponents(scales.view(torch.uint8)) if power else scales
        # All 256 values, looked up: faster on a CPU than to convert each.
        values = torch.arange(256, dtype=torch.uint8, device=stored.device).view(stored.dtype).float()

        def some(rows: slice) -> Tensor:
            part = stored[rows]
            return values.index_select(0, part.contiguous().view(torch.uint8).flatten().int()).view(part.shape)

        return scaled(shape, some, scales, None, block)

    scheme = Scheme("e4m3", 8.0, block, notes=notes)
    return Quantized(shape, (*parts, *(name for name in module.taken if name not in parts)), scheme, dequantize)
