"""From sums to a report: the pure half of an audit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tracelens.audit_report import AuditReport, Control, DivergenceSummary
from tracelens.audit_settings import AuditSettings
from tracelens.auditing.evidence_collecting import EvidenceSource, pair_floors
from tracelens.auditing.measured import Measured
from tracelens.auditing.preservation import Thresholds, classes_of
from tracelens.auditing.question import Question
from tracelens.auditing.random_sets import matched_members, mean_of_members
from tracelens.auditing.report_controls import (
    NOISE,
    PERMUTED,
    RandomErrors,
    floor_control,
    random_error,
    set_control,
    shares_of,
)
from tracelens.auditing.tables import (
    CAPABILITY,
    Kinds,
    feature_table,
    n_smeared,
    pair_table,
    prompt_table,
    smeared_pairs,
)
from tracelens.auditing.verdict import RANDOM_COMPARISONS, Contrast, Verdict, contrast, judge, two_sided_rank
from tracelens.behaviour.flips import Flips
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.permuted_labels import permuted_fingerprints
from tracelens.features.survival import REFERENCE, Survival, prompt_blocks
from tracelens.metrics.cpfr import fidelity
from tracelens.metrics.divergence import Divergence
from tracelens.metrics.moments import FeatureMoments
from tracelens.precision import QuantizationConfig, QuantizationType
from tracelens.stats import bootstrap_weights, percentile_interval

RANDOM_SETS = 2000


@dataclass(frozen=True)
class Names:
    """What the report calls things."""

    label: str
    reference: str
    quantized: str
    precision: str | None


@dataclass(frozen=True)
class ControlNames:
    """Names in the `Survival` of the models that are controls for one quantized model."""

    floor: str | None
    noise: list[str]
    permuted: list[str]


def build_report(
    survival: Survival,
    variant: str,
    question: Question,
    fingerprint: Fingerprint,
    names: Names,
    *,
    controls: ControlNames,
    settings: AuditSettings,
    provenance: dict[str, Any],
    source: EvidenceSource | None = None,
) -> AuditReport:
    """The report on one of the models that were measured.

    Args:
        variant: its name in `survival`.
        controls: names in `survival` of its controls.
        provenance: further settings to record.
        source: of the report's evidence; without it there is none.
    """
    moments = survival.moments[variant]
    total = moments.total()
    live = (total.n_ref[0] >= settings.min_active).cpu()
    kinds = _kinds(survival, fingerprint)
    sets = _sets(live, kinds, fingerprint)
    weights = bootstrap_weights(len(moments.n), settings.n_resamples, settings.seed)
    at = Thresholds(settings.survived_at, settings.damaged_at, settings.degradation_threshold)
    margins = {model: question.margins(answers) for model, answers in survival.answers.items()}
    blocks = prompt_blocks(question.texts, settings.n_blocks)

    def measure(model: str) -> Measured:
        return Measured.of(
            survival.moments[model],
            survival.divergence[model],
            (margins[REFERENCE], margins[model]),
            sets=sets,
            at=at,
            blocks=blocks,
            weights=weights,
        )

    ours = measure(variant)
    errors = RandomErrors.of(
        [measure(model) for model in controls.noise], [measure(model) for model in controls.permuted], settings.seed
    )
    population = _Population(total, _site_of_feature(survival), sets["safety"], sets[CAPABILITY], at)
    found: dict[str, Control] = {}
    for name, what, draws, further in (
        ("noise", NOISE, controls.noise, errors.noise),
        ("permuted", PERMUTED, controls.permuted, errors.permuted),
    ):
        if further is not None:
            found[name] = random_error(what, len(draws), further, n_smeared(survival, draws[0], settings))
    if controls.floor:
        found["bf16"] = floor_control(measure(controls.floor), n_smeared(survival, controls.floor, settings))
    found |= population.random_sets(settings.seed)
    found |= _permuted_labels(survival, question, fingerprint, live, population, settings)

    pairs = smeared_pairs(survival, variant, settings, pair_floors(settings) if source else None)
    own = {site: some.above(settings.smearing_tau, settings.smearing_delta) for site, some in pairs.items()}
    report = AuditReport(
        label=names.label,
        reference=names.reference,
        quantized=names.quantized,
        precision=names.precision,
        features=feature_table(
            moments, [survival.moments[model] for model in controls.noise], survival, kinds, live, settings, weights
        ),
        smeared_pairs=pair_table(total, survival, own, kinds),
        prompts=prompt_table(question, margins[REFERENCE], margins[variant]),
        cpfr={name: run.estimate for name, run in ours.cpfr.items()},
        flips=_flips(margins[REFERENCE], margins[variant], settings),
        divergence=_divergence(survival.divergence[variant], ours, weights),
        controls=found,
        verdict=_verdict(ours, errors, population.against_capability(ours, settings.seed), names),
        fingerprint=fingerprint,
        sites={str(site): size for site, size in survival.sites.items()},
        moments=total,
        settings=provenance,
        shares={name: shares_of(shares) for name, shares in ours.shares.items()},
        absent=_absent(found, sets, survival, settings),
    )
    if source is None:
        return report
    evidence = source.evidence(report, survival.firings[variant], pair_table(total, survival, pairs, kinds))
    return replace(report, evidence=evidence)


@dataclass(frozen=True)
class _Population:
    """The features of the quantized model, from which random sets are drawn."""

    total: FeatureMoments
    site: Int[Tensor, "feature"]
    safety: Bool[Tensor, "feature"]
    capability: Bool[Tensor, "feature"]
    at: Thresholds

    def matched(self, *, with_own: bool, seed: int) -> Int[Tensor, "member set"]:
        n_ref = self.total.n_ref[0].cpu()
        return matched_members(
            n_ref, self.site, self.safety, self.capability, with_own=with_own, n_sets=RANDOM_SETS, seed=seed
        )

    def control(self, what: str, sets: Any) -> Control:
        return set_control(what, fidelity(self.total)[0].cpu(), classes_of(self.total, self.at)[:, 0].cpu(), sets)

    def random_sets(self, seed: int) -> dict[str, Control]:
        sets = self.matched(with_own=False, seed=seed)
        if not sets.numel():
            return {}
        what = f"capability features of the same sites and firing rates, {sets.shape[1]} random sets"
        return {"random": self.control(what, sets)}

    def against_capability(self, ours: Measured, seed: int) -> Contrast:
        null = mean_of_members(fidelity(self.total)[0].cpu(), self.matched(with_own=True, seed=seed))
        safety, capability = ours.cpfr["safety"], ours.cpfr[CAPABILITY]
        return contrast(CAPABILITY, safety, capability, two_sided_rank(safety.value, null))


def _sets(live: Bool[Tensor, "feature"], kinds: Kinds, fingerprint: Fingerprint) -> dict[str, Bool[Tensor, "feature"]]:
    """The sets of features that are reported on: safety, capability, and each behaviour if there are several."""
    is_safety = torch.tensor([bool(kind) for kind in kinds])
    sets = {"safety": live & is_safety, CAPABILITY: live & ~is_safety}
    behaviours = list(fingerprint.by_behaviour)
    if len(behaviours) > 1:
        sets |= {name: live & torch.tensor([name in kind for kind in kinds]) for name in behaviours}
    return sets


def _kinds(survival: Survival, fingerprint: Fingerprint) -> Kinds:
    """Behaviours of every feature of every site, best first; empty for a capability feature."""
    found = {(row.site, row.feature): tuple(row.behaviours) for row in fingerprint.features}
    return [found.get((site, i), ()) for site, size in survival.sites.items() for i in range(size)]


def _site_of_feature(survival: Survival) -> Int[Tensor, "feature"]:
    sizes = torch.tensor(list(survival.sites.values()))
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def _permuted_labels(
    survival: Survival,
    question: Question,
    fingerprint: Fingerprint,
    live: Bool[Tensor, "feature"],
    population: _Population,
    settings: AuditSettings,
) -> dict[str, Control]:
    """The control of label-permuted fingerprints, if there is a fingerprint of these prompts to permute."""
    if not survival.maxima or not population.safety.any():
        return {}
    parts = dict(zip(survival.sites, live.split(list(survival.sites.values())), strict=True))
    starts = dict(zip(survival.sites, _starts(survival), strict=True))
    chosen = permuted_fingerprints(
        survival.maxima,
        question.labels,
        ids=question.texts,
        features=fingerprint.features,
        among=parts,
        split=fingerprint.settings["split"],
        seed=settings.seed,
    )
    sets = [torch.cat([members + starts[site] for site, members in found.items()]) for found in chosen]
    what = f"the features that the same selection puts first when the prompts' labels are shuffled, {len(sets)} times"
    return {"labels": population.control(what, sets)}


def _starts(survival: Survival) -> list[int]:
    """Where each site's features begin."""
    return [0, *torch.tensor(list(survival.sites.values())).cumsum(0).tolist()[:-1]]


def _absent(
    found: Mapping[str, Control], sets: Mapping[str, Tensor], survival: Survival, settings: AuditSettings
) -> dict[str, str]:
    """Why a control is not there."""
    reasons = {}
    none = not sets["safety"].any()
    for name, draws in (("noise", settings.noise_seeds), ("permuted", settings.permuted_seeds), ("bf16", 1)):
        if not settings.controls:
            reasons[name] = "controls were switched off"
        elif not draws:
            reasons[name] = "no draws of it were asked for"
        else:
            reasons[name] = "the reference already simulates a precision, so no other error can be put in its place"
    reasons["random"] = "no safety features" if none else "no capability features at the site of a safety feature"
    reasons["labels"] = (
        "no safety features"
        if none and survival.maxima
        else "the fingerprint was given, so there are no labelled prompts of which to shuffle the labels"
    )
    return {name: reason for name, reason in reasons.items() if name not in found}


def _verdict(ours: Measured, errors: RandomErrors, against_capability: Contrast, names: Names) -> Verdict:
    against: dict[str, Contrast] = {}
    many = {"n_comparisons": RANDOM_COMPARISONS}
    safety, n_noise, n_permuted = ours.cpfr["safety"], len(errors.noise_draws), len(errors.permuted_draws)
    if (noise := errors.noise) is not None:
        against["against_noise"] = contrast("noise", safety, noise.cpfr["safety"], **many)
        against["kl_against_noise"] = contrast("noise", ours.divergence["kl"], noise.divergence["kl"])
        if ours.flips and n_noise > 1:
            against["flips_against_noise"] = contrast("noise", ours.flips["flips"], noise.flips["flips"], **many)
    if errors.permuted is not None and max(n_noise, n_permuted) > 1:
        against["against_permuted"] = contrast("permuted error", safety, errors.permuted.cpfr["safety"], **many)
    unmatched = noise is not None and (noise.cpfr["safety"].value == 1 or not error_in_weights_alone(names.precision))
    return judge(
        against_capability,
        against.pop("against_noise", None),
        safety.estimate,
        names.label,
        noise_matches=not unmatched,
        **against,
    )


def error_in_weights_alone(precision: str | None) -> bool:
    """Whether the error that is compared with noise lies in the weights; True if it is not known.

    What quantized weights are computed in (`int4+bf16`) is passed over: next to the weights' error it is small. In bf16 and fp16
    themselves rounding of activations is the larger part, and noise in the weights has no counterpart of it.
    """
    if precision is None:
        return True
    config = QuantizationConfig.parse(precision)
    fp32 = QuantizationType.FP32
    if config.type in (QuantizationType.BF16, QuantizationType.FP16):
        return False
    return replace(config, compute=fp32) == replace(config.weights_only, compute=fp32)


def _flips(reference: Tensor, quantized: Tensor, settings: AuditSettings) -> Flips | None:
    readable = (~reference.isnan()).nonzero().squeeze(1)
    if not len(readable):
        return None
    return Flips.from_margins(
        reference[readable],
        quantized[readable],
        prompts=readable.tolist(),
        n_resamples=settings.n_resamples,
        seed=settings.seed,
    )


def _divergence(divergence: Divergence, ours: Measured, weights: Tensor) -> DivergenceSummary:
    read = Divergence.perplexity_reference
    reference = percentile_interval(
        read(divergence.total()).item(), read(divergence.resample(weights)).cpu(), n=ours.divergence["kl"].n_prompts
    )
    return DivergenceSummary(
        kl=ours.divergence["kl"].estimate,
        top1_agreement=ours.divergence["top1"].estimate,
        perplexity_reference=reference,
        perplexity_quantized=ours.divergence["perplexity"].estimate,
    )
