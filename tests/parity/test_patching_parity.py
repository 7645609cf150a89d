"""Patching against `transformer_lens.patching`, and against full passes with plain hooks, one prompt and one arm at a time.

Largest difference 1e-5 (metrics of about 1 to 10): float32 with `transformer_lens`; float64 elsewhere, where bridges keep some norms
in float32.
"""

import itertools

import pytest
import torch
from transformer_lens import patching as reference

import tracelens
from tests.naive_patching import naive
from tests.parity.test_activations_bridge import CASES
from tests.tiny import TEXTS, tiny_tokenizer, write_checkpoint
from tracelens.causal.arms import ArmRunner, OtherRun
from tracelens.causal.contrasts import Contrasts
from tracelens.causal.patching import activation_patching
from tracelens.causal.places import UNITS, Place
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import Function
from tracelens.causal.rerun import Rerunner
from tracelens.errors import UnknownNameError
from tracelens.sites import HOOKS, Site

TOLERANCE = 1e-5
CLEAN = ["the cat sat on the mat", "a bird ran under a tree", "then she saw the roof no"]
CORRUPTED = ["the dog sat on the mat", "a cat ran over a tree", "then he saw the roof yes"]
AXES = {"layer": "layer", "position": "pos", "head": "head", "key": "src_pos"}


def difference(logits):
    return logits[..., 5] - logits[..., 9]


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "GPT2LMHeadModel"])
def hooked(request, tmp_path_factory):
    """With key-value heads shared by two heads each, and without."""
    folder = write_checkpoint(tmp_path_factory.mktemp("hooked") / "model", request.param, seed=1)
    model = tracelens.load(folder, device="cpu")
    for block in model.blocks:  # random attention is all but even, and would hardly notice a patch
        block.attn.W_Q.data *= 10
    return model


@pytest.fixture(scope="module")
def runs(hooked):
    clean, corrupted = (torch.tensor(tiny_tokenizer()(texts)["input_ids"]) for texts in (CLEAN, CORRUPTED))
    _, cache = hooked.run_with_cache(clean)
    contrasts = Contrasts.of(CLEAN, CORRUPTED, hooked, chat="never")
    assert contrasts.clean.tokens == tuple(map(tuple, clean.tolist()))
    return corrupted, cache, contrasts


def ours(model, contrasts, sites, by):
    result = activation_patching(model, contrasts, sites=sites, by=by, metric=difference, placebo=None)
    return result, result.patched.mean(1).float()


def laid_out(result, values, expected, axes):
    """Our values in the reference's layout; what we do not run (keys after their query) holds the unpatched metric."""
    out = torch.full_like(expected, result.start.mean().item())
    for row, value in zip(result.rows, values, strict=True):
        out[tuple(row[axis] for axis in axes)] = value
    return out


KINDS = {
    "resid_pre": ("resid_pre", ("layer", "position")),
    "resid_mid": ("resid_mid", ("layer", "position")),
    "attn_out": ("attn_out", ("layer", "position")),
    "mlp_out": ("mlp_out", ("layer", "position")),
    **{
        f"attn_head_{kind}_by_pos": (site, ("layer", "position", "head"))
        for kind, site in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"))
    },
    "attn_head_pattern_by_pos": ("pattern", ("layer", "head", "position")),
    "attn_head_pattern_dest_src_pos": ("pattern", ("layer", "head", "position", "key")),
    **{
        f"attn_head_{kind}_all_pos": (site, ("layer", "head"))
        for kind, site in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"), ("pattern", "pattern"))
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_transformer_lens(hooked, runs, kind):
    corrupted, cache, contrasts = runs
    site, axes = KINDS[kind]
    metric = lambda logits: difference(logits[:, -1]).mean()  # noqa: E731
    expected = getattr(reference, f"get_act_patch_{kind}")(hooked, corrupted, cache, metric)
    result, values = ours(hooked, contrasts, site, axes)
    assert result.axes == axes
    found = laid_out(result, values, expected, axes)
    assert (expected - result.start.mean()).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


EVERY = {
    "block_every": (("resid_pre", "attn_out", "mlp_out"), ("position",), ("layer", "position")),
    "attn_head_all_pos_every": (("z", "q", "k", "v", "pattern"), ("head",), ("layer", "head")),
    "attn_head_by_pos_every": (("z", "q", "k", "v", "pattern"), ("position", "head"), ("layer", "position", "head")),
}


@pytest.mark.parametrize("kind", EVERY)
def test_equal_to_the_helpers_that_do_every_kind(hooked, runs, kind):
    corrupted, cache, contrasts = runs
    sites, by, axes = EVERY[kind]
    metric = lambda logits: difference(logits[:, -1]).mean()  # noqa: E731
    expected = getattr(reference, f"get_act_patch_{kind}")(hooked, corrupted, cache, metric)
    result, values = ours(hooked, contrasts, sites, by)
    found = torch.zeros_like(expected)
    for row, value in zip(result.rows, values, strict=True):
        found[(sites.index(row["site"]), *(row[axis] for axis in axes))] = value
    # transformer_lens pads the key-value heads that there are not with zeros.
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
    """Case and wrapper → two models that differ in every weight, float64."""
    made = {}

    def make(case, wrapper):
        architecture, config = CASES[case]
        for seed in (5, 6):
            folder = tmp_path_factory.getbasetemp() / "patched" / f"{case}{seed}"
            if not folder.exists():
                write_checkpoint(folder, architecture, seed=seed, **config)
            if (case, wrapper, seed) not in made:
                made[case, wrapper, seed] = tracelens.load(folder, wrapper=wrapper, device="cpu", dtype=torch.float64)
        return [made[case, wrapper, seed] for seed in (5, 6)]

    return make


def arms_at(name):
    at = Site(1, name)
    arms = [(Place(at),), (Place(at, "some"),)]
    if UNITS.get(name) == "head":
        arms += [(Place(at, "some", 1),)]
    if UNITS.get(name) == "neuron":
        arms += [(Place(at, None, 7),)]
    if name == "pattern":
        arms += [(Place(at, -1, 1, key="some"),)]
    return arms


def prompts_of(model):
    return PromptSet.of(TEXTS, model, chat="never", spans={"some": [(1, 3), (2,), (), (4, 5)]})


NOT_THERE = {"neox": ("resid_mid",)}
"""Blocks whose MLP is beside the attention have no stream between the two."""
ONLY_SHOWN = {("opt", "bridge"): ("pattern", "attn_scores")}
FAMILIES = [
    *((case, "hooked") for case in ("gpt2", "neox", "gemma2")),
    *((case, "bridge") for case in ("llama", "gpt2", "neox", "gemma2", "opt", "olmo2")),
]


@pytest.fixture(scope="module")
def expected_of(models_of):
    """Case → what each arm gives on the hooked models, by the oracle."""
    made = {}

    def make(case):
        if case not in made:
            twins = models_of(case, "hooked")
            arms = [arm for name in HOOKS if name not in NOT_THERE.get(case, ()) for arm in arms_at(name)]
            made[case] = dict(zip(arms, naive(*twins, prompts_of(twins[0]), arms, difference), strict=True))
        return made[case]

    return make


@pytest.mark.parametrize(("case", "wrapper"), FAMILIES)
def test_every_site_of_every_family_is_written_where_it_counts(models_of, expected_of, case, wrapper):
    target, source = models_of(case, wrapper)
    job, other = ArmRunner(target, prompts_of(target), Function(difference)), OtherRun(Rerunner(source))
    for name in NOT_THERE.get(case, ()):
        with pytest.raises(UnknownNameError, match=f"has no hook point blocks.1.hook_{name}"):
            job.run(arms_at(name), other)
    for name in (shown := ONLY_SHOWN.get((case, wrapper), ())):
        with pytest.raises(
            UnknownNameError, match=rf"put in at blocks.1.attn.hook_{name} gets nowhere.*wrapper='hooked'"
        ):
            job.run(arms_at(name), other)
    expected = {arm: values for arm, values in expected_of(case).items() if arm[0].site.name not in shown}
    plain, patched = job.run(list(expected), other)
    for arm, found in zip(expected, patched, strict=True):
        torch.testing.assert_close(
            found, expected[arm], rtol=0, atol=TOLERANCE, msg=lambda text, arm=arm: f"{arm[0]}: {text}"
        )
    for name in {arm[0].site.name for arm in expected}:
        changes = [
            (found - plain).abs().max()
            for arm, found in zip(expected, patched, strict=True)
            if arm[0].site.name == name
        ]
        assert max(changes) > 10 * TOLERANCE, name


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
@pytest.mark.parametrize("case", ["neox", "gemma2"])
def test_places_in_several_layers_together(models_of, case, wrapper):
    twins, (target, source) = models_of(case, "hooked"), models_of(case, wrapper)
    prompts = prompts_of(target)
    names = ("attn_out", "z", "mlp_out", "mlp_post", "k", *(() if case == "neox" else ("resid_mid",)))
    arms = [
        tuple(Place(Site(layer, name), where) for layer in range(3) for name in pair)
        for pair in itertools.combinations(names, 2)
        for where in (None, "some")
    ]
    arms += [(Place(Site(0, "resid_pre"), -1), Place(Site(2, "resid_post"), 1), Place(Site(1, "q"), -1, 0))]
    arms += [()]
    _, patched = ArmRunner(target, prompts, Function(difference)).run(arms, OtherRun(Rerunner(source)))
    torch.testing.assert_close(patched, naive(*twins, prompts, arms, difference), rtol=0, atol=TOLERANCE)
