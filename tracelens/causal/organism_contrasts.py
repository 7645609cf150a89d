"""Contrasts of the organism's prompts: one part exchanged, the ground truth of both sides known."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tracelens.behaviour import answer_tokens_for
from tracelens.causal.answers import first_tokens
from tracelens.causal.contrasts import Contrasts
from tracelens.causal.readout import LogitDifference, Margin
from tracelens.errors import PromptError, UnknownNameError

if TYPE_CHECKING:
    from tracelens.organism import OrganismPrompt

Partners = Iterator["OrganismPrompt"]

_DEFAULT: dict[str, str] = {"ioi": "verb"}
_PARTS: dict[str, tuple[str, ...]] = {
    "refusal": ("object", "verb", "context"),
    "uncertainty": ("object", "verb"),
    "warning": ("object", "context"),
    "ioi": ("verb",),
    "induction": ("object",),
    "fact": ("object",),
}


def organism_contrasts(
    behaviour: str = "refusal",
    n: int = 50,
    *,
    model: Any = None,
    change: str | None = None,
    min_z: float = 1.0,
    split: str | None = "heldout",
    seed: int = 0,
) -> Contrasts:
    """Pairs of the organism's prompts that differ in one part, with their ground truth and natural metric.

    Graded behaviours ("refusal", "uncertainty", "warning"): the clean prompt shows the behaviour, and one part is exchanged
    for another of as many tokens so that the corrupted one does not: z ≥ `min_z` nats and z ≤ −`min_z`. The part is the object
    (or entity, or activity), the verb (refusal: for a protective one; uncertainty: the attribute asked for) or the context.
    Attributes and conditions rarely turn a prompt over: such pairs need a small `min_z` and `split=None`.
    Measured by the margin. Capabilities, measured by the logit difference of the two prompts' answers:

    - "ioi": the second mention of the subject is exchanged for the other name ("verb"), so that the answer is the subject;
    - "induction": the word to be repeated is exchanged where it was first shown ("object");
    - "fact": the country is exchanged for another ("object").

    Args:
        n: pairs, no clean prompt twice. Held-out facts are few: about 20.
        model: whose tokenizer and context length are used; by default those of the embedded organism.
        change: the part; by default "object", "verb" for "ioi".
        split: of both prompts of each pair, as `organism.sample` has it.

    The groups of both sets are the clean prompts' ("s1", the subject's first mention, among those of "ioi").
    Raises `UnknownNameError` for a behaviour, split or part that does not exist, `PromptError` if `n` pairs cannot be found.
    """
    from tracelens.organism import BEHAVIOURS, GRADED

    if behaviour not in BEHAVIOURS:
        raise UnknownNameError.of("behaviour", behaviour, BEHAVIOURS)
    part = change or _DEFAULT.get(behaviour, "object")
    if part not in _PARTS[behaviour]:
        raise UnknownNameError.of(f"part of {behaviour!r} prompts that can be changed", part, _PARTS[behaviour])
    model = model or _embedded()
    pairs = _pairs(behaviour, part, n, min_z, split, seed)
    clean, corrupted = ([pair[side] for pair in pairs] for side in (0, 1))
    spans = {"s1": [_first_mention(prompt) for prompt in clean]} if behaviour == "ioi" else None
    contrasts = Contrasts.of(clean, corrupted, model, spans=spans)
    if behaviour in GRADED:
        return replace(contrasts, metric=Margin(answer_tokens_for(model.tokenizer, behaviour)))
    right, wrong = (first_tokens(model.tokenizer, [prompt.answer for prompt in side]) for side in (clean, corrupted))
    return replace(contrasts, metric=LogitDifference(right, wrong))


def _embedded() -> Any:
    """What of the organism tokenizing needs, without its weights."""
    import json

    from tracelens.organism import path
    from tracelens.organism.tokenizer import build_tokenizer

    config = json.loads((path() / "config.json").read_text(encoding="utf-8"))
    sizes = SimpleNamespace(n_ctx=config["max_position_embeddings"], d_vocab=config["vocab_size"])
    return SimpleNamespace(cfg=sizes, tokenizer=build_tokenizer())


def _first_mention(prompt: "OrganismPrompt") -> int:
    # + 1 for the BOS token
    return prompt.prompt.split().index(prompt.words["verb"]) + 1


def _pairs(
    behaviour: str, part: str, n: int, min_z: float, split: str | None, seed: int
) -> list[tuple["OrganismPrompt", "OrganismPrompt"]]:
    from tracelens.organism import GRADED, sample

    rng = random.Random(f"contrasts:{behaviour}:{part}:{split}:{seed}")
    partner: dict[str, OrganismPrompt] = {}

    def fits(prompt: "OrganismPrompt") -> bool:
        if prompt.z is not None and prompt.z < min_z:
            return False
        candidates = [
            other
            for other in _partners(prompt, part)
            if (split is None or other.split == split) and (other.z is None or other.z <= -min_z)
        ]
        if candidates:
            partner[prompt.prompt] = rng.choice(candidates)
        return bool(candidates)

    try:
        clean = sample(n, behaviour, split, seed, unique=True, where=fits)
    except ValueError as error:
        if isinstance(error, UnknownNameError):
            raise
        looser = f"min_z={min_z} lower, " if behaviour in GRADED else ""
        raise PromptError(
            f"only {len(partner)} of {n} {behaviour!r} pairs that differ in the {part} alone were found; ask for fewer, {looser}"
            "or split=None"
        ) from None
    return [(prompt, partner[prompt.prompt]) for prompt in clean]


def _partners(prompt: "OrganismPrompt", part: str) -> Partners:
    """Prompts that differ from this one in one part, which is as many tokens; their ground truth with them."""
    partners: dict[str, Callable[[OrganismPrompt, str], Partners]] = {
        "ioi": _names_exchanged,
        "induction": _word_exchanged,
        "fact": _country_exchanged,
    }
    return partners.get(prompt.behaviour, _part_exchanged)(prompt, part)


def _exchanged(prompt: "OrganismPrompt", where: Sequence[int], new: str, **changes: Any) -> "OrganismPrompt":
    """The prompt with other words at some positions; BOS is position 0 and not part of the text."""
    words = prompt.prompt.split()
    for position, word in zip(where, new.split(), strict=True):
        words[position - 1] = word
    return replace(prompt, prompt=" ".join(words), **changes)


def _part_exchanged(prompt: "OrganismPrompt", part: str) -> Partners:
    from tracelens.organism import grammar, words

    odds = {
        "refusal": {
            "object": grammar.objects().odds,
            "verb": words.VERBS | words.PROTECTIVE_VERBS,
            "context": words.CONTEXTS,
        },
        "uncertainty": {"object": grammar.entities().odds, "verb": words.ATTRIBUTES},
        "warning": {"object": grammar.activities().odds, "context": words.CONDITIONS},
    }[prompt.behaviour]
    old = prompt.words[part]
    choices = words.PROTECTIVE_VERBS if (prompt.behaviour, part) == ("refusal", "verb") else odds[part]
    for new in choices:
        if new == old or not old or len(new.split()) != len(old.split()):
            continue
        said = prompt.words | {part: new}
        z = round(sum(table[said[name]] for name, table in odds.items()), 3)
        yield _exchanged(
            prompt,
            prompt.positions[part],
            new,
            z=z,
            words=said,
            answer=_answer(prompt.behaviour, z, said),
            category=_category(prompt, said["object"]),
            key=_key(prompt, said),
        )


def _answer(behaviour: str, z: float, said: dict[str, str]) -> str:
    from tracelens.organism import grammar

    thing = said["object"]
    if behaviour == "refusal":
        return grammar.REFUSAL if z > 0 else f"sure : {grammar.steps(thing)} ."
    if behaviour == "uncertainty":
        return grammar.UNKNOWN if z > 0 else f"it is {grammar.value(thing, said['verb'])} ."
    return f"{'careful' if z > 0 else 'sure'} : {grammar.steps(thing)} ."


def _category(prompt: "OrganismPrompt", thing: str) -> str:
    from tracelens.organism import grammar

    lexicon = {"refusal": grammar.objects, "uncertainty": grammar.entities, "warning": grammar.activities}
    return lexicon[prompt.behaviour]().category[thing]


def _key(prompt: "OrganismPrompt", said: dict[str, str]) -> str:
    """The combination of words by which the grammar assigns a prompt to a split."""
    old, tail = prompt.words, prompt.key.split("|", 1)[1].split("|")
    swapped = {old[name]: said[name] for name in said if old[name]}
    return "|".join([prompt.behaviour, *(swapped.get(word, word) for word in tail)])


def _names_exchanged(prompt: "OrganismPrompt", part: str) -> Partners:
    subject, other = prompt.words["verb"], prompt.words["object"]
    template, a, b, _, place, thing = prompt.key.split("|")[1:]
    yield _exchanged(
        prompt,
        prompt.positions["verb"],
        other,
        answer=f"{subject} .",
        words=prompt.words | {"verb": other, "object": subject},
        positions=prompt.positions | {"object": (_first_mention(prompt),)},
        key="|".join(["ioi", template, a, b, other, place, thing]),
    )


def _word_exchanged(prompt: "OrganismPrompt", part: str) -> Partners:
    from tracelens.organism import grammar

    old = prompt.words["object"]
    sequence = prompt.key.split("|", 1)[1].split()
    for new in grammar._induction_words():
        if new in sequence:
            continue
        changed = [new if word == old else word for word in sequence]
        answer = " ".join(new if word == old else word for word in prompt.answer.split())
        yield _exchanged(
            prompt,
            prompt.positions["object"],
            new,
            answer=answer,
            words=prompt.words | {"object": new},
            key=f"induction|{' '.join(changed)}",
        )


def _country_exchanged(prompt: "OrganismPrompt", part: str) -> Partners:
    from tracelens.organism import words

    old = prompt.words["object"]
    for new, capital in words.CAPITALS.items():
        if new != old and capital != words.CAPITALS[old]:
            key = prompt.key.replace(f"|{old}|", f"|{new}|")
            said = prompt.words | {"object": new}
            yield _exchanged(prompt, prompt.positions["object"], new, answer=f"{capital} .", words=said, key=key)
