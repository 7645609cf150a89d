"""Drift of components: how far each one's activations moved from the reference's, prompt by prompt."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tracelens.causal.ablation_result import means, put_estimates
from tracelens.causal.component_files import read_tensors, write_tensors
from tracelens.causal.components import Features, arm_of, components_of, described, from_dict, kind_of, to_dict
from tracelens.causal.places import Place
from tracelens.causal.prompts import PromptSet, Spans
from tracelens.chat import Chat
from tracelens.features.sae_encode import encode
from tracelens.features.saes import check_saes, normalise_saes
from tracelens.pair import AlignedBatch, PrecisionPair
from tracelens.sites import Site
from tracelens.stats import bootstrap_weights

if TYPE_CHECKING:
    import pandas as pd

KIND = "tracelens_component_drift"


@dataclass(frozen=True, eq=False)
class Drift:
    """Relative L2 drift of components.

    Attributes:
        components: as in `Importance`.
        relative: ‖a_ref − a_quant‖₂ / ‖a_ref‖₂ over a prompt's tokens, BOS aside, ≥ 0; NaN where the reference's is 0. Of a
            head a is its z, of an MLP or attention layer what it adds to the residual stream, of a layer the sum of both,
            of a feature its activation.
        norm: root mean square over all tokens of the norm of what the component adds to the residual stream in the reference:
            of a head z W_O, of a feature its activation times its decoder row. Of other sites the norm of what they hold.
        label: the quantized model's name.
        prompts: the texts.
    """

    components: tuple[Place, ...]
    relative: Float64[Tensor, "component prompt"] = field(repr=False)
    norm: Float64[Tensor, "component"] = field(repr=False)
    label: str = "quantized"
    prompts: tuple[str, ...] = field(default=(), repr=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of each component: "head", "mlp", "attn", "layer", "feature"."""
        return tuple(map(kind_of, self.components))

    @property
    def value(self) -> Float64[Tensor, "component"]:
        """Mean of `relative` over the prompts where it is known."""
        return self.relative.nanmean(1)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a component: what it is (`described`), drift with its 95 % bootstrap interval over prompts, norm, n_prompts
        where the drift is known.
        """
        import pandas as pd

        table = pd.DataFrame([described(place) for place in self.components])
        put_estimates(table, "drift", means(self.relative, bootstrap_weights(self.relative.shape[1])))
        table["norm"] = self.norm.numpy()
        table["n_prompts"] = self.relative.isfinite().sum(1).numpy()
        return table

    def to_dataframe(self) -> "pd.DataFrame":
        """`table`."""
        return self.table

    def top(self, k: int = 10) -> "pd.DataFrame":
        """The `k` components that drift most."""
        return self.table.sort_values("drift", ascending=False, kind="stable").head(k).reset_index(drop=True)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the tensors."""
        return {
            "components": [to_dict(place) for place in self.components],
            "label": self.label,
            "prompts": list(self.prompts),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What `to_dict` leaves out."""
        return {"relative": self.relative, "norm": self.norm}

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, which `load` reads back."""
        return write_tensors(path, KIND, self.to_dict(), self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> "Drift":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        return read_tensors(path, KIND, cls.from_dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Drift":
        """From what `to_dict` gave, and the tensors."""
        places = tuple(from_dict(place) for place in data["components"])
        return cls(components=places, label=data["label"], prompts=tuple(data["prompts"]), **tensors)


@torch.no_grad()
def component_drift(
    pair: PrecisionPair,
    prompts: Any,
    *,
    components: Sequence[str | Place] = ("head", "mlp"),
    saes: Any = None,
    features: Features | None = None,
    layers: Iterable[int] | None = None,
    label: str = "quantized",
    spans: Spans | None = None,
    chat: Chat = "auto",
    batch_size: int = 32,
    progress: bool = False,
) -> Drift:
    """How far each component's activations are from the reference's on the same tokens, one pass of each model.

    What reaches a component has drifted already, so its drift is that of all below it together with its own weights'. A small
    component has a large relative drift for the same error. Activations are not kept: what grows with the prompts is the
    result alone.

    Args:
        components, saes, features, layers: as for `importance`; the same names give the same places. Positions of places
            are honoured too.

    Raises as `components_of`, `PromptSet.of` and `PrecisionPair.stream`.
    """
    if saes is not None:
        saes = normalise_saes(saes)
        check_saes(saes, pair.reference)
    places = components_of(pair.reference, components, features=features, saes=saes, layers=layers)
    prompt_set = PromptSet.of(prompts, pair.reference, tokenizer=pair.tokenizer, spans=spans, chat=chat)
    sums = _Sums(pair.reference, places, prompt_set, saes)
    sites = dict.fromkeys(part.site for place in places for part in arm_of(place))
    for batch in pair.stream(prompt_set.tokens, sites=sites, batch_size=batch_size, logits=False, progress=progress):
        sums.update(batch)
    return Drift(
        components=places,
        relative=(sums.error / sums.size).sqrt().where(sums.size > 0, torch.nan),
        norm=(sums.written / sums.n_tokens.clamp(min=1)).sqrt(),
        label=label,
        prompts=prompt_set.texts,
    )


class _Sums:
    """Squares of errors and of sizes, by component and prompt; places with the same site and positions go together."""

    def __init__(self, reference: Any, places: Sequence[Place], prompts: PromptSet, saes: Any) -> None:
        self.reference, self.places, self.prompts, self.saes = reference, places, prompts, saes
        shape = (len(places), len(prompts))
        self.error, self.size = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self.written, self.n_tokens = (torch.zeros(len(places), dtype=torch.float64) for _ in range(2))
        self.groups: dict[tuple[Site, str, Any], list[int]] = {}
        for index, place in enumerate(places):
            self.groups.setdefault((place.site, kind_of(place), place.where), []).append(index)

    def update(self, batch: AlignedBatch) -> None:
        """Adds a batch."""
        for (site, kind, where), indices in self.groups.items():
            rows = self._rows(batch, where)
            prompt = batch.prompt[rows]
            units = [self.places[i].feature if kind == "feature" else self.places[i].unit for i in indices]
            ours, theirs = (self._read(batch, name, site, kind, rows, units) for name in ("reference", "quantized"))
            self._add(self.error, indices, (theirs - ours).square().sum(-1), prompt)
            self._add(self.size, indices, ours.square().sum(-1), prompt)
            self.written[indices] += self._written(ours, site, kind, units).double().sum(0).cpu()
            self.n_tokens[indices] += len(rows)

    def _rows(self, batch: AlignedBatch, where: Any) -> Int[Tensor, "row"]:
        """Tokens of the batch at these positions of their prompts."""
        if where is None:
            return torch.arange(len(batch.prompt), device=batch.prompt.device)
        kept = {prompt: set(self.prompts.positions(prompt, where)) for prompt in batch.prompt.unique().tolist()}
        pairs = zip(batch.prompt.tolist(), batch.position.tolist(), strict=True)
        return torch.tensor([i for i, (p, at) in enumerate(pairs) if at in kept[p]], device=batch.prompt.device).long()

    def _read(
        self, batch: AlignedBatch, model: str, site: Site, kind: str, rows: Tensor, units: Sequence[Any]
    ) -> Float[Tensor, "row unit width"]:
        """What the units hold; a whole site is one unit."""
        held = batch.activations[model]
        if kind == "layer":
            return sum(held[Site(site.layer, name)][rows].float() for name in ("attn_out", "mlp_out"))[:, None]  # pyright: ignore[reportIndexIssue]
        if kind == "feature":
            return encode(self.saes[site], held[site][rows])[:, list(units)][..., None]
        values = held[site][rows].float()
        if units[0] is None:
            return values.flatten(1)[:, None]
        return values[:, list(units)].reshape(len(rows), len(units), -1)

    def _written(
        self, ours: Float[Tensor, "row unit width"], site: Site, kind: str, units: Sequence[Any]
    ) -> Float[Tensor, "row unit"]:
        """Squared norm of what the units add to the residual stream."""
        size = ours.square().sum(-1)
        if kind == "feature":
            return size * self.saes[site].W_dec[list(units)].float().square().sum(-1).to(size)
        weight = getattr(self.reference.blocks[site.layer].attn, "W_O", None) if site.name == "z" else None
        if weight is None or units[0] is None:
            return size
        out = weight[list(units)].to(ours)
        return torch.einsum("rui,uij,ruj->ru", ours, out @ out.mT, ours).clamp(min=0)

    def _add(self, total: Tensor, indices: Sequence[int], values: Float[Tensor, "row unit"], prompt: Tensor) -> None:
        summed = torch.zeros(len(indices), len(self.prompts), dtype=torch.float64)
        total[indices] += summed.index_add_(1, prompt.cpu(), values.double().cpu().T.contiguous())
