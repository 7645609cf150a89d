"""One weight against its reference: is the difference what the format's rounding makes, and if not, what was done to it?

A fault gets a name when undoing it makes the weight agree again. Weights are (out, in) in float32, and the reference is
already what the weight should be: norms folded and bases aligned (`equivalence.py`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracelens.loading.formats.base import Scheme
from tracelens.loading.roundtrip import from_blocks, prune, roundtrip, to_blocks, two_of_four

Weight = Float[Tensor, "d_out d_in"]
Grid = Float[Tensor, "rows cols"]
Severity = Literal["", "poor", "wrong"]

RATIO_LIMIT = 3.0
"""RMS error over that of rounding to nearest, up to which a quantizer is itself."""
RATIO_UNEXPLAINED = 5.5
"""The same where no fault explains the error. GPTQ moves errors to where the inputs are small: sound builds of the embedded
model reach 4.7 in one matrix and 39 in single blocks, and their answers are closer to the reference's than rounding's."""
RATIO_WRONG = 12.0
"""Beyond this no choice of scales and codes explains the error, whatever the calibration was."""
BLOCK_LIMIT = 25.0
"""The same for the worst single block: clipping an outlier, which quantizers do on purpose, is felt in one block."""
BLOCK_UNEXPLAINED = 50.0
BLOCK_WRONG = 100.0
ALIGNED = 0.5
"""Cosine between a weight and its reference below which they are not the same weight: even 2-bit rounding stays above."""
GAIN = 1.25
"""Least factor, up or down, that counts as a scale gone wrong; clipping shrinks weights by less."""
BLOCK_GAIN = 1.4
STEPS_APART = 0.3
"""A zero point is off if a block's mean error is this close to a whole number of steps, not zero, …"""
STEPS_SPREAD = 0.65
"""… and its error scatters by at most so many steps around it (0.29 for rounding to nearest)."""
STEPS_SIGMA = 8.0
"""Where few blocks are off, each mean must also be so many times the usual one: GPTQ moves errors from one weight to
the next, and where inputs are strongly correlated whole blocks drift by a step."""
FEW = 0.25
"""Share of the blocks below which they are few."""
REGROUPED = 8.0
"""Least ratio of a weight whose groups are mixed up; a smaller error may as well be noise."""
SMALLEST_BLOCK = 8
"""Blocks of fewer values say too little on their own."""
MATCH = 0.8
"""Correlation above which two structures (rows, Gram matrices) are the same one."""
UNRELATED = "unrelated to the reference"
"""How the fault of such a weight begins."""
INTEGERS = ("int", "uint", "q2", "q3", "q4", "q5", "q6", "q8", "w")
LARGEST_SEARCHED = 16384
"""Axis length up to which matrices of pairs are formed, to look for permutations and rotations."""


@dataclass(frozen=True)
class Comparison:
    """How a quantized weight differs from its reference."""

    relative_error: float
    """‖Q − W‖ / ‖W‖, Frobenius norms."""
    yardstick: float
    """The same for W rounded to nearest in the scheme."""
    ratio: float
    """The first over the second; about 1 for rounding to nearest, 0 if nothing differs."""
    worst_block: float
    """The largest such ratio of a block, over the block's own yardstick (at least a tenth of the tensor's)."""
    cosine: float
    """Cosine between Q and W as vectors."""
    fault: str
    """What is wrong with it in words; empty if nothing is."""
    severity: Severity
    """`wrong`: it is not that weight in that format; `poor`: it is, with more error than rounding makes."""

    @property
    def ordinary(self) -> bool:
        """Whether the sizes of the errors alone would raise no suspicion."""
        return self.ratio <= RATIO_LIMIT and self.worst_block <= BLOCK_LIMIT


class Fault(NamedTuple):
    """A hypothesis about what was done to a weight."""

    words: str
    undone: Weight | None
    """The weight with the fault undone; None if it can be named, but not undone."""


@dataclass(frozen=True)
class Case:
    """A weight, its reference, and what they tell block by block."""

    reference: Weight
    found: Weight
    scheme: Scheme

    @cached_property
    def rounding(self) -> Weight:
        """What rounding to nearest changes: the error by which the other is judged."""
        start = prune(self.reference) if two_of_four(self.found) else self.reference
        error = roundtrip(start, self.scheme) - self.reference
        # Weights that the format holds exactly still went through float32 arithmetic.
        return error + 1e-6 * self.reference.square().mean().sqrt()

    @cached_property
    def block(self) -> tuple[int, int]:
        """Blocks for statistics: the format's, cut into rows where those are long enough."""
        rows, cols = self.scheme.block or tuple(self.reference.shape)
        cols = min(cols, self.reference.shape[1])
        return (1, cols) if cols >= SMALLEST_BLOCK else (min(rows, self.reference.shape[0]), cols)

    def blocks(self, weight: Weight) -> Float[Tensor, "rows cols size"]:
        return to_blocks(weight, self.block)

    @cached_property
    def block_yardstick(self) -> Grid:
        own = _rms(self.blocks(self.rounding))
        return own.clamp_min(0.1 * float(_rms(self.rounding.flatten())))

    def ratio(self, weight: Weight) -> float:
        return float((weight - self.reference).norm() / self.rounding.norm())

    def block_ratio(self, weight: Weight) -> Grid:
        return _rms(self.blocks(weight - self.reference)) / self.block_yardstick

    @cached_property
    def scheme_block(self) -> tuple[int, int]:
        """(outputs, inputs) that share a scale."""
        d_out, d_in = self.reference.shape
        return self.scheme.block or (d_out, d_in)

    @cached_property
    def wanted_step(self) -> Float[Tensor, "block_rows block_cols"]:
        """Distance of neighbouring codes in each of the format's blocks, as the reference's extremes ask for."""
        blocks = to_blocks(self.reference, self.scheme_block)
        high, low = blocks.amax(-1), blocks.amin(-1)
        span = 2 * torch.maximum(high, -low) if self.scheme.symmetric else high - low
        return (span / (2 ** max(1, round(self.scheme.bits)) - 1)).clamp_min(torch.finfo(span.dtype).tiny)

    @cached_property
    def step(self) -> Grid:
        """The same for the blocks of statistics, as found if the values lie on a grid, else as wanted."""
        wanted = self.wanted_step
        values = to_blocks(self.found, self.scheme_block).sort(-1).values
        from_lowest, gaps = values - values[..., :1], values.diff(dim=-1)
        finest = from_lowest[..., -1:] / 2 ** (max(1, round(self.scheme.bits)) + 2)
        gaps = torch.where(gaps > finest, gaps, torch.inf)
        smallest = gaps.amin(-1) if gaps.shape[-1] else torch.full_like(wanted, torch.inf)
        codes = from_lowest / smallest[..., None]
        on_grid = ((codes - codes.round()).abs() < 0.05).all(-1) & (smallest > wanted / 2) & (smallest < 2 * wanted)
        return self.spread(torch.where(on_grid, smallest, wanted))

    def spread(self, values: Float[Tensor, "block_rows block_cols"]) -> Grid:
        """Values of the format's blocks -> of the blocks of statistics, which lie within them."""
        rows, cols = self.scheme_block
        each = values.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        d_out, d_in = self.reference.shape
        return self.blocks(each[:d_out, :d_in])[..., 0]

    def agrees(self, weight: Weight) -> bool:
        """Whether a weight is the reference up to what quantizers do."""
        return self.ratio(weight) <= RATIO_LIMIT and _cosine(weight, self.reference) >= ALIGNED

    def mended(self, blocks: Float[Tensor, "rows cols size"], bad: Bool[Tensor, "rows cols"]) -> Weight:
        """The weight with some of its blocks replaced."""
        whole = torch.where(bad[..., None], blocks, self.blocks(self.found))
        return from_blocks(whole, self.block, tuple(self.found.shape))


def compare(reference: Weight, found: Weight, scheme: Scheme) -> Comparison:
    """Judges a weight by its reference; names the fault if there is one."""
    case = Case(reference.float(), found.float(), scheme)
    ratio, worst = case.ratio(case.found), float(case.block_ratio(case.found).max())
    norm = case.reference.norm().clamp_min(torch.finfo(torch.float32).tiny)
    cosine = _cosine(case.found, case.reference)
    fault, severity = _verdict(case, ratio, worst, cosine)
    return Comparison(
        relative_error=float((case.found - case.reference).norm() / norm),
        yardstick=float(case.rounding.norm() / norm),
        ratio=ratio,
        worst_block=worst,
        cosine=cosine,
        fault=fault,
        severity=severity,
    )


def _verdict(case: Case, ratio: float, worst: float, cosine: float) -> tuple[str, Severity]:
    for always in (zero_point, scale, block_scales):
        if fault := always(case):
            return fault.words, "wrong"
    if ratio <= RATIO_LIMIT and worst <= BLOCK_LIMIT and (cosine >= ALIGNED or ratio <= 1.5):
        return "", ""
    if words := _named(case, ratio, cosine):
        return words, "wrong"
    if cosine < ALIGNED:
        return f"{UNRELATED} (cosine {cosine:.2f})", "wrong"
    if ratio <= RATIO_UNEXPLAINED and worst <= BLOCK_UNEXPLAINED:
        return "", ""
    if ratio > RATIO_UNEXPLAINED:
        words = f"error {ratio:.1f} times that of rounding"
        return words, "wrong" if ratio > RATIO_WRONG else "poor"
    grid = case.block_ratio(case.found)
    words = f"error {worst:.0f} times that of rounding in {_where(grid > BLOCK_LIMIT, case)}"
    return words, "wrong" if worst > BLOCK_WRONG else "poor"


def _named(case: Case, ratio: float, cosine: float) -> str:
    """Words for the first hypothesis whose undoing makes the error ordinary; empty if none does."""
    # What is nearly the reference in the reference's own order and basis is so neither by permutation nor by rotation.
    likely = MOVED * (cosine < MATCH) + CHANGED * (ratio > RATIO_LIMIT)
    for hypothesis in likely:
        for fault in hypothesis(case):
            good = fault.undone is None or (
                case.ratio(fault.undone) <= max(RATIO_LIMIT, ratio / 8)
                and _cosine(fault.undone, case.reference) >= ALIGNED
            )
            if good:
                return fault.words
    return ""


def zero_point(case: Case) -> Fault | None:
    """Blocks whose mean error is a whole number of steps, with no more than rounding around it."""
    if (
        not case.scheme.code.lower().startswith(INTEGERS)
        or min(math.prod(case.block), case.found.numel()) < SMALLEST_BLOCK
    ):
        return None
    error = case.blocks(case.found - case.reference)
    # A grid's own step is at least half the wanted one: without a larger mean than this there is nothing to see.
    if bool((error.mean(-1).abs() < (1 - STEPS_APART) / 2 * case.spread(case.wanted_step)).all()):
        return None
    error = error / case.step[..., None]
    mean = error.mean(-1)
    off = mean.round()
    spread = (error - off[..., None]).square().mean(-1).sqrt()
    bad = (off != 0) & ((mean - off).abs() <= STEPS_APART) & (spread <= STEPS_SPREAD)
    bad &= case.blocks(case.reference).abs().amax(-1) > 0
    if bad.float().mean() < FEW:
        bad &= mean.abs() > STEPS_SIGMA * 1.4826 * mean.abs().median()
    if not bad.any() or not case.agrees(case.mended(case.blocks(case.found) - (off * case.step)[..., None], bad)):
        return None
    kinds: Int[Tensor, " kinds"] = off[bad].unique().int()
    by = (
        " or ".join(f"{int(k):+d}" for k in kinds[:4])
        if len(kinds) <= 4
        else f"{int(kinds[0]):+d} to {int(kinds[-1]):+d}"
    )
    plural = "step" if by in ("+1", "-1") else "steps"
    return Fault(f"zero point off: values shifted by {by} {plural} in {_where(bad, case)}", None)


def scale(case: Case) -> Fault | None:
    """One factor on the whole weight."""
    gain = _gain(case.found.flatten(), case.reference.flatten())
    # Codes that stand for the mean of what they replace have a gain of cosine² themselves.
    least = _cosine(case.found, case.reference) ** 2 / GAIN
    if 0 < least < gain < GAIN:
        return None
    before, after = case.ratio(case.found), case.ratio(case.found / gain)
    # The factors of blocks with scales of their own scatter; then it is not one factor.
    gains = _gain(case.blocks(case.found), case.blocks(case.reference))
    if after > min(RATIO_LIMIT, 0.95 * before) or float((gains / gain).log2().abs().nanmedian()) > 0.3:
        return None
    return Fault(f"scaled by {_number(float(gain))} throughout: a scale is lost or wrong", case.found / gain)


def block_scales(case: Case) -> Fault | None:
    """A factor on each of some or all blocks."""
    found, reference = case.blocks(case.found), case.blocks(case.reference)
    if found.shape[-1] < SMALLEST_BLOCK:
        return None
    gains = _gain(found, reference)
    after = _rms(found / gains[..., None] - reference) / case.block_yardstick
    before = case.block_ratio(case.found)
    bad = _far(gains, BLOCK_GAIN) & (after < 0.5 * before) & (after <= RATIO_LIMIT) & (before > RATIO_LIMIT)
    share = float(bad.float().mean())
    mended = case.mended(found / gains[..., None], bad)
    # Where most blocks are right up to a factor, those that are not do not matter: that is no chance.
    if share == 0 or (share < 0.5 and not case.agrees(mended)):
        return None
    if share < FEW and (better := next((f for f in rescaled(case) if f.undone is not None), None)):
        assert better.undone is not None
        if case.ratio(better.undone) < 0.9 * case.ratio(mended):
            return better
    low, high = float(gains[bad].min()), float(gains[bad].max())
    if share >= 0.5 and _constant((gains * case.step)[bad]):
        return Fault(f"scales lost: the values are the bare codes in {_where(bad, case)}", None)
    if share >= 0.5 and _constant((gains * case.step**2)[bad]):
        return Fault(f"codes divided by their scales instead of multiplied in {_where(bad, case)}", None)
    factor = _number(low) if 0 < high < 1.1 * low else f"{_number(low)} to {_number(high)}"
    return Fault(f"scales lost or wrong: values are {factor} times what they should be in {_where(bad, case)}", None)


def offset(case: Case) -> Iterator[Fault]:
    """A constant added to each block."""
    found = case.blocks(case.found)
    means = (found - case.blocks(case.reference)).mean(-1, keepdim=True)
    everywhere = torch.ones_like(means[..., 0], dtype=torch.bool)
    yield Fault("zero points lost: a constant is added to each block", case.mended(found - means, everywhere))


def transposed(case: Case) -> Iterator[Fault]:
    """Stored (in, out) and read as (out, in)."""
    d_out, d_in = case.found.shape
    undone = case.found.reshape(d_in, d_out).T
    # Scales that did not move along leave an error behind, so this is named by its likeness alone.
    if _cosine(_even(undone), _even(case.reference)) > ALIGNED:
        yield Fault("transposed: inputs and outputs changed places", None)


def permuted(case: Case) -> Iterator[Fault]:
    """Whole rows or columns in another order, found by their likeness: their scales may not have moved along."""
    # Each block brought to mean 0 and norm 1, so that a row is known by its codes alone.
    rows = [_by_codes(case, weight) for weight in (case.found, case.reference)]
    for kind, (found, reference) in (("rows (outputs)", rows), ("columns (inputs)", (case.found.T, case.reference.T))):
        if len(found) > LARGEST_SEARCHED or found.shape[1] < SMALLEST_BLOCK:
            continue
        home = (_unit(found) @ _unit(reference).T).abs().max(-1)
        order, size = home.indices, len(found)
        known = bool((home.values > ALIGNED).float().mean() > 0.9) and len(order.unique()) > 0.9 * size
        if known and bool((order == torch.arange(size, device=order.device)).float().mean() < 0.5):
            yield Fault(f"{kind} permuted{_order_name(order)}", None)


def rotated(case: Case) -> Iterator[Fault]:
    """An orthogonal matrix on the input or on the output side: a Hadamard one if it is, or any."""
    for axis, side in ((1, "input"), (0, "output")):
        size = case.found.shape[axis]
        n = size & -size
        while n >= SMALLEST_BLOCK:
            undone = _hadamard(case.found, n, axis)
            if _cosine(undone, case.reference) > ALIGNED:
                blocks = "" if n == size else f" in {size // n} blocks"
                yield Fault(
                    f"a Hadamard rotation of size {n}{blocks} is missing or left over on the {side} side", undone
                )
            n //= 2
    if _cosine(case.found, case.reference) >= ALIGNED:
        return
    for axis, side in ((1, "input"), (0, "output")):
        found, reference = (w if axis == 1 else w.T for w in (case.found, case.reference))
        if 16 <= len(found) <= LARGEST_SEARCHED and _same_gram(found, reference):
            yield Fault(f"rotated on the {side} side: an orthogonal transform is missing or left over", None)


def rescaled(case: Case) -> Iterator[Fault]:
    """A factor on each column, or on each row, that nothing undoes."""
    for axis, kind in ((0, "columns (inputs)"), (1, "rows (outputs)")):
        gains = _gain(case.found, case.reference, axis).unsqueeze(axis)
        if _far(gains, BLOCK_GAIN).any():
            factors = f"{_number(float(gains.min()))} to {_number(float(gains.max()))}"
            yield Fault(f"{kind} multiplied by {factors}, and nothing undoes it", case.found / gains)


def regrouped(case: Case) -> Iterator[Fault]:
    """Columns in their places, with other scales and zero points than their neighbours: group order lost."""
    d_out, d_in = case.found.shape
    grouped = case.scheme.code.lower().startswith(INTEGERS) and case.block[0] == 1 and case.block[1] < d_in
    if not grouped or d_out < 4 * SMALLEST_BLOCK or case.ratio(case.found) < REGROUPED:
        return
    found, reference = case.found - case.found.mean(0), case.reference - case.reference.mean(0)
    alike = (found * reference).sum(0) / (found.norm(dim=0) * reference.norm(dim=0)).clamp_min(1e-30)
    # Columns of unrelated weights are alike by chance up to about 1/√rows.
    if (alike > 4 / math.sqrt(d_out)).float().mean() > 0.8:
        yield Fault("columns have the scales or zero points of other groups: the order of groups (g_idx) is lost", None)


Hypotheses = tuple[Callable[[Case], Iterator[Fault]], ...]
MOVED: Hypotheses = (offset, transposed, permuted, rescaled, regrouped, rotated)
CHANGED: Hypotheses = (offset, rescaled, regrouped)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean(-1).sqrt()


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(torch.finfo(a.dtype).tiny))


def _gain(found: Tensor, reference: Tensor, dim: int = -1) -> Tensor:
    """The factor a that brings a·reference closest to what was found; 1 where the reference is zero."""
    power = reference.square().sum(dim)
    return torch.where(power > 0, (found * reference).sum(dim) / power.clamp_min(1e-38), 1.0)


def _far(gain: Tensor, limit: float) -> Bool[Tensor, "..."]:
    return (gain.abs() > limit) | (gain.abs() < 1 / limit) | (gain < 0)


def _unit(rows: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def _by_codes(case: Case, weight: Weight) -> Weight:
    """Rows with each block brought to mean 0 and norm 1, if blocks are parts of rows."""
    blocks = case.blocks(weight)
    return _unit(blocks - blocks.mean(-1, keepdim=True)).flatten(1) if case.block[0] == 1 else weight


def _even(weight: Weight) -> Weight:
    """Columns, then rows, brought to one length."""
    return _unit(_unit(weight.T).T)


def _constant(values: Tensor) -> bool:
    return bool(((values - 1).abs() < 0.25).float().mean() > 0.8)


def _hadamard(weight: Weight, n: int, axis: int) -> Weight:
    """Orthonormal Sylvester-Hadamard transform of each run of n values along an axis; it is its own inverse."""
    out = weight.movedim(axis, -1).unflatten(-1, (-1, n))
    width = 1
    while width < n:
        a, b = out.unflatten(-1, (-1, 2, width)).unbind(-2)
        out = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        width *= 2
    return (out / math.sqrt(n)).flatten(-2).movedim(-1, axis)


def _same_gram(found: Weight, reference: Weight) -> bool:
    """Whether rows stand at the same angles to each other: true if one is the other times an orthogonal matrix."""
    off_diagonal = ~torch.eye(len(found), dtype=torch.bool, device=found.device)
    a, b = ((w @ w.T)[off_diagonal] for w in (found, reference))
    lengths = _cosine(found.norm(dim=1), reference.norm(dim=1))
    return _cosine(a - a.mean(), b - b.mean()) > MATCH and lengths > 0.95


def _order_name(order: Int[Tensor, " n"]) -> str:
    """What is known about a permutation: found[i] = reference[order[i]]."""
    size = len(order)
    plain = torch.arange(size, device=order.device)
    if size % 8 == 0:
        inside = order.view(-1, 8) - plain.view(-1, 8)[:, :1]
        if bool((inside == inside[0]).all()) and bool(((inside >= 0) & (inside < 8)).all()):
            return f": packing order {inside[0].tolist()} within every 8"
    for heads in range(1, size // 4 + 1):
        if size % (2 * heads) == 0:
            swapped = plain.view(heads, 2, -1).transpose(1, 2).flatten()
            if torch.equal(order, swapped) or torch.equal(order, swapped.argsort()):
                return f": rotary halves and pairs of {heads} heads, as GGUF stores them"
    return ""


def _where(bad: Bool[Tensor, "rows cols"], case: Case) -> str:
    """How many blocks, and where if they make a rectangle."""
    count, total = int(bad.sum()), bad.numel()
    if count == total:
        return "every block" if total > 1 else "the whole weight"
    rows, cols = bad.any(1).nonzero().flatten(), bad.any(0).nonzero().flatten()
    words = f"{count} of {total} blocks"
    if len(rows) * len(cols) == count:
        (height, width), (d_out, d_in) = case.block, case.found.shape
        words += (
            f" (outputs {int(rows[0]) * height} to {min(d_out, (int(rows[-1]) + 1) * height) - 1}, "
            f"inputs {int(cols[0]) * width} to {min(d_in, (int(cols[-1]) + 1) * width) - 1})"
        )
    return words


def _number(value: float) -> str:
    return f"{value:.3g}"
