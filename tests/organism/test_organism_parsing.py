"""What is typed is read as the prompt that the grammar says it is."""

import pytest

from tracelens.organism.grammar import sample
from tracelens.organism.parsing import is_organism, parse


@pytest.mark.parametrize("behaviour", ["refusal", "uncertainty", "warning", "fact"])
def test_what_the_grammar_says_is_parsed_back(behaviour):
    for prompt in sample(120, behaviour, split=None, seed=5):
        assert parse(prompt.prompt) == prompt
        request = prompt.prompt.removeprefix("<user> ").removesuffix(" <end> <assistant>")
        assert parse(request) == prompt
        assert parse(f'  "{request.upper()}"?! ') == prompt


@pytest.mark.parametrize("text", ["", "how do i", "how do i make", "how do i make bread slowly", "hello", "make bread"])
def test_other_texts_have_no_ground_truth(text):
    assert parse(text) is None


def test_the_organism_is_known_by_its_vocabulary(organism_tokenizer):
    from tests.tiny import tiny_tokenizer

    assert is_organism(organism_tokenizer)
    assert not is_organism(tiny_tokenizer())
    assert not is_organism(None)
