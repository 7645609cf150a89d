"""Each layout against weights computed one at a time, or against the library that writes it; and what is refused."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from tests.loading.formats.ct_stored import (
    NAME,
    by_hand,
    floats,
    group,
    integers,
    pack_stream,
    pack_words,
    stored,
    unsigned,
    weight,
)
from tracelens.errors import CheckpointError
from tracelens.loading.formats.compressed_tensors import _layout, _recognise

E4M3 = torch.float8_e4m3fn
ROWS, COLUMNS = 10, 64


def packed(bits, size=None, symmetric=True, packer=pack_stream, rows=ROWS, columns=COLUMNS):
    """Tensors of one module, its config group, and the weight they stand for."""
    codes, blocks = integers(rows, columns, bits), 1 if size is None else columns // size
    scale = floats(rows, blocks)
    tensors = {
        "weight_packed": packer(unsigned(codes, bits), bits),
        "weight_shape": torch.tensor([rows, columns]),
        "weight_scale": scale,
    }
    zero = None
    if not symmetric:
        zero = integers(rows, max(blocks, 2), bits, seed=3)[:, :blocks]
        tensors["weight_zero_point"] = packer(unsigned(zero.T, bits), bits).T.contiguous()
    shared = {"strategy": "group", "group_size": size} if size else {}
    return tensors, group(num_bits=bits, symmetric=symmetric, **shared), by_hand(codes, scale, zero)


@pytest.mark.parametrize("packer", [pack_stream, pack_words])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("size", "symmetric"), [(None, True), (16, True), (None, False), (16, False)])
def test_packed(bits, size, symmetric, packer):
    tensors, entry, expected = packed(bits, size, symmetric, packer)
    checkpoint = stored(tensors, entry, format="pack-quantized")
    assert torch.equal(weight(checkpoint), expected)
    quantized = _layout(checkpoint).tensors[f"{NAME}.weight"]
    assert quantized.parts[0] == f"{NAME}.weight_packed"
    assert set(quantized.parts) == {f"{NAME}.{part}" for part in tensors}
    assert (quantized.scheme.code, quantized.scheme.symmetric) == (f"int{bits}", symmetric)
    assert quantized.scheme.block == (1, size or COLUMNS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_fewer_bits(dtype):
    tensors, entry, _ = packed(4, 16)
    tensors["weight_scale"] = tensors["weight_scale"].to(dtype)
    codes = integers(ROWS, COLUMNS, 4)
    assert torch.equal(weight(stored(tensors, entry)), by_hand(codes, tensors["weight_scale"]))


def test_rows_beyond_what_is_computed_together(monkeypatch):
    monkeypatch.setattr("tracelens.loading.formats.ct_scales.CACHED", 3 * COLUMNS)
    for symmetric in (True, False):
        tensors, entry, expected = packed(4, 16, symmetric)
        assert torch.equal(weight(stored(tensors, entry)), expected)


def test_one_scale_for_the_whole_weight():
    codes, zero = integers(ROWS, COLUMNS, 4), torch.tensor([-3], dtype=torch.int8)
    tensors = {
        "weight_packed": pack_stream(unsigned(codes, 4), 4),
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
        "weight_scale": torch.tensor([0.3]),
        "weight_zero_point": zero,
    }
    expected = by_hand(codes, torch.full((ROWS, 1), 0.3), torch.full((ROWS, 1), -3))
    assert torch.equal(weight(stored(tensors, group(strategy="tensor", symmetric=False))), expected)


def test_zero_points_that_are_not_packed():
    tensors, entry, expected = packed(4, 16, False)
    zero = integers(ROWS, COLUMNS // 16, 4, seed=3).to(torch.int8)
    assert torch.equal(weight(stored({**tensors, "weight_zero_point": zero}, entry)), expected)
    with pytest.raises(
        CheckpointError, match=r"weight_zero_point .*holds values from -128 to .*expected -8 to 7 for num_bits 4"
    ):
        weight(stored({**tensors, "weight_zero_point": zero.fill_diagonal_(-128)}, entry))


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_in_the_order_of_activations(symmetric):
    size, codes, scale = 16, integers(ROWS, COLUMNS, 4), floats(ROWS, 4)
    index = (torch.arange(COLUMNS) // size)[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(5))]
    zero = None if symmetric else integers(ROWS, 4, 4, seed=3)
    tensors = {
        "weight_packed": pack_stream(unsigned(codes, 4), 4),
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
        "weight_scale": scale,
        "weight_g_idx": index.int(),
    }
    if zero is not None:
        tensors["weight_zero_point"] = pack_stream(unsigned(zero.T, 4), 4).T.contiguous()
    entry = group(strategy="group", group_size=size, symmetric=symmetric, actorder="group")
    checkpoint = stored(tensors, entry)
    assert torch.equal(weight(checkpoint), by_hand(codes, scale, zero, index))
    assert "act-order" in _layout(checkpoint).tensors[f"{NAME}.weight"].scheme.notes
    unset = stored({**tensors, "weight_g_idx": torch.full_like(tensors["weight_g_idx"], -1)}, entry)
    assert torch.equal(weight(unset), by_hand(codes, scale, zero))
    for place, value in ((0, 4), (0, -1), (int((index != index[0]).nonzero()[0]), int(index[0]))):
        wrong = tensors["weight_g_idx"].clone()
        wrong[place] = value
        with pytest.raises(CheckpointError, match=r"weight_g_idx .*must name each of 4 groups 16 times"):
            _layout(stored({**tensors, "weight_g_idx": wrong}, entry))
    tensors.pop("weight_g_idx")
    with pytest.raises(CheckpointError, match=r"lack '.*weight_g_idx', though .*actorder"):
        _layout(stored(tensors, entry))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_without_a_group_shapes_tell(bits):
    tensors, _, expected = packed(bits, 16, False, columns=192)
    if bits == 8:
        with pytest.raises(CheckpointError, match="fit 7 or 8 bits; which cannot be told"):
            weight(stored(tensors))
        return
    checkpoint = stored(tensors)
    assert torch.equal(weight(checkpoint), expected)
    assert any("named by no group" in note for note in _layout(checkpoint).notes)


def test_a_short_row_may_be_packed_in_two_ways():
    tensors, entry, _ = packed(3, columns=16)
    with pytest.raises(CheckpointError, match="2 words fit 3 or 4 bits in two ways; which cannot be told"):
        _layout(stored(tensors, entry))
    tensors, entry, expected = packed(3, columns=8)
    assert torch.equal(weight(stored(tensors, entry)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_bits": 8},
            r"expected 16 words for 64 columns of 8 bits \(num_bits of config group 'group_0'\), and 8 words fit 4",
        ),
        ({"group_size": 32}, r"weight_scale .*\[10, 4\], expected \[10, 2\] .*group_size 32.*which is group_size 16"),
        ({"strategy": "channel"}, r"expected \[10, 1\] .*a scale for each output"),
        ({"strategy": "tensor"}, r"expected \[1\]: config group 'group_0' has one scale for the whole"),
        ({"type": "float"}, r"has 4-bit float weights, but the tensors of .*up_proj hold int codes"),
        ({"symmetric": False}, r"lack '.*weight_zero_point', though config group 'group_0' is not symmetric"),
        ({"strategy": "odd"}, r"quantizes weights per 'odd', expected tensor, channel"),
        ({"num_bits": 16}, r"num_bits 16, expected 1 to 8"),
        ({"group_size": 0}, r"group_size 0 with the strategy 'group'"),
        ({"strategy": "block"}, r"block_structure None, expected two positive"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message):
    tensors, entry, _ = packed(4, 16)
    entry["weights"].update(change)
    with pytest.raises(CheckpointError, match=message):
        _layout(stored(tensors, entry))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_shape", torch.tensor([10, 128]), r"expected 16 words for 128 columns of 4 bits.*8 words fit 2"),
        ("weight_shape", torch.tensor([11, 64]), r"weight_packed .*\[10, 8\], expected 11 rows"),
        ("weight_shape", torch.tensor([10, 63]), r"weight_scale .*group_size 16"),
        ("weight_shape", torch.tensor([2, 5, 64]), r"says that the weight is \[2, 5, 64\], expected a matrix"),
        ("weight_packed", torch.zeros(10, 8, dtype=torch.int64), r"weight_packed .*int64.*expected int32 or uint8"),
        ("weight_scale", torch.ones(10, 4, dtype=torch.int32), r"weight_scale .*expected floating-point scales"),
        ("weight_zero_point", torch.zeros(1, 4, dtype=torch.int32), r"weight_zero_point .*expected int32 \[2, 4\]"),
        ("weight_zero_point", torch.zeros(2, 4, dtype=torch.int32), r"holds zero points, but .*symmetric"),
        ("weight_global_scale", torch.ones(1), r"weight_global_scale .*have no place in a pack-quantized module"),
        ("weight", torch.ones(10, 64), r"up_proj.weight .*have no place"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(part, value, message):
    tensors, entry, _ = packed(4, 16)
    with pytest.raises(CheckpointError, match=message):
        _layout(stored({**tensors, part: value}, entry))


@pytest.mark.parametrize("part", ["weight_packed", "weight_shape", "weight_scale"])
def test_a_missing_part_is_named(part):
    tensors, entry, _ = packed(4, 16)
    tensors.pop(part)
    with pytest.raises(CheckpointError, match=rf"lack '{NAME}\.(weight|{part})'; get the whole"):
        _layout(stored(tensors, entry))


def test_codes_beyond_the_stored_shape_are_refused():
    codes, entry = integers(4, 62, 4), group()
    tensors = {"weight_packed": pack_stream(unsigned(codes, 4), 4), "weight_scale": floats(4, 1)}
    assert torch.equal(
        weight(stored({**tensors, "weight_shape": torch.tensor([4, 62])}, entry)), by_hand(codes, floats(4, 1))
    )
    with pytest.raises(CheckpointError, match=r"codes beyond the columns that .*weight_shape says"):
        weight(stored({**tensors, "weight_shape": torch.tensor([4, 61])}, entry))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("zeros", [None, torch.int8, torch.int32])
def test_integers_one_by_one(bits, zeros):
    codes, scale = integers(ROWS, COLUMNS, bits), floats(ROWS, 4)
    zero = None if zeros is None else integers(ROWS, 4, bits, seed=3).to(zeros)
    tensors = {"weight": codes.to(torch.int8), "weight_scale": scale}
    tensors |= {} if zero is None else {"weight_zero_point": zero}
    entry = group(num_bits=bits, strategy="group", group_size=16, symmetric=zero is None)
    for name in ("int-quantized", "naive-quantized"):
        assert torch.equal(weight(stored(tensors, entry, format=name)), by_hand(codes, scale, zero))
    if bits < 8:
        tensors["weight"][3, 3] = 2 ** (bits - 1)
        with pytest.raises(CheckpointError, match=rf"weight in folder holds values .*for num_bits {bits}"):
            weight(stored(tensors, entry))


def test_float_codes_and_their_blocks():
    codes = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(E4M3)
    for scale, arguments in [
        (floats(ROWS, 1), {"strategy": "channel"}),
        (floats(ROWS), {"strategy": "channel"}),
        (floats(1), {"strategy": "tensor"}),
        (floats(1)[0], {"strategy": "tensor"}),
        (floats(3, 5), {"strategy": "block", "block_structure": [4, 15]}),
        (floats(3, 5), {"strategy": "block", "block_structure": "4x15"}),
    ]:
        entry = group(num_bits=8, type="float", **arguments)
        spread = torch.empty(ROWS, COLUMNS)
        for n in range(ROWS):
            for k in range(COLUMNS):
                spread[n, k] = scale[n // 4, k // 15] if scale.shape == (3, 5) else scale.flatten()[n % scale.numel()]
        got = weight(stored({"weight": codes, "weight_scale": scale}, entry, format="float-quantized"))
        assert torch.equal(got, codes.float() * spread)


@pytest.mark.parametrize(
    ("tensors", "arguments", "message"),
    [
        (
            {"weight_scale": floats(3, 4)},
            {"strategy": "block", "block_structure": [4, 15]},
            r"\[3, 4\], expected \[3, 5\]",
        ),
        ({"weight_scale": floats(3, 4)}, None, "no group of config.json names this module"),
        (
            {"weight_scale": floats(10, 1), "weight_zero_point": floats(10, 1)},
            {},
            "belongs to no format of float codes",
        ),
        (
            {"weight": torch.ones(10, 64), "weight_scale": floats(10, 1)},
            {},
            r"expected int8 or float8.*before it was compressed",
        ),
        ({"weight_scale": floats(10, 1)}, {"num_bits": 4}, "has 4-bit float weights, but .* 8-bit float codes"),
        ({}, {}, r"lack '.*weight_scale'"),
        ({"weight": torch.ones(2, 5, 64).to(E4M3), "weight_scale": floats(2, 1)}, {}, "expected a matrix"),
    ],
)
def test_floats_that_are_refused(tensors, arguments, message):
    entries = [] if arguments is None else [group(**{"num_bits": 8, "type": "float", **arguments})]
    with pytest.raises(CheckpointError, match=message):
        _layout(stored({"weight": torch.ones(10, 64).to(E4M3), **tensors}, *entries))


def four_bits():
    octets = torch.arange(256, dtype=torch.uint8).repeat(2).view(8, 64)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    rows = [
        [s * values[c & 7] for o in row for c in (o & 15, o >> 4) for s in [-1.0 if c & 8 else 1.0]]
        for row in octets.tolist()
    ]
    return octets, torch.tensor(rows)


def test_nvfp4_and_mxfp4():
    octets, values = four_bits()
    scale, whole = floats(8, 8).to(E4M3), torch.tensor([7.3])
    entry = group(type="float", strategy="tensor_group", group_size=16)
    tensors = {"weight_packed": octets, "weight_scale": scale, "weight_global_scale": whole}
    expected = values * (scale.float() / whole).repeat_interleave(16, 1)
    for checkpoint in (stored(tensors, entry, format="nvfp4-pack-quantized"), stored(tensors)):
        got = weight(checkpoint)
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32))  # signs of zero too

    power = torch.randint(100, 140, (8, 4), dtype=torch.uint8)
    entry = group(type="float", strategy="group", group_size=32)
    expected = values * (2.0 ** (power.double() - 127)).float().repeat_interleave(32, 1)
    for dtype in (torch.uint8, torch.float8_e8m0fnu):
        checkpoint = stored(
            {"weight_packed": octets, "weight_scale": power.view(dtype)}, entry, format="mxfp4-pack-quantized"
        )
        assert torch.equal(weight(checkpoint).view(torch.int32), expected.view(torch.int32))


def test_mxfp8():
    codes = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(E4M3)
    power = torch.tensor([[120, 127], [1, 130], [125, 126], [128, 90]], dtype=torch.uint8)
    entry = group(num_bits=8, type="float", strategy="group", group_size=32)
    expected = codes.float() * (2.0 ** (power.double() - 127)).float().repeat_interleave(32, 1)
    assert torch.equal(
        weight(stored({"weight": codes, "weight_scale": power}, entry, format="mxfp8-quantized")), expected
    )
    with pytest.raises(CheckpointError, match="a power of two for each 32 of 64 columns"):
        _layout(stored({"weight": codes, "weight_scale": power[:, :1].contiguous()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_global_scale": None}, r"lack '.*weight_global_scale'"),
        ({"weight_global_scale": torch.ones(2)}, "expected one value"),
        ({"weight_scale": floats(8, 8)}, r"expected uint8 powers of two \(MXFP4\) or float8_e4m3fn"),
        (
            {"weight_scale": floats(8, 4).to(E4M3)},
            r"\[8, 4\], expected \[8, 8\] .*group_size 16.*which is group_size 32",
        ),
        ({"weight_zero_point": torch.zeros(8, 8)}, "belongs to no 4-bit float"),
    ],
)
def test_four_bit_floats_that_are_refused(change, message):
    tensors = {
        "weight_packed": four_bits()[0],
        "weight_scale": floats(8, 8).to(E4M3),
        "weight_global_scale": torch.ones(1),
    }
    tensors = {name: value for name, value in (tensors | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        _layout(stored(tensors, group(type="float", strategy="tensor_group", group_size=16)))


LIBRARY = {
    "pack-quantized": [
        {
            "num_bits": bits,
            "strategy": strategy,
            "symmetric": symmetric,
            **({"group_size": 32} if strategy == "group" else {}),
        }
        for bits in (2, 3, 4, 5, 6, 7, 8)
        for strategy in ("group", "channel")
        for symmetric in (True, False)
    ],
    "int-quantized": [{"num_bits": 8, "strategy": "channel"}, {"num_bits": 4, "strategy": "group", "group_size": 32}],
    "float-quantized": [{"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 48]}],
    "nvfp4-pack-quantized": [{"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}],
    "mxfp4-pack-quantized": [
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    ],
    "mxfp8-quantized": [
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    ],
}


@pytest.mark.parametrize(
    ("name", "arguments"), [(name, entry) for name, entries in LIBRARY.items() for entry in entries]
)
def test_what_the_library_writes_is_what_it_reads(name, arguments):
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=name)
    rows, columns = 96, 128
    plain = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    blocks = {"channel": (rows, 1), "block": (2, 3)}.get(
        arguments["strategy"], (rows, columns // (args.group_size or 1))
    )
    scale = 2.0 ** torch.randint(-4, 0, blocks, generator=torch.Generator().manual_seed(1))
    scale = scale if name.startswith("mx") else scale * floats(*blocks)
    state = {"weight": plain, "weight_scale": scale.to(E4M3).float() if name.startswith("nv") else scale}
    if not args.symmetric:
        low = -(2 ** (args.num_bits - 1))
        state["weight_zero_point"] = torch.randint(low, -low, blocks, generator=torch.Generator().manual_seed(2)).to(
            torch.int8
        )
    if name.startswith("nv"):
        state["weight_global_scale"] = torch.tensor([3.7])
    library = BaseCompressor.get_value_from_registry(name)
    compressed = library.compress(state, scheme)
    expected = library.decompress(compressed, scheme)["weight"]
    got = weight(stored(compressed, group(**arguments), format=name))
    assert torch.equal(got.to(expected.dtype), expected)  # the library decodes 4-bit floats in bfloat16


def test_each_module_finds_its_group():
    module = "model.layers.{}.self_attn.q_proj"
    fp8 = {"weight": torch.ones(4, 64).to(E4M3), "weight_scale": floats(4, 1)}
    four, entry4, expected4 = packed(4)
    three, entry3, expected3 = packed(3)
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    groups = [
        group(["re:.*self_attn.*"], "float-quantized", inputs, num_bits=8, type="float"),
        {**entry4, "targets": ["Linear"], "format": "pack-quantized"},
        {**entry3, "targets": [module.format(1)], "format": "pack-quantized"},
        {**entry3, "targets": ["Embedding"], "format": "pack-quantized"},
    ]  # fmt: skip
    tensors = {f"{module.format(0)}.{part}": value for part, value in fp8.items()}
    tensors |= four
    tensors |= {f"{module.format(1)}.{part}": value for part, value in three.items()}
    tensors |= {f"model.embed_tokens.{part}": value for part, value in three.items()}
    tensors["lm_head.weight"] = torch.ones(4, 4)  # targeted by a class, but plain
    checkpoint = stored(tensors, *groups, format="mixed-precision", ignore=["lm_head"])
    assert torch.equal(weight(checkpoint), expected4)
    assert torch.equal(weight(checkpoint, f"{module.format(1)}.weight"), expected3)
    assert torch.equal(weight(checkpoint, "model.embed_tokens.weight"), expected3)
    layout = _layout(checkpoint)
    assert layout.format == "compressed-tensors (float-quantized, pack-quantized)"
    assert "lm_head.weight" not in layout.tensors
    assert [note for note in layout.notes if "inputs of 1 modules" in note and "8-bit float per token" in note]


@pytest.mark.parametrize("target", ["lm_head", "re:.*lm_head", "re:^embed_out$"])
def test_a_target_may_have_another_name_than_the_tensors(target):
    """transformers gives the tensors of GPT-NeoX their old names when it saves them, and leaves the groups."""
    eight, entry8, expected8 = packed(8)
    four, entry4, expected4 = packed(4)
    groups = [{**entry4, "targets": ["Linear"]}, {**entry8, "targets": [target]}]
    tensors = four | {f"embed_out.{part}": value for part, value in eight.items()}
    checkpoint = stored(tensors, *groups, format="pack-quantized", config={"architectures": ["GPTNeoXForCausalLM"]})
    assert torch.equal(weight(checkpoint, "embed_out.weight"), expected8)
    assert torch.equal(weight(checkpoint), expected4)


def test_runtime_tensors_and_the_cache():
    tensors, entry, expected = packed(4)
    names = [
        "up_proj.input_scale",
        "up_proj.input_global_scale",
        "up_proj.input_zero_point",
        "k_proj.output_scale",
        "k_scale",
        "v_scale",
    ]
    runtime = {f"model.layers.0.{name}": torch.ones(1) for name in names}
    checkpoint = stored(
        {**tensors, **runtime}, entry, kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"}
    )
    assert torch.equal(weight(checkpoint), expected)
    layout = _layout(checkpoint)
    assert set(layout.runtime) == set(runtime)
    assert any("KV cache too (8-bit float per tensor)" in note for note in layout.notes)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("float-quantized", r"is in the format 'float-quantized', but the tensors of .*up_proj are pack-quantized"),
        ("packed-anew", r"stored in the format 'packed-anew', which is not known; known are pack-quantized"),
        ("marlin-24", r"format 'marlin-24' .*full-precision original"),
    ],
)
def test_formats_that_are_refused(format, message):
    tensors, entry, _ = packed(4)
    with pytest.raises(CheckpointError, match=message):
        _layout(stored(tensors, entry, format=format))


def test_other_refusals():
    tensors, entry, _ = packed(4)
    with pytest.raises(CheckpointError, match=r"'marlin-24' \(.*scale_packed\).*original"):
        _layout(
            stored(
                {
                    "weight_packed": torch.zeros(2, 2, dtype=torch.int32),
                    "scale_packed": torch.ones(2),
                    "meta": torch.ones(2),
                }
            )
        )
    with pytest.raises(CheckpointError, match="expected an object with targets"):
        _layout(stored(tensors, config_groups={"W4A16": ["Linear"]}))
    with pytest.raises(CheckpointError, match="is no regular expression"):
        _layout(stored(tensors, {**entry, "targets": ["re:("]}))
    conv = {f"transformer.h.0.attn.c_attn.{part}": value for part, value in tensors.items()}
    with pytest.raises(CheckpointError, match=r"c_attn .*Conv1D of GPT-2"):
        _layout(stored(conv, entry, config={"model_type": "gpt2"}))


def test_auto_round_writes_the_same_tensors():
    octets, values = four_bits()
    power = torch.full((8, 4), 126, dtype=torch.uint8)
    config = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:llm_compressor",
        "data_type": "mx_fp",
        "bits": 4,
        "group_size": 32,
    }
    checkpoint = stored({"weight_packed": octets, "weight_scale": power}, **config, act_bits=4, act_data_type="mx_fp")
    assert _recognise(checkpoint)
    assert torch.equal(weight(checkpoint), values / 2)
    layout = _layout(checkpoint)
    assert layout.format == "auto-round (mxfp4-pack-quantized)"
    assert any("4-bit mx_fp" in note for note in layout.notes)
    with pytest.raises(CheckpointError, match="group_size 16"):
        _layout(stored({"weight_packed": octets, "weight_scale": power}, **config | {"group_size": 16}))
    mixed = stored({"weight_packed": octets, "weight_scale": power}, **config, extra_config={NAME: {"bits": 4}})
    assert torch.equal(weight(mixed), values / 2)


def test_what_is_recognised():
    assert _recognise(stored({"weight": torch.ones(2, 2)}))
    assert _recognise(stored({"weight_packed": torch.ones(2, 2)}, quant_method=""))
    assert not _recognise(stored({"weight": torch.ones(2, 2)}, quant_method=""))
    assert not _recognise(stored({"qweight": torch.ones(2, 2)}, quant_method="gptq"))
    assert not _recognise(
        stored({"weight": torch.ones(2, 2)}, quant_method="auto-round", packing_format="auto_round:fp8")
    )
    assert _layout(stored({"weight": torch.ones(2, 2)})).format == "compressed-tensors (dense)"
