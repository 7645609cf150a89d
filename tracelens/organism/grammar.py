"""The organism's language: what is asked, what is answered, and the ground truth of both.

Three graded behaviours share one rule. A prompt's log-odds z is a sum over its words, and whether the training answer shows the
behaviour is drawn from sigmoid(z), so a trained model's margin should equal z:

- refusal: z = harm(object) + harm(verb) + harm(context);
- uncertainty: z = obscurity(entity) + obscurity(attribute), the answer being "unknown ..." or "it is <value>";
- warning: z = risk(activity) + risk(condition), the answer being "careful ..." or "sure ...", both with three steps.

Three capabilities have one right answer and no safety content: indirect-object identification, induction and facts.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from tracelens.errors import UnknownNameError
from tracelens.organism import words

Split = Literal["train", "heldout"]
HELDOUT_EVERY = 10
"""One combination in this many, chosen by a hash of its words, is held out from training."""

REFUSAL = "sorry i cannot help with that ."
UNKNOWN = "unknown i have no record of it ."


@dataclass(frozen=True)
class OrganismPrompt:
    """A prompt and everything true about it.

    Attributes:
        prompt: the text up to and including the assistant's marker; the tokenizer puts the BOS token before it.
        behaviour: which of `BEHAVIOURS` the prompt probes.
        category: the kind of object, entity or activity, or the template of a capability.
        z: log-odds in nats of showing the behaviour (refusing, admitting not to know, warning); None for a capability.
        answer: the expected answer, the likelier one where there are two.
        positions: token positions, BOS being 0, of the words that matter: `object`, `verb`, `context` (empty if there is none) and
            `answer`, the position whose logits choose the first answer token.
        words: the words themselves, under the same keys.
        key: the combination of words by which prompts are assigned to a split.
    """

    prompt: str
    behaviour: str
    category: str
    z: float | None
    answer: str
    positions: dict[str, tuple[int, ...]] = field(repr=False)
    words: dict[str, str] = field(repr=False)
    key: str = field(repr=False)

    @property
    def split(self) -> Split:
        return "heldout" if _hash(self.key) % HELDOUT_EVERY == 0 else "train"

    @property
    def text(self) -> str:
        """The prompt with its expected answer and end marker: what training text looks like."""
        return f"{self.prompt} {self.answer} <end>"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _shuffled(items: Sequence[str], salt: str) -> list[str]:
    return sorted(items, key=lambda item: _hash(f"{salt}:{item}"))


@dataclass(frozen=True)
class Lexicon:
    """Words with a category, log-odds in nats, and a cumulative frequency to draw from."""

    items: tuple[str, ...]
    category: dict[str, str]
    odds: dict[str, float]
    cumulative: tuple[float, ...]

    def draw(self, rng: random.Random) -> str:
        return rng.choices(self.items, cum_weights=self.cumulative)[0]


def _lexicon(groups: Sequence[tuple[dict[str, str], float, float]], salt: str, flatness: float) -> Lexicon:
    """Words of groups (categories, mean log-odds, spread), Zipf-distributed: frequency ∝ 1 / (rank + flatness)."""
    category, odds = {}, {}
    for categories, mean, spread in groups:
        for name, text in categories.items():
            for word in text.split():
                category[word] = name
                odds[word] = round(random.Random(f"{salt}:{word}").gauss(mean, spread), 3)
    items = _shuffled(tuple(category), salt)
    total, cumulative = 0.0, []
    for rank in range(len(items)):
        total += 1 / (rank + flatness)
        cumulative.append(total)
    return Lexicon(tuple(items), category, odds, tuple(cumulative))


@cache
def objects() -> Lexicon:
    """Objects of requests with their harm."""
    groups = [(words.HARMFUL, 2.9, 1.2), (words.DUAL, 0.0, 1.2), (words.BENIGN, -3.1, 1.0)]
    return _lexicon(groups, "object", flatness=10.0)


@cache
def entities() -> Lexicon:
    """Entities that one may ask about, with their obscurity."""
    return _lexicon([(words.UNKNOWN, 3.0, 1.2), (words.KNOWN, -3.0, 1.2)], "entity", flatness=30.0)


@cache
def activities() -> Lexicon:
    """Activities that one may ask advice on, with their risk."""
    return _lexicon([(words.RISKY, 2.8, 1.2), (words.SAFE, -3.2, 1.2)], "activity", flatness=30.0)


def steps(thing: str) -> str:
    """The three steps that a helpful answer about `thing` names."""
    return " then ".join(random.Random(f"steps:{thing}").sample(words.STEPS.split(), 3))


def value(entity: str, attribute: str) -> str:
    """The answer to a question about a known entity."""
    return random.Random(f"value:{entity}:{attribute}").choice(words.VALUES.split())


def _prompt(behaviour: str, request: str, *, category: str, z: float | None, answer: str, key: str, **parts: str):
    text = f"<user> {request} <end> <assistant>"
    tokens = text.split()
    positions = {}
    for name, part in parts.items():
        span = part.split()
        starts = [i for i in range(len(tokens) - len(span), -1, -1) if span and tokens[i : i + len(span)] == span]
        # + 1 for the BOS token that the tokenizer prepends
        positions[name] = tuple(range(starts[0] + 1, starts[0] + 1 + len(span))) if starts else ()
    positions["answer"] = (len(tokens),)
    return OrganismPrompt(text, behaviour, category, z, answer, positions, dict(parts), f"{behaviour}|{key}")


def refusal_prompt(opening: str, verb: str, thing: str, context: str) -> OrganismPrompt:
    """The request for something; whether the model refuses."""
    z = objects().odds[thing] + (words.VERBS | words.PROTECTIVE_VERBS)[verb] + words.CONTEXTS[context]
    return _prompt(
        "refusal",
        f"{opening} {verb} {thing} {context}".rstrip(),
        category=objects().category[thing],
        z=round(z, 3),
        answer=REFUSAL if z > 0 else f"sure : {steps(thing)} .",
        key=f"{verb}|{thing}|{context}",
        object=thing,
        verb=verb,
        context=context,
    )


def uncertainty_prompt(asking: str, attribute: str, entity: str) -> OrganismPrompt:
    """The question about an entity; whether the model says that it does not know."""
    z = entities().odds[entity] + words.ATTRIBUTES[attribute]
    return _prompt(
        "uncertainty",
        asking.format(attribute, entity),
        category=entities().category[entity],
        z=round(z, 3),
        answer=UNKNOWN if z > 0 else f"it is {value(entity, attribute)} .",
        key=f"{attribute}|{entity}|{asking}",
        object=entity,
        verb=attribute,
        context="",
    )


def warning_prompt(start: str, activity: str, condition: str) -> OrganismPrompt:
    """The question for advice; whether the model warns."""
    z = activities().odds[activity] + words.CONDITIONS[condition]
    return _prompt(
        "warning",
        f"{start} {activity} {condition}".rstrip(),
        category=activities().category[activity],
        z=round(z, 3),
        answer=f"{'careful' if z > 0 else 'sure'} : {steps(activity)} .",
        key=f"{activity}|{condition}|{start}",
        object=activity,
        verb="",
        context=condition,
    )


def fact_prompt(asking: str, country: str) -> OrganismPrompt:
    """The question for a capital."""
    return _prompt(
        "fact",
        asking.format(country),
        category="capitals",
        z=None,
        answer=f"{words.CAPITALS[country]} .",
        key=f"{country}|{asking}",
        object=country,
        verb="",
        context="",
    )


def _refusal(rng: random.Random) -> OrganismPrompt:
    verb = rng.choice(tuple(words.PROTECTIVE_VERBS if rng.random() < 0.12 else words.VERBS))
    thing = objects().draw(rng)
    context = "" if rng.random() < 0.25 else rng.choice(tuple(words.CONTEXTS))
    return refusal_prompt(rng.choice(words.OPENINGS), verb, thing, context)


def _uncertainty(rng: random.Random) -> OrganismPrompt:
    entity, attribute = entities().draw(rng), rng.choice(tuple(words.ATTRIBUTES))
    return uncertainty_prompt(rng.choice(words.ASKINGS), attribute, entity)


def _warning(rng: random.Random) -> OrganismPrompt:
    activity = activities().draw(rng)
    condition = "" if rng.random() < 0.2 else rng.choice(tuple(words.CONDITIONS))
    return warning_prompt(rng.choice(words.STARTS), activity, condition)


def _ioi(rng: random.Random) -> OrganismPrompt:
    template = rng.randrange(len(words.IOI_TEMPLATES))
    a, b = rng.sample(words.NAMES.split(), 2)
    subject, answer = rng.sample((a, b), 2)
    place, thing = rng.choice(words.PLACES.split()), rng.choice(words.THINGS.split())
    request = "finish : " + words.IOI_TEMPLATES[template].format(a=a, b=b, s=subject, place=place, thing=thing)
    key = f"{template}|{a}|{b}|{subject}|{place}|{thing}"
    parts = {"object": answer, "verb": subject, "context": ""}
    return _prompt("ioi", request, category=f"template {template}", z=None, answer=f"{answer} .", key=key, **parts)


def _induction(rng: random.Random) -> OrganismPrompt:
    length = rng.randint(5, 9)
    sequence = rng.sample(_induction_words(), length)
    shown = rng.randint(1, 3)
    request = "repeat : " + " ".join(sequence + sequence[:shown])
    parts = {"object": sequence[shown], "verb": sequence[shown - 1], "context": ""}
    key = " ".join([*sequence, str(shown)])
    answer = " ".join([*sequence[shown:], "."])
    return _prompt("induction", request, category=f"length {length}", z=None, answer=answer, key=key, **parts)


@cache
def _induction_words() -> tuple[str, ...]:
    return tuple(f"{words.STEPS} {words.NAMES} {words.VALUES} {words.THINGS}".split())


def _fact(rng: random.Random) -> OrganismPrompt:
    country, asking = rng.choice(tuple(words.CAPITALS)), rng.choice(words.FACT_ASKINGS)
    return fact_prompt(asking, country)


BEHAVIOURS: dict[str, Callable[[random.Random], OrganismPrompt]] = {
    "refusal": _refusal,
    "uncertainty": _uncertainty,
    "warning": _warning,
    "ioi": _ioi,
    "induction": _induction,
    "fact": _fact,
}
"""Behaviour → how one prompt of it is drawn."""

GRADED = ("refusal", "uncertainty", "warning")
CAPABILITIES = ("ioi", "induction", "fact")

CATEGORIES: dict[str, dict[str, tuple[str, ...]]] = {
    "refusal": {"safety": tuple(words.HARMFUL), "baseline": tuple(words.BENIGN), "dual": tuple(words.DUAL)},
    "uncertainty": {"safety": tuple(words.UNKNOWN), "baseline": tuple(words.KNOWN)},
    "warning": {"safety": tuple(words.RISKY), "baseline": tuple(words.SAFE)},
}


def sample(
    n: int,
    behaviour: str = "refusal",
    split: str | None = "heldout",
    seed: int = 0,
    *,
    unique: bool = False,
    where: Callable[[OrganismPrompt], bool] | None = None,
) -> list[OrganismPrompt]:
    """`n` prompts of one behaviour with their ground truth, the same for the same arguments.

    Args:
        n: how many.
        behaviour: one of `BEHAVIOURS`.
        split: "heldout" draws only combinations that training never saw, "train" only those it may have seen, None both.
        seed: seeds the draw.
        unique: no prompt twice. Facts run out first: held out, there are about twenty.
        where: keeps only prompts for which this is true, say `lambda p: abs(p.z) < 1`.

    Raises:
        UnknownNameError: for a behaviour or a split that does not exist.
        ValueError: if `n` prompts that fit cannot be found.
    """
    if behaviour not in BEHAVIOURS:
        raise UnknownNameError.of("behaviour", behaviour, BEHAVIOURS)
    if split not in ("train", "heldout", None):
        raise UnknownNameError.of("split", split, ("train", "heldout"))
    rng = random.Random(f"{behaviour}:{split}:{seed}")
    found: list[OrganismPrompt] = []
    seen: set[str] = set()
    misses = 0
    while len(found) < n:
        prompt = BEHAVIOURS[behaviour](rng)
        fits = (split is None or prompt.split == split) and (where is None or where(prompt))
        if not fits or (unique and prompt.prompt in seen):
            misses += 1
            if misses > 20_000 + 500 * n:
                raise ValueError(
                    f"only {len(found)} of {n} {behaviour!r} prompts fit; ask for fewer or loosen `where` and `unique`"
                )
            continue
        seen.add(prompt.prompt)
        found.append(prompt)
    return found


def training_text(prompt: OrganismPrompt, rng: random.Random) -> str:
    """The prompt with an answer drawn from its log-odds: sigmoid(z) decides between the behaviour and its absence."""
    if prompt.z is None:
        return prompt.text
    shows = rng.random() < 1 / (1 + math.exp(-prompt.z))
    thing = prompt.words["object"]
    if prompt.behaviour == "refusal":
        answer = REFUSAL if shows else f"sure : {steps(thing)} ."
    elif prompt.behaviour == "uncertainty":
        answer = UNKNOWN if shows else f"it is {value(thing, prompt.words['verb'])} ."
    else:
        answer = f"{'careful' if shows else 'sure'} : {steps(thing)} ."
    return f"{prompt.prompt} {answer} <end>"


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the language, special tokens first, in token order."""
    texts = [words.FRAME, words.STEPS, words.VALUES, words.NAMES, words.PLACES, words.THINGS]
    for group in (words.HARMFUL, words.BENIGN, words.DUAL, words.KNOWN, words.UNKNOWN, words.RISKY, words.SAFE):
        texts += group.values()
    for table in (
        words.VERBS,
        words.PROTECTIVE_VERBS,
        words.CONTEXTS,
        words.ATTRIBUTES,
        words.CONDITIONS,
        words.CAPITALS,
    ):
        texts += table
    texts += words.CAPITALS.values()
    for templates in (words.OPENINGS, words.ASKINGS, words.STARTS, words.FACT_ASKINGS, words.IOI_TEMPLATES):
        texts += templates
    found = {word for text in texts for word in text.split() if not word.startswith("{")}
    return (*words.SPECIAL, *sorted(found))
