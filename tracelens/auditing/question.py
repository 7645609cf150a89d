"""`Question`: the prompts of an audit as the models see them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.behaviour.refusal import OPENERS, AnswerTokens, answer_tokens_for, margin
from tracelens.chat import Chat, as_chat
from tracelens.datasets import Dataset, check_vocabulary
from tracelens.errors import PromptError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """The prompts of an audit as the models see them, and how their answers are read."""

    dataset: str
    texts: list[str]
    labels: list[str | None]
    """Behaviour that a safety prompt calls for; None for a baseline prompt."""
    behaviours: list[str]
    """Behaviour that is decided on at each prompt, baseline prompts included."""
    answer_tokens: dict[str, AnswerTokens]
    """Behaviours whose decisions can be read."""

    @classmethod
    def of(
        cls, dataset: Dataset, tokenizer: Any, chat: Chat, answer_tokens: Mapping[str, AnswerTokens] | None = None
    ) -> "Question":
        """Raises `PromptError` if the tokenizer does not know the data set's words."""
        texts = as_chat(dataset.prompts, tokenizer, chat) if tokenizer is not None else list(dataset.prompts)
        if tokenizer is not None:
            check_vocabulary(dataset, tokenizer)
        safety, n_baseline = list(dataset.behaviours), len(dataset.baseline_prompts)
        # Sets of several behaviours pair the i-th baseline prompt with the i-th safety prompt.
        paired = len(set(safety)) > 1 and n_baseline == len(safety)
        behaviours = [*safety, *(safety if paired else [safety[0]] * n_baseline)]
        tokens = dict(answer_tokens or {})
        for behaviour in dict.fromkeys(behaviours):
            if behaviour in tokens or behaviour not in OPENERS or tokenizer is None:
                continue
            try:
                tokens[behaviour] = answer_tokens_for(tokenizer, behaviour)
            except PromptError as error:
                # What features do can be told all the same; the report says that no decision could be read.
                log.warning("flips of %s are not measured: %s", behaviour, error)
        return cls(dataset.name, texts, [*safety, *[None] * n_baseline], behaviours, tokens)

    def readout(self, logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, "prompt readout"]:
        """Margins of every readable behaviour, one column each."""
        columns = [margin(logits, tokens) for tokens in self.answer_tokens.values()]
        return torch.stack(columns, 1) if columns else logits.new_zeros(len(logits), 0)

    def margins(self, answers: Float[Tensor, "prompt readout"]) -> Float[Tensor, "prompt"]:
        """Each prompt's margin in its own behaviour, nats; NaN where that cannot be read."""
        names = list(self.answer_tokens)
        padded = torch.cat([answers, torch.full((len(answers), 1), torch.nan)], 1)
        column = [names.index(b) if b in names else len(names) for b in self.behaviours]
        return padded[torch.arange(len(answers)), torch.tensor(column)]
