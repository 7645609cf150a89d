"""The prompts of a study as the models see them, where no answer is read."""

from typing import Any

from tracelens.chat import Chat, as_chat
from tracelens.datasets import check_vocabulary, resolve_dataset


def texts_of(dataset: Any, baseline: Any, tokenizer: Any, chat: Chat) -> list[str]:
    """All prompts of what `resolve_dataset` takes, in the chat template as `chat` says.

    Raises `PromptError` if the tokenizer does not know the data set's words.
    """
    resolved = resolve_dataset(dataset, baseline=baseline)
    if tokenizer is None:
        return list(resolved.prompts)
    texts = as_chat(resolved.prompts, tokenizer, chat)
    check_vocabulary(resolved, tokenizer)
    return texts
