import json
import logging

import pytest

from tests.tiny import TEXTS, tiny_tokenizer
from tracelens.datasets import get_dataset
from tracelens.errors import PromptError, UnknownNameError
from tracelens.loading import Checkpoint
from tracelens.precision.calibration_prompts import read_calibration


@pytest.fixture(scope="module")
def checkpoint(tiny_folder):
    return Checkpoint(tiny_folder)


def decoded(calibration) -> list[str]:
    return [tiny_tokenizer().decode(ids) for ids in calibration.ids]


def test_files_and_lists_give_the_same_tokens(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS) + "\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS))
    (tmp_path / "a.csv").write_text("prompt\n" + "\n".join(TEXTS))
    listed = read_calibration(TEXTS, checkpoint)
    for name in ("a.txt", "a.jsonl", "a.csv"):
        read = read_calibration(tmp_path / name, checkpoint)
        assert read.ids == listed.ids
        assert read.source == name
        assert read.to_dict()["sha256_token_ids"] == listed.to_dict()["sha256_token_ids"]
    assert listed.to_dict()["prompts"] == len(TEXTS) == listed.available


def test_prompts_are_put_into_the_chat_template_with_one_bos(checkpoint):
    wrapped, bare = read_calibration(["yes"], checkpoint), read_calibration(["yes"], checkpoint, chat="never")
    assert decoded(bare) == ["<s> yes"]
    assert wrapped.ids[0].count(checkpoint.tokenizer.bos_token_id) == 1
    assert len(wrapped.ids[0]) > len(bare.ids[0])


def test_a_data_set_by_name():
    organism = read_calibration("organism_refusal_v1", _organism(), n_samples=5)
    assert (len(organism.ids), organism.source) == (5, "organism_refusal_v1")
    assert organism.available == len(get_dataset("organism_refusal_v1").prompts)


def _organism():
    from tracelens.organism import path

    return Checkpoint(path())


def test_a_sample_is_drawn_by_the_seed_and_without_repetition(checkpoint):
    texts = [f"{a} {b}" for a in ("the", "cat", "dog", "bird", "sat") for b in ("ran", "on", "under", "over")]
    one, again = (read_calibration(texts, checkpoint, n_samples=8, seed=1) for _ in range(2))
    other = read_calibration(texts, checkpoint, n_samples=8, seed=2)
    assert one.ids == again.ids != other.ids
    assert len(set(map(tuple, one.ids))) == 8


def test_what_is_cut_is_counted_and_said(checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        cut = read_calibration(["yes", "the cat sat on the mat"], checkpoint, max_length=4, chat="never")
    assert sorted(map(len, cut.ids)) == [2, 4]
    assert cut.truncated == 1
    assert "1 of 2 calibration prompts are cut to 4 tokens" in caplog.text
    long = read_calibration(["the cat " * 100], checkpoint, chat="never")
    assert (len(long.ids[0]), long.truncated) == (64, 1), "as many as the model has positions"


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ([], {}, "there are none"),
        (["yes", " "], {}, "' ' is not a prompt"),
        ([3], {}, "3 is not a prompt"),
        (7, {}, "calibration is a int"),
        (TEXTS, {"n_samples": 5}, "5 calibration prompts are asked for, and prompts holds 4"),
        (TEXTS, {"max_length": 65}, "2 to 64 tokens"),
        (["quantum chromodynamics"], {"chat": "never"}, "of the tokens are unknown"),
        ("/nowhere/a.txt", {}, "no prompt file at /nowhere/a.txt"),
        ("/nowhere/a.jsonl", {}, "no prompt file at /nowhere/a.jsonl"),
        ("/nowhere/a.pdf", {}, "not '.pdf'"),
    ],
)
def test_prompts_that_cannot_be_used(checkpoint, source, options, said):
    with pytest.raises(PromptError) as caught:
        read_calibration(source, checkpoint, **options)
    assert said in str(caught.value)


def test_an_unknown_name_lists_the_sets(checkpoint):
    with pytest.raises(UnknownNameError, match=r"harmful_refusal_v1.*\.txt"):
        read_calibration("harmful_refusals_v1", checkpoint)


def test_an_empty_text_file(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(PromptError, match="no lines"):
        read_calibration(tmp_path / "a.txt", checkpoint)


def test_another_models_tokenizer_is_found_out(checkpoint):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(40)])
    with pytest.raises(PromptError, match="the model has 48"):
        read_calibration(["new39 new39"], checkpoint, tokenizer=tokenizer, chat="never")
