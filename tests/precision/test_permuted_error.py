import pytest
import torch

from tests.tiny import TEXTS, write_checkpoint
from tracelens import load
from tracelens.errors import PairMismatchError
from tracelens.precision import apply_precision, permuted_error
from tracelens.precision.sharing import copy_sharing
from tracelens.precision.weights import weight_matrices


def matrices(reference, other) -> dict:
    """Name → float64 error as a matrix of output channels × inputs."""
    theirs = {weight.name: weight.matrix.double() for weight in weight_matrices(other)}
    return {weight.name: theirs[weight.name] - weight.matrix.double() for weight in weight_matrices(reference)}


@pytest.mark.parametrize("spec", ["int8", "int3-g8", "nf4"])
def test_each_output_channel_keeps_its_errors_and_loses_their_places(tiny_model, spec):
    quantized = apply_precision(tiny_model, spec)
    shuffled = matrices(tiny_model, permuted_error(tiny_model, quantized))
    for name, error in matrices(tiny_model, quantized).items():
        ours, theirs = error.sort(-1).values, shuffled[name].sort(-1).values
        torch.testing.assert_close(theirs, ours, atol=3e-7, rtol=0)  # the sum with the weight is float32 again
        if error.any():
            assert abs(torch.cosine_similarity(shuffled[name].flatten(), error.flatten(), dim=0)) < 0.35, name


def test_rows_are_shuffled_each_in_its_own_way(tiny_model):
    quantized = apply_precision(tiny_model, "fp32")
    weight = quantized.blocks[1].mlp.W_in  # [d_model, d_mlp]: an output channel is a column
    ramp = torch.arange(weight.shape[0], dtype=torch.float32)[:, None]
    quantized.blocks[1].mlp.W_in = torch.nn.Parameter(weight + ramp / 64, requires_grad=False)
    found = (permuted_error(tiny_model, quantized).blocks[1].mlp.W_in - weight) * 64
    places = found.round().long()
    assert (places.sort(0).values == torch.arange(len(weight))[:, None]).all()
    assert len({tuple(column) for column in places.T.tolist()}) > weight.shape[1] // 2


def test_the_seed_decides_and_what_agrees_is_shared(tiny_model):
    int4 = apply_precision(tiny_model, "int4")
    ids = tiny_model.to_tokens(TEXTS[0])
    first = permuted_error(tiny_model, int4, seed=1)
    assert torch.equal(first(ids), permuted_error(tiny_model, int4, seed=1)(ids))
    assert not torch.equal(first(ids), permuted_error(tiny_model, int4, seed=2)(ids))
    assert first.embed.W_E is tiny_model.embed.W_E
    same = permuted_error(tiny_model, tiny_model)
    assert all(ours is theirs for ours, theirs in zip(same.parameters(), tiny_model.parameters(), strict=True))


def test_other_parameters_are_refused_by_name(tiny_model):
    other = apply_precision(tiny_model, "fp32")
    other.blocks[0].mlp.W_in = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(PairMismatchError, match=r"permuted error needs the same parameters.*blocks\.0\.mlp\.W_in"):
        permuted_error(tiny_model, other)


def test_layers_beside_experts_keep_their_rows(tmp_path):
    model = load(write_checkpoint(tmp_path, "MixtralForCausalLM"))
    quantized = apply_precision(model, "int3-g8")
    shuffled = matrices(model, permuted_error(model, quantized))
    for name, error in matrices(model, quantized).items():
        torch.testing.assert_close(shuffled[name].sort(-1).values, error.sort(-1).values, atol=3e-7, rtol=0)
        assert not torch.equal(shuffled[name], error), name


def test_rows_of_a_bridge_whose_layers_lie_the_other_way_round(tmp_path):
    model = load(write_checkpoint(tmp_path, "GPT2LMHeadModel"), wrapper="bridge")
    (name,) = [n for n, _ in model.named_parameters() if ".h.0." in n and "c_fc" in n and n.endswith("weight")]
    before = dict(model.named_parameters())[name].detach()
    error = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    other = copy_sharing(model, {name: before + error})
    found = dict(permuted_error(model, other).named_parameters())[name].detach() - before
    assert before.shape == (32, 128)  # inputs first: an output channel is a column
    torch.testing.assert_close(found.sort(0).values, error.sort(0).values, atol=1e-6, rtol=0)
    assert (found.sort(1).values - error.sort(1).values).abs().max() > 0.1
