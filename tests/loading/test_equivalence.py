from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_checkpoint
from tracelens.loading.checkpoint import Checkpoint
from tracelens.loading.equivalence import Expectation, wiring
from tracelens.loading.plain import build_plain

LAYER = "model.layers.1."
EMBED, NORM = "model.embed_tokens.weight", LAYER + "input_layernorm.weight"
IDS = torch.arange(6)[None]


def draw(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul(0.5).exp()


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed))).Q


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("reference") / "model")


@pytest.fixture
def expect(folder, tmp_path):
    """What should be in a checkpoint that was made from the reference by an edit of its tensors."""

    def run(edit, source: Path = folder) -> tuple[Expectation, dict[str, torch.Tensor]]:
        tensors = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
        edit(tensors)
        made = tmp_path / "made"
        made.mkdir()
        (made / "config.json").write_text((source / "config.json").read_text())
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made / "model.safetensors")
        pair = Checkpoint(source), Checkpoint(made)
        plain = [build_plain(one, dtype=torch.float32, device=torch.device("cpu")) for one in pair]
        return Expectation(*pair, *(wiring(model, IDS) for model in plain)), tensors

    return run


def check(expectation: Expectation, tensors: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    for name, tensor in tensors.items():
        if not expectation.compared_elsewhere(name):
            wanted = expectation.of(name)
            assert (wanted - tensor).abs().max() <= tolerance * wanted.abs().max(), name


def test_wiring(folder):
    model = build_plain(Checkpoint(folder), dtype=torch.float32, device=torch.device("cpu"))
    seen = wiring(model, IDS)
    for part in ("q_proj", "k_proj", "v_proj"):
        assert seen.readers[f"{LAYER}self_attn.{part}.weight"] == NORM
    for part in ("gate_proj", "up_proj"):
        assert seen.readers[f"{LAYER}mlp.{part}.weight"] == LAYER + "post_attention_layernorm.weight"
    assert seen.readers["lm_head.weight"] == "model.norm.weight"
    assert len(seen.readers) == 3 * 5 + 1
    assert seen.embedding == EMBED
    torch.testing.assert_close(seen.gains[NORM], model.get_parameter(NORM).data)


@pytest.mark.parametrize("architecture", ["GemmaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"])
def test_gains_are_what_norms_multiply_by(tmp_path, architecture):
    folder = write_checkpoint(tmp_path / "model", architecture)
    model = build_plain(Checkpoint(folder), dtype=torch.float32, device=torch.device("cpu"))
    seen = wiring(model, IDS)
    # Gemma stores what is added to one.
    shift = 1 if architecture == "GemmaForCausalLM" else 0
    assert len(seen.gains) == 7
    for name, gain in seen.gains.items():
        torch.testing.assert_close(gain, model.get_parameter(name).data + shift, rtol=1e-3, atol=1e-4)


def test_nothing_moved_is_the_reference_itself(expect):
    expectation, tensors = expect(lambda tensors: None)
    assert expectation.notes == []
    for name, tensor in tensors.items():
        assert torch.equal(expectation.of(name), tensor)


def awq(tensors: dict[str, torch.Tensor]) -> None:
    s = draw(32, 1)
    tensors[NORM] /= s
    for part in ("q_proj", "k_proj", "v_proj"):
        tensors[f"{LAYER}self_attn.{part}.weight"] *= s
    s = draw(40, 2)
    tensors[f"{LAYER}mlp.up_proj.weight"] /= s[:, None]
    tensors[f"{LAYER}mlp.down_proj.weight"] *= s
    # Two heads share each key-value head.
    s = draw(16, 3)
    tensors[f"{LAYER}self_attn.v_proj.weight"] /= s[:, None]
    tensors[f"{LAYER}self_attn.o_proj.weight"] *= s.view(2, 1, 8).expand(2, 2, 8).flatten()


def test_factors_with_their_counterparts_are_followed(expect):
    expectation, tensors = expect(awq)
    check(expectation, tensors)
    assert expectation.compared_elsewhere(NORM)
    assert not expectation.compared_elsewhere("model.norm.weight")
    assert expectation.notes == [
        "1 norms are rescaled and compared with what reads them",
        "factors moved between the rows and the columns of 2 pairs of weights",
    ]


@pytest.mark.parametrize("module", ["mlp.up_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj"])
def test_factors_without_a_counterpart_stay_a_difference(expect, folder, module):
    name = f"{LAYER}{module}.weight"
    original = load_file(folder / "model.safetensors")[name]
    expectation, _ = expect(lambda tensors: (awq(tensors), tensors.__setitem__(name, original)))
    first, second = ("up_proj", "down_proj") if "mlp" in module else ("v_proj", "o_proj")
    for part in (first, second):
        weight = f"{LAYER}{module.split('.')[0]}.{part}.weight"
        found = expectation.linear(expectation.found, weight)
        if weight != name:
            assert (expectation.of(weight) - found).norm() > 0.2 * found.norm()


def test_a_norm_whose_readers_did_not_follow(expect):
    def edit(tensors):
        awq(tensors)
        tensors[f"{LAYER}self_attn.q_proj.weight"] /= draw(32, 1)

    expectation, tensors = expect(edit)
    for part, norm in (("q_proj", NORM), ("k_proj", "")):
        name = f"{LAYER}self_attn.{part}.weight"
        assert expectation.unmatched(name, tensors[name], expectation.of(name)) == norm


def test_biases_take_the_factors_of_their_weights(tmp_path, expect):
    folder = write_checkpoint(tmp_path / "neox", "GPTNeoXForCausalLM")
    layer = "gpt_neox.layers.1."

    def edit(tensors):
        s = draw(32, 1)
        for part in ("weight", "bias"):
            tensors[f"{layer}input_layernorm.{part}"] /= s
        tensors[f"{layer}attention.query_key_value.weight"] *= s
        s = draw(40, 2)
        for part in ("weight", "bias"):
            tensors[f"{layer}mlp.dense_h_to_4h.{part}"] /= s.view(-1, *[1] * (part == "weight"))
        tensors[f"{layer}mlp.dense_4h_to_h.weight"] *= s

    check(*expect(edit, folder))


def spinquant(tensors: dict[str, torch.Tensor], *, centre: bool = False) -> None:
    residual, head = orthogonal(32, 1), orthogonal(8, 2)
    if centre:
        tensors[EMBED] -= tensors[EMBED].mean(1, keepdim=True)
    tensors[EMBED] = tensors[EMBED] @ residual
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for norm, parts in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for part in parts:
                name = f"{prefix}{part}.weight"
                tensors[name] = tensors[name] * tensors[f"{prefix}{norm}.weight"] @ residual
            tensors[f"{prefix}{norm}.weight"] = torch.ones(32)
        values, output = f"{prefix}self_attn.v_proj.weight", f"{prefix}self_attn.o_proj.weight"
        tensors[values] = torch.block_diag(head.T, head.T) @ tensors[values]
        tensors[output] = residual.T @ tensors[output] @ torch.block_diag(*[head] * 4)
        down = f"{prefix}mlp.down_proj.weight"
        tensors[down] = residual.T @ tensors[down]
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * tensors["model.norm.weight"] @ residual
    tensors["model.norm.weight"] = torch.ones(32)


@pytest.mark.parametrize("centre", [False, True])
def test_a_rotated_model_is_compared_in_its_own_basis(expect, centre):
    expectation, tensors = expect(lambda tensors: spinquant(tensors, centre=centre))
    check(expectation, tensors, 1e-4)
    centred = ", after its mean was taken from each embedding," if centre else ""
    assert f"the residual stream is rotated{centred} and compared in the quantized model's basis" in expectation.notes


def test_a_weight_that_was_not_rotated_stays_a_difference(expect, folder):
    name = f"{LAYER}mlp.down_proj.weight"
    original = load_file(folder / "model.safetensors")[name]
    expectation, _ = expect(lambda tensors: (spinquant(tensors), tensors.__setitem__(name, original)))
    assert (expectation.of(name) - original).norm() > original.norm()


def test_another_embedding_is_no_rotation(expect):
    expectation, tensors = expect(lambda tensors: tensors[EMBED].normal_(generator=torch.Generator().manual_seed(9)))
    assert expectation.notes == []
    assert (expectation.of(EMBED) - tensors[EMBED]).norm() > tensors[EMBED].norm()


def test_weights_in_each_others_places(expect):
    a, b = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))

    def edit(tensors):
        tensors[a], tensors[b] = tensors[b], tensors[a]

    expectation, tensors = expect(edit)
    assert expectation.resembles(a, tensors[a]) == b
    assert expectation.resembles("lm_head.weight", tensors["lm_head.weight"]) == ""


def test_conv1d_is_compared_with_outputs_first(tmp_path, expect):
    folder = write_checkpoint(tmp_path / "gpt2", "GPT2LMHeadModel")
    expectation, tensors = expect(lambda tensors: None, folder)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert tuple(expectation.of(name).shape) == tuple(reversed(tensors[name].shape))
    assert torch.equal(expectation.of(name), tensors[name].T)


def test_without_wiring_weights_are_compared_as_they_are(expect):
    expectation, tensors = expect(awq)
    blind = replace(expectation, before=replace(expectation.before, readers={}, gains={}, embedding=""), notes=[])
    name = f"{LAYER}self_attn.q_proj.weight"
    assert torch.equal(blind.of(name), Checkpoint(expectation.reference.path).weight(name))
    assert not blind.compared_elsewhere(NORM)
    assert (blind.of(name) - tensors[name]).norm() > 0.1 * tensors[name].norm()
