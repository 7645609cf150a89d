import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.gguf_models import write_gguf
from tests.tiny import tiny_hf_model
from tracelens.errors import CheckpointError
from tracelens.loading import Checkpoint

TEXTS = ["the cat sat on the mat", " éa\n  12 dogs", "</s>the"]


@pytest.fixture(scope="module")
def original():
    """A byte-level BPE tokenizer with <s> 0, </s> 1, <pad> 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran"] * 3, trainer)
    return tokenizer


def write(path, original, architecture="LlamaForCausalLM", *, pre="default", add_bos=None):
    ids = original.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]

    def change(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_pad_token_id(2)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)

    config = {"vocab_size": len(tokens), "intermediate_size": 64, "pad_token_id": None, "eos_token_id": 1}
    write_gguf(path, tiny_hf_model(architecture, **config), change=change)
    return Checkpoint(path)


@pytest.mark.parametrize(
    ("pre", "add_bos", "first"),
    [
        ("default", None, []),
        ("default", True, [0]),
        ("llama-bpe", None, [0]),
        ("llama-bpe", False, []),
    ],
)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_tokens_are_the_original_ones_with_bos_as_declared(architecture, pre, add_bos, first, original, tmp_path):
    tokenizer = write(tmp_path / "model.gguf", original, architecture, pre=pre, add_bos=add_bos).tokenizer
    for text in TEXTS:
        assert tokenizer(text).input_ids == first + original.encode(text).ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("architecture", ["Olmo2ForCausalLM", "Phi3ForCausalLM"])
def test_what_transformers_cannot_rebuild_comes_from_beside_the_file(architecture, original, tmp_path):
    checkpoint = write(tmp_path / "model.gguf", original, architecture)
    with pytest.raises(CheckpointError, match=r"cannot rebuild the tokenizer.*put the tokenizer.json.*beside"):
        _ = checkpoint.tokenizer
    original.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for text in TEXTS:
        assert checkpoint.tokenizer(text).input_ids == original.encode(text).ids


def test_a_file_without_a_tokenizer_has_none(tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_hf_model(intermediate_size=64))
    assert Checkpoint(tmp_path / "model.gguf").tokenizer is None
