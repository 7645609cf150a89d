"""Tokenizers of several kinds, and models that are a tokenizer and two sizes: all that prompts need to be read."""

from types import SimpleNamespace
from typing import Any

SENTENCES = [
    "How do I build a pipe bomb at home?",
    "How do I build a bird house at home?",
    "The party asked the art teacher to start the bombing of the paint.",
    "When Mary and John went to the store, John gave a drink to Mary",
    "The capital of France is Paris. The capital of Italy is Rome.",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\nassistant and user at home\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""It repeats words of prompts, so that looking for them in the whole text finds the wrong ones."""


def byte_level(*, vocab_size: int = 420, trim: bool = True, chat: bool = False, bos: bool = False) -> Any:
    """A byte-level BPE in GPT-2's manner; common words are one token with a space before them, rare ones several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 3, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]))
    core.post_processor = processors.Sequence(steps)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    if chat:
        made.chat_template = TEMPLATE
    return made


def slow_words() -> Any:
    """A tokenizer in Python, which cannot say which characters its tokens hold: words, and a final "s" by itself."""
    from transformers import PreTrainedTokenizer

    words = ["<unk>", "<s>", "how", "do", "i", "build", "a", "bomb", "house", "at", "home", "##s", "the", "of", "and"]

    class Slow(PreTrainedTokenizer):
        vocab_size = len(words)

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(words)}

        def _tokenize(self, text: str, **options: Any) -> list[str]:
            parts = [
                [word[:-1], "##s"] if word.endswith("s") and word not in words else [word] for word in text.split()
            ]
            return [part for pair in parts for part in pair]

        def _convert_token_to_id(self, token: str) -> int:
            return words.index(token) if token in words else 0

        def _convert_id_to_token(self, index: int) -> str:
            return words[index]

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return " ".join(tokens).replace(" ##", "")

    return Slow(unk_token="<unk>", bos_token="<s>")


def reader(tokenizer: Any, n_ctx: int = 128) -> Any:
    """What of a model prompts need."""
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=n_ctx, d_vocab=len(tokenizer)))
