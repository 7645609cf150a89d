"""`OptimizationAuditor`: many precisions against one reference, which runs once for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tracelens.audit_settings import AuditSettings
from tracelens.auditing.question import Question
from tracelens.auditing.running import Variant, audits_in_turn, can_simulate, check_finite, model_name
from tracelens.auditing.sweep_pieces import PIECE, Pieces, files_of, piece_key, state_of, sweep_key
from tracelens.behaviour.refusal import AnswerTokens
from tracelens.datasets import Dataset, get_dataset, list_datasets, resolve_dataset
from tracelens.datasets.vocabulary import unknown_fraction
from tracelens.errors import OutputError, PrecisionSpecError, PromptError
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import check_saes, normalise_saes
from tracelens.loading import Checkpoint, load, open_checkpoint
from tracelens.pair import PrecisionPair
from tracelens.precision import QuantizationConfig, QuantizationType, apply_precision, weight_matrices
from tracelens.sweep_result import SweepResult


@dataclass(frozen=True)
class _Entry:
    """Something to audit in a sweep."""

    name: str
    variant: Variant
    identity: Any
    """What tells it from others; JSON."""


class OptimizationAuditor:
    """Audits what many precisions would do to one model.

    Args:
        model: the reference, a hooked model.
        sae_dict: its SAEs by site, hook name or layer, or a single SAE.
        tokenizer: in place of the model's own.

    Raises `SAEError` if an SAE does not fit the model, `PrecisionSpecError` if the model already carries a simulated precision,
    `NonFiniteError` for NaN or infinity in its weights.
    """

    def __init__(self, model: Any, sae_dict: Any, tokenizer: Any = None) -> None:
        if not can_simulate(model):
            raise PrecisionSpecError(
                f"the model already computes in {model.precision.label}; sweep over the model that was loaded without precision"
            )
        check_finite(model, "model")
        self.model = model
        self.saes = normalise_saes(sae_dict)
        check_saes(self.saes, model)
        self.tokenizer = model.tokenizer if tokenizer is None else tokenizer

    def run_sweep(
        self,
        test_prompts: Any,
        configs: Sequence[str | QuantizationConfig | QuantizationType] = (),
        *,
        builds: Mapping[str, Any] | None = None,
        baseline_prompts: Any = None,
        fingerprint: Fingerprint | str | Path | None = None,
        calibration: Sequence[Any] | None = None,
        answer_tokens: Mapping[str, AnswerTokens] | None = None,
        out: str | Path | None = None,
        resume: bool = True,
        settings: AuditSettings | None = None,
        **changes: Any,
    ) -> SweepResult:
        """An audit for each precision and build. The reference runs once over the prompts, whatever their number: N of them cost N + 1
        passes, controls a pass each, and evidence the margin's gradient on at most 64 prompts. Beyond `settings.memory` a further model
        costs an unembedding too. They run one after the other.

        Args:
            test_prompts: a registered data set's name, a file, a `Dataset`, a list of prompts or a mapping behaviour → prompts.
            configs: precisions to simulate, as configs or specifications ("int4-g32").
            builds: name → a quantized build of the same model: what `load` takes, such as a folder, or a hooked model.
            baseline_prompts: prompts that call for none of the behaviours. Without them, and if `test_prompts` brings none, those of the
                built-in set that shares most behaviours and whose words the tokenizer knows.
            calibration: prompts on which static scales of activations are found.
            out: a folder that each report is written to as soon as it is there; `SweepResult.load` reads it.
            resume: use the reports that lie in `out`, if they were made with the same model, SAEs, prompts, settings and version.
            fingerprint, answer_tokens, settings, changes: as for `Audit.trace_features`.

        Raises `PrecisionSpecError` for no or unknown precisions or one given twice, `PromptError` for prompts that cannot be run,
        `CheckpointError` for a build that cannot be opened, `PairMismatchError` for one of another model, `OutputError` if `out` holds
        something that is not a sweep.
        """
        entries = self._entries(configs, builds or {}, calibration)
        settings = replace(settings or AuditSettings(), **changes)
        dataset = self._dataset(test_prompts, baseline_prompts)
        question = Question.of(dataset, self.tokenizer, settings.chat, answer_tokens)
        if isinstance(fingerprint, str | Path):
            fingerprint = Fingerprint.load(fingerprint)
        pieces = None
        if out is not None:
            common = sweep_key(
                self.model,
                self.saes,
                question,
                tokenizer=self.tokenizer,
                fingerprint=fingerprint,
                calibration=calibration,
                settings=settings,
            )
            keys = {entry.name: piece_key(common, entry.identity) for entry in entries}
            pieces = Pieces(out, keys, resume=resume)
            pieces.begin()
            entries = [
                _with_record(entry, PIECE, keys[entry.name]) for entry in entries if entry.name in pieces.missing
            ]
        reports = audits_in_turn(
            self.model,
            [entry.variant for entry in entries],
            self.saes,
            question,
            tokenizer=self.tokenizer,
            fingerprint=fingerprint,
            settings=settings,
            shared=PrecisionPair(self.model, self.model, tokenizer=self.tokenizer).settings,
            folder=None if out is None else Path(out),
        )
        if pieces is None:
            return SweepResult({entry.name: report for entry, report in zip(entries, reports, strict=True)})
        for entry in entries:
            pieces.add(entry.name, next(reports))
        pieces.finish()
        return SweepResult({name: pieces.done[name] for name in pieces.keys})

    def _entries(
        self,
        configs: Sequence[str | QuantizationConfig | QuantizationType],
        builds: Mapping[str, Any],
        calibration: Sequence[Any] | None,
    ) -> list[_Entry]:
        parsed = [QuantizationConfig.parse(config) for config in configs]
        if len(parsed) + len(builds) == 0 or len(set(parsed)) < len(parsed):
            names = ", ".join(map(str, parsed)) or "none"
            raise PrecisionSpecError(f"a sweep needs at least one precision, each once; got: {names}")
        entries = [
            *(self._simulated(config, calibration) for config in parsed),
            *(self._built(name, source) for name, source in builds.items()),
        ]
        n = _n_linear_weights(self.model)
        return [_with_record(entry, "linear_weights", n) for entry in entries]

    def _simulated(self, config: QuantizationConfig, calibration: Sequence[Any] | None) -> _Entry:
        make = partial(apply_precision, self.model, config, calibration=calibration)
        variant = Variant(make, config.label, model_name(self.model), config)
        return _with_record(_Entry(str(config), variant, str(config)), "bits_per_weight", config.bits_per_weight)

    def _built(self, name: str, source: Any) -> _Entry:
        _check_name(name)
        if not isinstance(source, str | Path | Checkpoint):
            model = self._checked(source, name)
            simulated = getattr(model, "precision", None)
            variant = Variant(lambda: model, name, model_name(model), simulated, getattr(model, "stored_as", None))
            bits = simulated and simulated.bits_per_weight
            return _with_record(_Entry(name, variant, [name, state_of(model)]), "bits_per_weight", bits)
        checkpoint = open_checkpoint(source)  # what cannot be opened is found before anything runs
        bits = checkpoint.describe().bits_per_weight or None

        def make() -> Any:
            cfg = self.model.cfg
            return self._checked(load(checkpoint, dtype=cfg.dtype, device=cfg.device, share=self.model), name)

        variant = Variant(make, name, checkpoint.name, None, checkpoint.format)
        identity = [name, checkpoint.name, str(checkpoint.round_to), files_of(checkpoint.path)]
        return _with_record(_Entry(name, variant, identity), "bits_per_weight", bits)

    def _checked(self, model: Any, name: str) -> Any:
        """The model of a build; raises `PairMismatchError`, `NonFiniteError`."""
        model = load(model)
        check_finite(model, name)
        PrecisionPair(self.model, model, tokenizer=self.tokenizer)
        return model

    def _dataset(self, prompts: Any, baseline: Any) -> Dataset:
        if baseline is None and isinstance(prompts, list | tuple | Mapping) and "baseline" not in prompts:
            behaviours = set(prompts) if isinstance(prompts, Mapping) else {"refusal"}
            baseline = fitting_baseline(behaviours, self.tokenizer)
        return resolve_dataset(prompts, baseline=baseline)


def fitting_baseline(behaviours: set[str], tokenizer: Any, max_unknown: float = 0.05) -> list[str]:
    """Baseline prompts of the built-in set that is closest in behaviours and whose words the tokenizer knows.

    Raises `PromptError` if no built-in set fits.
    """
    fits = []
    for name in list_datasets():
        candidate = get_dataset(name)
        if tokenizer is not None and unknown_fraction(candidate.prompts, tokenizer) <= max_unknown:
            fits.append((len(behaviours ^ set(candidate.behaviours)), name, candidate))
    if not fits:
        raise PromptError("no built-in baseline prompts fit this model's vocabulary; pass baseline_prompts=[...]")
    return min(fits)[-1].baseline_prompts


def _with_record(entry: _Entry, name: str, value: Any) -> _Entry:
    return replace(entry, variant=replace(entry.variant, record={**entry.variant.record, name: value}))


def _n_linear_weights(model: Any) -> int | None:
    """Weights of the linear layers inside the blocks, which is what formats store in few bits; None where these cannot be told."""
    try:
        return sum(weight.parameter.numel() for weight in weight_matrices(model))
    except PrecisionSpecError:
        return None


def _check_name(name: str) -> None:
    """Raises `PrecisionSpecError` for a name that says a precision, `OutputError` for one that cannot be a folder's."""
    try:
        QuantizationConfig.parse(name)
    except PrecisionSpecError:
        pass
    else:
        raise PrecisionSpecError(f"the build {name!r} is called like a precision to simulate; give it another name")
    if not name or name != Path(name).name or name.startswith(".") or set(name) & set('\\/:*?"<>|'):
        raise OutputError(
            f"the build's name {name!r} cannot be a folder's name; use letters, digits, spaces and hyphens"
        )
