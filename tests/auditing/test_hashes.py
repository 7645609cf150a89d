"""Hashes of weights, and versions."""

import subprocess
import sys

import pytest
import torch

from tests.handmade import OPTIONS
from tests.test_audit import tiny  # noqa: F401
from tracelens import Audit, load
from tracelens.auditing.hashes import WeightHasher, versions, weights_hash
from tracelens.features.saes import sae_hash
from tracelens.precision import apply_precision
from tracelens.precision.sharing import copy_sharing


def test_the_same_weights_have_the_same_hash_in_another_process(tiny_folder, tiny_model):
    code = (
        "import torch; torch.set_num_threads(2)\nfrom tracelens import load\n"
        "from tracelens.auditing.hashes import weights_hash\n"
        f"print(weights_hash(load({str(tiny_folder)!r}, device='cpu')))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.split()[-1] == weights_hash(tiny_model)
    assert len(weights_hash(tiny_model)) == 64


def test_any_bit_changes_it(tiny_model):
    before = weights_hash(tiny_model)
    for name in ("embed.W_E", "blocks.2.mlp.W_out", "ln_final.w"):
        weight = dict(tiny_model.named_parameters())[name].detach()
        changed = weight.clone()
        flat = changed.view(torch.int32).flatten()
        flat[-1] ^= 1
        assert weights_hash(copy_sharing(tiny_model, {name: changed})) != before
    assert weights_hash(copy_sharing(tiny_model, {})) == before


class Bare(torch.nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


def test_names_shapes_and_types_count():
    x = torch.arange(6.0)
    hashes = [
        weights_hash(Bare(**tensors))
        for tensors in (
            {"a": x},
            {"b": x},
            {"a": x.view(2, 3)},
            {"a": x.view(torch.int32)},
            {"a": x[:3], "b": x[3:]},
            {"a": x[3:], "b": x[:3]},
            {"a": x.bfloat16()},
            {"a": x[:0]},
            {"a": x[1]},
        )
    ]
    assert len(set(hashes)) == len(hashes)


def test_layout_in_memory_and_size_of_pieces(monkeypatch):
    x = torch.randn(40, 30)
    strided = Bare(a=torch.empty(30, 40).T.copy_(x))
    assert not strided.a.is_contiguous()
    assert weights_hash(strided) == weights_hash(Bare(a=x))
    monkeypatch.setattr("tracelens.auditing.hashes._PIECE", 1000)
    in_pieces = weights_hash(Bare(a=x))
    assert in_pieces == weights_hash(strided)
    assert in_pieces != weights_hash(Bare(a=x.flip(0)))


def test_shared_tensors_are_hashed_once(tiny_model, monkeypatch):
    quantized = apply_precision(tiny_model, "int4-g8")
    expected = weights_hash(tiny_model), weights_hash(quantized)
    seen = []
    from tracelens.auditing import hashes

    digest = hashes._digest
    monkeypatch.setattr(hashes, "_digest", lambda piece: seen.append(piece.numel()) or digest(piece))
    hasher = WeightHasher(tiny_model)
    assert hasher(tiny_model) == expected[0]
    once = len(seen)
    assert hasher(tiny_model) == expected[0]
    assert len(seen) == once
    assert hasher(quantized) == expected[1]
    rounded = sum(p is not q for p, q in zip(tiny_model.parameters(), quantized.parameters(), strict=True))
    assert 0 < len(seen) - once == rounded < once
    assert expected[0] != expected[1]


def test_what_is_gone_is_not_remembered():
    # A new tensor may get the number of one that is gone.
    hasher = WeightHasher(Bare(a=torch.zeros(4)))
    for value in range(30):
        model = Bare(a=torch.full((4,), float(value)))
        assert hasher(model) == weights_hash(model)
        del model


def test_versions_import_nothing():
    code = (
        "import sys; from tracelens.auditing.hashes import versions; found = versions()\n"
        "print(found, {'transformers', 'transformer_lens', 'sae_lens'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip().endswith("set()")
    assert versions().keys() == {"tracelens", "python", "torch", "transformers", "transformer-lens", "sae-lens"}
    assert versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"] == torch.__version__


def test_reports_say_them(tiny):  # noqa: F811
    model, saes, prompts = tiny
    quantized = apply_precision(model, "int4-g8")
    report = Audit(model, quantized).load_sae(saes).trace_features(prompts, **OPTIONS, controls=False)
    assert report.settings["versions"] == versions()
    assert report.settings["hashes"] == {
        "reference": weights_hash(model),
        "quantized": weights_hash(quantized),
        "saes": {str(site): sae_hash(sae) for site, sae in saes.items()},
    }


def test_activations_that_are_rounded_are_no_weights(tiny_folder):
    model = load(tiny_folder, device="cpu")
    assert weights_hash(apply_precision(model, "fp32")) == weights_hash(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_matter(tiny_model):
    assert weights_hash(Bare(a=tiny_model.W_E.detach().cuda())) == weights_hash(Bare(a=tiny_model.W_E.detach()))
