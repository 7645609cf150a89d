"""compressed-tensors `pack-quantized`: integers of 1 to 8 bits in 32-bit words, with scales and zero points."""

from typing import Literal

import torch
from torch import Tensor

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Quantized, Read, Scheme, unpack_words
from tracelens.loading.formats.ct_module import Module
from tracelens.loading.formats.ct_scales import scaled

Packing = Literal["stream", "words"]
"""Codes as one stream of bits, some of them across two words; or only whole codes in a word, its last bits unused."""


def packed(module: Module) -> Quantized:
    """How the weight of a module with `weight_packed` of int32 is made.

    Raises `CheckpointError` where shapes, config and each other disagree, or bits cannot be told.
    """
    shape = module.shape_stored_as("weight_shape")
    words = module.take("weight_packed")
    found = module.stored.shape(words)
    if len(found) != 2 or found[0] != shape[0]:
        raise module.wrong("weight_packed", f"{shape[0]} rows, as weight_shape {list(shape)} says")
    module.says("int")
    bits, packing = _packing(module, shape[1], found[1])
    module.check_float("weight_scale")
    scale, block = module.take("weight_scale"), module.block(shape)
    blocks = -(-shape[1] // block[1]) if block else 1
    zero = _zero(module, shape[0], blocks, bits, packing)
    order = act_order(module, shape[1], blocks)
    half = 2 ** (bits - 1)
    used = (
        shape[1] * bits - 32 * (found[1] - 1)
        if packing == "stream"
        else bits * (shape[1] - 32 // bits * (found[1] - 1))
    )

    def dequantize(read: Read) -> Tensor:
        stored = read(words).contiguous()
        _check_padding(stored, used, words, module)
        zeros = None if zero is None else read(zero)
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = _codes(zeros, bits, packing, 0)[: shape[0]].to(torch.int16) - half
        elif zeros is not None:
            check_range(zeros, bits, zero or "", module.stored.path)
        # The difference of two codes of 8 bits does not fit a byte.
        wide = torch.int16 if zeros is not None and bits == 8 else torch.int8
        zeros = None if zeros is None else zeros.to(wide)

        def codes(rows: slice) -> Tensor:
            part = _codes(stored[rows], bits, packing, 1)[:, : shape[1]]
            # In a byte, code - 128 is the code with its highest bit turned.
            signed = part.view(torch.int8).bitwise_xor(-128) if bits == 8 else part.view(torch.int8).sub(half)
            return signed.to(wide)

        return scaled(shape, codes, read(scale), zeros, block, None if order is None else read(order).long())

    notes = ("act-order",) if order else ()
    return Quantized(
        shape,
        (words, *_but(module.taken, words)),
        Scheme(f"int{bits}", float(bits), block, zero is None, notes),
        dequantize,
    )


def act_order(module: Module, columns: int, blocks: int) -> str | None:
    """Stored name of the group of each column, if the columns are not in the order of their groups.

    Raises `CheckpointError` for groups that do not exist or have another size than the config's.
    """
    name = module.maybe("weight_g_idx")
    if name is None:
        if module.group and module.group.ordered:
            raise CheckpointError(
                f"the weights of {module.stored.path} lack {module.name + '.weight_g_idx'!r}, though config group "
                f"{module.group.name!r} orders columns by activation (actorder); get the whole checkpoint"
            )
        return None
    index = module.stored.read(name).long()
    if index.shape != (columns,):
        raise module.wrong("weight_g_idx", f"[{columns}], a group for each column")
    if bool((index == -1).all()):  # what it is initialised with: not set
        return None
    size = -(-columns // blocks)
    inside = bool(((index >= 0) & (index < blocks)).all())
    if not inside or not bool((index.bincount(minlength=blocks) == size).all()):
        raise CheckpointError(
            f"{name} in {module.stored.path} must name each of {blocks} groups {size} times (or be -1 throughout), and "
            f"its values from {int(index.min())} to {int(index.max())} do not; get the checkpoint again"
        )
    return None if bool((index == torch.arange(columns) // size).all()) else name


def _packing(module: Module, columns: int, words: int) -> tuple[int, Packing]:
    """Bits of a code and how codes lie in words, from how many words a row takes."""
    packings: tuple[Packing, ...] = ("stream", "words")
    fitting: list[tuple[int, Packing]] = [
        (bits, packing)
        for bits in range(1, 9)
        for packing in packings
        # Where a code is an even part of a word, both are the same.
        if words_for(columns, bits, packing) == words and (packing == "stream" or 32 % bits)
    ]
    group = module.group
    choices = [choice for choice in fitting if group is None or choice[0] == group.bits]
    # A row within one word looks the same in both.
    if len(choices) == 2 and choices[0][0] == choices[1][0] and columns <= 32 // choices[0][0]:
        choices = choices[:1]
    if len(choices) == 1:
        return choices[0]
    possible = sorted({bits for bits, _ in fitting})
    fits = (
        f"{words} words fit {' or '.join(map(str, possible))} bits"
        if possible
        else f"{words} words fit no number of bits"
    )
    if group is not None and not choices:
        raise module.wrong(
            "weight_packed",
            f"{words_for(columns, group.bits, 'stream')} words for {columns} columns of {group.bits} bits "
            f"(num_bits of config group {group.name!r}), and {fits}",
        )
    raise module.wrong(
        "weight_packed",
        f"a width that tells how codes are packed, and {fits}" + (" in two ways" if len(choices) > 1 and group else ""),
        "which cannot be told from shapes: load the full-precision original",
    )


def words_for(count: int, bits: int, packing: Packing) -> int:
    """32-bit words for `count` codes."""
    return -(-count * bits // 32) if packing == "stream" else -(-count // (32 // bits))


def _zero(module: Module, rows: int, blocks: int, bits: int, packing: Packing) -> str | None:
    """Stored name of the zero points: of int32 packed along the outputs, or of int8 one by one."""
    group = module.group
    name = module.maybe("weight_zero_point")
    if name is None:
        if group and not group.symmetric:
            raise CheckpointError(
                f"the weights of {module.stored.path} lack {module.name + '.weight_zero_point'!r}, though config group "
                f"{group.name!r} is not symmetric; get the whole checkpoint"
            )
        return None
    if module.stored.dtype(name) == torch.int8:
        module.check_like_scale("weight_zero_point")
        return name
    expected = (words_for(rows, bits, packing), blocks)
    if module.stored.dtype(name) != torch.int32 or module.stored.shape(name) != expected:
        raise module.wrong("weight_zero_point", f"int32 {list(expected)}, or int8 one by one")
    if group and group.symmetric:
        raise CheckpointError(
            f"{name} in {module.stored.path} holds zero points, but config group {group.name!r} is symmetric; "
            "get the original config.json"
        )
    return name


def _codes(words: Tensor, bits: int, packing: Packing, dim: int) -> Tensor:
    """Codes along `dim`, from 0 to 2^bits - 1: uint8, and freshly made unless of 8 bits."""
    if packing == "words":
        shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=words.device)
        codes = ((words.movedim(dim, -1).unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8)
        return codes.flatten(-2).movedim(-1, dim)
    if bits == 4 and dim == 1:
        # Each byte is spread over two, its low half first, without a temporary of 32 bits for each code.
        pairs = words.view(torch.uint8).to(torch.int16)
        return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    return _eights(words, bits) if dim == 1 and 8 % bits else unpack_words(words, bits, dim)


def _eights(words: Tensor, bits: int) -> Tensor:
    """Codes of 3, 5, 6 or 7 bits along rows of words: 8 of them lie in as many bytes as a code has bits."""
    octets = words.view(torch.uint8)
    octets = torch.nn.functional.pad(octets, (0, -octets.shape[1] % bits)).unflatten(1, (-1, bits)).to(torch.int16)
    codes = torch.empty((*octets.shape[:2], 8), dtype=torch.uint8, device=words.device)
    for place in range(8):
        byte, offset = divmod(place * bits, 8)
        code = octets[..., byte] >> offset
        if offset + bits > 8:
            code |= octets[..., byte + 1] << (8 - offset)
        codes[..., place] = code & (2**bits - 1)
    return codes.flatten(1)


def _check_padding(words: Tensor, used: int, name: str, module: Module) -> None:
    """Raises if the last word of a row has anything beyond its `used` bits."""
    if used < 32 and bool(((words[:, -1].long() & 0xFFFFFFFF) >> used).any()):
        raise CheckpointError(
            f"{name} in {module.stored.path} has codes beyond the columns that {module.name}.weight_shape says; one of them is "
            "damaged or of another model: get the checkpoint again"
        )


def check_range(codes: Tensor, bits: int, name: str, path: object) -> None:
    """Raises if int8 codes are not of so few bits."""
    low, high = (int(value) for value in torch.aminmax(codes))
    half = 2 ** (bits - 1)
    if low < -half or high >= half:
        raise CheckpointError(
            f"{name} in {path} holds values from {low} to {high}, expected {-half} to {half - 1} for num_bits {bits}; "
            "its config.json is of another model, or it is damaged: get both again"
        )


def _but(names: list[str], first: str) -> list[str]:
    return [name for name in names if name != first]
