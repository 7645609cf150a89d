"""Rounded activations of a `TransformerBridge` against those of the hooked model of the same checkpoint.

Logits within 1e-5 of the largest, float64; scales 1e-5 wider on both sides for the reason that test_activations_reference.py gives.
Some norms are float32 in transformers all the same: of 160 comparisons (8 seeds) one had a code that tipped.
"""

import copy

import pytest
import torch

import tracelens
from tests.tiny import TEXTS, write_checkpoint
from tracelens.errors import PrecisionSpecError
from tracelens.precision import activation_grids, apply_precision
from tracelens.precision.activation_grids import scale_of

TOLERANCE = 1e-5
CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "neox": ("GPTNeoXForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 1}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 20, "pad_token_id": 1},
    ),
    "opt": ("OPTForCausalLM", {}),
    "bloom": ("BloomForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
}
ROTATED_UNSEEN = ("neox", "phi3")
"""Bridges that rotate keys where no hook point sees them."""


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
    made = {}

    def make(case):
        if case not in made:
            architecture, config = CASES[case]
            folder = write_checkpoint(tmp_path_factory.mktemp("bridges") / case, architecture, seed=5, **config)
            kwargs = {"device": "cpu", "dtype": torch.float64}
            made[case] = [tracelens.load(folder, wrapper=wrapper, **kwargs) for wrapper in ("hooked", "bridge")]
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spec", ["fp32+a8", "fp32+afp8-static", "fp32+kvfp8", "fp32+a8+kv8-static"])
def test_logits(models_of, case, spec, monkeypatch):
    hooked, bridge = models_of(case)
    if "kv" in spec and case in ROTATED_UNSEEN:
        with pytest.raises(
            PrecisionSpecError, match=r"does not go through blocks\.0\.attn\.hook_rot_k.*wrapper='hooked'"
        ):
            apply_precision(bridge, spec, calibration=TEXTS)
        return
    monkeypatch.setattr(activation_grids, "scale_of", lambda *args: (1 + 1e-5) * scale_of(*args))
    ids = hooked.to_tokens(TEXTS[1])
    exact = hooked(ids)
    expected, found = (apply_precision(m, spec, calibration=TEXTS)(ids) for m in (hooked, bridge))
    scale = exact.abs().max().item()
    assert (expected - exact).abs().max() > 30 * TOLERANCE * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_bf16_errs_as_much_as_the_hooked_model(models_of, case):
    hooked, bridge = models_of(case)
    ids = hooked.to_tokens(TEXTS[1])
    errors = [(apply_precision(m, "bf16")(ids) - hooked(ids)).norm() for m in (hooked, bridge)]
    assert 0.6 < errors[1] / errors[0] < 1.4


def test_the_bridge_itself_is_left_alone_and_hooks_stay(models_of):
    hooked, bridge = models_of("llama")
    ids = hooked.to_tokens(TEXTS[1])
    before = bridge(ids)
    rounded = apply_precision(bridge, "fp32+a8+kv8")
    logits = rounded(ids)
    assert torch.equal(bridge(ids), before)
    assert not torch.equal(logits, before)
    rounded.reset_hooks(including_permanent=True)
    assert torch.equal(rounded(ids), logits)
    assert torch.equal(copy.deepcopy(rounded)(ids), logits)
    name, seen = "blocks.0.mlp.out.hook_in", []
    for model in (bridge, apply_precision(bridge, "fp32+a4")):
        model.run_with_hooks(ids, fwd_hooks=[(name, lambda value, hook: seen.append(value))])
    # What is captured is what the layer reads.
    assert seen[0][0, 1].unique().numel() > 16 >= seen[1][0, 1].unique().numel()


def test_experts_are_refused(tmp_path):
    bridge = tracelens.load(write_checkpoint(tmp_path / "m", "MixtralForCausalLM"), device="cpu", wrapper="bridge")
    with pytest.raises(PrecisionSpecError, match=r"holds several linear layers.*wrapper='hooked'"):
        apply_precision(bridge, "fp32+a8")
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(apply_precision(bridge, "fp32+kv8")(ids), bridge(ids))


def test_a_bridge_in_compatibility_mode_may_have_folded_norms(tmp_path):
    bridge = tracelens.load(write_checkpoint(tmp_path / "m"), device="cpu", wrapper="bridge")
    bridge.compatibility_mode = True
    with pytest.raises(PrecisionSpecError, match="norm weights are folded"):
        apply_precision(bridge, "fp32+a8")
