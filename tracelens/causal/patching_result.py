"""`PatchingResult`: what each replacement did to each prompt, and to all of them."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from tracelens.causal.effects import MIN_DIFFERENCE, Effects, differing, effects, per_prompt, versus
from tracelens.causal.places import Arm
from tracelens.errors import MetricInputError, ResultFileError
from tracelens.output import encode, reading
from tracelens.stats import Estimate, benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.views.widgets.patching import PatchingExplorer

KIND = "tracelens_patching"
VERSION = 1
TENSORS = ("patched", "start", "goal", "placebo", "present")
Row = dict[str, Any]
"""What a row of the table says of its arm: site, layer, position, head, ..."""


@dataclass(frozen=True, eq=False)
class PatchingResult:
    """Metrics of patched runs, prompt by prompt.

    A large effect of putting clean (reference) activations in says that they are enough there; it does not say that the
    behaviour needs them: that is what noising (damage) asks, and the two need not agree (Heimersheim & Nanda, 2024, arXiv
    2404.15255). No effect does not say that a place is unused: later layers may make up for it (McGrath et al., 2023, arXiv
    2307.15771).

    Attributes:
        direction: "denoising", "noising", "repair" or "damage".
        metric: its name.
        unit: its unit.
        rows: what each arm replaced, one dictionary an arm with the same keys: "layer" and "site" of its place (the last
            one, if cumulative), and further axes of the sweep ("position", "group", "head", "neuron", "feature", ...).
        axes: the keys of `rows` that vary over the sweep, outermost first.
        patched: the metric with each arm.
        start: the metric of the run that is patched: corrupted (denoising), clean (noising), quantized (repair), reference
            (damage).
        goal: the metric of the run whose activations are put in.
        placebo: the metric with random activations in the arm's places; None if none were run.
        placebo_kind: what those were.
        present: which prompts have the arm's positions at all; only they enter its effect. None: all of them.
        prompts: the texts, for hover and for `per_prompt`.
        min_difference: prompts whose |goal − start| is less are counted, and left out of normalised effects.
        settings: what the models and the sweep were.
        tokens: the text of each prompt's tokens; empty where they have none.
        places: group → the positions of each prompt that are meant by it; empty where a prompt has none.
    """

    direction: str
    metric: str
    unit: str
    rows: tuple[Row, ...] = field(repr=False)
    axes: tuple[str, ...]
    patched: Float64[Tensor, "arm prompt"] = field(repr=False)
    start: Float64[Tensor, "prompt"] = field(repr=False)
    goal: Float64[Tensor, "prompt"] = field(repr=False)
    placebo: Float64[Tensor, "arm prompt"] | None = field(default=None, repr=False)
    placebo_kind: str = ""
    present: Bool[Tensor, "arm prompt"] | None = field(default=None, repr=False)
    prompts: tuple[str, ...] = field(default=(), repr=False)
    min_difference: float = MIN_DIFFERENCE
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    tokens: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    places: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        shape = (len(self.rows), len(self.start))
        for name in ("patched", "placebo", "present"):
            found = getattr(self, name)
            if found is not None and found.shape != shape:
                raise MetricInputError(f"{name} has shape {list(found.shape)}; expected [arm, prompt], {list(shape)}")

    def __repr__(self) -> str:
        n_arms, n_prompts = self.patched.shape
        lost = f", {self.n_undetermined} of them undetermined" if self.n_undetermined else ""
        return (
            f"PatchingResult({self.direction} of the {self.metric} by {', '.join(self.axes)}: {n_arms} arms, "
            f"{n_prompts} prompts{lost})"
        )

    @property
    def n_undetermined(self) -> int:
        """Prompts whose two runs are equal: nothing to bring back, so no effect can be said (0 / 0)."""
        return int((~differing(self.start, self.goal, self.min_difference)).sum())

    @cached_property
    def effects(self) -> Effects:
        """Normalised effects, each over the prompts that have the arm's positions; the `n` of an estimate says how many of
        them are usable. `n_usable` and `n_prompts` count all prompts.
        """
        return self._effects(self.patched)

    def per_prompt(self) -> Float64[Tensor, "arm prompt"]:
        """Each prompt's own normalised effect; NaN where its two runs are equal or it lacks the arm's positions."""
        found = per_prompt(self.patched, self.start, self.goal, min_difference=self.min_difference)
        return found if self.present is None else found.where(self.present, torch.nan)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row an arm: what it replaced; effect, effect_low, effect_high; closed with its interval, the
        share of the squared gap that is gone: an effect may go too far, this tells; ratio_of_means; change, change_low,
        change_high (metric's units); p_value, and p_adjusted over all arms (Benjamini & Hochberg); placebo_effect with its
        interval, placebo_change, and p_versus_placebo, plain and adjusted; n_usable of n_prompts that have its positions.

        p values and `n_usable` leave out prompts whose two runs are equal; where none is left, all is NaN.
        """
        import pandas as pd

        table = pd.DataFrame(list(self.rows))
        found = self.effects
        _put(table, "effect", found.effect)
        _put(table, "closed", found.closed)
        table["ratio_of_means"] = found.ratio_of_means.numpy()
        _put(table, "change", found.change)
        table["p_value"] = found.p_value.numpy()
        table["p_adjusted"] = _adjusted(found.p_value).numpy()
        if self.placebo is not None:
            random = self._effects(self.placebo, n_permutations=100)
            _put(table, "placebo_effect", random.effect)
            table["placebo_change"] = [e.value for e in random.change]
            table["p_versus_placebo"] = (versus_placebo := self._versus_placebo()).numpy()
            table["p_versus_placebo_adjusted"] = _adjusted(versus_placebo).numpy()
        table["n_usable"] = [e.n for e in found.effect]
        n_prompts = self.patched.shape[1]
        table["n_prompts"] = n_prompts if self.present is None else self.present.sum(1).numpy()
        return table

    def to_dataframe(self) -> "pd.DataFrame":
        """`table`."""
        return self.table

    def top(self, k: int = 10) -> "pd.DataFrame":
        """The `k` arms with the largest effects, NaN last."""
        return self.table.sort_values("effect", ascending=False, na_position="last").head(k).reset_index(drop=True)

    def plot(self, **options: Any) -> "go.Figure":
        """Heatmap of effects over the sweep's axes, with intervals on hover."""
        from tracelens.views.patching_figures import patching_figure

        return patching_figure(self, **options)

    def explore(self) -> "PatchingExplorer":
        """A widget to look around in: the effects, and each one's prompts and interval."""
        from tracelens.views.widgets.patching import PatchingExplorer

        return PatchingExplorer(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: the fields, metrics as lists, and `n_undetermined`."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {name: None if data[name] is None else data[name].tolist() for name in TENSORS}
        return encode(data | lists | {"n_undetermined": self.n_undetermined})

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all, with all but the tensors as JSON in its metadata."""
        from safetensors.torch import save

        path = Path(path)
        tensors = {name: value for name in TENSORS if (value := getattr(self, name)) is not None}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TENSORS}
        text = json.dumps({KIND: VERSION} | encode(plain), allow_nan=False)
        data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {KIND: text})
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_bytes(data)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "PatchingResult":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        from safetensors import safe_open

        with reading(path, f"a {KIND} file that Tracelens wrote"), safe_open(path, "pt") as file:
            data = json.loads((file.metadata() or {})[KIND])
            if (found := data.pop(KIND)) != VERSION:
                raise ResultFileError(f"{path} is of version {found}; this Tracelens reads version {VERSION}")
            known = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            many = {name: tuple(data.pop(name)) for name in ("rows", "axes", "prompts")}
            # Files of before these were kept have none.
            many["tokens"] = _nested(data.pop("tokens", ()))
            places = {name: _nested(rows) for name, rows in data.pop("places", {}).items()}
            return cls(**data, **many, **known, places=places)

    def _effects(self, patched: Tensor, **options: Any) -> Effects:
        options |= {"min_difference": self.min_difference}
        whole = effects(patched, self.start, self.goal, **options)
        for arms, prompts in self._incomplete():
            part = effects(patched[arms][:, prompts], self.start[prompts], self.goal[prompts], **options)
            for name in ("ratio_of_means", "p_value"):
                getattr(whole, name)[arms] = getattr(part, name)
            merged = {
                name: _replaced(getattr(whole, name), arms, getattr(part, name))
                for name in ("effect", "closed", "change")
            }
            whole = replace(whole, **merged)
        return whole

    def _versus_placebo(self) -> Float64[Tensor, "arm"]:
        assert self.placebo is not None
        options: dict[str, Any] = {"min_difference": self.min_difference}
        found = versus(self.patched, self.placebo, self.start, self.goal, **options)
        for arms, prompts in self._incomplete():
            ours, theirs = (values[arms][:, prompts] for values in (self.patched, self.placebo))
            found[arms] = versus(ours, theirs, self.start[prompts], self.goal[prompts], **options)
        return found

    def _incomplete(self) -> list[tuple[Tensor, Tensor]]:
        """Arms whose positions some prompts lack, those that lack the same together, and the prompts that have them."""
        if self.present is None or self.present.all():
            return []
        kinds, which = self.present.unique(dim=0, return_inverse=True)
        return [((which == i).nonzero().flatten(), kind) for i, kind in enumerate(kinds) if not kind.all()]


def row_of(arm: Arm, **more: Any) -> Row:
    """What the table says of an arm, by its last place."""
    place = arm[-1]
    row: Row = {"layer": place.site.layer, "site": place.site.name}
    if isinstance(place.where, str):
        row["group"] = place.where
    elif place.where is not None:
        row["position"] = place.where
    if place.kind:
        row[place.kind] = place.feature if place.unit is None else place.unit
    if place.key is not None:
        row["key"] = place.key
    return row | more


def of_pair(pair: Any) -> dict[str, Any]:
    """What settings say of a pair: what the two models share, and the quantized one's precision, "" where it carries none."""
    return {"pair": pair.settings, "precision": getattr(getattr(pair.quantized, "precision", None), "label", "")}


def _nested(rows: Iterable[Iterable[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(map(tuple, rows))


def _replaced(estimates: Sequence[Estimate], arms: Tensor, new: Sequence[Estimate]) -> list[Estimate]:
    found = list(estimates)
    for arm, estimate in zip(arms.tolist(), new, strict=True):
        found[arm] = estimate
    return found


def _adjusted(p: Float64[Tensor, "arm"]) -> Float64[Tensor, "arm"]:
    """Over all arms that have a p value."""
    known = p.isfinite()
    adjusted = torch.full_like(p, torch.nan)
    adjusted[known] = benjamini_hochberg(p[known])
    return adjusted


def _put(table: "pd.DataFrame", name: str, estimates: Sequence[Estimate]) -> None:
    table[name] = [e.value for e in estimates]
    table[f"{name}_low"] = [e.low for e in estimates]
    table[f"{name}_high"] = [e.high for e in estimates]
