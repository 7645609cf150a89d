import pytest
import torch

import tracelens as tl
from tests.tiny import write_checkpoint
from tracelens.causal.past import Past
from tracelens.causal.rerun import Rerunner
from tracelens.sites import Site

WINDOW = {"sliding_window": 3}
PLAIN = (
    *("LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "GPTJForCausalLM", "OPTForCausalLM"),
    *("BloomForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM", "Olmo2ForCausalLM", "GPTNeoForCausalLM"),
)
ARCHITECTURES: dict[str, dict] = {
    **{name: {} for name in PLAIN},
    "MistralForCausalLM": WINDOW,
    "Gemma2ForCausalLM": {**WINDOW, "head_dim": 8},
}
"""Rotary, learned, offset and ALiBi positions; sliding windows; parallel blocks; norms behind; experts."""
SPECS = ("int4-g8+a8", "int8-dynamic", "int4-g8+kv8", "bf16")


def rows_of(n: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(4, 40, (n, length), generator=torch.Generator().manual_seed(0))


def assert_runs_from_everywhere(model) -> None:
    """A run that starts at any layer, one of which rows join late, and one beside the past of earlier positions: each
    gives what the full run gives."""
    runner, tokens, n = Rerunner(model), rows_of(), model.cfg.n_layers
    keep = [*(Site(layer, "resid_pre") for layer in range(n)), runner.end]
    with torch.no_grad():
        cache = runner.new_cache(3) if runner.continues else None
        logits, own = runner.run(tokens, keep=keep, cache=cache)
        assert logits is not None
        whole = runner.run(tokens, whole=True)[0]
        assert whole is not None
        torch.testing.assert_close(whole[:, -1], logits, atol=1e-10, rtol=0)
        for layer, site in enumerate(keep):
            again = runner.run(tokens, start=layer, residual=own[site])[0]
            torch.testing.assert_close(again, logits, atol=1e-10, rtol=0)
        for site in keep[1:]:
            entries = [(keep[0], own[keep[0]][:1]), (site, own[site][1:])]
            for given in (False, True):
                again = runner.resume(tokens, entries, whole=given)
                torch.testing.assert_close(again, whole if given else logits, atol=1e-10, rtol=0)
            if cache is not None:
                cut = [(place, rows[:, 4:]) for place, rows in entries]
                again = runner.resume(tokens, cut, past=(Past.of(cache), 4, torch.arange(3)))
                torch.testing.assert_close(again, logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_from_any_layer_and_position_equals_the_full_run(architecture, tmp_path):
    folder = write_checkpoint(tmp_path / "model", architecture, **ARCHITECTURES[architecture])
    model = tl.load(folder, dtype=torch.float64, device="cpu")
    assert_runs_from_everywhere(model)
    runner = Rerunner(model)
    assert (runner.resumes, runner.continues, runner.adds_up) == (True, True, True)


@pytest.mark.parametrize("spec", SPECS)
def test_rounding_of_activations_fires_once_wherever_a_run_begins(spec, tiny_folder):
    model = tl.load(tiny_folder, dtype=torch.float64, device="cpu")
    quantized = tl.apply_precision(model, spec)
    assert_runs_from_everywhere(quantized)
    runner = Rerunner(quantized)
    assert (runner.resumes, runner.continues, runner.adds_up) == (True, True, True)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"])
@pytest.mark.parametrize("spec", ["fp32", "bf16"])
def test_a_bridge_runs_from_its_tokens_to_the_same_numbers(architecture, spec, tmp_path):
    folder = write_checkpoint(tmp_path / "model", architecture)
    model = tl.load(folder, dtype=torch.float64, device="cpu", wrapper="bridge")
    model = tl.apply_precision(model, spec)
    assert not Rerunner(model).resumes
    assert_runs_from_everywhere(model)


def test_positions_that_are_lost_with_the_tokens_are_noticed():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {
        "n_layers": 3,
        "d_model": 16,
        "n_ctx": 16,
        "d_head": 4,
        "n_heads": 4,
        "d_vocab": 40,
        "d_mlp": 32,
        "seed": 0,
    }
    options = {
        "positional_embedding_type": "shortformer",
        "act_fn": "gelu",
        "normalization_type": "LN",
        "device": "cpu",
    }
    model = HookedTransformer(HookedTransformerConfig(**sizes, **options, dtype=torch.float64)).eval()
    with torch.no_grad():
        model.pos_embed.W_pos.normal_()
    assert not Rerunner(model).resumes
    assert_runs_from_everywhere(model)


def test_a_hook_that_stays_and_would_act_twice_is_noticed(tiny_folder):
    model = tl.load(tiny_folder, dtype=torch.float64, device="cpu")
    assert Rerunner(model).resumes
    model.add_hook("blocks.2.hook_resid_pre", lambda value, hook: value + 1, is_permanent=True)
    assert not Rerunner(model).resumes
    assert_runs_from_everywhere(model)


def test_hooks_are_taken_off_when_a_run_is_interrupted(tiny_model):
    def interrupt(value):
        raise KeyboardInterrupt

    runner, tokens = Rerunner(tiny_model), rows_of()
    before = runner.run(tokens)[0]
    with pytest.raises(KeyboardInterrupt):
        runner.run(tokens, edits={"blocks.1.hook_resid_pre": interrupt})
    assert not any(point.fwd_hooks for point in tiny_model.hook_dict.values())
    assert not tiny_model.unembed._forward_pre_hooks
    assert torch.equal(runner.run(tokens)[0], before)
