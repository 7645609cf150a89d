"""New pathways: features that fire in the quantized model only, ranked by what they do to its margin.

Attribution first, for all of them: activation × gradient of the margin along the decoder direction, summed over a prompt's
tokens (Syed et al., 2310.10348, with zero as the base point). Then the exact effect for those with the largest: the margin
less the margin of the same model from whose residual stream the feature is taken out. Random features of the same site that
fire as often, and are not new, go through the same: a new feature matters if it does more than they do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tracelens.auditing.assembly import CAPABILITY, Question
from tracelens.auditing.running import model_label
from tracelens.behaviour.refusal import AnswerTokens
from tracelens.chat import Chat
from tracelens.datasets import resolve_dataset
from tracelens.errors import PromptError, SAEError
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import SAEs, check_saes, normalise_saes
from tracelens.features.survival import measure_survival
from tracelens.metrics.drift import novelty
from tracelens.metrics.moments import FeatureMoments
from tracelens.metrics.pathways import NOVEL_AT, equally_active, novel_features
from tracelens.pair import PrecisionPair
from tracelens.precision import matched_noise
from tracelens.sites import Site
from tracelens.stats import benjamini_hochberg, bootstrap_weights, percentile_interval, sign_flip_test
from tracelens.studies.feature_effects import Attribution, Feature, MarginRuns
from tracelens.studies.storage import read_result, restored, table_to_dict, write_result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "tracelens_new_pathways"
COLUMNS = (
    *("kind", "site", "feature", "behaviour", "novelty", "n_quant", "n_prompts", "attribution"),
    *("effect", "low", "high", "p_value", "q_value", "effect_where_it_fires", "prompts_raised"),
)


@dataclass(frozen=True, eq=False)
class NewPathways:
    """Features that only the quantized model fires, and what they do.

    Attributes:
        label: the quantized model's precision or name.
        table: one row per new feature, those whose effect was measured first, largest first. site, feature, behaviour;
            novelty; n_quant (tokens on which it fires); n_prompts (prompts); attribution (nats, mean over all prompts);
            effect: margin less the margin without the feature, nats, mean over all prompts, with its bootstrap interval
            [low, high] over prompts, sign-flip p_value and q_value (Benjamini–Hochberg over the new features measured);
            the same mean over the prompts on which it fires; prompts_raised: on how many it raises the margin. NaN where
            only the attribution is known.
        control: the same for random features that are not new, of the same sites, that fire about as often.
        n_novel: new features in the quantized model.
        n_novel_noise: in the reference with matched noise; None if that was not measured.
        n_candidates: features that the quantized model fires on `min_active` tokens: what n_novel is a part of.
        novel_at, min_active: what makes a feature new.
        n_prompts: prompts with a readable margin.
    """

    label: str
    table: "pd.DataFrame"
    control: "pd.DataFrame"
    n_novel: int
    n_novel_noise: int | None
    n_candidates: int
    novel_at: float
    min_active: int
    n_prompts: int

    @property
    def above_control(self) -> float:
        """P(|effect| of a new feature > |effect| of a random one), ties counting half, over those measured; NaN if none."""
        new, other = (torch.tensor(t["effect"].dropna().abs().to_numpy(float)) for t in (self.table, self.control))
        if not len(new) or not len(other):
            return float("nan")
        difference = new[:, None] - other
        return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()

    def to_dataframe(self) -> "pd.DataFrame":
        """New features and controls in one table; `kind` tells them apart."""
        import pandas as pd

        return pd.concat([t for t in (self.table, self.control) if len(t)] or [self.table], ignore_index=True)

    def plot(self) -> "go.Figure":
        """Effects of the strongest new features with intervals, over the range of the controls' effects."""
        from tracelens.views.pathway_figures import pathways_figure

        return pathways_figure(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return vars(self) | {name: table_to_dict(getattr(self, name)) for name in ("table", "control")}

    def save(self, path: str | Path) -> Path:
        """Writes one JSON file, which `load` reads back."""
        return write_result(path, KIND, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "NewPathways":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        return cls(**restored(read_result(path, KIND), "table", "control"))


def new_pathways(
    reference: Any,
    quantized: Any,
    saes: Any,
    dataset: Any,
    *,
    baseline: Any = None,
    fingerprint: Fingerprint | None = None,
    answer_tokens: dict[str, AnswerTokens] | None = None,
    tokenizer: Any = None,
    novel_at: float = NOVEL_AT,
    min_active: int = 10,
    top: int = 20,
    noise: bool = True,
    n_resamples: int = 1000,
    n_permutations: int = 10_000,
    seed: int = 0,
    chat: Chat = "auto",
    batch_size: int = 32,
    progress: bool = False,
) -> NewPathways:
    """Finds the features that only the quantized model fires and ranks them by their effect on the margin there.

    Needs a pass of both models (and one of the noisy reference), one of the quantized model with gradients, and two times
    `top` over the prompts on which the features fire.

    Args:
        dataset, baseline, answer_tokens, chat: as for `Audit.trace_features`.
        fingerprint: says which behaviour a feature carries in the reference.
        novel_at, min_active: a feature is new if at least this share of its quantized firings, of which there are at least
            `min_active`, has no counterpart in the reference.
        top: new features whose exact effect is measured, by attribution; and as many controls.
        noise: whether the new features of the reference with matched noise are counted beside.

    Raises `PromptError` if no prompt's margin can be read, `SAEError` for SAEs that normalise their input, whose decoder
    directions are not those of the model; further as `PrecisionPair` and `check_saes`.
    """
    saes = normalise_saes(saes)
    check_saes(saes, reference)
    _check_directions(saes)
    pair = PrecisionPair(reference, quantized, tokenizer=tokenizer)
    question = Question.of(resolve_dataset(dataset, baseline=baseline), pair.tokenizer, chat, answer_tokens)
    others = {"quantized": lambda: quantized}
    if noise:
        others["noise"] = lambda: matched_noise(reference, quantized, seed=seed)
    survival = measure_survival(
        reference,
        others,
        saes,
        question.texts,
        readout=question.readout,
        tokenizer=pair.tokenizer,
        maxima=False,
        n_blocks=1,
        batch_size=batch_size,
        progress=progress,
    )
    moments = survival.moments["quantized"]
    novel = novel_features(moments, novel_at, min_active)
    sizes = torch.tensor(list(survival.sites.values()))
    site_of = torch.arange(len(sizes)).repeat_interleave(sizes)
    n_quant = moments.total().n_quant[0]
    chosen = novel.nonzero().squeeze(1)
    random = equally_active(chosen, (n_quant >= max(1, min_active)) & ~novel, n_quant, site_of, seed=seed)
    keys = [Feature(site, i) for site, size in survival.sites.items() for i in range(size)]
    behaviours = {(row.site, row.feature): row.behaviour for row in fingerprint.features} if fingerprint else {}

    runs = MarginRuns(quantized, saes, question, pair.tokenizer, batch_size=batch_size, progress=progress)
    if not runs.n_prompts:
        raise PromptError("no prompt's margin can be read: give answer_tokens={behaviour: AnswerTokens(...)}")
    attribution = runs.attribution([keys[k] for k in [*chosen.tolist(), *random.tolist()]])
    tested = _Tested(runs, moments.total(), keys, attribution, behaviours, n_resamples, n_permutations, seed)
    # As many controls as new features, in the same way: those with the largest attribution of theirs.
    tables = [tested.table(kind, features.tolist(), top) for kind, features in (("new", chosen), ("control", random))]
    return NewPathways(
        label=model_label(quantized),
        table=tables[0],
        control=tables[1],
        n_novel=len(chosen),
        n_novel_noise=int(novel_features(survival.moments["noise"], novel_at, min_active).sum()) if noise else None,
        n_candidates=int((n_quant >= max(1, min_active)).sum()),
        novel_at=novel_at,
        min_active=min_active,
        n_prompts=runs.n_prompts,
    )


def _check_directions(saes: SAEs) -> None:
    for site, sae in saes.items():
        how = getattr(getattr(sae, "cfg", None), "normalize_activations", "none")
        if how not in ("none", "expected_average_only_in", None):
            raise SAEError(
                f"the SAE at {site} normalises its input ({how}), so a feature's direction in the model differs from token "
                "to token; use SAEs without it"
            )


@dataclass(frozen=True)
class _Tested:
    """Features with their attributions, and how their exact effects are measured."""

    runs: MarginRuns
    moments: FeatureMoments
    keys: list[Feature]
    attribution: dict[Feature, Attribution]
    behaviours: dict[tuple[Site, int], str]
    n_resamples: int
    n_permutations: int
    seed: int

    def table(self, kind: str, features: list[int], top: int) -> "pd.DataFrame":
        """One row per feature (an index into the moments); the `top` by attribution with their exact effect, strongest first."""
        import pandas as pd

        strongest = sorted(features, key=lambda k: -abs(self.attribution[self.keys[k]].total))
        rows = [self._row(kind, k) | (self._effect(self.keys[k]) if i < top else {}) for i, k in enumerate(strongest)]
        table: Any = pd.DataFrame(rows, columns=pd.Index(COLUMNS))
        measured = table["p_value"].notna()
        if measured.any():
            p_values = torch.tensor(table.loc[measured, "p_value"].to_numpy(float))
            table.loc[measured, "q_value"] = benjamini_hochberg(p_values).numpy()
        # Rows come by attribution, and a stable sort leaves those without an effect so.
        order = table["effect"].astype(float).abs().sort_values(ascending=False, kind="stable", na_position="last")
        return table.loc[order.index].reset_index(drop=True)

    def _row(self, kind: str, k: int) -> dict[str, Any]:
        feature, one = self.keys[k], self.moments.select([k])
        attribution = self.attribution[feature]
        unknown = ("effect", "low", "high", "p_value", "q_value", "effect_where_it_fires", "prompts_raised")
        return {
            "kind": kind,
            "site": str(feature.site),
            "feature": feature.index,
            "behaviour": self.behaviours.get((feature.site, feature.index), CAPABILITY),
            "novelty": novelty(one)[0, 0].item(),
            "n_quant": int(one.n_quant[0, 0]),
            "n_prompts": attribution.n_prompts,
            "attribution": attribution.total / self.runs.n_prompts,
            **dict.fromkeys(unknown, float("nan")),
        }

    def _effect(self, feature: Feature) -> dict[str, float]:
        effect, n = self.runs.effect(feature), self.runs.n_prompts
        weights = bootstrap_weights(n, self.n_resamples, self.seed)
        estimate = percentile_interval(effect.mean().item(), weights @ effect / n, n=n)
        return {
            "effect": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            # Prompts on which it does not fire are zeros, and change nothing in a test of signs.
            "p_value": sign_flip_test(effect[effect != 0], self.n_permutations, self.seed),
            "effect_where_it_fires": effect.sum().item() / max(1, self.attribution[feature].n_prompts),
            "prompts_raised": float((effect > 0).sum()),
        }
