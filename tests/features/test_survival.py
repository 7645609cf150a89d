import copy
import weakref

import pytest
import torch

from tests import handmade
from tests.handmade import ReadOut
from tests.planted import unwritten
from tracelens.features.survival import REFERENCE, ReferencePass, measure_survival, prompt_blocks
from tracelens.metrics import FeatureSmearing
from tracelens.metrics.divergence import token_divergence
from tracelens.metrics.moments import MomentAccumulator
from tracelens.precision.sharing import copy_sharing
from tracelens.sites import Site

TEXTS = [text for texts in handmade.prompts(12).values() for text in texts]
SITES = {Site(0): ReadOut(), Site(1): ReadOut()}


@pytest.fixture(scope="module")
def models():
    reference = handmade.model()
    rows = handmade.directions()
    return reference, {"one": unwritten(reference, rows[:1], 1), "two": unwritten(reference, rows[4:6], 1)}


def measure(models, **options):
    reference, others = models
    makers = {name: (lambda model=model: model) for name, model in others.items()}
    options = {"readout": lambda logits: logits[:, :2], "smearing_of": ["one"]} | options
    return measure_survival(reference, makers, SITES, TEXTS, **options)


def test_sums_are_those_of_all_tokens_at_once(models):
    reference, others = models
    survival = measure(models, batch_size=5, n_blocks=4)
    ids = [reference.tokenizer(text)["input_ids"][1:] for text in TEXTS]
    tokens = torch.tensor([token for row in ids for token in row])
    prompt = torch.arange(len(TEXTS)).repeat_interleave(torch.tensor([len(row) for row in ids]))
    r = ReadOut().encode(reference.W_E[tokens])
    for name, model in others.items():
        q = ReadOut().encode(model.W_E[tokens])
        expected = MomentAccumulator(handmade.FEATURES, 4).update(r, q, prompt_blocks(TEXTS, 4)[prompt]).finalize()
        both = survival.moments[name]
        assert both.max_ref.shape == (2 * handmade.FEATURES,)
        for side in (slice(None, handmade.FEATURES), slice(handmade.FEATURES, None)):
            for field, value in vars(expected).items():
                mine = getattr(both, field)
                torch.testing.assert_close(mine if field == "n" else mine[..., side], value, rtol=1e-5, atol=1e-5)
        kl, agree = token_divergence(
            reference.W_E[tokens] @ reference.W_U + reference.b_U, model.W_E[tokens] @ model.W_U + model.b_U
        )
        divergence = survival.divergence[name].total()
        assert divergence.n.item() == len(tokens)
        assert divergence.n_targets.item() == len(tokens) - len(TEXTS)
        assert divergence.kl().item() == pytest.approx(kl.mean().item(), rel=1e-5)
        assert divergence.top1().item() == pytest.approx(agree.double().mean().item())
    assert set(survival.smearing) == {"one"}
    q = ReadOut().encode(others["one"].W_E[tokens])
    found = survival.smearing["one"][Site(0)].finalize()
    assert found.leakage == pytest.approx(FeatureSmearing().detect_smearing(r, q).leakage, rel=1e-5)


def test_answers_and_maxima_are_in_the_order_of_the_prompts(models):
    reference, _ = models
    survival = measure(models, batch_size=5, readout=lambda logits: logits)
    assert set(survival.answers) == {REFERENCE, "one", "two"}
    for row, text in enumerate(TEXTS):
        ids = reference.tokenizer(text)["input_ids"]
        torch.testing.assert_close(survival.answers[REFERENCE][row], reference(torch.tensor([ids]))[0, -1])
        acts = ReadOut().encode(reference.W_E[ids[1:]])  # BOS is not counted
        torch.testing.assert_close(survival.maxima[Site(1)].dense()[row], acts.amax(0), rtol=1e-5, atol=1e-5)
    assert not measure(models, maxima=False).maxima


def assert_same(ours, theirs):
    assert list(ours.moments) == list(theirs.moments)
    for name, moments in ours.moments.items():
        assert all(torch.equal(value, getattr(theirs.moments[name], key)) for key, value in vars(moments).items())
        for key, value in vars(ours.divergence[name]).items():
            assert torch.equal(value, getattr(theirs.divergence[name], key))
    for name, answers in ours.answers.items():
        assert torch.equal(answers, theirs.answers[name])
    for site, maxima in ours.maxima.items():
        assert torch.equal(maxima.dense(), theirs.maxima[site].dense())
    for name, sites in ours.smearing.items():
        for site, seen in sites.items():
            assert seen.finalize().to_dict() == theirs.smearing[name][site].finalize().to_dict()


def one_by_one(models, **options):
    """Each model beside the reference, in a pass of its own."""
    reference, others = models
    whole, *more = (measure((reference, {name: other}), **options) for name, other in others.items())
    for one in more:
        whole.include(one)
    return whole


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("memory", [None, 0.0, 3e-5])  # all in memory, nothing, and some of it
def test_a_kept_pass_gives_the_same_to_the_bit(models, memory, side):
    options = {"batch_size": 5, "padding_side": side}
    assert_same(measure(models, memory=memory, **options), one_by_one(models, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_logits_are_done_again_from_the_unembedding(tiny_model, monkeypatch, dtype, cap):
    """Beyond the memory what the unembedding reads is kept, and logits come back as they were."""
    reference = copy.deepcopy(tiny_model).to(dtype)
    reference.cfg.output_logits_soft_cap = cap
    saes = {Site(1): ReadOut(torch.randn(9, reference.cfg.d_model, generator=torch.Generator().manual_seed(0)))}
    saes[Site(1)].W_dec = saes[Site(1)].W_dec.to(dtype)
    unembeddings = []
    reference.unembed.register_forward_hook(lambda *_: unembeddings.append(1))

    def run(keep, names, **options):
        one = ReferencePass(
            reference, saes, TEXTS, keep=keep, batch_size=5, readout=lambda logits: logits[:, :3], **options
        )
        return one.measure({name: lambda: reference for name in names}), one

    batches = -(-len(TEXTS) // 5)
    together, _ = run(False, "ab")
    assert len(unembeddings) == 3 * batches
    unembeddings.clear()
    again, one = run(True, "ab", memory=0.0)
    assert_same(again, together)
    assert again.divergence["a"].sum_kl.eq(0).all()
    assert len(unembeddings) == 3 * batches + 2 * batches + 1  # again for each model, and once to try it
    assert not reference.unembed._forward_pre_hooks
    # A model that makes something else of its unembedding has its logits kept.
    unembeddings.clear()
    reference.cfg.output_logits_soft_cap = 5.0
    forward = type(reference.unembed).forward
    monkeypatch.setattr(type(reference.unembed), "forward", lambda self, x: forward(self, x) + len(unembeddings))
    one = ReferencePass(reference, saes, TEXTS, batch_size=5, readout=lambda logits: logits[:, :3], memory=0.0)
    one.measure({})
    assert one._kept._can_redo is False


def test_models_are_made_one_after_the_other(models):
    reference, others = models
    events = []

    def maker(name):
        def make():
            assert not [r for r in alive if r() is not None], "the one before is still held"
            model = copy_sharing(others[name], {})
            alive.append(weakref.ref(model))
            events.append(name)
            return model

        return make

    def readout(logits):
        events.append("run")
        return logits[:, :1]

    alive = []
    measure_survival(reference, {n: maker(n) for n in others}, SITES, TEXTS, readout=readout, batch_size=100)
    assert events == ["run", "one", "run", "two", "run"]


def test_models_may_come_later(models):
    reference, others = models
    calls = []
    one = ReferencePass(reference, SITES, TEXTS, readout=lambda logits: calls.append(len(logits)) or logits[:, :2])
    first = one.measure({"one": lambda: others["one"]}, ["one"])
    second = one.measure({"two": lambda: others["two"]})
    assert len(calls) == 1 + 2
    assert list(second.moments) == ["two"]
    assert_same(first.include(second), measure(models))


def test_memory_does_not_grow_with_prompts():
    """Sums are per block; what is kept of the reference lies in the spool, bounded, with one array per batch that it knows."""
    reference, texts = handmade.model(), TEXTS * 20
    sizes = {}
    for n in (len(TEXTS), len(texts)):
        one = ReferencePass(reference, SITES, texts[:n], readout=lambda logits: logits[:, :1], memory=1e-4, n_blocks=4)
        one.measure({"a": lambda: reference})
        sizes[n] = (one.spool.in_memory, one.spool.on_disk)
    assert max(in_memory for in_memory, _ in sizes.values()) <= 1e5
    assert sizes[len(texts)][1] > 5 * sizes[len(TEXTS)][1]


def test_blocks_follow_the_text_and_not_its_place():
    blocks = prompt_blocks(TEXTS, 5)
    assert sorted(set(blocks.tolist())) == [0, 1, 2, 3, 4]
    sizes = torch.bincount(blocks)
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(prompt_blocks(TEXTS[::-1], 5), blocks.flip(0))
    assert sorted(prompt_blocks(TEXTS, 1000).tolist()) == list(range(len(TEXTS)))


def test_copies_of_a_prompt_share_its_block():
    blocks = prompt_blocks([*TEXTS, *TEXTS], 1000)
    assert torch.equal(blocks[: len(TEXTS)], blocks[len(TEXTS) :])
    assert torch.equal(blocks[: len(TEXTS)], prompt_blocks(TEXTS, 1000))


def test_without_other_models_the_reference_still_runs():
    survival = measure((handmade.model(), {}))
    assert list(survival.answers) == [REFERENCE]
    assert dict(survival.moments) == {}
    assert survival.maxima[Site(0)].dense().shape == (len(TEXTS), handmade.FEATURES)
