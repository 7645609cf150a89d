"""Muting of neurons: what the hidden layer of an MLP computes, by cause.

A gated neuron (SwiGLU) writes along its direction with either sign, and the smooth activation functions (GELU, SiLU) leave
small negative values where a ReLU leaves none. So a neuron is said to fire on a token where its magnitude exceeds a
share of the largest magnitude that it reaches in the reference on these prompts: one rule for every activation function,
that does not depend on a neuron's scale.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.chat import Chat
from tracelens.errors import MetricInputError
from tracelens.metrics.clipping import BITS
from tracelens.metrics.muting import MUTED_AT
from tracelens.pair import PrecisionPair
from tracelens.sites import Site
from tracelens.studies.muting_causes import MutingTrace, Reader, Scale, maxima, trace_muting
from tracelens.studies.texts import texts_of

FIRES_ABOVE = 0.1
"""Share of its own largest magnitude above which a neuron fires."""


def neuron_muting(
    reference: Any,
    quantized: Any,
    dataset: Any,
    *,
    sites: Iterable[Site | str] | None = None,
    baseline: Any = None,
    fires_above: float = FIRES_ABOVE,
    tokenizer: Any = None,
    muted_at: float = MUTED_AT,
    min_active: int = 10,
    bits: Sequence[int] = BITS,
    scale: Scale = "token",
    chat: Chat = "auto",
    batch_size: int = 32,
    progress: bool = False,
) -> MutingTrace:
    """Muting of neurons by cause; takes two passes of the reference and one of the quantized model.

    "Clipped" is exact: under `+a8` or `+a4` the quantized model rounds the neurons where W_out reads them, and its value
    just before that is compared with the one after. `clipping` and `bits_needed` say what an integer grid of so many bits
    would do to the reference's own values, at such a place.

    Args:
        dataset, baseline, chat: as for `Audit.trace_features`.
        sites: of neurons; by default `mlp_post` of every layer.
        fires_above: share of its largest magnitude in the reference, in [0, 1), above which a neuron fires.
        bits, scale: the hypothetical grids.

    Raises `MetricInputError` for a share outside [0, 1); further as `PrecisionPair` and `resolve_dataset`.
    """
    if not 0 <= fires_above < 1:
        raise MetricInputError(f"fires_above is {fires_above}; expected a share of each neuron's maximum, in [0, 1)")
    pair = PrecisionPair(reference, quantized, tokenizer=tokenizer)
    texts = texts_of(dataset, baseline, pair.tokenizer, chat)
    everywhere = [Site(layer, "mlp_post") for layer in range(reference.cfg.n_layers)]
    wanted = everywhere if sites is None else [Site.parse(site) for site in sites]
    stream = {"batch_size": batch_size, "progress": progress, "tokenizer": pair.tokenizer}
    peaks = maxima(reference, texts, dict.fromkeys(wanted, _magnitudes), **stream)
    return trace_muting(
        pair,
        texts,
        {site: _above(fires_above * peaks[site]) for site in wanted},
        unit="neuron",
        names=lambda site, index: "",
        span=lambda site, a, _: _magnitudes(a).amax(1) if scale == "token" else float(peaks[site].max()),
        scale=scale,
        fires_above=f"{fires_above:g} of the neuron's largest magnitude in the reference",
        muted_at=muted_at,
        min_active=min_active,
        bits=bits,
        stream=stream,
    )


def _magnitudes(activations: Float[Tensor, "token ..."]) -> Float[Tensor, "token unit"]:
    return activations.flatten(1).abs()


def _above(levels: Float[Tensor, "unit"]) -> Reader:
    def read(activations: Float[Tensor, "token ..."]) -> Float[Tensor, "token unit"]:
        magnitudes = _magnitudes(activations)
        return torch.where(magnitudes > levels, magnitudes, 0)

    return read
