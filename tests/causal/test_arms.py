import itertools

import pytest
import torch

import tracelens as tl
from tests.tiny import write_checkpoint
from tracelens.causal.arms import ArmRunner, OtherRun
from tracelens.causal.places import Place, n_units
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import Function, LogitDifference
from tracelens.causal.rerun import Rerunner
from tracelens.errors import MemoryBudgetError
from tracelens.features.sae_encode import encode
from tracelens.sites import HOOKS, Site

LENGTHS = (7, 9, 7)
GROUPS = {"object": ((2, 3), (5,), ())}
TOLERANCE = {"atol": 1e-9, "rtol": 0}


def prompt_set(seed: int) -> PromptSet:
    generator = torch.Generator().manual_seed(seed)
    tokens = tuple(tuple(torch.randint(4, 40, (n,), generator=generator).tolist()) for n in LENGTHS)
    groups = {**GROUPS, "answer": tuple((n - 1,) for n in LENGTHS)}
    return PromptSet(tuple(map(str, tokens)), tokens, groups, ("",) * len(tokens))


def one_by_one(model, prompts, arms, values_of, metric) -> torch.Tensor:
    """Every arm on every prompt as a run of its own from the tokens: what the engine has to equal."""

    def hook(place, prompt, new):
        where = list(prompts.positions(prompt, place.where))
        keys = list(prompts.positions(prompt, place.key))

        def replace(value, hook):
            units = slice(None) if place.unit is None else place.unit
            if place.site.name in ("pattern", "attn_scores"):
                for query, key in itertools.product(where, keys):
                    value[:, units, query, key] = new[:, units, query, key]
            elif place.unit is None:
                value[:, where] = new[:, where]
            else:
                value[:, where, place.unit] = new[:, where, place.unit]
            return value

        return str(place.site), replace

    out = torch.zeros(len(arms), len(prompts), dtype=torch.float64)
    for prompt, ids in enumerate(prompts.tokens):
        tokens = torch.tensor([ids])
        cache = values_of(prompt)
        for index, arm in enumerate(arms):
            with torch.no_grad():
                mask = torch.ones_like(tokens)
                hooks = [hook(place, prompt, cache[str(place.site)]) for place in arm]
                logits = model.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask)
            out[index, prompt] = metric(logits)[0]
    return out


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5] - logits[:, -1, 6]


def some_arms(model) -> list:
    known, wheres = getattr(model, "hook_dict", {}), (None, "object", -1, 3)
    generator = torch.Generator().manual_seed(1)
    arms: list = [()]
    for layer, name in itertools.product(range(model.cfg.n_layers), HOOKS):
        site = Site(layer, name)
        if str(site) not in known:
            continue
        where = wheres[int(torch.randint(4, (), generator=generator))]
        arms.append((Place(site, where),))
        if name in ("k", "v", "z", "q", "pattern", "mlp_post"):
            unit = int(torch.randint(n_units(model.cfg, site), (), generator=generator))
            arms.append((Place(site, where, unit),))
        if name == "pattern":
            arms.append((Place(site, -1, 0, None, "object"),))
    singles = [arm[0] for arm in arms if arm]
    for _ in range(8):
        picks = torch.randint(len(singles), (3,), generator=generator).tolist()
        # Two places of one arm may not write into the same cell, whose value would hang on their order.
        sites = {singles[i].site: singles[i] for i in picks}
        arms.append(tuple(sites.values()))
    return arms


def assert_equals_one_by_one(reference, target, ties=False, **options) -> None:
    prompts, other = prompt_set(0), prompt_set(1)
    arms = some_arms(target)
    job = ArmRunner(target, prompts, LogitDifference((5,) * 3, (6,) * 3), **options)
    plain, patched = job.run(arms, OtherRun(Rerunner(reference), other))

    def values_of(prompt):
        tokens = torch.tensor([other.tokens[prompt]])
        with torch.no_grad():
            return reference.run_with_cache(tokens, attention_mask=torch.ones_like(tokens))[1]

    expected = one_by_one(target, prompts, arms, values_of, difference)
    if ties:
        # The step largest / 127.5 puts a row's largest number between two codes, and the last bit of a sum decides.
        apart = (patched - expected).abs()
        assert (apart < TOLERANCE["atol"]).double().mean() > 0.95
        assert apart.max() < 0.05
    else:
        torch.testing.assert_close(patched, expected, **TOLERANCE)
    torch.testing.assert_close(plain, expected[0], **TOLERANCE)
    assert (patched - plain).abs().amax(1).gt(1e-6).sum() > len(arms) / 2
    assert torch.equal(job.unpatched(), job.unpatched())
    torch.testing.assert_close(job.unpatched(), plain, atol=0.05 if ties else 1e-9, rtol=0)


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "GPTNeoXForCausalLM", "GPT2LMHeadModel", "Olmo2ForCausalLM"]
)
def test_every_arm_equals_a_run_of_its_own(architecture, tmp_path):
    model = tl.load(write_checkpoint(tmp_path / "m", architecture), dtype=torch.float64, device="cpu")
    assert_equals_one_by_one(model, model)


@pytest.mark.parametrize(
    ("spec", "ties"),
    [("int4-g8+a8", True), ("int8-dynamic", True), ("int4-g8+kv8", True), ("bf16", False), ("llm-int8", False)],
)
def test_so_it_does_across_precisions_with_rounded_activations(spec, ties, tiny_folder):
    model = tl.load(tiny_folder, dtype=torch.float64, device="cpu")
    assert_equals_one_by_one(model, tl.apply_precision(model, spec), ties)


def test_so_it_does_whatever_goes_side_by_side(tiny_folder):
    model = tl.load(tiny_folder, dtype=torch.float64, device="cpu")
    assert_equals_one_by_one(model, model, batch_size=1)
    assert_equals_one_by_one(model, model, memory_budget=2**19)


def test_so_it_does_on_attention_alone():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 16, "d_head": 4, "n_heads": 4, "d_vocab": 40, "seed": 0}
    cfg = HookedTransformerConfig(**sizes, attn_only=True, normalization_type="LN", device="cpu", dtype=torch.float64)
    model, prompts = HookedTransformer(cfg).eval(), prompt_set(0)
    arms = [
        (Place(Site(layer, name), where),)
        for layer in range(2)
        for name in ("z", "attn_out", "resid_post")
        for where in (None, -1, 2)
    ]
    job = ArmRunner(model, prompts, LogitDifference((5,) * 3, (6,) * 3))
    patched = job.run(arms, OtherRun(Rerunner(model), prompt_set(1)))[1]
    expected = one_by_one(
        model, prompts, arms, lambda i: model.run_with_cache(torch.tensor([prompt_set(1).tokens[i]]))[1], difference
    )
    torch.testing.assert_close(patched, expected, **TOLERANCE)


def test_a_metric_of_all_positions_sees_all_positions(tiny_folder):
    model, prompts = tl.load(tiny_folder, dtype=torch.float64, device="cpu"), prompt_set(0)
    metric = Function(lambda logits: logits[:, :, 5].sum(1), whole=True)
    arms = [(Place(Site(layer, "resid_pre"), p),) for layer in range(3) for p in range(1, 5)]
    arms += [(Place(Site(2, "mlp_out"), 2),)]
    patched = ArmRunner(model, prompts, metric).run(arms, OtherRun(Rerunner(model), prompt_set(1)))[1]
    expected = one_by_one(
        model, prompts, arms, lambda i: model.run_with_cache(torch.tensor([prompt_set(1).tokens[i]]))[1],
        lambda logits: logits[:, :, 5].sum(1),
    )  # fmt: skip
    torch.testing.assert_close(patched, expected, **TOLERANCE)


def test_what_cannot_reach_the_metric_is_not_run(tiny_model):
    job = ArmRunner(tiny_model, prompt_set(0), LogitDifference((5,) * 3, (6,) * 3))
    dead = [(Place(Site(2, name), 1),) for name in ("resid_mid", "mlp_out", "resid_post", "z", "attn_out", "q")]
    dead += [(), (Place(Site(0, "resid_pre"), 30),)]
    alive = [(Place(Site(2, name), 1),) for name in ("resid_pre", "k", "v")]
    assert job.estimate(dead).runs == 0
    assert job.estimate(alive).runs == 3 * 3
    # One prompt of the three has no such key.
    assert job.estimate([(Place(Site(0, "pattern"), -1, 0, None, "object"),)]).runs == 2
    plain, patched = job.run(dead, OtherRun(Rerunner(tiny_model), prompt_set(1)))
    assert torch.equal(patched, plain.expand_as(patched))


class Sparse(torch.nn.Module):
    """A ReLU SAE of 12 features on width 32."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.W_dec = torch.nn.functional.normalize(torch.randn(12, 32, generator=generator, dtype=torch.float64), dim=1)

    def encode(self, x):
        return (x @ self.W_dec.T).relu()


def test_features_move_to_the_source_and_all_else_stays(tiny_folder):
    model = tl.load(tiny_folder, dtype=torch.float64, device="cpu")
    prompts, other, site, sae = prompt_set(0), prompt_set(1), Site(1, "resid_post"), Sparse()
    arms = [
        (Place(site, -1, feature=3),),
        (Place(site, None, feature=3), Place(site, None, feature=5)),
        (Place(Site(0, "resid_post"), 1), Place(site, "object", feature=7)),
    ]
    job = ArmRunner(model, prompts, LogitDifference((5,) * 3, (6,) * 3), saes={site: sae})
    patched = job.run(arms, OtherRun(Rerunner(model), other))[1]
    for prompt, ids in enumerate(prompts.tokens):
        with torch.no_grad():
            cache = model.run_with_cache(torch.tensor([other.tokens[prompt]]))[1]
        for index, arm in enumerate(arms):

            def hook(value, hook, arm=arm, cache=cache, prompt=prompt):
                new, before = cache[hook.name], value.clone()
                for place in arm:
                    where = list(prompts.positions(prompt, place.where))
                    if str(place.site) == hook.name and place.feature is None:
                        value[:, where] = new[:, where]
                    elif str(place.site) == hook.name and where:
                        wanted, own = (encode(sae, x[0, where])[:, place.feature].double() for x in (new, before))
                        value[0, where] += (wanted - own)[:, None] * sae.W_dec[place.feature]
                return value

            with torch.no_grad():
                logits = model.run_with_hooks(
                    torch.tensor([ids]),
                    fwd_hooks=[(str(p.site), hook) for p in set(arm[:1])]
                    + ([(str(site), hook)] if arm[0].site != site else []),
                )
            # Features are read in float32.
            assert patched[index, prompt].item() == pytest.approx(float(difference(logits)), abs=1e-5)


def test_a_sweep_that_does_not_fit_says_so_before_it_starts(tiny_model):
    runs = []
    tiny_model.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    job = ArmRunner(tiny_model, prompt_set(0), LogitDifference((5,) * 3, (6,) * 3), memory_budget=20_000)
    Rerunner(tiny_model).resumes  # noqa: B018
    runs.clear()
    with pytest.raises(MemoryBudgetError, match=r"one run of \d tokens needs about .* MiB .* budget is 0.0 MiB"):
        job.run([(Place(Site(0, "resid_pre")),)], OtherRun(Rerunner(tiny_model), prompt_set(1)))
    assert not runs


def test_an_interrupted_sweep_leaves_the_model_as_it_was(tiny_model):
    class Interrupting:
        def values(self, batch, sites, target):
            raise KeyboardInterrupt

    tiny_model.train()
    job = ArmRunner(tiny_model, prompt_set(0), LogitDifference((5,) * 3, (6,) * 3))
    with pytest.raises(KeyboardInterrupt):
        job.run([(Place(Site(0, "resid_pre")),)], Interrupting())
    assert tiny_model.training
    assert not any(point.fwd_hooks for point in tiny_model.hook_dict.values())


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
def test_a_source_that_changes_nothing_changes_nothing(wrapper, tiny_folder):
    model = tl.load(tiny_folder, dtype=torch.float64, device="cpu", wrapper=wrapper)
    arms = [
        (Place(Site(layer, name), where),)
        for layer in range(3)
        for name in ("resid_pre", "z", "mlp_out", "resid_post")
        for where in (None, -1)
    ]
    plain, patched = ArmRunner(model, prompt_set(0), LogitDifference((5,) * 3, (6,) * 3)).run(
        arms, OtherRun(Rerunner(model))
    )
    torch.testing.assert_close(patched, plain.expand_as(patched), **TOLERANCE)


def test_the_estimate_counts_less_work_than_runs_of_their_own(tiny_model):
    job = ArmRunner(tiny_model, prompt_set(0), LogitDifference((5,) * 3, (6,) * 3), memory_budget=2**24)
    cost = job.estimate([(Place(Site(layer, "resid_pre"), p),) for layer in range(3) for p in range(4)])
    assert cost.runs == 3 * 4 * 3
    assert 0 < cost.work < cost.full
    assert 0 < cost.bytes <= cost.budget == 2**24


def test_features_behind_the_last_attention_move_where_they_are_read(tiny_folder):
    model, site = tl.load(tiny_folder, dtype=torch.float64, device="cpu"), Site(2, "resid_post")
    before = Place(Site(0, "resid_pre"), -1)
    arms = [(before,), (before, Place(site, None, feature=3)), (before, Place(site, -1, feature=3))]
    job = ArmRunner(model, prompt_set(0), LogitDifference((5,) * 3, (6,) * 3), saes={site: Sparse()})
    without, everywhere, at_last = job.run(arms, OtherRun(Rerunner(model), prompt_set(1)))[1]
    torch.testing.assert_close(everywhere, at_last, **TOLERANCE)
    assert (everywhere - without).abs().max() > 1e-4
