"""`look`: both models of a pair on one prompt, a pass each, and their answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tracelens.auditing.answering import greedy
from tracelens.auditing.prompt_passes import compared
from tracelens.auditing.prompt_reading import read_prompt
from tracelens.auditing.prompt_result import Answer, Ended, PromptLook
from tracelens.auditing.token_text import TokenText
from tracelens.behaviour.refusal import AnswerTokens
from tracelens.chat import Chat
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import SAEs
from tracelens.organism.parsing import is_organism, parse
from tracelens.pair import PrecisionPair

Tick = Callable[[PromptLook, int], bool]
"""The look so far, and how many tokens have been generated → whether to go on. What it raises ends the look."""


def look(
    pair: PrecisionPair,
    saes: SAEs | None,
    text: str,
    *,
    chat: Chat = "auto",
    answer_tokens: Mapping[str, AnswerTokens] | None = None,
    fingerprint: Fingerprint | None = None,
    max_new_tokens: int = 24,
    top_features: int = 12,
    top_tokens: int = 8,
    tick: Tick | None = None,
) -> PromptLook:
    """Both models on one prompt: one pass each, and one step each for every token of an answer.

    Args:
        saes: by site; without them there are no features.
        chat: whether the text is put into the tokenizer's chat template; see `tracelens.chat.as_chat`.
        answer_tokens: behaviour → first tokens of answers, beside those that the tokenizer's vocabulary suggests.
        fingerprint: says which features carry which behaviour.
        max_new_tokens: of each answer; 0 for none.
        top_features: how many are kept of each site and each ranking.
        top_tokens: how many next tokens are kept of each model.
        tick: called when both passes are done, and after each generated token.

    Raises `PromptError` for a text that cannot be run (`read_prompt`), `NonFiniteError` for NaN or infinity in what a model computes.
    """
    reading = read_prompt(pair, text, chat=chat)
    seen, logits = compared(pair, saes or {}, reading, answer_tokens or {}, fingerprint, top_features, top_tokens)
    organism = is_organism(pair.tokenizer)
    truth = parse(reading.prompt) if organism else None
    if truth and tuple(pair.tokenizer(truth.prompt)["input_ids"]) != reading.ids:
        truth = None  # positions would be those of another text
    found = PromptLook(reading=reading, organism=organism, truth=truth, **seen)
    return _answered(found, pair, logits, max_new_tokens, tick)


def _answered(found: PromptLook, pair: PrecisionPair, logits: Sequence[Any], n: int, tick: Tick | None) -> PromptLook:
    """With the answers, of both models in turn."""
    going = tick is None or tick(found, 0)
    if n < 1:
        return found
    stop = _end_tokens(pair)
    total = 0
    for name, start in zip(("reference", "quantized"), logits, strict=True):
        model, ids = getattr(pair, name), found.reading.ids
        given: list[int] = []
        steps = greedy(model, ids, start, n=n, stop=stop) if going else iter(())
        for token in steps:
            given.append(token)
            total += 1
            if tick is not None:
                found = _with_answer(found, name, given, pair.tokenizer, "length")
                going = tick(found, total)
            if not going:
                break
        full = len(ids) + len(given) >= model.cfg.n_ctx
        ended: Ended = "end" if given and given[-1] in stop else "length" if len(given) >= n else "context"
        ended = ended if going or ended == "end" else "stopped"
        assert ended != "context" or full
        found = _with_answer(found, name, given, pair.tokenizer, ended)
    return found


def _with_answer(found: PromptLook, name: str, given: list[int], tokenizer: Any, ended: Ended) -> PromptLook:
    show = TokenText(tokenizer)
    said = given[:-1] if ended == "end" else given
    text = tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return replace(found, answers={**found.answers, name: Answer(text, tuple(map(show, given)), ended)})


def _end_tokens(pair: PrecisionPair) -> tuple[int, ...]:
    """The tokenizer's end of text, and the marks that chat templates end a turn with."""
    tokenizer = pair.tokenizer
    ends = ("<end>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>")
    special = set(tokenizer.all_special_tokens)
    found = {tokenizer.convert_tokens_to_ids(token) for token in ends if token in special}
    return tuple(sorted(found | ({tokenizer.eos_token_id} - {None})))
