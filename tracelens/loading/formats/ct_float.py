"""compressed-tensors `nvfp4-pack-quantized` and `mxfp4-pack-quantized`: two 4-bit floats in a byte."""

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import E2M1, Quantized, Read, Scheme, exponents
from tracelens.loading.formats.ct_elements import POWERS
from tracelens.loading.formats.ct_module import Module
from tracelens.loading.formats.ct_scales import scaled

NVFP4_GROUP, MXFP4_GROUP = 16, 32


def four_bit_float(module: Module) -> Quantized:
    """How the weight of a module with `weight_packed` of uint8 is made.

    NVFP4 has E4M3 scales over a scale of the whole tensor (weight = code * (scale / global)), MXFP4 powers of two.
    """
    rows, width = module.matrix("weight_packed")
    shape = (rows, 2 * width)
    module.says("float", 4)
    for part in ("weight_zero_point", "weight_g_idx"):
        if module.maybe(part):
            raise CheckpointError(
                f"{module.name}.{part} in {module.stored.path} belongs to no 4-bit float; get the original"
            )
    octets, scale, block = module.take("weight_packed"), module.take("weight_scale"), module.block(shape)
    power = module.stored.dtype(scale) in POWERS
    whole = None if power else _global_scale(module)
    group = MXFP4_GROUP if power else NVFP4_GROUP
    if block is None or (module.group is None and block != (1, group)):
        raise module.wrong("weight_scale", f"a scale for each {group} of {shape[1]} columns")

    def dequantize(read: Read) -> Tensor:
        stored, scales = read(octets).contiguous(), read(scale)
        scales = exponents(scales.view(torch.uint8)) if whole is None else scales.float() / read(whole).float()
        pairs = _pairs(stored.device)

        def codes(part: slice) -> Tensor:
            some = stored[part]
            return pairs.index_select(0, some.flatten().int()).view(torch.float32).view(some.shape[0], -1)

        return scaled(shape, codes, scales, None, block)

    return Quantized(
        shape, (octets, *(name for name in module.taken if name != octets)), Scheme("e2m1", 4.0, block), dequantize
    )


def _global_scale(module: Module) -> str:
    if module.stored.dtype(module.take("weight_scale")) != torch.float8_e4m3fn:
        raise module.wrong("weight_scale", "uint8 powers of two (MXFP4) or float8_e4m3fn (NVFP4)")
    name = module.take("weight_global_scale")
    module.check_float("weight_global_scale")
    if any(size != 1 for size in module.stored.shape(name)):
        raise module.wrong("weight_global_scale", "one value")
    return name


def _pairs(device: torch.device) -> Tensor:
    """Byte -> the two values it holds, low half first, as one 64-bit word each: the sign of zero is kept."""
    values = torch.tensor(E2M1)
    both = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)
    return both.view(torch.int64).flatten().to(device)
