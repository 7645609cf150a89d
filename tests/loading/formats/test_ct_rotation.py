"""Folded weights against a Linear that the library rotates at run time, and against products written out."""

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config

from tests.loading.formats.ct_stored import NAME, floats, group, stored, weight
from tracelens.errors import CheckpointError
from tracelens.loading.formats.compressed_tensors import _layout

OTHER = "model.layers.1.mlp.up_proj"
ROWS, COLUMNS = 8, 16


def hadamard(size):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    # Rows turned, so that it is not its own transpose.
    return matrix.roll(1, 0)


def transforms(*entries, name="R4", **scheme):
    apply = [
        {"targets": ["re:.*up_proj$"], "location": "input", "inverse": False, "ignore": [], **entry}
        for entry in entries
    ]
    return {
        "config_groups": {name: {"type": "hadamard", "apply": apply, "head_dim": None, "randomize": False, **scheme}}
    }


def codes(module=NAME, seed=0):
    values = torch.randint(-128, 128, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    scale = floats(ROWS, 1, seed=seed)
    return {f"{module}.weight": values, f"{module}.weight_scale": scale}, values * scale


def close(got, expected):
    return torch.allclose(got.double(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", [None, 4])
def test_input_and_output(inverse, size):
    tensors, plain = codes()
    bias = torch.randn(ROWS)
    wide, high = hadamard(size or COLUMNS), hadamard(size or ROWS)
    both = {f"{NAME}.R4_input.weight": wide, f"{NAME}.R4_output.weight": high, f"{NAME}.bias": bias}
    config = transforms({"inverse": inverse}, {"inverse": inverse, "location": "output"}, head_dim=size)
    checkpoint = stored({**tensors, **both}, group(num_bits=8), transform_config=config)
    right = torch.block_diag(*[wide / len(wide) ** 0.5] * (COLUMNS // len(wide)))
    left = torch.block_diag(*[high / len(high) ** 0.5] * (ROWS // len(high)))
    right, left = (right.T, left.T) if inverse else (right, left)
    assert close(weight(checkpoint), left.T @ plain.double() @ right.T)
    assert close(weight(checkpoint, f"{NAME}.bias"), bias.double() @ left)
    quantized = _layout(checkpoint).tensors[f"{NAME}.weight"]
    assert quantized.parts[0] == f"{NAME}.weight"
    assert {f"{NAME}.R4_input.weight", f"{NAME}.R4_output.weight"} < set(quantized.parts)
    assert "rotated" in quantized.scheme.notes


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
@pytest.mark.parametrize(("inverse", "size", "randomize"), [(False, None, False), (True, None, False), (True, 4, True)])
def test_the_library_computes_the_same(kind, inverse, size, randomize):
    randomize = randomize and kind != "random-matrix"
    config = transforms(
        {"inverse": inverse}, {"inverse": inverse, "location": "output"}, type=kind, head_dim=size, randomize=randomize
    )
    model = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(COLUMNS, ROWS)})
    model["up_proj"].weight.data = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    apply_transform_config(model, TransformConfig(**config))
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    checkpoint = stored(tensors, transform_config=config)
    inputs = torch.randn(5, COLUMNS)
    with torch.no_grad():
        expected = model["up_proj"](inputs)
    got = inputs @ weight(checkpoint, "up_proj.weight").T + weight(checkpoint, "up_proj.bias")
    assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
    assert str(_layout(checkpoint).tensors["up_proj.weight"].scheme) == "float, per tensor, rotated"


def test_a_matrix_is_stored_once_for_all():
    (first, plain), (second, other) = codes(), codes(OTHER, 7)
    matrix = hadamard(COLUMNS)
    checkpoint = stored(
        {**first, **second, f"{OTHER}.R4_input.weight": matrix}, group(num_bits=8), transform_config=transforms({})
    )
    assert close(weight(checkpoint), plain.double() @ matrix.T / 4)
    assert close(weight(checkpoint, f"{OTHER}.weight"), other.double() @ matrix.T / 4)
    shared = [set(quantized.parts) for quantized in _layout(checkpoint).tensors.values()]
    assert shared[0] & shared[1] == {f"{OTHER}.R4_input.weight"}


def test_targets_and_classes():
    (first, plain), (second, other) = codes(), codes(OTHER, 7)
    matrix = hadamard(COLUMNS)
    checkpoint = stored(
        {**first, **second, f"{NAME}.v_input.weight": matrix, "model.embed_tokens.weight": torch.ones(3, 5)},
        group(num_bits=8),
        transform_config=transforms({"targets": "Linear", "ignore": OTHER}, name="v"),
    )
    assert close(weight(checkpoint), plain.double() @ matrix.T / 4)
    assert torch.equal(weight(checkpoint, f"{OTHER}.weight"), other)
    assert set(_layout(checkpoint).tensors) == {f"{NAME}.weight", f"{OTHER}.weight"}


def test_what_is_in_the_weights_already_stays():
    tensors, plain = codes()
    config = transforms({"location": "weight_output"}, {"location": "weight_input"}, name="R1")
    checkpoint = stored(tensors, group(num_bits=8), transform_config=config)
    assert torch.equal(weight(checkpoint), plain)
    assert any("the weights hold the rotations R1:" in note for note in _layout(checkpoint).notes)


@pytest.mark.parametrize(
    ("entry", "scheme", "message"),
    [
        ({"location": "k_cache"}, {}, r"'R4' .*acts on 'k_cache' \(queries and keys at run time\).*original"),
        ({"location": "q_attn"}, {}, r"acts on 'q_attn'"),
        ({}, {"type": "cayley"}, r"is of the type 'cayley', expected hadamard"),
        ({}, {"requires_grad": True}, r"is learned \(requires_grad\)"),
        ({}, {"head_dim": 5}, r"blocks of 5 \(head_dim\), which do not divide the 16 of the input of"),
        ({}, {"head_dim": 8}, r"R4_input.weight in folder is \[16, 16\], expected \[8, 8\]"),
        ({}, {"randomize": True}, r"is randomized, but no .*R4_input.perm of size 16"),
        ({"targets": ["re:.*nowhere"]}, {}, r"acts on \['re:.*nowhere'\], and no module of it is stored"),
        ({"location": "output"}, {}, r"neither .*R4_output.weight nor another matrix of size 8 is stored"),
    ],
)
def test_what_cannot_be_folded_is_refused(entry, scheme, message):
    tensors, _ = codes()
    tensors[f"{NAME}.R4_input.weight"] = hadamard(COLUMNS)
    with pytest.raises(CheckpointError, match=message):
        _layout(stored(tensors, group(num_bits=8), transform_config=transforms(entry, **scheme)))


def test_missing_and_stray_matrices_are_refused():
    tensors, _ = codes()
    with pytest.raises(CheckpointError, match=r"neither .*R4_input.weight nor another matrix of size 16"):
        _layout(stored(tensors, group(num_bits=8), transform_config=transforms({})))
    tensors[f"{NAME}.R4_input.weight"] = hadamard(COLUMNS)
    with pytest.raises(CheckpointError, match="is the matrix of a rotation, and transform_config names none"):
        _layout(stored(tensors, group(num_bits=8)))
    two = transforms({})
    two["config_groups"]["R5"] = {**two["config_groups"]["R4"]}
    tensors[f"{NAME}.R5_input.weight"] = hadamard(COLUMNS)
    with pytest.raises(CheckpointError, match="two transforms, 'R4' and 'R5', act on the input"):
        _layout(stored(tensors, group(num_bits=8), transform_config=two))
    with pytest.raises(CheckpointError, match="expected config_groups alone"):
        _layout(stored(tensors, group(num_bits=8), transform_config={"groups": {}}))


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.layers.0.mlp.gate"])
def test_modules_of_other_classes_are_refused(module):
    tensors = {f"{module}.weight": torch.ones(4, 4)}
    config = transforms({"targets": [f"re:{module}"]})
    with pytest.raises(CheckpointError, match="which may be no Linear"):
        _layout(stored(tensors, transform_config=config))


def test_a_head_that_shares_the_embedding_is_refused():
    tensors, _ = codes()
    config = transforms({"targets": ["Linear"]})
    with pytest.raises(CheckpointError, match="acts on lm_head, which shares"):
        _layout(stored(tensors, group(num_bits=8), config={"tie_word_embeddings": True}, transform_config=config))


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_a_damaged_hadamard_matrix_is_refused(value):
    tensors, _ = codes()
    matrix = hadamard(COLUMNS)
    matrix[3, 5] *= value
    checkpoint = stored(
        {**tensors, f"{NAME}.R4_input.weight": matrix}, group(num_bits=8), transform_config=transforms({})
    )
    with pytest.raises(CheckpointError, match=r"R4_input\.weight in folder is no Hadamard matrix"):
        weight(checkpoint)
