"""What holds for every format of weights."""

import pytest
import torch

from tests.precision.matrices import awkward
from tracelens.errors import NonFiniteError, PrecisionSpecError
from tracelens.precision import QuantizationConfig, QuantizationType, blocks
from tracelens.precision.blocks import from_tiles, in_chunks, to_tiles
from tracelens.precision.rounding import round_weight

SPECS = [
    *(
        "int2",
        "int4",
        "int8",
        "int4-asym",
        "int3-g16",
        "int4-tensor",
        "int3-tensor-asym",
        "int4-g16-mse",
        "int2-asym-mse",
    ),
    *("int8-dynamic", "llm-int8", "llm-int8-weights", "nf4", "nf4-g32-dq", "fp4", "fp4-dq", "fp8", "fp8-tensor"),
    *("fp8-block", "fp8-e5m2", "fp8-e5m2-block", "nvfp4", "mxfp4", "mxfp8", "pruned-s50"),
]
PER_ROW = [spec for spec in SPECS if not any(k in spec for k in ("tensor", "block", "nf4", "nvfp4", "fp4", "pruned"))]
IDEMPOTENT = ["nf4", "fp4", "nf4-g32", "mxfp4", "mxfp8", "pruned-s50"]
IDEMPOTENT_BUT_FOR_THE_SCALE = ["fp8", "fp8-tensor", "fp8-block", "fp8-e5m2", "llm-int8"]


def rounded(matrix, spec, name="the weight"):
    return round_weight(matrix, QuantizationConfig.parse(spec), name)


def gaussian(out=48, width=160, seed=0):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def error(matrix, spec):
    return ((rounded(matrix, spec) - matrix).norm() / matrix.norm()).item()


def test_all_formats_are_among_those_tested():
    tested = {QuantizationConfig.parse(spec).type for spec in [*SPECS, "int3", "int5", "int6", "int7"]}
    untouched = {QuantizationType.FP32, QuantizationType.BF16, QuantizationType.FP16}
    assert tested | untouched == set(QuantizationType)
    for kind in untouched:
        matrix = gaussian()
        assert round_weight(matrix, QuantizationConfig(kind)) is matrix


@pytest.mark.parametrize("spec", SPECS)
def test_the_source_is_left_alone_whatever_its_memory_looks_like(spec):
    matrix = awkward(48, 160)
    before = matrix.clone()
    result = rounded(matrix, spec)
    assert torch.equal(matrix, before)
    assert not torch.equal(result, matrix)
    assert result.isfinite().all()
    assert result.shape == matrix.shape
    assert result.dtype is torch.float32
    assert torch.equal(rounded(matrix.T.contiguous().T, spec), result)
    wide = torch.cat([matrix, matrix], dim=1)
    assert torch.equal(rounded(wide[:, :160], spec), result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("spec", SPECS)
def test_other_dtypes_are_rounded_in_float32(spec, dtype):
    matrix = awkward(48, 160).to(dtype)
    result = rounded(matrix, spec)
    assert result.dtype is dtype
    expected = rounded(matrix.float(), spec)
    assert torch.equal(result, matrix * (expected != 0) if spec.startswith("pruned") else expected.to(dtype))


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_stay_zeros(spec):
    assert torch.equal(rounded(torch.zeros(3, 160), spec), torch.zeros(3, 160))
    assert torch.equal(rounded(awkward(48, 160), spec)[1], torch.zeros(160))


@pytest.mark.parametrize("spec", PER_ROW)
def test_rows_do_not_know_of_each_other(spec):
    matrix = awkward(48, 160)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(matrix[order], spec), rounded(matrix, spec)[order])


@pytest.mark.parametrize("spec", ["nf4", "fp4", "fp8", "nvfp4", "mxfp4", "mxfp8", "llm-int8", "pruned-s50"])
def test_formats_without_a_side_treat_signs_alike(spec):
    matrix = gaussian()
    flipped = rounded(-matrix, spec)
    if spec == "nf4":  # its table is lopsided
        assert not torch.equal(flipped, -rounded(matrix, spec))
    else:
        assert torch.equal(flipped, -rounded(matrix, spec))


@pytest.mark.parametrize("spec", IDEMPOTENT)
def test_twice_is_once(spec):
    once = rounded(awkward(48, 160), spec)
    assert torch.equal(rounded(once, spec), once)


@pytest.mark.parametrize("spec", IDEMPOTENT_BUT_FOR_THE_SCALE)
def test_twice_is_once_but_for_the_last_bit_of_the_scale(spec):
    once = rounded(awkward(48, 160), spec)
    torch.testing.assert_close(rounded(once, spec), once, rtol=5e-7, atol=0)


@pytest.mark.parametrize(
    ("spec", "size"),
    [("int2", 160), ("int3-g16", 16), ("int4-asym", 160), ("int4-g16-mse", 16), ("nvfp4", 16), ("mxfp4", 32)],
)
def test_a_group_has_no_more_values_than_codes(spec, size):
    groups = rounded(awkward(48, 160), spec).unflatten(1, (-1, size)).flatten(0, 1)
    most = max(len(group.unique()) for group in groups)
    codes = 2 ** QuantizationConfig.parse(spec).bits
    assert most <= codes
    assert size < codes or most > codes / 2


@pytest.mark.parametrize("options", ["", "-asym", "-g32", "-tensor", "-g32-asym-mse"])
def test_more_bits_are_closer(options):
    errors = [error(gaussian(), f"int{bits}{options}") for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def test_finer_and_cleverer_is_closer():
    matrix = gaussian(256, 512)
    for worse, better in [
        ("int4", "int4-mse"),
        ("int4-tensor", "int4"),
        ("int4", "int4-g32"),
        ("int4-g32", "int4-g32-asym"),
        ("fp4", "nf4"),
        ("mxfp4", "nvfp4"),
        ("nf4", "mxfp8"),
        ("fp8-e5m2", "fp8"),
        ("fp8", "llm-int8"),
        ("pruned-s50", "pruned-s20"),
    ]:
        assert error(matrix, better) < error(matrix, worse), (better, worse)


def test_per_tensor_is_one_row():
    matrix = gaussian()
    flat = matrix.view(1, -1)
    for kind in ("int4", "int3-asym", "fp8", "fp8-e5m2"):
        name, *options = kind.split("-asym")
        assert torch.equal(rounded(matrix, f"{name}-tensor{'-asym' * len(options)}"), rounded(flat, kind).view(48, 160))


def test_blocks_of_fp8_are_squares_of_128():
    matrix = awkward(300, 272)
    result = rounded(matrix, "fp8-block")
    for top in range(0, 300, 128):
        for left in range(0, 272, 128):
            square = (slice(top, top + 128), slice(left, left + 128))
            assert torch.equal(result[square], rounded(matrix[square].contiguous(), "fp8-tensor"))


def test_tiles_go_back():
    matrix = gaussian(10, 7)
    tiles = to_tiles(matrix, 4)
    assert tiles.shape == (3 * 2, 16)
    assert tiles[1].view(4, 4)[:, :3].equal(matrix[:4, 4:])
    assert not tiles[1].view(4, 4)[:, 3].any()
    assert torch.equal(from_tiles(tiles, 4, matrix.shape), matrix)


@pytest.mark.parametrize("spec", SPECS)
def test_chunks_do_not_show(spec, monkeypatch):
    matrix = awkward(48, 160)
    whole = rounded(matrix, spec)
    seen = []
    monkeypatch.setattr(blocks, "_CHUNK", 320)
    assert torch.equal(rounded(matrix, spec), whole)
    in_chunks(lambda rows, beside: seen.append((rows.shape[0], beside.tolist())) or rows, matrix[:5], torch.arange(5))
    assert seen == [(2, [0, 1]), (2, [2, 3]), (1, [4])]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_by_name(spec, bad):
    matrix = gaussian()
    matrix[3, 4] = bad
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.mlp\.W_in holds NaN or infinity .* cannot be rounded to"):
        rounded(matrix, spec, "blocks.0.mlp.W_in")


def test_llm_int8_goes_through_float16_and_says_so():
    matrix = gaussian()
    matrix[3, 4] = 1e6
    with pytest.raises(NonFiniteError, match=r"W_in does not fit float16: its largest magnitude is 1e\+06"):
        rounded(matrix, "llm-int8", "W_in")
    assert rounded(matrix, "int8").isfinite().all()


@pytest.mark.parametrize(("spec", "group"), [("nvfp4", 16), ("mxfp4", 32), ("mxfp8", 32)])
def test_groups_that_do_not_fit_and_cannot_be_others(spec, group):
    with pytest.raises(PrecisionSpecError) as caught:
        rounded(gaussian(4, 40), spec, "W_out")
    assert f"group size {group} does not divide the input width 40 of W_out, and {spec} has no other" in str(
        caught.value
    )


def test_a_group_size_that_does_not_fit_says_which_do():
    with pytest.raises(
        PrecisionSpecError, match=r"group size 32 does not divide the input width 40 of W_out; .*: 2, 4, 5, 8"
    ):
        rounded(gaussian(4, 40), "int4-g32", "W_out")
