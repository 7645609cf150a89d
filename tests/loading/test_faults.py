import pytest
import torch
from torch import Tensor

from tracelens.loading.faults import RATIO_LIMIT, RATIO_WRONG, compare
from tracelens.loading.formats.base import Scheme
from tracelens.loading.roundtrip import prune, roundtrip

SIZE = 128
INTEGERS = [
    Scheme("int4", 4, (1, 32), symmetric=False),
    Scheme("int4", 4, (1, 32)),
    Scheme("int8", 8, (1, 128)),
    Scheme("int8", 8, None),
    Scheme("int3", 3, (1, 64), symmetric=False),
    Scheme("Q4_K", 4, (1, 32), symmetric=False),
    Scheme("int4", 4, (64, 1), symmetric=False),
]
TWO_BITS = Scheme("int2", 2, (1, 32), symmetric=False)
OTHERS = [Scheme("nf4", 4, (1, 64)), Scheme("e2m1", 4, (1, 16)), Scheme("e4m3", 8, (64, 64)), Scheme("float", 16)]
SCHEMES = [*INTEGERS, TWO_BITS, *OTHERS]
BLOCKED = [scheme for scheme in SCHEMES if scheme.block and scheme.block[1] < SIZE and scheme.bits > 2]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def reference() -> Tensor:
    weight = torch.randn(SIZE, SIZE, generator=generator(0)) * 0.05
    # Real weights have outlier channels.
    weight[:, 5] *= 10
    return weight


def step(reference: Tensor, scheme: Scheme) -> Tensor:
    """The distance of codes at each value."""
    rows, cols = scheme.block or reference.shape
    out = torch.empty_like(reference)
    for i in range(0, len(reference), rows):
        for j in range(0, reference.shape[1], cols):
            block = reference[i : i + rows, j : j + cols]
            span = 2 * block.abs().max() if scheme.symmetric else block.max() - block.min()
            out[i : i + rows, j : j + cols] = span / (2**scheme.bits - 1)
    return out


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator(3))).Q


def hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_to_nearest_has_no_fault(reference, scheme):
    result = compare(reference, roundtrip(reference, scheme), scheme)
    assert (result.fault, result.severity) == ("", "")
    assert result.ratio == pytest.approx(1, abs=1e-3)
    assert result.relative_error == pytest.approx(result.yardstick, rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_that_is_its_reference_has_no_error(reference, scheme):
    result = compare(reference, reference, scheme)
    assert (result.relative_error, result.ratio, result.fault) == (0, 0, "")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_errors_a_little_larger_than_rounding_are_a_quantizers_own(reference, scheme):
    error = roundtrip(reference, scheme) - reference
    moved = error[:, torch.randperm(SIZE, generator=generator(1))]
    result = compare(reference, reference + error + moved, scheme)
    assert 1.2 < result.ratio < RATIO_LIMIT
    assert not result.fault


@pytest.mark.parametrize(
    ("scheme", "times", "severity"),
    [(s, 2 * RATIO_LIMIT, "poor") for s in SCHEMES if s.bits >= 4]
    + [(s, 1.2 * RATIO_WRONG, "wrong") for s in SCHEMES if s.bits >= 8],
)
def test_larger_errors_are_told_by_their_size(reference, scheme, times, severity):
    noise = torch.randn(SIZE, SIZE, generator=generator(1))
    yardstick = (roundtrip(reference, scheme) - reference).norm() / noise.norm()
    result = compare(reference, reference + times * yardstick * noise, scheme)
    assert result.severity == severity
    assert result.fault == f"error {result.ratio:.1f} times that of rounding"


@pytest.mark.parametrize("scheme", [*INTEGERS, TWO_BITS], ids=str)
@pytest.mark.parametrize("by", [-1, 1, -8])
def test_zero_points_off(reference, scheme, by):
    if scheme.block is None:
        # One zero point for all of it: the same shift everywhere.
        found = roundtrip(reference, scheme) + by * step(reference, scheme)
        assert "zero point off" in compare(reference, found, scheme).fault
        return
    result = compare(reference, roundtrip(reference, scheme) + by * step(reference, scheme), scheme)
    assert result.fault == f"zero point off: values shifted by {by:+d} step{'s' * (abs(by) > 1)} in every block"
    assert result.severity == "wrong"


@pytest.mark.parametrize("scheme", [s for s in INTEGERS if s.block and s.block[0] == 1 and s.block[1] < SIZE], ids=str)
def test_one_zero_point_off_is_found_and_placed(reference, scheme):
    group = scheme.block[1]
    found = roundtrip(reference, scheme)
    found[7, group : 2 * group] += step(reference, scheme)[7, group : 2 * group]
    result = compare(reference, found, scheme)
    blocks = SIZE * SIZE // group
    place = f"in 1 of {blocks} blocks (outputs 7 to 7, inputs {group} to {2 * group - 1})"
    assert result.fault == f"zero point off: values shifted by +1 step {place}"
    assert result.ratio < 1.2


def test_zero_points_lost(reference):
    scheme = INTEGERS[0]
    lowest = reference.unflatten(1, (-1, 32)).amin(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    result = compare(reference, roundtrip(reference, scheme) - lowest * 0.93, scheme)
    assert result.severity == "wrong"
    assert result.fault.startswith("zero point")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("factor", [0.5, 2.0, 448.0, -1.0])
def test_a_scale_lost(reference, scheme, factor):
    fault = compare(reference, roundtrip(reference, scheme) * factor, scheme).fault
    assert fault.endswith("throughout: a scale is lost or wrong")
    named = float(fault.split()[2])
    assert named == pytest.approx(factor, rel=0.05 if scheme.bits > 2 else 0.25)


@pytest.mark.parametrize("scheme", [s for s in [*INTEGERS, TWO_BITS] if s.block], ids=str)
def test_the_scales_of_all_blocks_lost(reference, scheme):
    steps = step(reference, scheme)
    bare = compare(reference, roundtrip(reference, scheme) / steps, scheme)
    assert bare.fault.startswith("scales lost: the values are the bare codes in ")
    inverse = compare(reference, roundtrip(reference, scheme) / steps**2, scheme)
    assert inverse.fault.startswith("codes divided by their scales instead of multiplied in ")


@pytest.mark.parametrize("scheme", [s for s in BLOCKED if s.block[0] == 1 and s.bits > 3], ids=str)
def test_one_scale_lost_is_found_and_placed(reference, scheme):
    group = scheme.block[1]
    found = roundtrip(reference, scheme)
    found[9, :group] *= 3
    result = compare(reference, found, scheme)
    assert result.severity == "wrong"
    assert result.fault.startswith("scales lost or wrong: values are ")
    assert f"in 1 of {SIZE * SIZE // group} blocks (outputs 9 to 9, inputs 0 to {group - 1})" in result.fault


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_transposed(reference, scheme):
    square = roundtrip(reference, scheme).T.contiguous()
    assert compare(reference, square, scheme).fault == "transposed: inputs and outputs changed places"
    wide = torch.randn(64, SIZE, generator=generator(4))
    read = roundtrip(wide, scheme).T.reshape(64, SIZE)
    assert compare(wide, read, scheme).fault == "transposed: inputs and outputs changed places"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_permuted(reference, scheme):
    good = roundtrip(reference, scheme)
    rotary = torch.arange(SIZE).view(4, 2, 16).transpose(1, 2).flatten()
    fault = compare(reference, good[rotary], scheme).fault
    assert fault == "rows (outputs) permuted: rotary halves and pairs of 4 heads, as GGUF stores them"
    order = torch.randperm(SIZE, generator=generator(2))
    assert compare(reference, good[:, order], scheme).fault == "columns (inputs) permuted"
    packing = (torch.arange(SIZE).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]]).flatten()
    fault = compare(reference, good[packing], scheme).fault
    assert fault == "rows (outputs) permuted: packing order [0, 2, 4, 6, 1, 3, 5, 7] within every 8"


def test_rows_permuted_without_their_scales(reference):
    scheme = INTEGERS[0]
    steps = step(reference, scheme)
    codes = (roundtrip(reference, scheme) / steps)[torch.randperm(SIZE, generator=generator(2))]
    assert compare(reference, codes * steps, scheme).fault == "rows (outputs) permuted"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_rotation_left_over(reference, scheme):
    turned = roundtrip(reference @ hadamard(SIZE), scheme)
    fault = compare(reference, turned, scheme).fault
    assert fault == "a Hadamard rotation of size 128 is missing or left over on the input side"
    blocks = torch.block_diag(*[hadamard(32)] * 4)
    fault = compare(reference, roundtrip(blocks @ reference, scheme), scheme).fault
    assert fault == "a Hadamard rotation of size 32 in 4 blocks is missing or left over on the output side"
    any_other = roundtrip(reference @ orthogonal(SIZE), scheme)
    fault = compare(reference, any_other, scheme).fault
    assert fault == "rotated on the input side: an orthogonal transform is missing or left over"


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits > 2], ids=str)
def test_columns_rescaled(reference, scheme):
    factors = torch.randn(SIZE, generator=generator(6)).exp()
    fault = compare(reference, roundtrip(reference, scheme) * factors, scheme).fault
    assert "nothing undoes it" in fault or "scales lost" in fault
    assert fault.startswith("columns (inputs)") or scheme.block == (64, 1)


def test_group_order_lost(reference):
    scheme = INTEGERS[0]
    order = torch.randperm(SIZE, generator=generator(7))
    # Codes are made with groups of the sorted columns, and read with groups of neighbours.
    codes_step = step(reference[:, order], scheme)
    low = reference[:, order].unflatten(1, (-1, 32)).amin(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    codes = torch.empty_like(reference)
    codes[:, order] = ((reference[:, order] - low) / codes_step).round()
    fault = compare(reference, codes * codes_step + low, scheme).fault
    assert fault == "columns have the scales or zero points of other groups: the order of groups (g_idx) is lost"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_unrelated(reference, scheme):
    other = torch.randn(SIZE, SIZE, generator=generator(5)) * 0.05
    result = compare(reference, roundtrip(other, scheme), scheme)
    assert result.severity == "wrong"
    assert result.fault.startswith("unrelated to the reference (cosine ")


def test_a_damaged_block_is_told_by_its_place(reference):
    scheme = Scheme("int8", 8, (1, 32))
    found = roundtrip(reference, scheme)
    found[3, 32:64] += torch.randn(32, generator=generator(8)) * 0.02
    result = compare(reference, found, scheme)
    assert result.ratio < RATIO_LIMIT
    assert result.severity == "poor"
    assert result.fault.endswith("in 1 of 512 blocks (outputs 3 to 3, inputs 32 to 63)")


def test_pruned_weights_are_judged_as_pruned(reference):
    scheme = Scheme("e4m3", 8, (1, SIZE))
    result = compare(reference, roundtrip(prune(reference), scheme), scheme)
    assert result.ratio == pytest.approx(1, abs=0.01)
    assert not result.fault


def test_a_plain_vector(reference):
    scheme, vector = Scheme("float", 16), reference[:1]
    assert not compare(vector, vector.bfloat16().float(), scheme).fault
    assert compare(vector, vector + 0.01, scheme).severity == "wrong"
