"""The two causes of muting, told apart token by token: the activation moved, or the number format clipped it.

A precision that rounds an activation does so by a hook on the module at that place, so the module's input is the value
just before the rounding. Where the unit would still have fired on that value, the format took the firing; otherwise
what came before had moved it already. Where nothing is rounded the two values are the same, and every cause is "moved".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.auditing.assembly import CAPABILITY
from tracelens.auditing.running import model_label
from tracelens.chat import Chat
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import check_saes, encode, normalise_saes
from tracelens.metrics.clipping import BITS, ClippingAccumulator
from tracelens.metrics.muting import MUTED_AT
from tracelens.metrics.muting_causes import CauseAccumulator
from tracelens.pair import AlignedBatch, PrecisionPair, stream_aligned
from tracelens.sites import Site
from tracelens.stats import wilson
from tracelens.studies.storage import read_result, restored, table_to_dict, write_result
from tracelens.studies.texts import texts_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "tracelens_muting_causes"
Scale = Literal["token", "tensor"]
"""What the hypothetical grid spans: each token's largest magnitude at the site, or the largest of all tokens."""
Reader = Callable[[Float[Tensor, "token ..."]], Float[Tensor, "token unit"]]
"""What a site holds → magnitudes of its units, 0 where one does not fire."""
Span = Callable[[Site, Float[Tensor, "token ..."], Float[Tensor, "token unit"]], Float[Tensor, "token"] | float]
"""Site, what it holds, and what the reader made of it → the largest magnitude that the hypothetical grid reaches."""


@dataclass(frozen=True, eq=False)
class MutingTrace:
    """Muting of every live unit (feature or neuron) in one quantized model, by cause.

    Attributes:
        unit: "feature" or "neuron".
        label: the quantized model's precision or name.
        table: one row per live unit, worst first: site, unit (its index), behaviour ("" for neurons), n_active, muting_rate,
            n_moved, n_clipped (they add up to the muted firings), bits_needed: the fewest bits at which an integer grid over
            the units' own activations would keep its firings (infinity: more than any tried), from the reference alone;
            and cause ("moved" or "clipped", whichever took more; "" if nothing is muted).
        clipping: one row per number of bits: the share of all reference firings that such a grid would clip, and the
            share of live units that it would mute, with its Wilson interval.
        scale: what that hypothetical grid spans.
        n_tokens: tokens that were looked at.
        muted_at, min_active: as for `ActivationMuting`.
        fires_above: what counts as firing.
    """

    unit: Literal["feature", "neuron"]
    label: str
    table: "pd.DataFrame"
    clipping: "pd.DataFrame"
    scale: Scale
    n_tokens: int
    muted_at: float
    min_active: int
    fires_above: str

    @property
    def muted(self) -> "pd.DataFrame":
        """The rows of `table` that are muted, worst first."""
        table: Any = self.table
        return table[table["muting_rate"] >= self.muted_at].reset_index(drop=True)

    @property
    def causes(self) -> dict[str, int]:
        """Muted firings of all live units, by cause."""
        return {name: int(self.table[f"n_{name}"].sum()) for name in ("moved", "clipped")}

    def to_dataframe(self) -> "pd.DataFrame":
        """The table of units."""
        return self.table

    def plot(self) -> "go.Figure":
        """Muted firings by site and cause, beside what a grid of so many bits would clip."""
        from tracelens.views.muting_figures import causes_figure

        return causes_figure(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return vars(self) | {name: table_to_dict(getattr(self, name)) for name in ("table", "clipping")}

    def save(self, path: str | Path) -> Path:
        """Writes one JSON file, which `load` reads back."""
        return write_result(path, KIND, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "MutingTrace":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        return cls(**restored(read_result(path, KIND), "table", "clipping"))


def feature_muting(
    reference: Any,
    quantized: Any,
    saes: Any,
    dataset: Any,
    *,
    baseline: Any = None,
    fingerprint: Fingerprint | None = None,
    tokenizer: Any = None,
    muted_at: float = MUTED_AT,
    min_active: int = 10,
    bits: Sequence[int] = BITS,
    scale: Scale = "token",
    chat: Chat = "auto",
    batch_size: int = 32,
    progress: bool = False,
) -> MutingTrace:
    """Muting of the SAEs' features by cause.

    The format clips a feature only where it rounds the residual stream itself (half precision does); the residual is
    then encoded before and after. `clipping` and `bits_needed` ask of a grid over the feature activations, as a sparse
    code stored in so many bits would have.

    Args:
        dataset, baseline, chat: as for `Audit.trace_features`.
        fingerprint: says which behaviour a feature carries; without one all are called capability features.
        bits, scale: the hypothetical grids; "tensor" takes one more pass of the reference.

    Raises as `PrecisionPair`, `check_saes` and `resolve_dataset`.
    """
    saes = normalise_saes(saes)
    check_saes(saes, reference)
    pair = PrecisionPair(reference, quantized, tokenizer=tokenizer)
    texts = texts_of(dataset, baseline, pair.tokenizer, chat)
    readers: dict[Site, Reader] = {site: _encoder(sae) for site, sae in saes.items()}
    stream = {"batch_size": batch_size, "progress": progress, "tokenizer": pair.tokenizer}
    found = {(row.site, row.feature): row.behaviour for row in fingerprint.features} if fingerprint else {}
    return trace_muting(
        pair,
        texts,
        readers,
        unit="feature",
        names=lambda site, index: found.get((site, index), CAPABILITY),
        span=_span(scale, reference, texts, readers, stream),
        scale=scale,
        fires_above="the SAE's own threshold",
        muted_at=muted_at,
        min_active=min_active,
        bits=bits,
        stream=stream,
    )


def _span(
    scale: Scale, reference: Any, texts: Sequence[str], readers: Mapping[Site, Reader], stream: Mapping[str, Any]
) -> Span:
    if scale == "token":
        return lambda site, activations, features: features.amax(1)
    peaks = {site: float(values.max()) for site, values in maxima(reference, texts, readers, **stream).items()}
    return lambda site, activations, features: peaks[site]


def _encoder(sae: Any) -> Reader:
    return lambda activations: encode(sae, activations)


def maxima(
    model: Any, texts: Sequence[str], readers: Mapping[Site, Reader], **stream: Any
) -> dict[Site, Float[Tensor, "_unit"]]:
    """Largest magnitude of every unit over all tokens of the texts."""
    found: dict[Site, Tensor] = {}
    for batch in stream_aligned({"": model}, texts, sites=list(readers), logits=False, **stream):
        for site, read in readers.items():
            largest = read(batch.activations[""][site]).amax(0)
            found[site] = torch.maximum(found[site], largest) if site in found else largest
    return found


def trace_muting(
    pair: PrecisionPair,
    texts: Sequence[str],
    readers: Mapping[Site, Reader],
    *,
    unit: Literal["feature", "neuron"],
    names: Callable[[Site, int], str],
    span: Span,
    scale: Scale,
    fires_above: str,
    muted_at: float,
    min_active: int,
    bits: Sequence[int],
    stream: Mapping[str, Any],
) -> MutingTrace:
    """One pass of both models: causes from the values on both sides of the rounding, clipping from the reference."""
    causes: dict[Site, CauseAccumulator] = {}
    clipping: dict[Site, ClippingAccumulator] = {}
    models = {"reference": pair.reference, "quantized": pair.quantized}
    n_tokens = 0
    with inputs_of(pair.quantized, list(readers)) as inputs:
        for batch in stream_aligned(models, texts, sites=list(readers), padding_side="right", logits=False, **stream):
            n_tokens += len(batch.prompt)
            for site, read in readers.items():
                r, q = (read(batch.activations[name][site]) for name in models)
                if site not in causes:
                    causes[site] = CauseAccumulator(r.shape[1])
                    clipping[site] = ClippingAccumulator(r.shape[1], bits)
                causes[site].update(r, read(_rows(inputs[site], batch)), q)
                clipping[site].update(r, span(site, batch.activations["reference"][site], r))
    table, profile = _tables(causes, clipping, names, muted_at, min_active)
    label = model_label(pair.quantized)
    return MutingTrace(unit, label, table, profile, scale, n_tokens, muted_at, min_active, fires_above)


@contextmanager
def inputs_of(model: Any, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Site → what its module was last given, before any hook of the module has touched it; filled by running the model."""
    found: dict[Site, Tensor] = {}

    def reader(site: Site) -> Callable[..., None]:
        def store(_module: Any, args: tuple[Any, ...]) -> None:
            found[site] = args[0]

        return store

    with ExitStack() as stack:
        for site in sites:
            stack.callback(model.hook_dict[str(site)].register_forward_pre_hook(reader(site)).remove)
        yield found


def _rows(padded: Float[Tensor, "batch pos ..."], batch: AlignedBatch) -> Float[Tensor, "token ..."]:
    """The batch's tokens out of the rectangle that the model saw, which is padded on the right."""
    row = torch.unique_consecutive(batch.prompt, return_inverse=True)[1]
    with torch.no_grad():
        return padded[row.to(padded.device), batch.position.to(padded.device)]


def _tables(
    causes: Mapping[Site, CauseAccumulator],
    clipping: Mapping[Site, ClippingAccumulator],
    names: Callable[[Site, int], str],
    muted_at: float,
    min_active: int,
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    import pandas as pd

    parts, grids = [], []
    for site, accumulator in causes.items():
        found, grid = accumulator.finalize(), clipping[site].finalize()
        live = found.n_ref >= max(1, min_active)
        index = live.nonzero().squeeze(1).tolist()
        columns = {"n_active": found.n_ref, "muting_rate": found.rate}
        columns |= {"n_moved": found.n_moved, "n_clipped": found.n_clipped, "bits_needed": grid.bits_needed(muted_at)}
        part = pd.DataFrame({"site": str(site), "unit": index, "behaviour": [names(site, i) for i in index]})
        parts.append(part.assign(**{name: column[live].numpy() for name, column in columns.items()}))
        grids.append((grid.n[live], grid.n_clipped[:, live], grid.share[:, live] >= muted_at, grid.bits))
    table: Any = pd.concat(parts, ignore_index=True)
    cause = (table["n_clipped"] > table["n_moved"]).map({True: "clipped", False: "moved"})
    table["cause"] = cause.where(table["muting_rate"] > 0, "")
    table = table.sort_values(["muting_rate", "n_active"], ascending=False, kind="stable").reset_index(drop=True)
    n, clipped, silent = (torch.cat([grid[k] for grid in grids], -1) for k in range(3))
    rows = []
    for k, width in enumerate(grids[0][3]):
        share = wilson(int(silent[k].sum()), silent.shape[1])
        rows.append((width, float(clipped[k].sum() / n.sum()), share.value, share.low, share.high))
    return table, pd.DataFrame(rows, columns=pd.Index(["bits", "firings_clipped", "units_muted", "low", "high"]))
