"""Running audits: which models are measured for a quantized one, and in which order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tracelens import __version__
from tracelens.audit_report import AuditReport
from tracelens.audit_settings import AuditSettings
from tracelens.auditing.assembly import ControlNames, Names, Question, build_report
from tracelens.auditing.evidence_collecting import EvidenceSource
from tracelens.auditing.hashes import WeightHasher, versions
from tracelens.errors import NonFiniteError, SAEError
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import SAEs, provenance_of, sae_hash
from tracelens.features.selection import check_prompts
from tracelens.features.survival import ReferencePass, Survival
from tracelens.precision import QuantizationConfig, QuantizationType, apply_precision, matched_noise, permuted_error

FLOOR, VARIANT = "bf16", "quantized"
"""Names of models in a `Survival`."""


@dataclass(frozen=True)
class Variant:
    """A model to be compared with the reference: how to make it, and what to call it."""

    make: Callable[[], Any]
    label: str
    name: str
    precision: QuantizationConfig | None
    stored_as: str | None = None
    """How its checkpoint stores it, such as `gptq`; None for a model that came as an object."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What else its report's settings shall hold."""


def run_audits(
    reference: Any, variants: Sequence[Variant], saes: SAEs, question: Question, **options: Any
) -> list[AuditReport]:
    """A report for each variant: all of `audits_in_turn`."""
    return list(audits_in_turn(reference, variants, saes, question, **options))


def audits_in_turn(
    reference: Any,
    variants: Sequence[Variant],
    saes: SAEs,
    question: Question,
    *,
    tokenizer: Any,
    fingerprint: Fingerprint | str | Path | None,
    settings: AuditSettings,
    shared: dict[str, str],
    folder: Path | None = None,
) -> Iterator[AuditReport]:
    """A report for each variant, as soon as it is there. The reference runs once for all of them and their controls.

    `folder`: where on disk goes what is kept beyond `settings.memory`; by default where the system puts temporary files.

    Raises `SAEError` if there are no SAEs, or if the fingerprint was made with others; `PromptError` for too few prompts to make one.
    """
    if not saes:
        raise SAEError(
            "no SAEs to look through; call load_sae(folder) first (load_sae('organism') for the embedded model)"
        )
    if isinstance(fingerprint, str | Path):
        fingerprint = Fingerprint.load(fingerprint)
    if fingerprint is None:
        check_prompts(question.labels, question.texts)  # before the models run
    else:
        fingerprint.check(saes)
    # Nothing can be put into a reference that rounds already: its weights would no longer be the ones it computes with.
    with_controls = settings.controls and can_simulate(reference)
    source = EvidenceSource.of(reference, saes, question, tokenizer, settings)
    run = ReferencePass(
        reference,
        saes,
        question.texts,
        readout=question.readout,
        tokenizer=tokenizer,
        maxima=fingerprint is None,
        keep=with_controls or len(variants) > 1,
        n_blocks=settings.n_blocks,
        memory=settings.memory,
        folder=folder,
        batch_size=settings.batch_size,
        padding_side=settings.padding_side,
        sample=source and source.sample,
        progress=settings.progress,
    )
    floor = {FLOOR: partial(apply_precision, reference, QuantizationType.BF16)} if with_controls else {}
    # The floor is the same for all variants.
    measured_floor = run.measure(floor, smearing_of=floor) if floor else None
    hasher = WeightHasher(reference)
    provenance = {
        "tracelens": __version__,
        "torch": torch.__version__,
        "dataset": question.dataset,
        "n_prompts": len(question.texts),
        **asdict(settings),
        "reference_stored_as": getattr(reference, "stored_as", None),
        "shared": shared,
        "saes": provenance_of(saes),
        "versions": versions(),
    }
    for variant in variants:
        survival, controls, quantized_hash = _measure(run, variant, settings, with_controls, hasher)
        if measured_floor is not None:
            survival.include(measured_floor)
        if fingerprint is None:
            fingerprint = Fingerprint.from_maxima(
                survival.maxima,
                question.labels,
                ids=question.texts,
                model=model_name(reference),
                saes=saes,
                min_auroc=settings.min_auroc,
                alpha=settings.alpha,
                seed=settings.seed,
            )
        hashes = {
            "reference": hasher(reference),
            "quantized": quantized_hash,
            "saes": {str(site): fingerprint.saes.get(site) or sae_hash(sae) for site, sae in saes.items()},
        }
        yield build_report(
            survival,
            VARIANT,
            question,
            fingerprint,
            Names(variant.label, model_name(reference), variant.name, variant.precision and str(variant.precision)),
            controls=controls,
            settings=settings,
            provenance={
                **provenance,
                "hashes": hashes,
                "quantized_stored_as": variant.stored_as,
                **variant.record,
            },
            source=source,
        )


def _measure(
    run: ReferencePass, variant: Variant, settings: AuditSettings, with_controls: bool, hasher: WeightHasher
) -> tuple[Survival, ControlNames, str]:
    """The variant and the controls that are made of it, which is held until they are; and the hash of its weights."""
    quantized = variant.make()
    noise, permuted = (
        {
            f"{what} {seed}": partial(control, run.reference, quantized, seed=seed)
            for seed in range(settings.seed, settings.seed + n * with_controls)
        }
        for what, control, n in (
            ("noise", matched_noise, settings.noise_seeds),
            ("permuted", permuted_error, settings.permuted_seeds),
        )
    )
    survival = run.measure(
        {VARIANT: lambda: quantized, **noise, **permuted},
        smearing_of=[VARIANT, *list(noise)[:1], *list(permuted)[:1]],
        firings_of=[VARIANT] if run.sample else [],
    )
    names = ControlNames(FLOOR if with_controls else None, list(noise), list(permuted))
    return survival, names, hasher(quantized)


def check_finite(model: Any, role: str) -> None:
    """Raises `NonFiniteError` naming a parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(
                f"the {role}'s {name} holds NaN or infinity; load or quantize it again, in a wider dtype if it overflowed"
            )


def can_simulate(model: Any) -> bool:
    """Whether a precision can be simulated on the model: not on one that carries a simulated precision already."""
    return getattr(model, "precision", None) in (None, QuantizationConfig(QuantizationType.FP32))


def model_name(model: Any) -> str:
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def model_label(model: Any) -> str:
    """How findings call a quantized model: by its simulated precision, or as "the quantized model"."""
    precision = getattr(model, "precision", None)
    return precision.label if precision else "the quantized model"
