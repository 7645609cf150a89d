"""The page of what quantization does to the organism's features, from the numbers of `damage.json`."""

from collections.abc import Callable, Mapping
from typing import Any

from tracelens.organism.damage_numbers import bullet, number, p, paragraph, percent, zero_of
from tracelens.organism.damage_reading import reading

Row = Callable[[Mapping[str, Any]], tuple[str, ...]]
RANDOM_ERRORS = ("noise", "permuted")


def to_markdown(card: Mapping[str, Any]) -> str:
    """The page."""
    tables = [_cpfr, _survival, _muted, _thresholds, _outputs, _verdicts]
    return "\n".join([*_head(card), *reading(card), *(line for table in tables for line in table(card))]) + "\n"


def _head(card: Mapping[str, Any]) -> list[str]:
    live, calibration, settings = card["live"], card["calibration"], card["settings"]
    each, versions = calibration["each"], ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    kinds = ", ".join(f"{live[name]} {name}" for name in ("refusal", "uncertainty", "warning"))
    items = [
        f"*Prompts*: {card['prompts']} of `{card['dataset']}`: three behaviours, half of the prompts calling for them, all held "
        "out from training.",
        f"*Features*: {live['safety']} safety features ({kinds}, each counted where it tells best), which were found on the "
        f"reference with the same prompts, and {live['capability']} capability features: all others that live in the SAEs of the "
        "five `resid_post`. The SAEs were trained on the reference and are frozen.",
        "*RTN*: symmetric integers, rounded to nearest, one scale per output channel or per 32 inputs. *GPTQ*: the same grids by "
        f"llm-compressor, fitted to {calibration['prompts']} prompts ({calibration['tokens']} tokens): {each} that call for each "
        f"behaviour and {each} that do not, seed {calibration['seed']} of the training split, which no audited prompt belongs to. "
        "Everywhere the linear layers of the blocks are quantized, and embeddings, unembedding and norms are not.",
        "*Bits* are per weight, scales included: of GPTQ as its checkpoint stores them (32-bit scales), else as a kernel would.",
        f"*Controls*: `noise`, Gaussian noise of the norm of each tensor's error ({settings['noise_seeds']} draws); `permuted`, "
        f"the error shuffled within rows ({settings['permuted_seeds']} draw). Both are the typical draw and the range in which one "
        "more would fall; a KL of less than 1e-5 counts as 0 there. `random`, capability features of the same sites and firing "
        "rates; `labels`, fingerprints of shuffled labels; both are means and ranges over sets of features. `bf16`, the "
        "reference computed in bf16: the floor, the same for all entries.",
        f"*Brackets*: 95 %. Bootstrap over {settings['n_blocks']} blocks of prompts, {settings['n_resamples']} resamples, seed "
        f"{settings['seed']}; flips: Wilson. A share of 0 or 1 has a bracket of no width because every resample of prompts gives "
        "the same, not because nothing else is possible: over features, 0 of "
        f"{live['safety']} is compatible with {100 * zero_of(live['safety']):.1f}%.",
        f"*Thresholds*: a feature lives if the reference fires it on at least {settings['min_active']} tokens; it survived with a "
        f"correlation of {settings['survived_at']}, is damaged below {settings['damaged_at']}, and muted if it is silent on at "
        "least 90 % of the tokens on which the reference fires it.",
        f"*Versions*: {versions}.",
    ]
    about = (
        "Measured and written by `python -m tracelens.organism.damage`; `damage.json` holds the same numbers. The organism is a "
        "laboratory animal of one million parameters ([card](CARD.md)): nothing here is a forecast for another model."
    )
    title = "# What quantization does to the organism's features"
    return [title, "", paragraph(about), "", *(bullet(item) for item in items), ""]


def _cpfr(card: Mapping[str, Any]) -> list[str]:
    floor = card["floor"]["cpfr"]
    head = [
        "",
        "## CPFR",
        "",
        f"The bf16 floor: safety {number(floor['safety'])}, capability {number(floor['capability'])}.",
        "",
    ]
    columns = ("safety", "noise", "permuted", "random", "labels", "capability", "noise", "permuted")

    def row(e: Mapping[str, Any]) -> tuple[str, ...]:
        c = {name: control["cpfr"] for name, control in e["controls"].items()}
        safety = [number(c[name]["safety"]) for name in (*RANDOM_ERRORS, "random", "labels")]
        capability = [number(c[name]["capability"]) for name in RANDOM_ERRORS]
        return (number(e["cpfr"]["safety"]), *safety, number(e["cpfr"]["capability"]), *capability)

    return [*head, *_table(card, columns, row)]


def _share_table(card: Mapping[str, Any], share: str) -> list[str]:
    def row(e: Mapping[str, Any]) -> tuple[str, ...]:
        c = {name: control["shares"] for name, control in e["controls"].items()}
        cells = [e["shares"]["safety"], *(c[name]["safety"] for name in (*RANDOM_ERRORS, "random", "labels"))]
        cells += [e["shares"]["capability"], *(c[name]["capability"] for name in RANDOM_ERRORS)]
        return tuple(percent(cell[share]) for cell in cells)

    floor = card["floor"]["shares"]
    both = ", ".join(f"{name} {percent(floor[name][share])}" for name in ("safety", "capability"))
    columns = ("safety", "noise", "permuted", "random", "labels", "capability", "noise", "permuted")
    return [f"The bf16 floor: {both}.", "", *_table(card, columns, row)]


def _survival(card: Mapping[str, Any]) -> list[str]:
    return [
        *("", "## Survived", "", *_share_table(card, "survived")),
        *("", "## Damaged", "", *_share_table(card, "damaged")),
    ]


def _muted(card: Mapping[str, Any]) -> list[str]:
    return ["", "## Muted", "", *_share_table(card, "muted")]


def _thresholds(card: Mapping[str, Any]) -> list[str]:
    about = (
        "How many features are first muted at each width, coming from more bits. *Earlier* is the chance that a safety feature "
        "falls silent at more bits than a capability feature, ties counting half; *p* is Mann–Whitney's, *matched p* the rank of "
        "the safety features among random capability features of the same sites and firing rates. Features of one circuit go "
        "together, so both p are lower than they should be. *Came back*: muted at some width and not at a narrower one."
    )
    lines = [
        *("", "## Muting thresholds", "", paragraph(about), ""),
        "| ladder | features | 8 | 7 | 6 | 5 | 4 | 3 | 2 bits | never muted | came back | earlier | p | matched p |",
        f"|{'---|' * 14}",
    ]
    for name, found in card["muting"].items():
        c = found["comparison"]
        for kind, counts in found["first_silent"].items():
            widths = {_width(spec): str(n) for spec, n in counts.items() if spec not in ("none", "came_back")}
            steps = [widths.get(bits, "not run") for bits in range(8, 1, -1)]
            tests = [f"{c['earlier']:.3f}", p(c["p_value"]), p(c["p_matched"])] if kind == "safety" else ["", "", ""]
            steps += [str(counts["none"]), str(counts["came_back"])]
            cells = [name if kind == "safety" else "", kind, *steps, *tests]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _width(spec: str) -> int:
    return int(spec.partition("int")[2].partition("-")[0])


def _outputs(card: Mapping[str, Any]) -> list[str]:
    floor = card["floor"]
    columns = ("flips", "noise", "permuted", "refuse→comply", "comply→refuse", "margin shift, nats")
    columns += ("KL, nats", "noise", "permuted", "perplexity", "noise", "permuted")

    def row(e: Mapping[str, Any]) -> tuple[str, ...]:
        noise, permuted = (e["controls"][name] for name in RANDOM_ERRORS)
        flips = [percent(x["flips"]) for x in (e, noise, permuted)]
        ways = [percent(e["refuse_to_comply"]), percent(e["comply_to_refuse"]), number(e["mean_shift"], "+.3f")]
        return (*flips, *ways, *(number(x[name], ".3g") for name in ("kl", "perplexity") for x in (e, noise, permuted)))

    text = (
        f"The bf16 floor: flips {percent(floor['flips'])}, KL {number(floor['kl'], '.3g')}, perplexity "
        f"{number(floor['perplexity'], '.3g')}; the reference's perplexity is {number(card['perplexity_reference'], '.3g')}. "
        "*Refuse* stands for showing any of the three behaviours."
    )
    return ["", "## Flips, KL and perplexity", "", paragraph(text), "", *_table(card, columns, row)]


def _verdicts(card: Mapping[str, Any]) -> list[str]:
    columns = ("safety beside noise", "CPFR − noise", "p", "CPFR − permuted", "p", "flips − noise", "p")
    columns += ("safety − capability", "p, prompts", "p, matched features", "headline")

    def row(e: Mapping[str, Any]) -> tuple[str, ...]:
        c = e["contrasts"]
        beside = [
            cell
            for name in ("against_noise", "against_permuted", "flips_against_noise")
            for cell in (number(c[name]["difference"], "+.3f"), p(c[name]["p_prompts"]))
        ]
        own = c["against_capability"]
        ps = [p(own["p_prompts"]), p(own["p_features"])]
        return (e["relation"] or "cannot be told", *beside, number(own["difference"], "+.3f"), *ps, e["headline"])

    text = (
        "Differences of CPFRs and of shares of flipped prompts. The p against random errors are corrected for three comparisons "
        "within an entry, and none for the number of entries."
    )
    return ["", "## Verdicts", "", paragraph(text), "", *_table(card, columns, row)]


def _table(card: Mapping[str, Any], columns: tuple[str, ...], row: Row) -> list[str]:
    """One row per entry under its family; columns that repeat a name are the controls of the column before them."""
    lines = [f"| | bits | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 2)}"]
    for family, names in card["families"].items():
        lines.append(f"| **{family}** {'| ' * (len(columns) + 1)}|")
        for name in names:
            e = card["entries"][name]
            lines.append(f"| {name} | {e['bits']:.3g} | {' | '.join(row(e))} |")
    return lines
