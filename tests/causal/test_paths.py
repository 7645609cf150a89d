import copy

import pytest
import torch

from tests.tiny import SIZES, write_checkpoint
from tracelens import apply_precision, load
from tracelens.causal.contrasts import Contrasts
from tracelens.causal.corruptions import EmbeddingNoise
from tracelens.causal.paths import cross_precision_path_patching, path_patching
from tracelens.causal.places import Place
from tracelens.causal.readout import KL, LogitDifference
from tracelens.errors import MemoryBudgetError, UnknownNameError
from tracelens.organism import sample
from tracelens.pair import PrecisionPair
from tracelens.sites import Site

CLEAN = [[2, 5, 9, 12, 7], [2, 8, 6, 11], [2, 14, 9, 21, 30]]
CORRUPTED = [[2, 16, 9, 12, 7], [2, 8, 19, 11], [2, 14, 27, 21, 30]]
METRIC = LogitDifference((4, 9, 20), (13, 17, 6))
ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPTNeoXForCausalLM": {"use_parallel_residual": True},
    "Gemma2ForCausalLM": {"head_dim": 8},
}
EVERYTHING = ("embedding", "head", "mlp")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory):
    """Grouped-query heads, learnt biases, parallel blocks, norms behind the blocks' parts."""
    folder = tmp_path_factory.mktemp(request.param)
    return load(write_checkpoint(folder, request.param, **ARCHITECTURES[request.param]))


def contrasts(model) -> Contrasts:
    return Contrasts.of(CLEAN, CORRUPTED, model, metric=METRIC)


def linear_model(**config):
    """Random heads and MLPs without norms, in double precision: logits are linear in what each writes."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 3, "d_model": 16, "d_head": 4, "n_heads": 4, "d_mlp": 20, "n_ctx": 16, "d_vocab": 40}
    options = {"act_fn": "relu", "normalization_type": None, "device": "cpu", "seed": 1, "dtype": torch.float64}
    made = HookedTransformer(HookedTransformerConfig(**sizes, **options, **config)).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.startswith("blocks"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return made


def moved(result) -> torch.Tensor:
    return result.patched - result.start


def of(result, **wanted) -> torch.Tensor:
    """How far the metric moves along one path, by prompt."""
    found = [i for i, row in enumerate(result.rows) if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1, (wanted, found)
    return moved(result)[found[0]]


class Oracle:
    """Path patching of one prompt by the book: residual streams added up by hand, one plain hooked run a path."""

    def __init__(self, model, index: int) -> None:
        self.model, self.index = model, index
        self.target, self.source = (torch.tensor([ids[index]]) for ids in (CORRUPTED, CLEAN))
        self.own, self.new = ({}, {})
        for tokens, into in ((self.target, self.own), (self.source, self.new)):
            model.run_with_hooks(
                tokens, fwd_hooks=[(lambda name: True, lambda x, hook, into=into: into.update({hook.name: x}))]
            )

    def metric(self, logits) -> float:
        return float(logits[0, -1, METRIC.correct[self.index]] - logits[0, -1, METRIC.wrong[self.index]])

    def plain(self) -> float:
        return self.metric(self.model(self.target))

    def delta(self, layer: int, head: int | None) -> torch.Tensor:
        """What a head, or the MLP, writes more."""
        name = f"blocks.{layer}.hook_mlp_out"
        if head is None:
            return self.new[name] - self.own[name]

        def put(z, hook):
            z[:, :, head] = self.new[hook.name][:, :, head]
            return z

        found = {}
        out = f"blocks.{layer}.hook_attn_out"
        hooks = [(f"blocks.{layer}.attn.hook_z", put), (out, lambda x, hook: found.update(out=x))]
        self.model.run_with_hooks(self.target, fwd_hooks=hooks)
        return found["out"] - self.own[out]

    def to_logits(self, delta) -> float:
        stream = self.own[f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"] + delta
        final = getattr(self.model, "ln_final", lambda x: x)(stream)
        logits = self.model.unembed(final)
        cap = self.model.cfg.output_logits_soft_cap
        return self.metric(cap * torch.tanh(logits / cap) if cap > 0 else logits) - self.plain()

    def to_mlp(self, delta, layer: int) -> float:
        block = self.model.blocks[layer]
        read = "hook_resid_pre" if self.model.cfg.parallel_attn_mlp else "hook_resid_mid"
        value = block.apply_mlp(block.ln2(self.own[f"blocks.{layer}.{read}"] + delta))
        return self.patched(f"blocks.{layer}.hook_mlp_out", lambda x: value)

    def to_input(self, delta, layer: int, name: str, head: int) -> float:
        block = self.model.blocks[layer]
        read = block.ln1(self.own[f"blocks.{layer}.hook_resid_pre"] + delta)
        underscore = "_" if name in "kv" and self.model.cfg.n_key_value_heads else ""
        weight, bias = (getattr(block.attn, f"{underscore}{kind}_{name.upper()}")[head] for kind in "Wb")

        def put(x):
            x[:, :, head] = read @ weight + bias
            return x

        return self.patched(f"blocks.{layer}.attn.hook_{name}", put)

    def patched(self, hook: str, put) -> float:
        hooks = [(hook, lambda x, hook: put(x.clone()))]
        return self.metric(self.model.run_with_hooks(self.target, fwd_hooks=hooks)) - self.plain()


def test_every_path_is_what_adding_up_residual_streams_by_hand_gives(model):
    result = path_patching(
        model, contrasts(model), receivers=("logits", "q", "k", "v", "mlp"), placebo=None, memory_budget=2**22
    )
    shared = bool(model.cfg.n_key_value_heads)
    for index in range(len(CLEAN)):
        oracle = Oracle(model, index)
        for sender, delta in (
            ("L0H1", oracle.delta(0, 1)),
            ("L0 MLP", oracle.delta(0, None)),
            ("L1H3", oracle.delta(1, 3)),
        ):
            expected = {"logits": oracle.to_logits(delta), "L2 MLP": oracle.to_mlp(delta, 2)}
            expected["L2H2 q"] = oracle.to_input(delta, 2, "q", 2)
            for name in "kv":
                expected[f"L2KV1 {name}" if shared else f"L2H1 {name}"] = oracle.to_input(delta, 2, name, 1)
            for receiver, change in expected.items():
                assert float(of(result, sender=sender, receiver=receiver)[index]) == pytest.approx(change, abs=1e-5)
    assert moved(result).abs().max() > 5e-3


def test_heads_between_are_held_and_mlps_are_not_when_these_recompute(model):
    """Wang et al.: all heads keep the target's outputs, MLPs and norms answer."""
    chosen = {"senders": [Place(Site(0, "z"), unit=2)], "receivers": ["logits", Place(Site(2, "q"), unit=1)]}
    result = path_patching(model, contrasts(model), **chosen, mlps="recompute", placebo=None)
    frozen = path_patching(model, contrasts(model), **chosen, placebo=None)
    for index in range(len(CLEAN)):
        oracle = Oracle(model, index)
        found = {}

        def hold(z, hook, oracle=oracle):
            own = oracle.own[hook.name].clone()
            if hook.layer() == 0:
                own[:, :, 2] = oracle.new[hook.name][:, :, 2]
            return own

        hooks = [(f"blocks.{layer}.attn.hook_z", hold) for layer in range(3)]
        hooks.append(("blocks.2.attn.hook_q", lambda x, hook, found=found: found.update(q=x.clone())))
        direct = oracle.metric(model.run_with_hooks(oracle.target, fwd_hooks=hooks)) - oracle.plain()

        def put(x, found=found):
            x[:, :, 1] = found["q"][:, :, 1]
            return x

        through = oracle.patched("blocks.2.attn.hook_q", put)
        assert float(of(result, receiver="logits")[index]) == pytest.approx(direct, abs=1e-5)
        assert float(of(result, receiver="L2H1 q")[index]) == pytest.approx(through, abs=1e-5)
    assert (moved(result) - moved(frozen)).abs().max() > 1e-3


def test_without_norms_the_direct_effects_of_all_components_add_up_to_the_whole_difference():
    model = linear_model()
    result = path_patching(model, contrasts(model), senders=EVERYTHING, placebo=None)
    assert moved(result).sum(0) == pytest.approx(result.goal - result.start, abs=1e-9)
    whole = path_patching(model, contrasts(model), senders=("embedding", "attn", "mlp"), placebo=None)
    assert moved(whole).sum(0) == pytest.approx(result.goal - result.start, abs=1e-9)
    heads = sum(of(result, sender=f"L1H{head}") for head in range(4))
    assert of(whole, sender="L1 attention") == pytest.approx(heads, abs=1e-9)


def test_without_norms_a_path_to_the_logits_is_direct_logit_attribution():
    model = linear_model()
    result = path_patching(model, contrasts(model), placebo=None)
    for index, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        z = [
            model.run_with_cache(torch.tensor([ids]))[1]["blocks.1.attn.hook_z"][0, -1, 3] for ids in (clean, corrupted)
        ]
        direction = model.W_U[:, METRIC.correct[index]] - model.W_U[:, METRIC.wrong[index]]
        expected = (z[0] - z[1]) @ model.W_O[1, 3] @ direction
        assert float(of(result, sender="L1H3")[index]) == pytest.approx(float(expected), abs=1e-9)


def test_components_that_move_together_add_up_and_receivers_that_hear_together_may_not():
    model = linear_model()
    heads = [Place(Site(layer, "z"), unit=1) for layer in (0, 2)]
    together = path_patching(model, contrasts(model), senders=[tuple(heads), *heads], placebo=None)
    apart = of(together, sender="L0H1") + of(together, sender="L2H1")
    assert of(together, sender="L0H1 + L2H1") == pytest.approx(apart, abs=1e-9)
    inputs = tuple(Place(Site(2, name), unit=1) for name in "qkv")
    heard = path_patching(
        model, contrasts(model), senders="head", receivers=[inputs, Place(Site(2, "z"), unit=1)], placebo=None
    )
    assert of(heard, sender="L1H0", receiver="L2H1 q + L2H1 k + L2H1 v") == pytest.approx(
        of(heard, sender="L1H0", receiver="L2H1"), abs=1e-5
    )


def test_other_receivers_of_an_arm_are_heard_beside_the_logits():
    model = linear_model()
    logits, mlp = Place(Site(2, "resid_post")), Place(Site(2, "mlp_out"))
    result = path_patching(model, contrasts(model), senders="mlp", receivers=[(mlp, logits), mlp, logits], placebo=None)
    apart = of(result, sender="L0 MLP", receiver="L2 MLP") + of(result, sender="L0 MLP", receiver="logits")
    assert of(result, sender="L0 MLP", receiver="L2 MLP + logits") == pytest.approx(apart, abs=1e-9)


def test_positions_share_out_what_a_receiver_hears():
    model = linear_model()
    options = {"senders": "mlp", "placebo": None}
    parts = path_patching(model, contrasts(model), **options, at=range(-5, 0))
    whole = path_patching(model, contrasts(model), **options)
    assert parts.axes == ("sender", "receiver", "position")
    assert of(parts, sender="L1 MLP", position=-1) == pytest.approx(of(whole, sender="L1 MLP"), abs=1e-6)
    assert moved(parts)[[row["position"] != -1 for row in parts.rows]].abs().max() < 1e-6
    assert parts.present[[row["position"] == -5 for row in parts.rows]].tolist() == [[True, False, True]] * 3
    changed = path_patching(model, contrasts(model), **options, receivers="v", at=("changed", "answer", None))
    assert {row["group"] for row in changed.rows} == {"changed", "answer", "all"}


def test_noising_goes_the_other_way(tiny_model):
    there = path_patching(tiny_model, contrasts(tiny_model), placebo=None)
    back = path_patching(tiny_model, contrasts(tiny_model), direction="noising", placebo=None)
    assert back.start == pytest.approx(there.goal)
    assert back.goal == pytest.approx(there.start)
    swapped = path_patching(tiny_model, contrasts(tiny_model).swapped(), placebo=None)
    assert back.patched == pytest.approx(swapped.patched, abs=1e-5)


def test_a_corrupted_embedding_is_the_target(tiny_model):
    made = Contrasts.of_corruption(CLEAN, tiny_model, EmbeddingNoise(where=1), METRIC)
    result = path_patching(
        tiny_model, made, senders="embedding", receivers=("q", "k", "v", "mlp", "logits"), placebo=None
    )
    assert (result.start - result.goal).abs().min() > 1e-3
    clean = {"senders": "embedding", "receivers": "logits", "placebo": None}
    assert of(path_patching(tiny_model, made, **clean, direction="noising")).shape == (3,)
    # Position 1 alone is spoilt, so that nothing is heard directly at the others.
    assert of(result, receiver="logits").abs().max() < 1e-6
    assert moved(result)[[row["receiver"] == "L0KV0 v" for row in result.rows]].abs().max() > 1e-3


def test_an_identical_pair_has_nothing_to_bring_back(tiny_model):
    result = cross_precision_path_patching(
        PrecisionPair(tiny_model, copy.deepcopy(tiny_model)), CLEAN, metric=METRIC, receivers=("logits", "mlp", "q")
    )
    assert result.n_undetermined == len(CLEAN)
    assert result.table["effect"].isna().all()
    assert moved(result).abs().max() < 1e-5


def test_a_fault_in_one_head_is_heard_from_there_first(tiny_model):
    damaged = copy.deepcopy(tiny_model)
    noise = torch.randn(damaged.blocks[1].attn.W_O[2].shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        damaged.blocks[1].attn._W_V[1] += 0.5 * noise.T
    prompts = [[2, *torch.randint(4, 40, (6,), generator=torch.Generator().manual_seed(i)).tolist()] for i in range(30)]
    metric = LogitDifference((4,) * 30, (13,) * 30)
    result = cross_precision_path_patching(PrecisionPair(tiny_model, damaged), prompts, metric=metric)
    table = result.table
    before = table["sender_layer"] == 0
    assert table.loc[before, "effect"].abs().max() < 1e-5
    # Heads 2 and 3 share the key-value head that is broken.
    heads = table[(table["site"] == "z") & (table["sender_layer"] == 1)].set_index("sender")["change"].abs()
    assert heads[["L1H0", "L1H1"]].max() < 1e-5
    assert heads[["L1H2", "L1H3"]].min() > 1e-3
    assert len(table[table["p_versus_placebo"] < 0.05]) > 0


@pytest.mark.parametrize("precision", ["int3-g32+a8"])
def test_a_quantized_run_that_rounds_activations_is_the_one_that_is_held(organism, precision):
    """Against plain hooks on the quantized model."""
    quantized = apply_precision(organism, precision)
    prompts = sample(4, behaviour="refusal")
    result = cross_precision_path_patching(PrecisionPair(organism, quantized), prompts, senders="mlp", placebo=None)
    from tracelens.behaviour import answer_tokens_for, margin

    answers = answer_tokens_for(organism.tokenizer)
    for index, prompt in enumerate(prompts):
        tokens = torch.tensor([organism.tokenizer(prompt.prompt)["input_ids"]])
        own, new = (model.run_with_cache(tokens)[1] for model in (quantized, organism))
        names = [f"blocks.{layer}.hook_{kind}_out" for layer in range(2, 5) for kind in ("attn", "mlp")]
        hooks = [(name, lambda x, hook, own=own: own[hook.name]) for name in names]
        hooks.append(("blocks.1.hook_mlp_out", lambda x, hook, new=new: new[hook.name]))
        logits = quantized.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
        expected = float(margin(logits, answers)) - float(result.start[index])
        assert float(of(result, sender="L1 MLP")[index]) == pytest.approx(expected, abs=1e-5)


def test_a_bridge_gives_the_same_numbers(tiny_folder, tiny_model):
    bridge = load(tiny_folder, wrapper="bridge")
    head, mlp = Place(Site(1, "z"), unit=2), Place(Site(0, "mlp_out"))
    options = {"senders": ["embedding", "attn", head, mlp], "receivers": ("logits", "head", "k", "mlp")}
    for mlps, placebo in (("frozen", "displacement"), ("recompute", None)):
        ours, theirs = (
            path_patching(m, contrasts(m), **options, mlps=mlps, placebo=placebo) for m in (tiny_model, bridge)
        )
        assert ours.rows == theirs.rows
        assert theirs.patched == pytest.approx(ours.patched, abs=1e-5)
        assert placebo is None or theirs.placebo == pytest.approx(ours.placebo, abs=1e-5)


def test_a_metric_may_compare_with_the_other_run(tiny_model):
    result = path_patching(tiny_model, contrasts(tiny_model), metric=KL("clean"), placebo=None)
    assert result.goal == pytest.approx(torch.zeros(3, dtype=torch.float64), abs=1e-6)
    assert (result.start > 1e-3).all()


def test_small_batches_and_budgets_give_the_same(tiny_model):
    options = {"senders": "mlp", "receivers": ("logits", "head", "mlp"), "seed": 5}
    whole = path_patching(tiny_model, contrasts(tiny_model), **options)
    parts = path_patching(tiny_model, contrasts(tiny_model), **options, batch_size=1, memory_budget=300_000)
    assert parts.patched == pytest.approx(whole.patched, abs=1e-5)
    assert parts.placebo == pytest.approx(whole.placebo, abs=1e-5)


def test_a_budget_that_holds_no_run_is_refused_before_the_first(tiny_model):
    with pytest.raises(MemoryBudgetError, match="larger memory_budget"):
        path_patching(tiny_model, contrasts(tiny_model), memory_budget=1000)


def test_pairs_of_which_the_sender_is_not_before_the_receiver_are_left_out(model):
    result = path_patching(model, contrasts(model), receivers=("head", "mlp"), placebo=None)
    pairs = {(row["sender"], row["receiver"]) for row in result.rows}
    assert ("L0H0", "L1H0") in pairs
    assert ("L0H0", "L0H1") not in pairs
    assert ("L1 MLP", "L1H0") not in pairs
    # In a parallel block attention and MLP do not hear each other.
    assert (("L1H0", "L1 MLP") in pairs) is not bool(model.cfg.parallel_attn_mlp)


def test_a_path_that_does_not_exist_names_both_ends(tiny_model):
    late, early = Place(Site(2, "z"), unit=1), Place(Site(1, "mlp_out"))
    with pytest.raises(UnknownNameError, match=r"no path from L2H1 to L1 MLP.*earlier sender"):
        path_patching(tiny_model, contrasts(tiny_model), senders=[late], receivers=[early])
    with pytest.raises(UnknownNameError, match=r"no path from L2H1 to L1 MLP"):
        path_patching(tiny_model, contrasts(tiny_model), senders=[late, Place(Site(0, "z"), unit=0)], receivers=[early])
    with pytest.raises(UnknownNameError, match=r"no path from .* to L0H1"):
        path_patching(tiny_model, contrasts(tiny_model), receivers=["logits", Place(Site(0, "z"), unit=1)])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"senders": "heads"}, r"unknown sender 'heads'.*mean 'head'.*embedding"),
        ({"receivers": "embedding"}, r"unknown receiver 'embedding'.*logits"),
        ({"senders": []}, "no sender is given"),
        ({"senders": [Place(Site(1, "resid_post"))]}, "resid_post of layer 1 is no sender of paths.*mlp_out"),
        ({"receivers": [Place(Site(1, "resid_post"))]}, "is no receiver of paths.*resid_post of layer 2"),
        ({"senders": [Place(Site(1, "z"), unit=4)]}, "head 4 is out of range"),
        ({"senders": [Place(Site(7, "z"), unit=0)]}, "3 layers"),
        ({"receivers": [Place(Site(2, "k"), unit=2)]}, "there are 2"),
        ({"at": ("subject",)}, "unknown group of positions 'subject'"),
        ({"mlps": "free"}, "unknown choice of mlps 'free'"),
        ({"direction": "repair"}, "unknown direction 'repair'.*denoising"),
        ({"n_placebo": 0}, "n_placebo is 0"),
    ],
)
def test_bad_input_is_named(tiny_model, wrong, said):
    with pytest.raises(UnknownNameError, match=said):
        path_patching(tiny_model, contrasts(tiny_model), **wrong)


def test_results_are_reproducible_and_survive_a_file(tiny_model, tmp_path):
    from tracelens.causal.patching_result import PatchingResult

    first, again = (path_patching(tiny_model, contrasts(tiny_model), seed=3) for _ in range(2))
    assert torch.equal(first.placebo, again.placebo)
    read = PatchingResult.load(first.save(tmp_path / "paths.safetensors"))
    assert torch.equal(read.patched, first.patched)
    assert read.rows == first.rows
    assert read.table.equals(first.table)
    assert SIZES["num_hidden_layers"] == len({row["sender_layer"] for row in first.rows})
