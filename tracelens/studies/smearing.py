"""Smearing between two models: pairs of features that merge, the groups they form, and leakage between classes.

Safety features are few and capability features many, and both smear: what is told is always the one beside the other, and
beside matched noise where that was asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tracelens.audit_report import AuditReport
from tracelens.auditing.assembly import CAPABILITY
from tracelens.auditing.running import model_label
from tracelens.chat import Chat
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import SAEs, check_saes, encode, normalise_saes
from tracelens.features.survival import prompt_blocks
from tracelens.metrics.leakage import ClassLeakage, Leakage
from tracelens.metrics.smearing import SmearedPair, SmearingAccumulator
from tracelens.metrics.smearing_groups import smeared_groups
from tracelens.metrics.support import JointSupport
from tracelens.pair import AlignedBatch, PrecisionPair, stream_aligned
from tracelens.precision import matched_noise
from tracelens.sites import Site
from tracelens.stats import Estimate, bootstrap_weights, percentile_interval, wilson
from tracelens.studies.storage import read_result, restored, table_to_dict, write_result
from tracelens.studies.texts import texts_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "tracelens_smearing"
CLASSES = ("safety", CAPABILITY)
GROUP_COLUMNS = (
    *("site", "members", "size", "n_pairs", "density", "mean_increase", "max_increase"),
    *("n_safety", "behaviours", "joins"),
)


@dataclass(frozen=True, eq=False)
class SmearingTrace:
    """What smears in a quantized model.

    Attributes:
        label: its precision or name.
        pairs: one row per smeared pair, largest rise first: site, feature_i, feature_j, behaviour_i, behaviour_j, cos_ref,
            cos_quant, increase.
        groups: one row per connected component of the pairs of a site, largest first: members, size, pairs, density (pairs
            over all possible ones), mean and largest rise, number of safety features, their behaviours, and what it joins:
            "safety", "capability" or "safety and capability".
        shares: one row per model ("quantized", "noise") and class: live features, those in at least one smeared pair, the
            share of them with its Wilson interval, and the share of all pairs within the class, and between the classes,
            that are smeared.
        leakage: one row per model, class in the reference and class in the quantized model: Σ r_i q_j off the diagonal, the
            reference's own Σ r_i r_j, and the ratio of the two with its bootstrap interval over prompts; 1 is no change.
        tau, delta, min_active: a pair is smeared if its cosine reaches tau and rose by delta, among features that fire on
            `min_active` tokens in both models.
        n_prompts: on which it was measured.
    """

    label: str
    pairs: "pd.DataFrame"
    groups: "pd.DataFrame"
    shares: "pd.DataFrame"
    leakage: "pd.DataFrame"
    tau: float
    delta: float
    min_active: int
    n_prompts: int

    def to_dataframe(self) -> "pd.DataFrame":
        """The table of groups."""
        return self.groups

    def plot(self) -> "go.Figure":
        """Sizes of the groups by what they join, the share of smeared features, and leakage between the classes."""
        from tracelens.views.smearing_figures import smearing_figure

        return smearing_figure(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return vars(self) | {name: table_to_dict(getattr(self, name)) for name in _TABLES}

    def save(self, path: str | Path) -> Path:
        """Writes one JSON file, which `load` reads back."""
        return write_result(path, KIND, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "SmearingTrace":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        return cls(**restored(read_result(path, KIND), *_TABLES))


_TABLES = ("pairs", "groups", "shares", "leakage")


def groups_of(report: AuditReport) -> "pd.DataFrame":
    """The groups of an audit's smeared pairs; columns as in `SmearingTrace.groups`."""
    return _group_table(report.smeared_pairs)


def trace_smearing(
    reference: Any,
    quantized: Any,
    saes: Any,
    dataset: Any,
    *,
    fingerprint: Fingerprint,
    baseline: Any = None,
    tokenizer: Any = None,
    tau: float = 0.5,
    delta: float = 0.2,
    min_active: int = 10,
    noise: bool = True,
    n_resamples: int = 1000,
    seed: int = 0,
    chat: Chat = "auto",
    batch_size: int = 32,
    progress: bool = False,
) -> SmearingTrace:
    """Pairs, groups and leakage in one pass of both models over the prompts, and of a third with `noise`.

    Args:
        dataset, baseline, chat: as for `Audit.trace_features`.
        fingerprint: which features are safety features.
        noise: whether the reference with matched noise is measured beside the quantized model.

    Raises `SAEError` if the fingerprint was made with other SAEs; further as `PrecisionPair`, `check_saes` and
    `resolve_dataset`.
    """
    saes = normalise_saes(saes)
    check_saes(saes, reference)
    fingerprint.check(saes)
    pair = PrecisionPair(reference, quantized, tokenizer=tokenizer)
    texts = texts_of(dataset, baseline, pair.tokenizer, chat)
    models = {"reference": reference, "quantized": quantized}
    if noise:
        models["noise"] = matched_noise(reference, quantized, seed=seed)
    masks = {site: fingerprint.mask(site, sae.W_dec.shape[0]) for site, sae in saes.items()}
    sums = _Sums.of(masks, list(models)[1:], prompt_blocks(texts))
    stream = {"tokenizer": pair.tokenizer, "batch_size": batch_size, "progress": progress}
    for batch in stream_aligned(models, texts, sites=list(saes), logits=False, **stream):
        sums.take(batch, saes)
    found = {
        model: {site: seen.finalize(tau, delta, min_active).pairs for site, seen in by_site.items()}
        for model, by_site in sums.smearing.items()
    }
    behaviours = {(row.site, row.feature): row.behaviour for row in fingerprint.features}
    pairs = _pair_table(found["quantized"], behaviours)
    return SmearingTrace(
        label=model_label(quantized),
        pairs=pairs,
        groups=_group_table(pairs),
        shares=_share_table(found, masks, sums.live(min_active)),
        leakage=_leakage_table(sums.leakage, bootstrap_weights(sums.n_blocks, n_resamples, seed), len(texts)),
        tau=tau,
        delta=delta,
        min_active=min_active,
        n_prompts=len(texts),
    )


@dataclass(frozen=True)
class _Sums:
    """Accumulators of each model that is compared with the reference, by site."""

    smearing: dict[str, dict[Site, SmearingAccumulator]]
    leakage: dict[str, dict[Site, ClassLeakage]]
    fired: dict[str, dict[Site, Tensor]]
    """Tokens on which each feature fires, the reference included."""
    blocks: Int[Tensor, "prompt"]

    @classmethod
    def of(cls, masks: Mapping[Site, Tensor], models: Sequence[str], blocks: Tensor) -> "_Sums":
        n_blocks = int(blocks.max()) + 1
        classes = {site: torch.stack([mask, ~mask]) for site, mask in masks.items()}
        return cls(
            {m: {site: SmearingAccumulator(len(mask)) for site, mask in masks.items()} for m in models},
            {m: {site: ClassLeakage(both, n_blocks) for site, both in classes.items()} for m in models},
            {m: {site: torch.zeros(len(mask)) for site, mask in masks.items()} for m in ("reference", *models)},
            blocks,
        )

    @property
    def n_blocks(self) -> int:
        return int(self.blocks.max()) + 1

    def take(self, batch: AlignedBatch, saes: SAEs) -> None:
        block = self.blocks[batch.prompt.cpu()]
        for site, sae in saes.items():
            features = {name: encode(sae, batch.activations[name][site]) for name in self.fired}
            for name, f in features.items():
                self.fired[name][site] += (f > 0).sum(0).cpu()
            reference = features["reference"]
            for name in self.smearing:
                support = JointSupport.of(reference, features[name])
                self.smearing[name][site].add(support)
                self.leakage[name][site].add(support, block)

    def live(self, min_active: int) -> dict[str, dict[Site, Tensor]]:
        """Features that fire on `min_active` tokens in the reference and in each model."""
        least = max(1, min_active)
        ours = self.fired["reference"]
        return {m: {s: (ours[s] >= least) & (self.fired[m][s] >= least) for s in ours} for m in self.smearing}


def _pair_table(
    found: Mapping[Site, Sequence[SmearedPair]], behaviours: Mapping[tuple[Site, int], str]
) -> "pd.DataFrame":
    import pandas as pd

    rows = [
        (str(site), p.i, p.j, *(behaviours.get((site, k), CAPABILITY) for k in (p.i, p.j)), p.cos_ref, p.cos_quant, p.increase)
        for site, pairs in found.items()
        for p in pairs
    ]  # fmt: skip
    columns = ["site", "feature_i", "feature_j", "behaviour_i", "behaviour_j", "cos_ref", "cos_quant", "increase"]
    table = pd.DataFrame(rows, columns=pd.Index(columns))
    return table.sort_values("increase", ascending=False, kind="stable").reset_index(drop=True)


def _group_table(pairs: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    rows = []
    for site, part in pairs.groupby("site", sort=True):
        kinds = dict(zip(part["feature_i"], part["behaviour_i"], strict=True))
        kinds |= dict(zip(part["feature_j"], part["behaviour_j"], strict=True))
        columns = zip(*(part[name] for name in ("feature_i", "feature_j", "cos_ref", "cos_quant")), strict=True)
        for group in smeared_groups(SmearedPair(int(i), int(j), float(r), float(q)) for i, j, r, q in columns):
            carried = [kinds[i] for i in group.members if kinds[i] != CAPABILITY]
            mixed = ["safety"] * bool(carried) + [CAPABILITY] * (len(carried) < group.size)
            numbers = (group.size, group.n_pairs, group.density, group.mean_increase, group.max_increase)
            named = ", ".join(sorted(set(carried)))
            rows.append((site, list(group.members), *numbers, len(carried), named, " and ".join(mixed)))
    table = pd.DataFrame(rows, columns=pd.Index(GROUP_COLUMNS))
    return table.sort_values(["size", "mean_increase"], ascending=False, kind="stable").reset_index(drop=True)


def _share_table(
    found: Mapping[str, Mapping[Site, Sequence[SmearedPair]]],
    masks: Mapping[Site, Bool[Tensor, "_feature"]],
    live: Mapping[str, Mapping[Site, Bool[Tensor, "_feature"]]],
) -> "pd.DataFrame":
    import pandas as pd

    rows = []
    for model, by_site in found.items():
        touched = {site: {k for p in pairs for k in (p.i, p.j)} for site, pairs in by_site.items()}
        counts = {
            site: (int((live[model][site] & mask).sum()), int((live[model][site] & ~mask).sum()))
            for site, mask in masks.items()
        }
        # Pairs that are smeared over pairs that there are, of one site, by the classes of the two.
        rates = {}
        for a, b in combinations_with_replacement((0, 1), 2):
            possible = sum(n[a] * (n[a] - 1) // 2 if a == b else n[a] * n[b] for n in counts.values())
            smeared = sum(
                sorted((int(not masks[site][p.i]), int(not masks[site][p.j]))) == [a, b]
                for site, pairs in by_site.items()
                for p in pairs
            )
            rates[a, b] = smeared / possible if possible else float("nan")
        for k, name in enumerate(CLASSES):
            hit = sum(bool(masks[site][i]) == (k == 0) for site, members in touched.items() for i in members)
            n = sum(count[k] for count in counts.values())
            share = wilson(hit, n)
            rows.append((model, name, n, hit, share.value, share.low, share.high, rates[k, k], rates[0, 1]))
    columns = ["model", "class", "n", "n_smeared", "share", "low", "high", "pairs_within", "pairs_between"]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def _leakage_table(
    leakage: Mapping[str, Mapping[Site, ClassLeakage]], weights: Tensor, n_prompts: int
) -> "pd.DataFrame":
    import pandas as pd

    rows = []
    for model, by_site in leakage.items():
        parts = [accumulator.finalize() for accumulator in by_site.values()]
        total = Leakage(sum(p.cross for p in parts), sum(p.reference for p in parts))  # pyright: ignore[reportArgumentType]
        ratio, resampled = total.ratio()[0], total.ratio(weights)
        for a, first in enumerate(CLASSES):
            for b, second in enumerate(CLASSES):
                estimate: Estimate = percentile_interval(ratio[a, b].item(), resampled[:, a, b], n=n_prompts)
                sums = (total.cross[:, a, b].sum().item(), total.reference[:, a, b].sum().item())
                rows.append((model, first, second, *sums, estimate.value, estimate.low, estimate.high))
    columns = ["model", "class_reference", "class_quantized", "leakage", "reference", "ratio", "low", "high"]
    return pd.DataFrame(rows, columns=pd.Index(columns))
