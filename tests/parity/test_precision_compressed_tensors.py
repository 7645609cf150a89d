"""Integer weights bit for bit, and int8-dynamic logits to 1e-5, against compressed-tensors on a Hugging Face Llama."""

import copy

import pytest
import torch

import tracelens
from tests.tiny import TEXTS, tiny_hf_model, tiny_tokenizer
from tracelens.precision import apply_precision
from tracelens.precision.grids import round_to_integers


def fake_quantize(x, bits, *, symmetric=True, group_size=None, strategy="channel", dynamic=False):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = "group" if group_size else strategy
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group_size, dynamic=dynamic
    )
    parts = x.unflatten(-1, (-1, group_size)) if group_size else x
    low, high = parts.amin(-1, keepdim=not group_size), parts.amax(-1, keepdim=not group_size)
    scale, zero_point = calculate_qparams(low, high, args)
    return fake_quantize(x, scale, zero_point, args)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16, 128])
def test_weights_bit_for_bit(bits, symmetric, group_size):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(48, 256, generator=generator) * torch.rand(48, 1, generator=generator).exp()
    weight[0] += 3  # a row that does not straddle 0
    weight[1] = 0
    expected = fake_quantize(weight, bits, symmetric=symmetric, group_size=group_size)
    ours = weight.unflatten(1, (-1, group_size or 256))
    assert torch.equal(round_to_integers(ours, bits, symmetric=symmetric).flatten(1), expected)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "llama"
    hf = tiny_hf_model(seed=5)
    hf.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return hf, tracelens.load(folder, device="cpu")


def linears(hf):
    return {n: m for n, m in hf.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


@pytest.mark.parametrize("spec", ["int8", "int4-g8", "int3-asym", "int8-dynamic"])
def test_logits_of_a_llama(pair, spec):
    hf, model = pair
    saved = {name: module.weight.data for name, module in linears(hf).items()}
    kwargs = {"group_size": 8} if "g8" in spec else {"symmetric": "asym" not in spec}
    handles = []
    for module in linears(hf).values():
        module.weight.data = fake_quantize(module.weight.data, int(spec[3]), **kwargs)
        if spec == "int8-dynamic":
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args: (fake_quantize(args[0], 8, strategy="token", dynamic=True),)
                )
            )
    ids = model.tokenizer(TEXTS[1], return_tensors="pt").input_ids
    with torch.no_grad():
        plain_error = (apply_precision(model, "int8")(ids) - model(ids)).abs().max()
        expected, ours = hf(ids).logits, apply_precision(model, spec)(ids)
    for handle in handles:
        handle.remove()
    for name, module in linears(hf).items():
        module.weight.data = saved[name]
    assert plain_error > 1e-3  # the quantization is far larger than the tolerance
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_bf16_errs_as_much_as_a_bf16_model(pair):
    hf, model = pair
    ids = torch.cat([model.tokenizer(text, return_tensors="pt").input_ids[0] for text in TEXTS])[None]
    with torch.no_grad():
        exact = model(ids)
        simulated = apply_precision(model, "bf16")(ids) - exact
        true = copy.deepcopy(hf).to(torch.bfloat16)(ids).logits.float() - exact
    assert 0.6 < simulated.norm() / true.norm() < 1.4
