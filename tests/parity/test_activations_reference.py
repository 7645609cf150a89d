"""Rounded activations and key-value caches against transformers with compressed-tensors' rounding in its hooks and cache.

Logits within 1e-5 of the largest. Both run in float64 (but transformers' rotations are float32), and both get scales that are
1e-5 larger than they should be: on the true scale the largest entry of a row lies at −127.5, where the last bit of a product
decides whether it becomes −127 or −128. The true scales are compared bit for bit by themselves.
"""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tracelens
from tests.tiny import TEXTS, tiny_hf_model, tiny_tokenizer
from tracelens.precision import activation_grids, apply_precision
from tracelens.precision.activation_grids import round_fixed, round_rows, scale_of

TOLERANCE = 1e-5
WIDER = 1 + 1e-5
CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "neox": ("GPTNeoXForCausalLM", {}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 20, "pad_token_id": 1},
    ),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {"experts_implementation": "eager"}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {"experts_implementation": "eager"}),
    "opt": ("OPTForCausalLM", {}),
}
CALIBRATION = ["the cat sat", "yes", "she heard the dog under a tree then it sleeps"]


def arguments(format: str, strategy: str):
    from compressed_tensors.quantization import QuantizationArgs

    kind = {"type": "float", "num_bits": 8} if format == "fp8" else {"type": "int", "num_bits": int(format[-1])}
    return QuantizationArgs(**kind, symmetric=True, strategy=strategy, dynamic=strategy == "token")


def fake_quantize(x: Tensor, format: str, largest: Tensor | None = None, *, wider: float = 1.0) -> Tensor:
    """compressed-tensors' rounding: a scale for each row, or one for all from the largest magnitude."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = arguments(format, "token" if largest is None else "tensor")
    low, high = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if largest is None else (-largest, largest)
    scale, zero_point = calculate_qparams(low, high, args)
    return fake_quantize(x, scale * wider, zero_point, args)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_bit_for_bit(format, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator, dtype=dtype) * torch.rand(64, 1, generator=generator).exp()
    x[0] = 0
    x[1] = x[1].abs()
    largest = x.abs().amax() / 2  # so that some saturate
    rounded = round_rows(x, format)
    assert torch.equal(rounded, fake_quantize(x, format))
    fixed = round_fixed(x, format, largest)
    assert torch.equal(fixed, fake_quantize(x, format, largest))
    assert fixed.abs().max() <= largest * (1 + 1e-6) * (
        1 if format == "fp8" else 128 / 127.5 if format == "int8" else 8 / 7.5
    )
    assert not torch.equal(rounded, x)


class Rounded:
    """A transformers model whose linear layers read, and whose cache holds, what compressed-tensors leaves of it."""

    def __init__(self, hf, activations=None, cache=None, static=False):
        self.hf, self.activations, self.cache, self.static = hf, activations, cache, static
        self.largest: dict[str, Tensor] = {}
        self.observing = False

    def change(self, name: str, x: Tensor, format: str | None) -> Tensor:
        if format is None:
            return x
        if self.observing:
            here = x.abs().amax()
            self.largest[name] = torch.maximum(self.largest.get(name, here), here)
            return x
        return fake_quantize(x, format, self.largest[name] if self.static else None, wider=WIDER)

    def calibrate(self, tokenizer):
        self.observing = True
        for text in CALIBRATION:
            self.logits(tokenizer(text, return_tensors="pt").input_ids)
        self.observing = False

    def logits(self, ids: Tensor) -> Tensor:
        outer = self

        class Cache(DynamicCache):
            def update(self, keys, values, layer_idx, *args, **kwargs):
                keys = outer.change(f"keys {layer_idx}", keys, outer.cache)
                values = outer.change(f"values {layer_idx}", values, outer.cache)
                return super().update(keys, values, layer_idx, *args, **kwargs)

        handles = [
            module.register_forward_pre_hook(
                lambda module, args, name=name: (self.change(name, args[0], self.activations), *args[1:])
            )
            for name, module in self.hf.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and name not in ("lm_head", "embed_out")
        ]
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            for name, module in self.hf.named_modules():
                if name.endswith(".experts"):
                    patch.setattr(module, "forward", self.experts(name, module.forward))
            logits = self.hf(ids, past_key_values=Cache(config=self.hf.config), use_cache=True).logits
        for handle in handles:
            handle.remove()
        return logits

    def experts(self, name: str, forward):
        """The forward of experts that are slices of one tensor, with what each of their products reads changed."""
        linear = torch.nn.functional.linear

        def changed(x: Tensor, weight: Tensor) -> Tensor:
            return linear(self.change(f"{name} {weight.shape}", x, self.activations), weight)

        def run(*args):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.nn.functional, "linear", changed)
                return forward(*args)

        return run


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    made = {}

    def make(case):
        if case not in made:
            architecture, config = CASES[case]
            folder = tmp_path_factory.mktemp("parity") / case
            hf = tiny_hf_model(architecture, seed=5, attn_implementation="eager", **config)
            hf.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            made[case] = hf.double(), tracelens.load(folder, device="cpu", dtype=torch.float64)
        return made[case]

    return make


SPECS = {
    "fp32+a8": {"activations": "int8"},
    "fp32+a4": {"activations": "int4"},
    "fp32+afp8": {"activations": "fp8"},
    "fp32+kv8": {"cache": "int8"},
    "fp32+kv4": {"cache": "int4"},
    "fp32+kvfp8": {"cache": "fp8"},
    "fp32+a8+kv8": {"activations": "int8", "cache": "int8"},
    "fp32+a8-static": {"activations": "int8", "static": True},
    "fp32+afp8-static+kvfp8-static": {"activations": "fp8", "cache": "fp8", "static": True},
    "fp32+kv4-static": {"cache": "int4", "static": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_against_transformers(pair_of, case, spec, monkeypatch):
    monkeypatch.setattr(activation_grids, "scale_of", lambda *args: WIDER * scale_of(*args))
    hf, model = pair_of(case)
    theirs = Rounded(hf, **SPECS[spec])
    if theirs.static:
        theirs.calibrate(model.tokenizer)
    ours = apply_precision(model, spec, calibration=CALIBRATION if theirs.static else None)
    ids = model.tokenizer(TEXTS[1], return_tensors="pt").input_ids
    with torch.no_grad():
        exact, found = model(ids), ours(ids)
    expected = theirs.logits(ids)
    scale = expected.abs().max().item()
    assert (exact - expected).abs().max() > 30 * TOLERANCE * scale  # the rounding is far larger than the tolerance
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale)
