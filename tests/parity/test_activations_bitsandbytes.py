"""LLM.int8()'s decomposition of activations against bitsandbytes on the CPU, call by call."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.autograd._functions import MatmulLtState
from torch import Tensor

import tracelens
from tests.tiny import TEXTS, tiny_hf_model, tiny_tokenizer
from tracelens.precision import apply_precision
from tracelens.precision.activation_grids import round_beside_outliers


def inputs(n: int = 40, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator)
    x[:, [3, 40]] *= 8  # mostly outliers
    x[5] *= 10
    return x


def dequantized(weight: Tensor) -> Tensor:
    codes, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    return codes * scale[:, None] / 127


@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0, 1000.0])
def test_codes_of_one_token(threshold):
    """To the bit where the product of code and scale is."""
    for row in inputs().split(1):
        codes, scale, columns = bitsandbytes.functional.int8_vectorwise_quant(row.half(), threshold=threshold)
        columns = torch.zeros(0, dtype=torch.long) if columns is None else columns
        expected = codes.clone().float() * (scale / 127)
        expected[:, columns] = row[:, columns]
        assert torch.equal(round_beside_outliers(row, threshold), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_of_one_token(dtype):
    """float32 to 1e-5 of the largest; float16, which adds up in float16, to 2e-3."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-3
    ours, plain, theirs = [], [], []
    for row in inputs().to(dtype).split(1):
        state = MatmulLtState()
        state.threshold, state.has_fp16_weights, state.is_training = 6.0, False, False
        theirs.append(bitsandbytes.matmul(row, weight, state=state).float())
        ours.append(round_beside_outliers(row, 6.0).float() @ dequantized(weight).T)
        plain.append(row.float() @ weight.float().T)
    ours, plain, theirs = torch.cat(ours), torch.cat(plain), torch.cat(theirs)
    largest = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * largest)
    assert (plain - theirs).abs().max() > 2 * tolerance * largest


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_model_token_by_token(tmp_path, architecture):
    """Logits within 1e-5 of the largest: transformers in float64, each linear layer reading what bitsandbytes leaves of one token
    after the other, with bitsandbytes' weights."""
    hf = tiny_hf_model(architecture, seed=5, attn_implementation="eager")
    hf.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = tracelens.load(tmp_path, device="cpu", dtype=torch.float64)
    ids = model.to_tokens(TEXTS[1])

    def by_token(module, args):
        rows = []
        for row in args[0].flatten(0, -2).split(1):
            codes, scale, columns = bitsandbytes.functional.int8_vectorwise_quant(row.half(), threshold=1.5)
            left = codes.double() * (scale / 127)
            left[:, columns] = row[:, columns]
            rows.append(left)
        return (torch.cat(rows).view_as(args[0]),)

    exact = model(ids)
    for name, module in hf.double().named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head":
            transposed = type(module).__name__ == "Conv1D"
            weight = module.weight.data.float()
            restored = dequantized(weight.T.contiguous()).T if transposed else dequantized(weight)
            module.weight.data = restored.double()
            module.register_forward_pre_hook(by_token)
    with torch.no_grad():
        expected = hf(ids).logits
    scale = expected.abs().max().item()
    assert (exact - expected).abs().max() > 1e-3 * scale
    torch.testing.assert_close(apply_precision(model, "llm-int8-t1.5")(ids), expected, rtol=0, atol=1e-5 * scale)


def test_in_a_call_of_many_tokens_bitsandbytes_keeps_whole_columns():
    """The stated difference: what one token's outlier does to the others there, it does not do here."""
    x = inputs()
    codes, scale, columns = bitsandbytes.functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    theirs = codes.float() * (scale / 127)[:, None]
    theirs[:, columns] = x[:, columns]
    ours = round_beside_outliers(x, 6.0)
    assert not torch.equal(ours, theirs)
    elsewhere = torch.ones(x.shape[1], dtype=torch.bool)
    elsewhere[columns] = False
    assert torch.equal(ours[:, elsewhere], theirs[:, elsewhere])  # scales do not differ
    assert (theirs - x).norm() < (ours - x).norm()
