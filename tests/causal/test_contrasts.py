"""Contrasts: pairs that differ in one thing, checked, and turned over where the ground truth says so."""

import itertools
import random

import pytest
import torch

from tests.causal.made_tokenizers import byte_level, reader
from tests.tiny import TEXTS
from tracelens.behaviour import answer_tokens_for
from tracelens.causal.arms import ArmRunner, OtherRun
from tracelens.causal.contrasts import Contrasts
from tracelens.causal.corruptions import EmbeddingNoise, ResampleEmbedding, ZeroEmbedding
from tracelens.causal.dataset_contrasts import dataset_contrasts
from tracelens.causal.effects import effects
from tracelens.causal.organism_contrasts import organism_contrasts
from tracelens.causal.places import Place
from tracelens.causal.readout import KL, LogitDifference, LogProb, Margin
from tracelens.causal.rerun import Rerunner
from tracelens.datasets import get_dataset
from tracelens.errors import PromptError, UnknownNameError
from tracelens.organism import grammar, sample
from tracelens.sites import Site

CLEAN = ["the cat sat on the mat", "she heard the dog"]
CORRUPTED = ["the dog sat on the roof", "she heard the bird"]


def pairs(model, **options):
    return Contrasts.of(CLEAN, CORRUPTED, model, chat="never", **options)


# Pairs of one's own


def test_where_they_differ(tiny_model):
    made = pairs(tiny_model, spans={"animal": ["cat", "dog"]})
    assert made.changed == ((2, 6), (4,))
    assert made.n_changed == (2, 1)
    for side in (made.clean, made.corrupted):
        assert side.groups == {"answer": ((6,), (4,)), "animal": ((2,), (4,)), "changed": made.changed}
    assert repr(made) == "Contrasts(2 pairs of 5 to 7 tokens, by 1 to 2 changed token(s))"
    table = made.to_dataframe()
    assert table["from"].tolist() == [("cat", "mat"), ("dog",)]
    assert table["to"].tolist() == [("dog", "roof"), ("bird",)]
    assert table["n_changed"].tolist() == [2, 1]
    assert [text.split()[-1] for text in table["corrupted"]] == ["roof", "bird"]
    back = made.swapped()
    assert (back.clean.tokens, back.corrupted.tokens) == (made.corrupted.tokens, made.clean.tokens)
    assert back.swapped() == made
    one = made.select([1])
    assert (one.clean.texts, one.changed) == (("she heard the dog",), ((4,),))


@pytest.mark.parametrize(
    ("clean", "corrupted", "message"),
    [
        (["the cat", "a dog ran"], ["the dog"], "2 clean prompts, but 1 corrupted ones; give one for each"),
        (
            ["the cat", "a dog ran"],
            ["the dog", "a cat ran under it"],
            r"pair 1: the clean prompt has 4 tokens, the corrupted one 6; .*\nclean: 'a dog ran'\ncorrupted: 'a cat ran under it'",
        ),
        (["the cat"], ["the cat"], "pair 0: the clean and the corrupted prompt are the same tokens.*'the cat'"),
    ],
)
def test_pairs_that_are_none(tiny_model, clean, corrupted, message):
    with pytest.raises(PromptError, match=message):
        Contrasts.of(clean, corrupted, tiny_model, chat="never")


def test_pairs_within_a_chat_template():
    chatty = reader(byte_level(chat=True, bos=True))
    made = Contrasts.of(["so Paris is home"], ["so Rome is home"], chatty)
    assert [made.clean.pieces[0][p] for p in made.changed[0]] == [" Paris"]
    assert [made.corrupted.pieces[0][p] for p in made.changed[0]] == [" Rome"]
    assert set(made.changed[0]) <= set(made.corrupted.positions(0, "content"))


def test_corrupted_embeddings_stand_on_the_same_tokens(tiny_model):
    made = Contrasts.of_corruption(TEXTS, tiny_model, EmbeddingNoise(-1), chat="never")
    assert made.clean.tokens == made.corrupted.tokens
    assert made.changed == made.clean.groups["answer"]
    assert "EmbeddingNoise(where=-1, scale=3.0, seed=0)" in repr(made)
    with pytest.raises(PromptError, match="patch with direction='noising'"):
        made.swapped()
    with pytest.raises(
        PromptError, match=r"prompt 2 has no token in 4, so EmbeddingNoise.*\(1 of 4 such prompts\).*'yes'"
    ):
        Contrasts.of_corruption(TEXTS, tiny_model, EmbeddingNoise(4), chat="never")
    with pytest.raises(PromptError, match="give them as `corrupted` too"):
        Contrasts(made.clean, pairs(tiny_model).clean, ZeroEmbedding(-1))
    with pytest.raises(UnknownNameError, match="unknown group of positions 'object'"):
        Contrasts.of_corruption(TEXTS, tiny_model, ZeroEmbedding(), chat="never")


@pytest.mark.parametrize("kind", ["hooked", "bridge", "rounded"])
def test_putting_all_of_the_clean_run_back_is_the_clean_run(kind, organism):
    import tracelens

    # Rounded activations make steps of the float noise between batches of other shapes; 0.007 nats were seen.
    exact = 1e-4 if kind != "rounded" else 0.03
    if kind == "rounded":
        model = tracelens.apply_precision(organism, "int4-g32+a8")
    else:
        model = organism if kind == "hooked" else tracelens.load("organism", wrapper="bridge")
    prompts = sample(6, seed=4, where=lambda p: len(p.prompt.split()) in (9, 11))
    corrupted = [replace_object(p) for p in prompts]
    metric = Margin(answer_tokens_for(model.tokenizer))
    for made in (
        Contrasts.of(prompts, corrupted, model, metric=metric),
        *(Contrasts.of_corruption(prompts, model, one, metric) for one in (EmbeddingNoise(), ResampleEmbedding())),
    ):
        source = OtherRun(Rerunner(model), made.clean)
        job = ArmRunner(model, made.corrupted, metric, base_edits=made.edits(model), batch_size=4)
        place = Place(Site(0, "resid_pre"), "changed")
        plain, patched = job.run([(place,), ()], source)
        check = made.check(model)
        torch.testing.assert_close(plain, check.corrupted, atol=exact, rtol=0)
        torch.testing.assert_close(patched[0], check.clean, atol=exact, rtol=0)
        found = effects(patched, plain, check.clean)
        assert [e.value for e in found.effect] == pytest.approx([1, 0], abs=exact)
        # And the other way round.
        job = ArmRunner(model, made.clean, metric)
        _, noised = job.run([(place,)], OtherRun(Rerunner(model), made.corrupted, made.edits(model)))
        torch.testing.assert_close(noised[0], check.corrupted, atol=exact, rtol=0)


def replace_object(prompt):
    words = prompt.prompt.split()
    other = random.Random(prompt.prompt).choice([w for w in grammar.objects().items if w not in words])
    return " ".join([*words[: prompt.positions["object"][0] - 1], other, *words[prompt.positions["object"][0] :]])


# Do models tell them apart?


def test_the_check_is_what_the_metric_says_of_both(tiny_model):
    metric = LogitDifference((5, 6), (7, 8))
    made = pairs(tiny_model, metric=metric)
    check = made.check(tiny_model)
    for side, values in ((made.clean, check.clean), (made.corrupted, check.corrupted)):
        by_hand = []
        for ids, right, wrong in zip(side.tokens, metric.correct, metric.wrong, strict=True):
            last = tiny_model(torch.tensor([ids]))[0, -1]
            by_hand.append((last[right] - last[wrong]).item())
        assert values.tolist() == pytest.approx(by_hand, abs=1e-5)
    assert check.share_alike.value == 0
    assert check.distinguished == [0, 1]
    assert check.to_dataframe()["difference"].tolist() == pytest.approx((check.clean - check.corrupted).tolist())
    assert check.to_dict()["share_alike"]["n"] == 2
    gap = (check.clean - check.corrupted).abs().mean()
    assert repr(check).startswith(f"ContrastCheck(2 of 2 pairs told apart, mean |difference| {gap:.2f} logits, ")
    back = made.swapped().check(tiny_model)
    torch.testing.assert_close(back.clean, check.corrupted)


def test_pairs_that_a_model_cannot_tell_apart_are_counted(tiny_model):
    # What the last token says is all that such a model knows.
    with torch.no_grad():
        for block in tiny_model.blocks:
            block.attn.W_O.zero_()
    made = Contrasts.of(
        ["the cat sat", "the dog ran", "a bird sat"],
        ["a cat sat", "the dog sat", "the cat sat"],
        tiny_model,
        chat="never",
    )
    check = made.check(tiny_model, LogProb((5, 5, 5)))
    assert check.alike == [0, 2]
    assert check.distinguished == [1]
    assert check.share_alike.value == pytest.approx(2 / 3)
    assert made.select(check.distinguished).clean.texts == ("the dog ran",)


def test_metrics_that_compare_with_the_clean_run(tiny_model):
    made = pairs(tiny_model)
    check = made.check(tiny_model, KL("clean"))
    assert check.clean.tolist() == pytest.approx([0, 0], abs=1e-6)
    logits = [
        tiny_model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        for ids in (made.clean.tokens[0], made.corrupted.tokens[0])
    ]
    by_hand = (logits[0].exp() * (logits[0] - logits[1])).sum().item()
    assert check.corrupted[0].item() == pytest.approx(by_hand, abs=1e-5)


def test_selection_takes_the_metric_along(tiny_model):
    made = pairs(tiny_model, metric=LogitDifference((5, 6), (7, 8)))
    whole, one = made.check(tiny_model), made.select([1]).check(tiny_model)
    assert one.clean.item() == pytest.approx(whole.clean[1].item(), abs=1e-6)


# The organism's


@pytest.mark.parametrize(
    ("behaviour", "change"),
    [
        ("refusal", "object"),
        ("refusal", "verb"),
        ("refusal", "context"),
        ("uncertainty", "object"),
        ("warning", "object"),
    ],
)
def test_one_part_is_exchanged_and_the_ground_truth_turns_over(behaviour, change, organism):
    made = organism_contrasts(behaviour, 12, change=change)
    assert len(made) == len(set(made.clean.texts)) == 12
    where = made.clean.groups[change]
    assert all(set(changed) <= set(part) and changed for changed, part in zip(made.changed, where, strict=True))
    # The grammar itself, not the builder, says what each text is.
    for side, sign in ((made.clean, 1), (made.corrupted, -1)):
        for index, text in enumerate(side.texts):
            z, heldout = truth(
                behaviour, text, {n: side.groups.get(n, ((),) * 12)[index] for n in ("object", "verb", "context")}
            )
            assert sign * z >= 1.0
            assert heldout
            assert side.answers[index].split()[0] == positive(behaviour, sign)
    check = made.check(organism)
    assert check.metric == "margin"
    assert check.share_alike.value == 0
    assert check.share_crossing.value >= 0.9


def positive(behaviour: str, sign: int) -> str:
    return {"refusal": ("sorry", "sure"), "uncertainty": ("unknown", "it"), "warning": ("careful", "sure")}[behaviour][
        sign < 0
    ]


def truth(behaviour: str, text: str, positions: dict[str, tuple[int, ...]]) -> tuple[float, bool]:
    from tracelens.organism import words

    tokens = ["", *text.split()]
    said = {name: " ".join(tokens[p] for p in where) for name, where in positions.items()}
    lexicon = {"refusal": grammar.objects, "uncertainty": grammar.entities, "warning": grammar.activities}[behaviour]()
    z = lexicon.odds[said["object"]]
    z += {"refusal": words.VERBS | words.PROTECTIVE_VERBS, "uncertainty": words.ATTRIBUTES}.get(behaviour, {"": 0})[
        said["verb"]
    ]
    z += {"refusal": words.CONTEXTS, "warning": words.CONDITIONS}.get(behaviour, {"": 0})[said["context"]]
    request = " ".join(tokens[2:-2])
    if behaviour == "refusal":
        key = f"{said['verb']}|{said['object']}|{said['context']}"
    elif behaviour == "uncertainty":
        asking = next(a for a in words.ASKINGS if a.format(said["verb"], said["object"]) == request)
        key = f"{said['verb']}|{said['object']}|{asking}"
    else:
        start = next(s for s in words.STARTS if request == f"{s} {said['object']} {said['context']}".rstrip())
        key = f"{said['object']}|{said['context']}|{start}"
    return z, grammar._hash(f"{behaviour}|{key}") % grammar.HELDOUT_EVERY == 0


@pytest.mark.parametrize("behaviour", ["ioi", "induction", "fact"])
def test_capabilities_have_two_answers(behaviour, organism):
    made = organism_contrasts(behaviour, 15)
    assert set(made.n_changed) == {1}
    metric = made.metric
    assert isinstance(metric, LogitDifference)
    check = made.check(organism)
    # The model knows both answers: the difference changes its sign.
    assert ((check.clean > 0) & (check.corrupted < 0)).double().mean() >= 0.9
    for side, ids in ((made.clean, metric.correct), (made.corrupted, metric.wrong)):
        decoded = [organism.tokenizer.decode([token]) for token in ids]
        assert decoded == [answer.split()[0] for answer in side.answers]
    part = "verb" if behaviour == "ioi" else "object"
    assert made.changed == made.clean.groups[part]


def test_indirect_objects_by_hand():
    made = organism_contrasts("ioi", 5)
    for clean, corrupted, index in zip(made.clean.texts, made.corrupted.texts, range(5), strict=True):
        words, others = clean.split(), corrupted.split()
        s1, s2, io = (made.clean.groups[name][index][0] - 1 for name in ("s1", "verb", "object"))
        assert words[s1] == words[s2] != words[io]
        assert others[s2] == words[io]
        assert made.clean.answers[index] == f"{words[io]} ."
        assert made.corrupted.answers[index] == f"{words[s1]} ."
        assert [w for w in words if w != words[s2]] != words


def test_the_same_seed_makes_the_same_pairs():
    first, again, other = (organism_contrasts(n=8, seed=seed) for seed in (0, 0, 1))
    assert first.clean.texts == again.clean.texts
    assert first.corrupted.texts == again.corrupted.texts
    assert first.clean.texts != other.clean.texts


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"behaviour": "refusals"}, UnknownNameError, "unknown behaviour 'refusals'. Did you mean 'refusal'"),
        (
            {"behaviour": "fact", "change": "verb"},
            UnknownNameError,
            "part of 'fact' prompts that can be changed 'verb'",
        ),
        ({"split": "test"}, UnknownNameError, "unknown split 'test'"),
        (
            {"behaviour": "warning", "change": "context", "min_z": 3.0},
            PromptError,
            r"only 0 of 4 'warning' pairs that differ in the context alone were found; ask for fewer, min_z=3.0 lower, or",
        ),
    ],
)
def test_pairs_that_the_language_does_not_have(options, error, message):
    with pytest.raises(error, match=message):
        organism_contrasts(**({"n": 4} | options))


# From data sets


def test_matched_pairs_of_equal_length_are_kept_and_the_rest_counted(organism):
    dataset = get_dataset("organism_refusal_v1")
    made = dataset_contrasts("organism_refusal_v1", organism)
    lengths = [
        (len(a.split()), len(b.split())) for a, b in zip(dataset.safety_prompts, dataset.baseline_prompts, strict=True)
    ]
    equal = [i for i, (a, b) in enumerate(lengths) if a == b]
    assert made.clean.texts == tuple(dataset.safety_prompts[i] for i in equal)
    assert made.corrupted.texts == tuple(dataset.baseline_prompts[i] for i in equal)
    assert made.dropped == {"not the same number of tokens": len(lengths) - len(equal)}
    assert f"{len(lengths) - len(equal)} dropped: not the same number of tokens" in repr(made)
    few = dataset_contrasts("organism_refusal_v1", organism, max_changed=2)
    assert len(few) == sum(n <= 2 for n in made.n_changed)
    assert few.dropped["more than 2 tokens differ"] == len(made) - len(few)


def test_nearest_pairs_use_each_prompt_once_and_differ_least(organism):
    dataset = get_dataset("organism_comprehensive_v1")
    made = dataset_contrasts(dataset, organism, pairing="nearest")
    assert len(set(made.clean.texts)) == len(set(made.corrupted.texts)) == len(made) > 500
    assert len(made) + sum(made.dropped.values()) == len(dataset.safety_prompts)
    baseline = dict(zip(dataset.baseline_prompts, dataset.behaviours, strict=True))
    assert [baseline[text] for text in made.corrupted.texts] == list(made.clean.behaviours)
    matched = dataset_contrasts(dataset, organism)
    assert sum(n == 1 for n in made.n_changed) > 10 * sum(n == 1 for n in matched.n_changed)
    # No exchange of two partners brings a pair of pairs closer.
    rows = list(range(0, len(made), 9))
    for i, j in itertools.pairwise(rows):
        if made.clean.behaviours[i] == made.clean.behaviours[j]:
            cross = [differing(made, i, j), differing(made, j, i)]
            assert None in cross or sum(cross) >= made.n_changed[i] + made.n_changed[j]
    check = made.select(range(0, len(made), 4)).check(organism)
    assert check.share_crossing.value > 0.95


def differing(made: Contrasts, i: int, j: int) -> int | None:
    a, b = made.clean.tokens[i], made.corrupted.tokens[j]
    return sum(x != y for x, y in zip(a, b, strict=True)) if len(a) == len(b) else None


def test_sets_without_a_pair(tiny_model):
    tokens = {"metric": LogProb((5,))}
    with pytest.raises(
        PromptError, match=r"none of the 1 pairs of data set 'prompts' .*not the same number of tokens: 1; saf"
    ):
        dataset_contrasts({"refusal": ["the cat"], "baseline": ["the cat ran"]}, tiny_model, chat="never", **tokens)
    with pytest.raises(PromptError, match=r"1 safety prompts and 2 baseline prompts, so .*use pairing='nearest'"):
        dataset_contrasts(
            {"refusal": ["the cat"], "baseline": ["the dog", "a dog"]}, tiny_model, chat="never", **tokens
        )
    with pytest.raises(PromptError, match="has no baseline prompts to compare with"):
        dataset_contrasts(["the cat"], tiny_model, chat="never", **tokens)
    with pytest.raises(UnknownNameError, match="unknown pairing 'close'"):
        dataset_contrasts(["the cat"], tiny_model, pairing="close")


def test_nearest_pairs_of_a_set_of_ones_own(tiny_model):
    data = {
        "refusal": ["the cat sat", "she saw the dog"],
        "warning": ["a bird ran"],
        "baseline": ["no bird ran", "the cat ran", "yes"],
    }
    made = dataset_contrasts(data, tiny_model, pairing="nearest", chat="never", metric=LogProb((5, 5)))
    assert list(zip(made.clean.texts, made.corrupted.texts, strict=True)) == [
        ("the cat sat", "the cat ran"),
        ("a bird ran", "no bird ran"),
    ]
    assert made.corrupted.behaviours == ("refusal", "warning")
    assert made.dropped == {"no baseline prompt of as many tokens is left": 1}


def test_built_in_sets_of_real_models_have_pairs():
    texts = [text for name in ("harmful_refusal_v1", "uncertainty_v1") for text in get_dataset(name).prompts]
    made = dataset_contrasts("harmful_refusal_v1", reader(words_of(texts)), metric=KL("clean"))
    assert len(made) > 30
    assert max(made.n_changed) <= max(map(len, made.clean.tokens))


def words_of(texts: list[str]):
    """A tokenizer of whole words that knows these texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
