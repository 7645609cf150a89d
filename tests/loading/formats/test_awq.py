import json
import random

import pytest
import torch
from safetensors.torch import save_file

from tracelens.errors import CheckpointError, NonFiniteError
from tracelens.loading.checkpoint import Checkpoint

M = "model.layers.0.mlp.down_proj"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble of a word of gemm -> column."""


def signed(word: int, bits: int = 32) -> int:
    return word - 2**bits if word >= 2 ** (bits - 1) else word


def words(codes: list[int], bits: int = 4, order=None) -> list[int]:
    per = 32 // bits
    order = order or range(per)
    blocks = [codes[start : start + per] for start in range(0, len(codes), per)]
    return [signed(sum(block[order[i]] << i * bits for i in range(per))) for block in blocks]


def numbers(inputs, outputs, groups, bits=4, seed=0):
    """Codes (N, K), zero points (G, N), fp16 scales (G, N)."""
    rng = random.Random(seed)
    codes = [[rng.randrange(2**bits) for _ in range(inputs)] for _ in range(outputs)]
    zeros = [[rng.randrange(2**bits) for _ in range(outputs)] for _ in range(groups)]
    scales = torch.tensor([[rng.uniform(0.01, 1) for _ in range(outputs)] for _ in range(groups)]).half()
    return codes, zeros, scales


def product(codes, zeros, scales, group):
    return torch.tensor(
        [
            [scales[k // group, n].item() * (q - zeros[k // group][n]) for k, q in enumerate(row)]
            for n, row in enumerate(codes)
        ]
    )


def gemm(inputs=64, outputs=32, group=32, bits=4):
    codes, zeros, scales = numbers(inputs, outputs, inputs // group, bits)
    order = ORDER if bits == 4 else None
    columns = [[row[k] for row in codes] for k in range(inputs)]
    tensors = {
        f"{M}.qweight": torch.tensor([words(column, bits, order) for column in columns], dtype=torch.int32),
        f"{M}.qzeros": torch.tensor([words(row, bits, order) for row in zeros], dtype=torch.int32),
        f"{M}.scales": scales,
    }
    return tensors, product(codes, zeros, scales, group)


def padded(inputs, group):
    """AutoAWQ's number of groups, padded."""
    multiple = {64: 2, 32: 4}.get(group, 1)
    width = -(-(inputs // group) // 8)
    return 8 * -(-width // multiple) * multiple


def gemv(inputs=128, outputs=16, group=64):
    codes, zeros, scales = numbers(inputs, outputs, inputs // group)
    pad = padded(inputs, group)
    wide = torch.zeros(outputs, pad, dtype=torch.float16)
    wide[:, : inputs // group] = scales.t()
    filled = [[row[n] for row in zeros] + [0] * (pad - len(zeros)) for n in range(outputs)]
    tensors = {
        f"{M}.qweight": torch.tensor([words(row) for row in codes], dtype=torch.int32),
        f"{M}.qzeros": torch.tensor([words(row) for row in filled], dtype=torch.int32),
        f"{M}.scales": wide,
    }
    return tensors, product(codes, zeros, scales, group).half().float()


def gemv_fast(inputs=128, outputs=16, group=64):
    """Word (n // 4, j) holds input `at(j, nibble)` of one output: AutoAWQ's two shuffles, spelled out place by place."""
    codes, zeros, scales = numbers(inputs, outputs, inputs // group)
    source = [(i // 2 % 4) * 8 + i // 8 * 2 + i % 2 for i in range(32)]  # first pairs, from four blocks of eight
    source = [source[i // 8 * 8 + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8]] for i in range(32)]  # then even before odd
    shuffled = [[row[k // 32 * 32 + source[k % 32]] for k in range(inputs)] for row in codes]
    rows = []
    for first in range(0, outputs, 4):
        row = []
        for strip in range(0, inputs, 64):
            flat = [shuffled[first + r][strip + k] for r in range(4) for k in range(64)]
            row += [signed(sum(flat[4 * j + i] << 4 * i for i in range(4)), 16) for j in range(64)]
        rows.append(row)
    pad = padded(inputs, group)
    wide, products = torch.zeros(2, pad, outputs, dtype=torch.float16)
    wide[: len(zeros)] = scales
    products[: len(zeros)] = -(scales.float() * torch.tensor(zeros)).half()
    tensors = {f"{M}.qweight": torch.tensor(rows, dtype=torch.int16), f"{M}.qzeros": products, f"{M}.scales": wide}
    return tensors, product(codes, zeros, scales, group).half().float()


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
NARROW = {**AWQ, "group_size": 64}


def write(folder, tensors, quantization=None, config=None):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **(config or {})}
    config["quantization_config"] = AWQ if quantization is None else quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_gemm(tmp_path, bits, group):
    tensors, weight = gemm(group=group, bits=bits)
    config = {**AWQ, "bits": bits, "group_size": -1 if group == 64 else group}
    checkpoint = Checkpoint(write(tmp_path, tensors, config))
    assert torch.equal(checkpoint.tensor(f"{M}.weight"), weight)
    assert checkpoint.format == "awq (gemm)"
    scheme = checkpoint.quantized(f"{M}.weight").scheme
    assert (scheme.code, scheme.block, scheme.symmetric) == (f"int{bits}", (1, group), False)


def test_old_names_of_settings_and_auto_round(tmp_path):
    tensors, weight = gemm()
    for config in (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32},
    ):
        assert torch.equal(Checkpoint(write(tmp_path, tensors, config)).tensor(f"{M}.weight"), weight)


@pytest.mark.parametrize("version", ["gemv", "gemm"])
@pytest.mark.parametrize("inputs", [128, 256])
def test_gemv_whatever_the_label(tmp_path, version, inputs):
    tensors, weight = gemv(inputs)
    checkpoint = Checkpoint(write(tmp_path, tensors, {**NARROW, "version": version}))
    assert torch.equal(checkpoint.tensor(f"{M}.weight"), weight)
    assert checkpoint.format == "awq (gemv)"


def test_gemv_fast(tmp_path):
    tensors, weight = gemv_fast()
    checkpoint = Checkpoint(write(tmp_path, tensors, NARROW))
    assert torch.equal(checkpoint.tensor(f"{M}.weight"), weight)
    assert checkpoint.format == "awq (gemv_fast)"


def test_gptq_tensors_under_an_awq_label(tmp_path):
    tensors = {
        f"{M}.qweight": torch.full((8, 32), 0x11111111, dtype=torch.int32),
        f"{M}.qzeros": torch.full((2, 4), 0x77777777, dtype=torch.int32),
        f"{M}.scales": torch.ones(2, 32),
    }
    checkpoint = Checkpoint(write(tmp_path, tensors))
    assert checkpoint.format == "gptq"
    assert torch.equal(checkpoint.tensor(f"{M}.weight"), torch.full((32, 64), -7.0))


def test_symmetric_zero_points_are_seen(tmp_path):
    tensors, _ = gemm()
    tensors[f"{M}.qzeros"].fill_(signed(0x88888888))
    assert Checkpoint(write(tmp_path, tensors)).quantized(f"{M}.weight").scheme.symmetric


H = "gpt_neox.layers.0.mlp"
NEOX = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}


@pytest.mark.parametrize("quantized", [True, False])
def test_scaled_activations_are_folded(tmp_path, quantized):
    tensors, weight = gemm()
    tensors = {key.replace(M, f"{H}.dense_4h_to_h"): value for key, value in tensors.items()}
    if not quantized:
        tensors = {key.replace("dense_4h_to_h", "dense_h_to_4h"): value for key, value in tensors.items()}
        tensors[f"{H}.dense_4h_to_h.weight"] = weight.half()
    scales = torch.linspace(0.5, 2, 64).half()
    tensors[f"{H}.act.scales"] = scales
    checkpoint = Checkpoint(write(tmp_path, tensors, config=NEOX))
    name = f"{H}.dense_4h_to_h.weight"
    plain = weight if quantized else weight.half().float()
    assert torch.equal(checkpoint.weight(name), plain / scales.float())
    assert torch.equal(checkpoint.tensor(name), plain)
    scheme = checkpoint.quantized(name).scheme
    assert (scheme.code, scheme.notes) == ("int4" if quantized else "float", ("activation scales folded",))
    assert f"{H}.act.scales" not in checkpoint.names()
    assert checkpoint.parts(name)[-1] == f"{H}.act.scales"


@pytest.mark.parametrize(
    ("model", "activation", "following"),
    [
        ("gptj", "transformer.h.0.mlp.act", "fc_out"),
        ("bloom", "transformer.h.0.mlp.gelu_impl", "dense_4h_to_h"),
        ("mpt", "transformer.blocks.0.ffn.act", "down_proj"),
        ("falcon", "transformer.h.0.mlp.act", "dense_4h_to_h"),
        ("gpt_bigcode", "transformer.h.0.mlp.act", "c_proj"),
        ("starcoder2", "model.layers.0.mlp.act", "c_proj"),
    ],
)
def test_scaled_activations_of_other_models(tmp_path, model, activation, following):
    tensors, weight = gemm()
    module = f"{activation.rpartition('.')[0]}.{following}"
    tensors = {key.replace(M, module): value for key, value in tensors.items()}
    tensors[f"{activation}.scales"] = torch.full((64,), 2.0).half()
    checkpoint = Checkpoint(write(tmp_path, tensors, config={"model_type": model, "architectures": ["Unknown"]}))
    assert torch.equal(checkpoint.weight(f"{module}.weight"), weight / 2)
    assert torch.equal(checkpoint.tensor(f"{module}.weight"), weight)


@pytest.mark.parametrize(
    ("model", "scales", "message"),
    [
        ("llama", torch.ones(64), "scales an activation, and for model_type 'llama'.*original"),
        ("gpt_neox", torch.ones(32), r"has shape \[32\], expected \[64\], the inputs"),
        ("gpt_neox", torch.ones(64, dtype=torch.int32), "expected floating point"),
    ],
)
def test_scaled_activations_that_fit_nothing_are_refused(tmp_path, model, scales, message):
    tensors = {key.replace(M, f"{H}.dense_4h_to_h"): value for key, value in gemm()[0].items()}
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(write(tmp_path, {**tensors, f"{H}.act.scales": scales}, config={**NEOX, "model_type": model}))


def _smaller_groups(tensors):
    tensors[f"{M}.scales"][:, 2:4] = 1


def _odd_zero(tensors):
    tensors[f"{M}.qzeros"][1, 3] = -0.5 * tensors[f"{M}.scales"][1, 3]


def _large_zero(tensors):
    tensors[f"{M}.qzeros"][1, 3] = -17 * tensors[f"{M}.scales"][1, 3]


def _no_zeros(tensors):
    tensors[f"{M}.qzeros"].zero_()


@pytest.mark.parametrize(
    ("make", "damage", "change", "message"),
    [
        (gemm, None, {"bits": 8}, r"bits = 8, but its shapes are those of 4 bits \(gemm\)"),
        (gemm, None, {"group_size": 64}, r"group_size 64 .* makes 1 groups of 64 inputs, .* holds 2"),
        (gemm, _no_zeros, {}, "nothing but zeros"),
        (gemv, None, {"group_size": None}, "has no group_size"),
        (gemv, None, {"group_size": 32}, "makes 4 groups, padded to 32, but .* holds 16"),
        (gemv, None, {"group_size": 48}, "do not divide into groups of 48"),
        (gemv, _smaller_groups, {"group_size": 64}, "beyond the 2 groups that group_size 64 .* smaller"),
        (gemv, _no_zeros, {"group_size": 64}, "nothing but zeros"),
        (gemv_fast, _odd_zero, {"group_size": 64}, "not -scale times a whole zero point"),
        (gemv_fast, _large_zero, {"group_size": 64}, "not -scale times a whole zero point"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, make, damage, change, message):
    tensors, _ = make()
    if damage:
        damage(tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint(write(tmp_path, tensors, {**AWQ, **change}))
    assert M in str(error.value)
    assert "original" in str(error.value)


@pytest.mark.parametrize("make", [gemm, gemv, gemv_fast])
def test_scales_that_are_not_finite_are_reported(tmp_path, make):
    tensors, _ = make()
    tensors[f"{M}.scales"][0, 0] = float("inf")
    checkpoint = Checkpoint(write(tmp_path, tensors, {**AWQ, "group_size": 32 if make is gemm else 64}))
    with pytest.raises(NonFiniteError, match=f"{M}.scales"):
        checkpoint.tensor(f"{M}.weight")


def test_one_module_of_another_shape_is_refused(tmp_path):
    tensors, _ = gemm()
    other = {key.replace("layers.0", "layers.1"): value for key, value in tensors.items()}
    other[f"{M.replace('0', '1')}.scales"] = torch.ones(2, 24).half()
    more = {key.replace("layers.0", "layers.2"): value for key, value in tensors.items()}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj' .*expected shapes of AWQ's"):
        Checkpoint(write(tmp_path, {**tensors, **other, **more}))
