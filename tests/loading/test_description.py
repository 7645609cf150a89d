"""What `describe()` says about a checkpoint: counted by hand."""

import json
from pathlib import Path

import pytest

from tracelens.loading import Checkpoint
from tracelens.loading.description import size

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"


def test_full_precision(tiny_folder):
    description = Checkpoint(tiny_folder).describe()
    assert (description.format, description.architecture) == ("full precision", "LlamaForCausalLM")
    assert description.schemes == {}
    assert description.bits_per_weight == 0
    (group,) = description.plain.values()
    file = (tiny_folder / "model.safetensors").stat().st_size
    assert group["parameters"] * 4 == group["bytes"] < file
    assert group["tensors"] == len(Checkpoint(tiny_folder).names())
    assert "model.layers.*.mlp.up_proj.weight" in group["modules"]


def test_what_is_quantized_and_what_is_not():
    """Llama of one layer, width 128, hidden 256, two of four heads for keys: GPTQ, 4 bits, groups of 32, act-order."""
    folder = FIXTURES / "gptq" / "b4_g32_asym_act_v2" / "llama"
    description = Checkpoint(folder).describe()
    assert description.format.startswith("gptq")
    ((scheme, group),) = description.schemes.items()
    assert "int4" in scheme
    assert "1×32" in scheme
    assert "asymmetric" in scheme
    weights = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256
    groups = weights // 32
    rows = 6 * 128 + 256  # one group index for each input of seven linears
    assert group["parameters"] == weights
    assert group["tensors"] == 7
    assert group["bytes"] == weights // 2 + 2 * groups + groups // 2 + 4 * rows
    assert description.bits_per_weight == pytest.approx(8 * group["bytes"] / weights)
    assert {name for plain in description.plain.values() for name in plain["modules"]} == {
        *("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"),
        *("model.layers.*.input_layernorm.weight", "model.layers.*.post_attention_layernorm.weight"),
    }
    text = str(description)
    assert "quantized: int4" in text
    assert "bits for each quantized weight" in text
    assert json.loads(json.dumps(description.to_dict()))["schemes"][scheme]["parameters"] == weights


def test_describing_reads_no_tensor_of_the_model(monkeypatch):
    checkpoint = Checkpoint(FIXTURES / "bnb" / "nf4_bf16storage" / "llama")
    monkeypatch.setattr(Checkpoint, "tensor", lambda *a, **k: pytest.fail("read a tensor"))
    description = checkpoint.describe()
    assert any("nf4" in scheme for scheme in description.schemes)
    assert 4 < description.bits_per_weight < 6


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.2 kB"), (5e6, "5.0 MB"), (7.25e12, "7,250.0 GB")]
)
def test_sizes_in_words(count, words):
    assert size(count) == words
