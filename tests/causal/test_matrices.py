"""Weight matrices of a pair: the same numbers as `nn.Linear`, and put back for the length of a block only."""

import pytest
import torch

import tracelens
from tests.tiny import write_checkpoint
from tracelens.causal.matrices import Part, choose, matrices, restored
from tracelens.errors import PairMismatchError, UnknownNameError

IDS = torch.tensor([[2, 5, 6, 7, 8]])


def logits(model):
    with torch.no_grad():
        return model(IDS, attention_mask=torch.ones_like(IDS))


@pytest.fixture
def pair(tiny_model):
    return tiny_model, tracelens.apply_precision(tiny_model, "int2-g8+a8")


def test_every_matrix_of_the_blocks(pair):
    found = matrices(*pair)
    assert len(found) == 3 * 7
    by_name = {m.name: m for m in found}
    assert by_name["blocks.1.attn._W_K"].shape == (16, 32)
    assert by_name["blocks.2.mlp.W_out"].shape == (32, 40)
    for m in found:
        assert torch.equal(m.unflat(m.flat(m.reference)), m.reference)
        assert m.n_weights == m.shape[0] * m.shape[1]
        assert m.error.norm() > 0


def test_putting_all_back_gives_the_reference_and_then_the_quantized_model_again():
    model = tracelens.load("organism")
    quantized = tracelens.apply_precision(model, "int3-g32")
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(ids), quantized(ids)
    parts = [Part(m) for m in matrices(model, quantized)]
    with restored(parts):
        assert torch.equal(quantized(ids), ours)
    assert torch.equal(quantized(ids), theirs)
    with pytest.raises(KeyError), restored(parts):
        raise KeyError
    assert torch.equal(quantized(ids), theirs)


def test_rows_add_up_to_the_matrix(pair):
    _, quantized = pair
    m = matrices(*pair)[4]
    before = logits(quantized)
    with restored([Part(m)]):
        whole = logits(quantized)
    half = m.shape[0] // 2
    with restored([Part(m, torch.arange(half)), Part(m, torch.arange(half, m.shape[0]))]):
        assert torch.equal(logits(quantized), whole)
    with restored([Part(m, torch.arange(half))]):
        some = logits(quantized)
        assert torch.equal(m.flat(quantized.get_parameter(m.name))[:half], m.flat(m.reference)[:half])
    assert not torch.equal(some, whole)
    assert torch.equal(logits(quantized), before)


def test_rounding_of_activations_stays(pair):
    reference, quantized = pair
    with restored([Part(m) for m in matrices(*pair)]):
        assert not torch.allclose(logits(quantized), logits(reference), atol=1e-6)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM", "GPTNeoXForCausalLM"])
def test_bridges(tmp_path, architecture):
    folders = [write_checkpoint(tmp_path / str(seed), architecture, seed=seed) for seed in (0, 1)]
    ours, theirs = (tracelens.load(folder, wrapper="bridge", device="cpu") for folder in folders)
    found = matrices(ours, theirs)
    assert len(found) == {"GPT2LMHeadModel": 18, "LlamaForCausalLM": 21, "GPTNeoXForCausalLM": 18}[architecture]
    assert [m.layer for m in found] == sorted(m.layer for m in found)
    wide = next(m for m in found if any(part in m.name for part in ("c_fc", "up_proj", "dense_h_to_4h")))
    assert wide.shape[0] > wide.shape[1] == 32
    before = logits(theirs)
    with restored([Part(m) for m in found]):
        assert not torch.equal(logits(theirs), before)
        assert torch.equal(wide.quantized, wide.reference)
        together = logits(theirs)
    for m in found:
        with restored([Part(m)]):
            assert not torch.equal(logits(theirs), before), f"{m.name} is not used"
    assert not torch.equal(together, before)
    assert torch.equal(logits(theirs), before)


def test_what_does_not_fit(pair, tmp_path):
    with pytest.raises(UnknownNameError, match=r"unknown weight matrix 'blocks.0.mlp.W_up'"):
        choose(matrices(*pair), ["blocks.0.mlp.W_up"])
    other = tracelens.load(write_checkpoint(tmp_path / "other", num_hidden_layers=2), device="cpu")
    with pytest.raises(PairMismatchError, match=r"do not have the same weight matrices: blocks\.2"):
        matrices(pair[0], other)
