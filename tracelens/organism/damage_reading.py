"""What the numbers of `damage.json` say, in sentences that are made from them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tracelens.organism.damage_numbers import bullet, number, p, percent

Card = Mapping[str, Any]
RELATIONS = ("worse than noise of the same size", "like noise", "better than noise")


def reading(card: Card) -> list[str]:
    """A section: what the tables say, and what does not follow."""
    says = [_capability(card), _noise(card), _permuted(card), _outputs(card), *_methods(card), *_muting(card)]
    return [
        *("## Reading", ""),
        *(bullet(sentence) for sentence in says),
        *("", "What does not follow:", ""),
        *(bullet(sentence) for sentence in _not_following(card)),
    ]


def _which(card: Card, holds: Callable[[Mapping[str, Any]], bool]) -> list[str]:
    return [name for name, e in card["entries"].items() if holds(e)]


def _named(card: Card, names: Iterable[str]) -> str:
    """The entries, a family that is among them as a whole by its name; "none"."""
    found = list(names)
    whole = {family: members for family, members in card["families"].items() if set(members) <= set(found)}
    rest = [name for name in found if not any(name in members for members in whole.values())]
    return ", ".join([*(f"all of {family}" for family in whole), *rest]) or "none"


def _sign(contrast: Mapping[str, Any]) -> int:
    """1 or -1 where the difference is significant, else 0."""
    return 0 if not contrast["significant"] else 1 if contrast["difference"][0] > 0 else -1


def _capability(card: Card) -> str:
    n = len(card["entries"])
    more, less, same = (
        _which(card, lambda e, s=s: _sign(e["contrasts"]["against_capability"]) == s) for s in (1, -1, 0)
    )

    def above(name: str) -> int:
        return len(_which(card, lambda e: e["cpfr"]["safety"][0] > e["controls"][name]["cpfr"]["safety"][2]))

    return (
        f"**Safety against capability.** Safety features are preserved better than capability features in {len(more)} of {n} "
        f"entries, worse in {_named(card, less)}, not distinguishably in {_named(card, same)} (over prompts and over matched "
        "features both). "
        "Their CPFR is above the range of random features of the same sites and firing rates in "
        f"{above('random')} entries, and above that of fingerprints made from shuffled labels in {above('labels')}. Safety "
        "features are chosen for firing reliably on these very prompts, and the tables do not tell how much of their advantage "
        "is that choice."
    )


def _noise(card: Card) -> str:
    entries = card["entries"]
    worse, like, better = (_which(card, lambda e, r=r: e["relation"] == r) for r in RELATIONS)
    untold = _which(card, lambda e: e["relation"] is None)
    text = (
        f"**Safety against noise of the same size.** {len(like)} of {len(entries)} entries are like noise; better: "
        f"{_named(card, better)}; worse: {_named(card, worse)}; not told: {_named(card, untold)}."
    )
    if not like:
        return text
    ordered = sorted(like, key=lambda name: _not_excluded(entries[name]))
    middle, most = (_not_excluded(entries[name]) for name in (ordered[len(ordered) // 2], ordered[-1]))
    ps = {name: entries[name]["contrasts"]["against_noise"]["p_prompts"] for name in like}
    least = min(ps, key=lambda name: ps[name])
    return (
        f"{text} The smallest p of those that are like noise is {p(ps[least])} ({least}). *Like noise* is weak evidence: with "
        f"{card['settings']['noise_seeds']} draws, the bracket of the difference leaves room for a loss (1 − CPFR) that is "
        f"{middle:.1f} times that of a draw of noise in the median entry, and {most:.1f} times in {ordered[-1]}."
    )


def _not_excluded(e: Mapping[str, Any]) -> float:
    """How many times the loss of a draw of noise the safety features' loss may be, by the bracket of the difference."""
    loss, low = 1 - e["cpfr"]["safety"][0], e["contrasts"]["against_noise"]["difference"][1]
    return loss / (loss + low) if loss + low > 0 else float("inf")


def _permuted(card: Card) -> str:
    more, less = (_which(card, lambda e, s=s: _sign(e["contrasts"]["against_permuted"]) == s) for s in (-1, 1))
    return (
        "**Safety against its own error shuffled.** Shuffled within rows, the same error does more harm to safety features in "
        f"{_named(card, less)}; less in {_named(card, more)}. In the other entries the two are not told apart."
    )


def _outputs(card: Card) -> str:
    entries = card["entries"]
    most = max(entries, key=lambda name: entries[name]["flips"][0])
    least = min(entries, key=lambda name: entries[name]["cpfr"]["safety"][0])
    more, fewer = (_which(card, lambda e, s=s: _sign(e["contrasts"]["flips_against_noise"]) == s) for s in (1, -1))
    return (
        f"**Features and decisions.** {least} has the lowest safety CPFR, {number(entries[least]['cpfr']['safety'])}, and flips "
        f"{percent(entries[least]['flips'])} of the decisions, at a perplexity of "
        f"{number(entries[least]['perplexity'], '.3g')} (reference {card['perplexity_reference'][0]:.3g}); the most flips of all "
        f"are {percent(entries[most]['flips'])} in {most}. More flips than noise: {_named(card, more)}; fewer: {_named(card, fewer)}."
    )


def _methods(card: Card) -> list[str]:
    widths, all_widths = (8, 6, 5, 4, 3, 2), range(8, 1, -1)
    channels = [(f"gptq-int{bits}", f"int{bits}") for bits in widths]
    groups = [(f"gptq-int{bits}-g32", f"int{bits}-g32") for bits in widths]
    finer = [(f"int{bits}-g32", f"int{bits}") for bits in all_widths]
    return [
        _beside(card, "**GPTQ beside RTN, per channel.**", channels, "GPTQ", "RTN"),
        _beside(card, "**GPTQ beside RTN, in groups of 32.**", groups, "GPTQ", "RTN"),
        _beside(card, "**Groups of 32 beside channels, RTN.**", finer, "groups", "channels"),
        "Two errors of one size differ by luck too, which brackets over prompts leave out. What is neither above nor below "
        "those ranges is not told from luck.",
    ]


def _beside(card: Card, title: str, pairs: list[tuple[str, str]], first: str, second: str) -> str:
    """Pairs of entries that differ in one thing, held against what noise of the second's size would do: luck of the draw."""
    entries = card["entries"]

    def beyond(of: Callable[[Mapping[str, Any]], list[float]]) -> str:
        values = [(one, of(entries[one])[0], of(entries[other]["controls"]["noise"])) for one, other in pairs]
        above = _named(card, [one for one, value, (_, _, high) in values if value > high])
        below = _named(card, [one for one, value, (_, low, _) in values if value < low])
        return f"above it in {above}; below it in {below}"

    ratios = ", ".join(f"{entries[one]['kl'][0] / entries[other]['kl'][0]:.2g} ({one})" for one, other in pairs)
    noise = [tuple(entries[name]["controls"]["noise"]["cpfr"]["safety"][0] for name in pair) for pair in pairs]
    less = sum(one < other for one, other in noise)
    return (
        f"{title} Safety CPFR with {first}, beside the range of noise as large as the error with {second}: "
        f"{beyond(lambda e: e['cpfr']['safety'])}. Capability CPFR: {beyond(lambda e: e['cpfr']['capability'])}. "
        f"KL with {first} over KL with {second}: {ratios}. "
        f"Noise as large as the error with {first} keeps less of the safety features than noise as large as that with {second} in "
        f"{less} of {len(pairs)} pairs."
    )


def _muting(card: Card) -> list[str]:
    texts = []
    for ladder, found in card["muting"].items():
        ever = {
            kind: (sum(n for spec, n in counts.items() if spec not in ("none", "came_back")), counts["none"])
            for kind, counts in found["first_silent"].items()
        }
        shares = {kind: f"{silent} of {silent + none} {kind}" for kind, (silent, none) in ever.items()}
        narrowest = [spec for spec in found["first_silent"]["safety"] if spec not in ("none", "came_back")][-1]
        own, noise = (
            x["shares"] for x in (card["entries"][narrowest], card["entries"][narrowest]["controls"]["noise"])
        )
        c = found["comparison"]
        texts.append(
            f"**Muting, {ladder}.** {shares['safety']} and {shares['capability']} features fall silent somewhere on the ladder "
            f"(the safety feature of a pair is the earlier with probability {c['earlier']:.3f}, p {p(c['p_value'])}, matched p "
            f"{p(c['p_matched'])}). Noise of the size of {narrowest}'s error mutes {percent(noise['safety']['muted'])} of the safety "
            f"and {percent(noise['capability']['muted'])} of the capability features; {narrowest} itself "
            f"{percent(own['safety']['muted'])} and {percent(own['capability']['muted'])}."
        )
    return texts


def _not_following(card: Card) -> list[str]:
    n, live = len(card["entries"]), card["live"]
    return [
        "that quantization is harmless to safety, or that safety features of other models fare better than their other "
        "features: this is one small model, one training run of it and of its SAEs, one language, and "
        f"{live['safety']} safety features that were chosen for telling behaviours apart;",
        "that an entry which is like noise does what noise does: see above how far apart the two may be;",
        f"anything from a single small p: {n} entries are compared, mostly of the same weights at neighbouring widths, so they "
        "are not independent, and no p is corrected for their number;",
        f"how GPTQ fares in general: it is fitted to {card['calibration']['prompts']} prompts of the very kinds that are "
        "audited, which is the best case for it, and each recipe is run once;",
        "what a kernel would do: RTN and the formats are simulated in memory, activations and the KV cache are not rounded.",
    ]
