"""Sparse weights against loops over bits."""

import pytest
import torch

from tests.loading.formats.ct_stored import NAME, floats, group, stored, weight
from tracelens.errors import CheckpointError
from tracelens.loading.formats.compressed_tensors import _layout

ROWS, COLUMNS = 6, 20
CONFIG = {"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}}


def two_of_four():
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(4, generator=generator) < 2 for _ in range(ROWS * COLUMNS // 4)])
    return places.view(ROWS, COLUMNS)


def bits(places):
    """Column 8 i + j in bit j of byte i."""
    columns = places.shape[1]
    return torch.tensor(
        [
            [sum(int(row[8 * i + j]) << j for j in range(8) if 8 * i + j < columns) for i in range(-(-columns // 8))]
            for row in places
        ],
        dtype=torch.uint8,
    )


def compressed(dense, places):
    return {
        "compressed": dense[places].view(ROWS, -1),
        "bitmask": bits(places),
        "shape": torch.tensor([[ROWS], [COLUMNS]]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_of_four(dtype):
    places = two_of_four()
    dense = (torch.randn(ROWS, COLUMNS) * places).to(dtype)
    checkpoint = stored(compressed(dense, places), **CONFIG)
    assert torch.equal(weight(checkpoint), dense.float())
    layout = _layout(checkpoint)
    assert layout.format == "compressed-tensors (sparse-24-bitmask)"
    assert layout.tensors[f"{NAME}.weight"].parts[0] == f"{NAME}.compressed"
    assert "2:4 sparse" in layout.tensors[f"{NAME}.weight"].scheme.notes


def test_with_codes_and_scales():
    places, scale = two_of_four(), floats(ROWS, 1)
    dense = (torch.randn(ROWS, COLUMNS) * places).to(torch.float8_e4m3fn)
    raw = compressed(dense.view(torch.int8), places)
    raw["compressed"] = raw["compressed"].view(torch.float8_e4m3fn)
    entry = group(num_bits=8, type="float")
    assert torch.equal(weight(stored({**raw, "weight_scale": scale}, entry, **CONFIG)), dense.float() * scale)

    codes = torch.randint(-128, 128, (ROWS, COLUMNS)) * places
    raw = compressed(codes.to(torch.int8), places)
    assert torch.equal(weight(stored({**raw, "weight_scale": scale}, group(num_bits=8), **CONFIG)), codes * scale)


@pytest.mark.parametrize("within", ["", "weight."])  # version 0.4 wrote the second
def test_any_number_in_a_row(within):
    dense = torch.randn(ROWS, COLUMNS) * (torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % 7 < 3)
    places = dense != 0
    counts = places.sum(1)
    parts = {"compressed": dense[places], "bitmask": bits(places), "shape": torch.tensor([ROWS, COLUMNS])}
    parts["row_offsets"] = counts.cumsum(0) - counts
    tensors = {f"{NAME}.{within}{part}": value for part, value in parts.items()}
    checkpoint = stored(tensors, sparsity_config={"format": "sparse-bitmask"})
    assert torch.equal(weight(checkpoint), dense)
    assert _layout(checkpoint).format == "compressed-tensors (sparse-bitmask)"


def test_a_bitmask_that_does_not_fit_is_refused():
    places = two_of_four()
    good = compressed(torch.randn(ROWS, COLUMNS), places)
    more = good["bitmask"].clone()
    more[0, 0] |= 15
    with pytest.raises(CheckpointError, match=r"bitmask .*marks 62 places, expected the 60 of .*two in each four"):
        weight(stored({**good, "bitmask": more}))
    moved = places.clone()  # as many, but three and one
    moved[0, :8] = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0]).bool()
    with pytest.raises(CheckpointError, match="two in each four; the checkpoint is damaged"):
        weight(stored({**good, "bitmask": bits(moved)}))
    for part, value, message in [
        ("bitmask", more[:, :2].contiguous(), r"bitmask .*expected uint8 \[6, 3\]"),
        ("compressed", good["compressed"][:, :8].contiguous(), r"compressed .*\[6, 8\], expected \[6, 10\], half"),
        ("compressed", good["compressed"].to(torch.int8), "expected floating-point weights, or weight_scale"),
        ("shape", torch.tensor([6]), r"says that the weight is \[6\]"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            _layout(stored({**good, part: value}))
    good.pop("bitmask")
    with pytest.raises(CheckpointError, match=r"lack '.*bitmask'"):
        _layout(stored(good))
