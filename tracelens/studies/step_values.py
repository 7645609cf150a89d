"""What each model of a decomposition measures, ready for paired differences."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tracelens.audit_settings import AuditSettings
from tracelens.auditing.measured import Measured
from tracelens.auditing.preservation import Thresholds
from tracelens.auditing.question import Question
from tracelens.auditing.replicates import Replicated
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.survival import REFERENCE, Survival, prompt_blocks
from tracelens.metrics.divergence import Divergence
from tracelens.stats import bootstrap_weights


class StepValues:
    """Every metric of every model, with replicates over the same resamples of prompts, and per prompt where there is such a number."""

    def __init__(
        self,
        survival: Survival,
        question: Question,
        fingerprint: Fingerprint,
        extra: list[str],
        settings: AuditSettings,
    ) -> None:
        self.survival, self.extra = survival, extra
        n_margins = len(question.answer_tokens)
        self.margins = {name: question.margins(a[:, :n_margins]) for name, a in survival.answers.items()}
        self.numbers = {name: a[:, n_margins:] for name, a in survival.answers.items()}
        self.safety = torch.tensor([label is not None for label in question.labels])
        self.blocks = prompt_blocks(question.texts, settings.n_blocks)
        first = survival.moments[next(iter(survival.moments))]
        self.weights = bootstrap_weights(len(first.n), settings.n_resamples, settings.seed)
        self.sets = _sets(survival, fingerprint, (first.total().n_ref[0] >= settings.min_active).cpu())
        self.at = Thresholds(settings.survived_at, settings.damaged_at, settings.degradation_threshold)

    def of(self, model: str) -> dict[str, Replicated]:
        """By metric; those that cannot be read are left out."""
        found = self._of_reference() if model == REFERENCE else self._of_model(model)
        per_prompt = self.per_prompt(model)
        return found | {name: self._mean(per_prompt[name]) for name in ("margin", *self.extra) if name in per_prompt}

    def per_prompt(self, model: str) -> dict[str, Float[Tensor, "prompt"]]:
        """Metrics that are means over prompts; NaN for a prompt that does not count."""
        margins, reference = self.margins[model], self.margins[REFERENCE]
        found = {name: self.numbers[model][:, i] for i, name in enumerate(self.extra)}
        if reference.isnan().all():
            return found
        flipped = ((margins > 0) != (reference > 0)).to(margins).where(~reference.isnan(), torch.nan)
        return found | {"margin": margins.where(self.safety, torch.nan), "flips": flipped}

    def _of_model(self, model: str) -> dict[str, Replicated]:
        measured = Measured.of(
            self.survival.moments[model],
            self.survival.divergence[model],
            (self.margins[REFERENCE], self.margins[model]),
            sets=self.sets,
            at=self.at,
            blocks=self.blocks,
            weights=self.weights,
        )
        found = {f"cpfr_{name}": measured.cpfr[name] for name in ("safety", "capability")}
        found["survived"] = measured.shares["all"]["survived"]
        found |= {name: measured.divergence[name] for name in ("kl", "perplexity")}
        return found | {name: rate for name, rate in measured.flips.items() if name == "flips"}

    def _of_reference(self) -> dict[str, Replicated]:
        """What a model that is the reference has: fidelities of 1 where there is a feature, no divergence and no flips."""
        other = next(iter(self.survival.moments))
        found = {
            name: Replicated(
                _same(run.value, name), torch.full_like(run.replicates, _same(run.value, name)), run.n_prompts
            )
            for name, run in self._of_model(other).items()
        }
        divergence = self.survival.divergence[other]
        total, resampled = divergence.total(), divergence.resample(self.weights)
        found["perplexity"] = Replicated(
            Divergence.perplexity_reference(total).item(),
            Divergence.perplexity_reference(resampled).cpu(),
            len(self.blocks),
        )
        return found

    def _mean(self, numbers: Float[Tensor, "prompt"]) -> Replicated:
        counts = ~numbers.isnan()
        sums = torch.zeros(2, self.weights.shape[1], dtype=torch.float64)
        sums.index_add_(1, self.blocks, torch.stack([numbers.double().nan_to_num() * counts, counts.double()]))
        total, n = (self.weights @ sums.T).T
        return Replicated((sums[0].sum() / sums[1].sum()).item(), total / n, int(counts.sum()))


def _same(value: float, metric: str) -> float:
    return float("nan") if value != value else 0.0 if metric in ("kl", "flips") else 1.0


def _sets(
    survival: Survival, fingerprint: Fingerprint, live: Bool[Tensor, "feature"]
) -> dict[str, Bool[Tensor, "feature"]]:
    safety = {(row.site, row.feature) for row in fingerprint.features}
    is_safety = torch.tensor([(site, i) in safety for site, size in survival.sites.items() for i in range(size)])
    return {"safety": live & is_safety, "capability": live & ~is_safety, "all": live}
