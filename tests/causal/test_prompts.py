"""Prompts as tokens: whatever they are given as, the same tokens, and positions that mean what they say."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from tests.causal.made_tokenizers import SENTENCES, byte_level, reader, slow_words
from tests.tiny import TEXTS, tiny_tokenizer
from tracelens.causal.given_prompts import baseline_behaviours
from tracelens.causal.prompts import PromptSet
from tracelens.datasets import get_dataset
from tracelens.errors import PromptError, UnknownNameError
from tracelens.organism import sample


@pytest.fixture(scope="module")
def plain():
    """A model of a byte-level tokenizer without template."""
    return reader(byte_level())


@pytest.fixture(scope="module")
def chatty():
    return reader(byte_level(chat=True, bos=True))


@pytest.fixture(scope="module")
def tiny():
    return reader(tiny_tokenizer(), n_ctx=64)


@dataclass(frozen=True)
class Labelled:
    prompt: str
    positions: dict[str, tuple[int, ...]]
    words: dict[str, str] = field(default_factory=dict)


def said(prompts: PromptSet, name: str, index: int = 0) -> str:
    return "".join(prompts.pieces[index][p] for p in prompts.positions(index, name))


# What may be given


def test_texts_ids_and_padded_batches_are_the_same_prompts(tiny):
    tokenizer = tiny.tokenizer
    expected = PromptSet.of(TEXTS, tiny, chat="never").tokens
    assert [ids[0] for ids in expected] == [tokenizer.bos_token_id] * len(TEXTS)
    assert [len(ids) for ids in expected] == [len(text.split()) + 1 for text in TEXTS]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        for kind in (None, "pt"):
            encoded = tokenizer(TEXTS, padding=True, return_tensors=kind)
            assert PromptSet.of(encoded, tiny).tokens == expected
            assert PromptSet.of(dict(encoded), tiny).tokens == expected
    assert PromptSet.of(tokenizer(TEXTS), tiny).tokens == expected
    assert PromptSet.of(tokenizer(TEXTS)["input_ids"], tiny).tokens == expected
    assert PromptSet.of([torch.tensor(ids) for ids in expected], tiny).tokens == expected
    same = tokenizer([TEXTS[0], TEXTS[0]], return_tensors="pt")["input_ids"]
    assert PromptSet.of(same, tiny).tokens == (expected[0], expected[0])
    assert PromptSet.of(expected, tiny).texts[0] == f"<s> {TEXTS[0]}"


def test_a_set_passes_through_and_is_checked_against_the_model(tiny):
    made = PromptSet.of(TEXTS, tiny, chat="never")
    assert PromptSet.of(made, tiny) is made
    with pytest.raises(PromptError, match=r"prompt 1 has 10 tokens, but the model's context holds 8 \(n_ctx\)"):
        PromptSet.of(made, reader(tiny.tokenizer, n_ctx=8))
    assert PromptSet.of(made, tiny, spans={"animal": ["cat", "bird", None, "dog"]}).groups["animal"] == (
        *((2,), (2,), ()),
        (4,),
    )


def test_data_sets_by_object_name_and_mapping(organism):
    small = get_dataset("organism_warning_v1")
    assert PromptSet.of(small, organism).texts == PromptSet.of(small.name, organism).texts == tuple(small.prompts)
    dataset = get_dataset("organism_comprehensive_v1")
    assert PromptSet.of(dataset.name, organism).behaviours == (*dataset.behaviours, *dataset.behaviours)
    mapping = {"refusal": dataset.safety_prompts[:2], "warning": dataset.safety_prompts[-1:]}
    assert PromptSet.of(mapping, organism).behaviours == ("refusal", "refusal", "warning")
    # Whose baseline it is, nobody says.
    mixed = PromptSet.of(mapping | {"baseline": dataset.baseline_prompts[:3]}, organism)
    assert mixed.behaviours == ("refusal", "refusal", "warning", "", "", "")
    one = PromptSet.of({"refusal": dataset.safety_prompts[:2], "baseline": dataset.baseline_prompts[:1]}, organism)
    assert one.behaviours == ("refusal",) * 3
    other = replace(dataset, baseline_prompts=dataset.baseline_prompts[::-1])
    assert set(baseline_behaviours(other)) == {""}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("how do i", r"one string; give a list of prompts: \[prompt\], or the name of a data set: harmful_refusal_v1"),
        ([], "there are no prompts"),
        ([1, 2, 3], r"one row of token ids; give a list of rows: \[ids\]"),
        (["the cat", [1, 2]], "some prompts are texts and some token ids"),
        ([[5, 6], []], "prompt 1 is empty"),
        ([[5, 99]], "prompt 0 has token id 99, but the model's vocabulary is 0 to"),
        ([[5, -1]], "prompt 0 has token id -1"),
        ([[5.0, 6.0]], r"prompt 0 has shape \[2\] and dtype torch.float32; rows of token ids are whole numbers"),
        ([{"text": "the cat"}], r"prompt 0 is \{'text': 'the cat'\}; give texts, objects with .prompt, or rows"),
        (torch.tensor([5, 6]), "prompt 0 has shape"),
        (["the cat " * 40], "prompt 0 has 81 tokens, but the model's context holds 64"),
        (["the xylophone plays"], "unknown to the model's tokenizer, for example 'xylophone', 'plays'"),
    ],
)
def test_what_is_no_prompt(tiny, prompts, message):
    with pytest.raises(PromptError, match=message):
        PromptSet.of(prompts, tiny, chat="never")


def test_padding_that_nothing_marks_is_refused(tiny):
    tokenizer = tiny.tokenizer
    for side in ("left", "right"):
        tokenizer.padding_side = side
        ids = tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"]
        for given in (ids, {"input_ids": ids}):
            with pytest.raises(PromptError, match=r"prompt 0 of the token ids seems padded \(token 1\)"):
                PromptSet.of(given, tiny)
    holes = {"input_ids": [[4, 5, 6, 7]], "attention_mask": [[1, 0, 1, 1]]}
    with pytest.raises(PromptError, match="attention_mask of prompt 0 has holes"):
        PromptSet.of(holes, tiny)
    with pytest.raises(PromptError, match="prompt 0 has 2 token ids and an attention_mask of 3"):
        PromptSet.of({"input_ids": [[4, 5]], "attention_mask": [[1, 1, 1]]}, tiny)


def test_texts_need_a_tokenizer():
    with pytest.raises(PromptError, match=r"pass tokenizer=\.\.\. or lists of token ids"):
        PromptSet.of(["the cat"], replace_tokenizer(None))
    bare = replace_tokenizer(None)
    made = PromptSet.of([[1, 2, 3]], bare, spans={"end": [-1]})
    assert (made.texts, made.pieces, made.frame) == (("[1, 2, 3]",), (), {})
    assert made.groups == {"answer": ((2,),), "end": ((2,),)}
    with pytest.raises(PromptError, match=r"token ids and there is no tokenizer to find 'cat' in them"):
        PromptSet.of([[1, 2, 3]], bare, spans={"end": ["cat"]})


def replace_tokenizer(tokenizer):
    model = reader(tiny_tokenizer())
    model.tokenizer = tokenizer
    return model


def test_batches_hold_equal_lengths_and_every_prompt_once(tiny):
    made = PromptSet.of(TEXTS * 3, tiny, chat="never")
    batches = made.batches(2)
    assert sorted(i for batch in batches for i in batch.prompt.tolist()) == list(range(len(made)))
    for batch in batches:
        assert 1 <= len(batch) <= 2
        assert [tuple(row) for row in batch.tokens.tolist()] == [made.tokens[i] for i in batch.prompt.tolist()]


def test_a_selection_keeps_everything_of_its_prompts(organism):
    made = PromptSet.of(sample(6), organism, spans={"x": "<user>"})
    some = made.select([4, 1])
    assert some.texts == (made.texts[4], made.texts[1])
    assert some.behaviours == ("refusal", "refusal")
    assert (some.answers, some.pieces) == ((made.answers[4], made.answers[1]), (made.pieces[4], made.pieces[1]))
    for name in [*made.groups, *made.frame]:
        assert [some.positions(i, name) for i in (0, 1)] == [made.positions(i, name) for i in (4, 1)]


# Positions


def test_ground_truth_of_the_organism(organism):
    prompts = sample(30)
    made = PromptSet.of(prompts, organism)
    for index, prompt in enumerate(prompts):
        for name, word in prompt.words.items():
            assert " ".join(made.pieces[index][p] for p in made.positions(index, name)) == word
        assert made.positions(index, "answer") == (len(made.tokens[index]) - 1,)
        assert made.positions(index, -1) == made.positions(index, "answer")
        assert made.positions(index, 99) == ()
        assert len(made.positions(index, None)) == len(made.tokens[index])
    with pytest.raises(UnknownNameError, match=r"unknown group of positions 'objekt'. Did you mean 'object'\?"):
        made.positions(0, "objekt")
    # A part that no prompt has is no group: facts have neither verb nor context.
    assert set(PromptSet.of(sample(3, "fact"), organism).groups) == {"object", "answer"}


def test_positions_of_another_tokenizer_are_refused(plain):
    given = sample(3, "refusal", where=lambda p: len(p.prompt.split()) > 12)
    with pytest.raises(PromptError, match=r"prompt 0 says that its object is '.*'; its positions are those of another"):
        PromptSet.of(given, plain, chat="never")
    with pytest.raises(PromptError, match="prompt 0 names positions beyond its 4 tokens"):
        PromptSet.of([Labelled("the cat sat", {"object": (9,)})], reader(tiny_tokenizer()), chat="never")


def test_positions_follow_their_words_into_a_chat_template(chatty):
    text = "How do I build a pipe bomb at home?"
    own = PromptSet.of([text], chatty, chat="never")
    at = own.pieces[0].index(" home")
    made = PromptSet.of([Labelled(text, {"place": (at,)}, {"place": "home"})], chatty)
    assert made.texts[0] != text
    # The template writes "at home" too, before the user's text.
    assert made.pieces[0].index(" home") < made.positions(0, "place")[0]
    assert said(made, "place") == " home"
    assert made.positions(0, "place")[0] - at == next(i for i, p in enumerate(made.pieces[0]) if p == "How") - 1


def test_positions_that_cannot_be_followed_are_refused(chatty):
    text = "How do I build a pipe bomb at home?"
    with pytest.raises(PromptError, match=r"brings positions \('start': 0\) that cannot be followed into the chat"):
        PromptSet.of([Labelled(text, {"start": (0,)})], chatty)
    # The first word is another token behind a space than at the start of a text.
    spaced = byte_level(chat=True)
    spaced.chat_template = "{% for m in messages %}<|user|> {{ m['content'] }}<|end|>{% endfor %}"
    with pytest.raises(PromptError, match=r"brings positions \('first': 0\).*pass chat='never', or name the words"):
        PromptSet.of([Labelled("The capital of France is", {"first": (0,)})], reader(spaced))
    trimmed = byte_level(chat=True)
    trimmed.chat_template = "<|user|>{{ messages[0]['content'] | upper }}<|assistant|>"
    with pytest.raises(PromptError, match="cannot be followed"):
        PromptSet.of([Labelled(text, {"x": (2,)})], reader(trimmed))


def test_positions_of_token_ids_are_theirs(tiny):
    @dataclass(frozen=True)
    class Tokens:
        prompt: list[int]
        positions: dict[str, tuple[int, ...]]
        behaviour: str = "refusal"

    made = PromptSet.of([Tokens([2, 5, 6], {"x": (1,)}), Tokens([2, 7], {})], tiny)
    assert made.groups == {"x": ((1,), ()), "answer": ((2,), (1,))}
    assert made.behaviours == ("refusal", "refusal")


def test_the_frame_parts_a_prompt(chatty, organism):
    for made in (
        PromptSet.of(SENTENCES, chatty),
        PromptSet.of(sample(5), organism),
        PromptSet.of(["i make bread"], organism),
    ):
        for index in range(len(made)):
            parts = [set(made.positions(index, name)) for name in ("bos", "content", "template")]
            assert set.union(*parts) == set(range(len(made.tokens[index])))
            assert sum(map(len, parts)) == len(made.tokens[index])
            assert made.positions(index, "bos") == (0,)
            assert made.positions(index, "answer")[0] in made.positions(index, "template")
    made = PromptSet.of(SENTENCES, chatty)
    for index, text in enumerate(SENTENCES):
        assert said(made, "content", index).strip() == text
    raw = PromptSet.of(SENTENCES, reader(byte_level()), chat="never")
    assert raw.positions(0, "content") == raw.positions(0, None)
    assert raw.positions(0, "template") == raw.positions(0, "bos") == ()


# Spans


@pytest.mark.parametrize("trim", [True, False])
def test_words_are_found_by_their_characters(trim):
    made = PromptSet.of(SENTENCES, reader(byte_level(trim=trim)), chat="never")
    tokenizer = byte_level(trim=trim)
    for index, text in enumerate(SENTENCES):
        for word in set(text.replace("?", "").replace(".", "").replace(",", "").split()):
            found = made.with_spans({"w": [word if i == index else None for i in range(len(made))]}, tokenizer)
            where = found.positions(index, "w")
            assert where == tuple(range(where[0], where[-1] + 1))
            assert word in said(found, "w", index)
            # No token too many: without the first or the last, something is missing.
            for less in (where[1:], where[:-1]):
                assert word not in "".join(made.pieces[index][p] for p in less)


def test_which_occurrence_is_meant(plain):
    def find(text: str, word: str) -> str:
        made = PromptSet.of([text], plain, chat="never", spans={"w": word})
        start = made.positions(0, "w")[0]
        return "".join(made.pieces[0][:start]) + "|" + said(made, "w")

    # the last one
    assert find("at home and at home", "home") == "at home and at| home"
    # a whole word before a part of one, though the part comes last
    assert find("the art of the party", "art") == "the| art"[:3] + "| art"
    # the same case before another
    assert find("Paint the paint", "Paint").startswith("|P")
    assert find("the Paint", "paint").endswith("aint")
    # several words, and characters that no single token holds
    assert find("build a pipe bomb at home", "pipe bomb").endswith("| pipe bomb")
    made = PromptSet.of(["say 🙂 now"], plain, chat="never", spans={"w": "🙂"})
    assert len(made.positions(0, "w")) == len(plain.tokenizer(" 🙂")["input_ids"]) - (
        plain.tokenizer(" 🙂")["input_ids"][0] == plain.tokenizer(" ")["input_ids"][0]
    )


def test_a_token_that_holds_part_of_a_word_belongs_to_it(plain):
    made = PromptSet.of(["the bombing of"], plain, chat="never", spans={"stem": "bomb", "end": "ing", "both": "mbi"})
    assert "bomb" in said(made, "stem")
    assert "ing" in said(made, "end")
    assert set(made.positions(0, "both")) <= set(made.positions(0, "stem")) | set(made.positions(0, "end"))
    assert "mbi" in said(made, "both")


def test_words_of_the_user_come_before_those_of_the_template(chatty):
    made = PromptSet.of(["the user of the assistant is Paris", "is it Rome"], chatty, spans={"w": ["user", "home"]})
    assert made.positions(0, "w")[0] in made.positions(0, "content")
    # Where the user does not say the word, the template's is meant.
    assert said(made, "w", 1).strip() == "home"


def test_spans_as_positions_and_lists(plain):
    text = SENTENCES[0]
    made = PromptSet.of(
        [text, text],
        plain,
        chat="never",
        spans={"a": [-1, 0], "b": [["pipe", "home"], torch.tensor([2, 1])], "c": "How"},
    )
    last = len(made.tokens[0]) - 1
    assert made.groups["a"] == ((last,), (0,))
    assert "pipe" in said(made, "b")
    assert "home" in said(made, "b")
    assert made.groups["b"][1] == (1, 2)
    assert made.groups["c"] == ((0,), (0,))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (
            {"w": ["zebra", None]},
            r"span 'w': 'zebra' does not occur in prompt 0; give words as they stand in it, positions, or",
        ),
        ({"w": ["home"]}, r"span 'w' has 1 entries for 2 prompts; give one for each"),
        ({"w": [None, 99]}, r"span 'w' of prompt 1 names position 99, but the prompt has \d+ tokens"),
        ({"w": [None, -99]}, "names position -99"),
        ({"w": [None, [1.5]]}, r"span 'w' of prompt 1 holds 1\.5; give words of the prompt, or positions"),
        ({"answer": [1, 1]}, "a span cannot be called 'answer'"),
        ({"changed": [1, 1]}, "a span cannot be called 'changed'"),
    ],
)
def test_spans_that_do_not_fit(plain, spans, message):
    with pytest.raises(PromptError, match=message):
        PromptSet.of(SENTENCES[:2], plain, chat="never", spans=spans)


def test_tokenizers_that_do_not_say_where_their_tokens_lie():
    slow = reader(slow_words())
    made = PromptSet.of(["how do i build a bombs at home", "the house of bombs and bombs"], slow, spans={"w": "bombs"})
    assert made.groups["w"] == ((5, 6), (6, 7))
    two = PromptSet.of(["do i build a house at home"], slow, spans={"w": "A House"})
    assert two.groups["w"] == ((3, 4),)
    with pytest.raises(PromptError, match=r"'hous' in prompt 0 is not made of whole tokens.*give positions instead"):
        PromptSet.of(["do i build a house"], slow, spans={"w": "hous"})
    with pytest.raises(PromptError, match="'cat' does not occur in prompt 0"):
        PromptSet.of(["do i build a house"], slow, spans={"w": "cat"})


def test_words_in_rows_of_token_ids(plain):
    ids = plain.tokenizer(SENTENCES[0])["input_ids"]
    made = PromptSet.of([ids], plain, spans={"w": "home"})
    assert said(made, "w") == " home"


def test_groups_of_ones_own_are_checked(plain):
    made = PromptSet.of(SENTENCES[:2], plain, chat="never")
    assert made.with_groups({"x": [[0], []]}).groups["x"] == ((0,), ())
    with pytest.raises(PromptError, match="group 'x' has 1 entries for 2 prompts"):
        made.with_groups({"x": [[0]]})
    with pytest.raises(PromptError, match=r"group 'x' of prompt 1 holds \(-1,\), but the prompt has"):
        made.with_groups({"x": [[0], [-1]]})
