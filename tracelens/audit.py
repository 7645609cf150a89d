"""`Audit`: one quantized model against its reference, from feature to verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tracelens.audit_report import AuditReport
from tracelens.audit_settings import AuditSettings
from tracelens.auditing.question import Question
from tracelens.auditing.running import Variant, check_finite, model_label, model_name, run_audits
from tracelens.behaviour.refusal import AnswerTokens
from tracelens.datasets import resolve_dataset
from tracelens.errors import TracelensError
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import SAEs, check_saes, load_saes, normalise_saes
from tracelens.loading import load
from tracelens.pair import PrecisionPair
from tracelens.precision import QuantizationConfig, QuantizationType, apply_precision

if TYPE_CHECKING:
    from tracelens.views.widgets.prompt import PromptExplorer


class Audit:
    """Compares a quantized model with its reference.

    Args:
        base_model: the reference: whatever `load` takes, such as a folder, the id of a model on the hub, or a hooked
            model.
        quant_model: the quantized model, likewise; a quantized checkpoint is dequantized exactly. Without it,
            `precision` is simulated on the reference.
        precision: a precision to simulate, such as "int4-g32"; on `quant_model` if there is one.
        tokenizer: in place of the models' own.
        calibration: prompts on which static scales of activations ("int8+a8-static") are found.
        dtype, device: what both models are loaded with.

    Raises:
        PairMismatchError: the two models differ in something they must share.
        NonFiniteError: a weight is NaN or infinite.
        TracelensError: neither a quantized model nor a precision is given, or a model cannot be loaded.
    """

    def __init__(
        self,
        base_model: Any,
        quant_model: Any = None,
        precision: str | QuantizationConfig | QuantizationType | None = None,
        *,
        tokenizer: Any = None,
        calibration: Sequence[Any] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> None:
        if quant_model is None and precision is None:
            raise TracelensError(
                "nothing to compare the reference with: give quant_model=..., or precision='int8' to simulate one"
            )
        self.precision = None if precision is None else QuantizationConfig.parse(precision)
        self.reference = load(base_model, dtype=dtype, device=device)
        same = quant_model is None or quant_model is base_model or (
            isinstance(quant_model, str | Path) and str(quant_model) == str(base_model)
        )  # fmt: skip
        quantized = self.reference if same else load(quant_model, dtype=dtype, device=device, share=self.reference)
        check_finite(self.reference, "reference")
        check_finite(quantized, "quantized model")
        if self.precision is not None:
            quantized = apply_precision(quantized, self.precision, calibration=calibration)
        self.pair = PrecisionPair(self.reference, quantized, tokenizer=tokenizer)
        self.quantized = quantized
        self.saes: SAEs = {}

    def load_sae(self, source: Any) -> "Audit":
        """Takes the SAEs that `load_saes` reads (a folder, a release, a list of them), or a dict of SAEs; returns the audit itself.

        Raises `SAEError` for SAEs that cannot be read or do not fit the model.
        """
        saes = (
            load_saes(source, device=self.reference.cfg.device)
            if isinstance(source, str | Path | tuple | list)
            else normalise_saes(source)
        )
        check_saes(saes, self.reference)
        self.saes = saes
        return self

    def trace_features(
        self,
        dataset: Any,
        *,
        baseline: Any = None,
        fingerprint: Fingerprint | str | Path | None = None,
        answer_tokens: Mapping[str, AnswerTokens] | None = None,
        settings: AuditSettings | None = None,
        **changes: Any,
    ) -> AuditReport:
        """Runs both models and the controls over the data set, and reports what happened to every feature.

        Args:
            dataset: a registered name, a file, a `Dataset`, a list of prompts or a mapping behaviour → prompts.
            baseline: where baseline prompts come from if not from `dataset`. None are needed with a `fingerprint`.
            fingerprint: which features are safety features, or the file that `Fingerprint.save` wrote, such as that of another build of the
                same reference; by default it is made from the reference's activations on the same prompts.
            answer_tokens: behaviour → first tokens of answers, in place of those that the tokenizer's vocabulary suggests.
            settings, changes: an `AuditSettings`, and single fields of it by name: `trace_features(ds, min_active=50)`.

        Raises `PromptError` for prompts that the model cannot take, `SAEError` if no SAEs are loaded or the fingerprint is of others.
        """
        settings = replace(settings or AuditSettings(), **changes)
        # Baseline prompts are there to find safety features; where these are known already, safety prompts will do.
        prompts = resolve_dataset(dataset, baseline=baseline, need_baseline=fingerprint is None)
        question = Question.of(prompts, self.pair.tokenizer, settings.chat, answer_tokens)
        variant = Variant(
            make=lambda: self.quantized,
            label=model_label(self.quantized),
            name=model_name(self.quantized),
            precision=getattr(self.quantized, "precision", None),
            stored_as=getattr(self.quantized, "stored_as", None),
        )
        (report,) = run_audits(
            self.reference,
            [variant],
            self.saes,
            question,
            tokenizer=self.pair.tokenizer,
            fingerprint=fingerprint,
            settings=settings,
            shared=self.pair.settings,
        )
        return report

    def explore(self) -> "PromptExplorer":
        """A widget to try prompts in: both models' answers, margins, features and attention, side by side. It runs the models."""
        from tracelens.views.widgets.prompt import PromptExplorer

        return PromptExplorer(self)
