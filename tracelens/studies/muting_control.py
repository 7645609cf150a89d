"""What matched noise does to firing: the control of muting thresholds and new pathways."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from tracelens.chat import Chat
from tracelens.features.saes import normalise_saes
from tracelens.features.survival import MEMORY, measure_survival
from tracelens.metrics.moments import FeatureMoments
from tracelens.precision import QuantizationConfig, apply_precision, matched_noise
from tracelens.studies.texts import texts_of


def noise_moments(
    model: Any,
    saes: Any,
    dataset: Any,
    configs: Sequence[str | QuantizationConfig],
    *,
    baseline: Any = None,
    calibration: Sequence[Any] | None = None,
    tokenizer: Any = None,
    chat: Chat = "auto",
    seed: int = 0,
    memory: float = MEMORY,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, FeatureMoments]:
    """Precision → moments of the reference against itself with Gaussian noise of the norm of each tensor's error.

    One draw each, of `seed`. Takes a pass of the model per precision and one of the reference, of which `memory` GB are
    kept in memory and the rest on disk; pass the sweep's own data set and tokenizer. Features of all sites stand side by side, by
    layer. Formats that round activations have the noise of their weights only.
    """
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    texts = texts_of(dataset, baseline, tokenizer, chat)
    specs = [str(QuantizationConfig.parse(config)) for config in configs]

    def noisy(spec: str) -> Any:
        config = QuantizationConfig.parse(spec).weights_only
        return matched_noise(model, apply_precision(model, config, calibration=calibration), seed=seed)

    survival = measure_survival(
        model,
        {spec: partial(noisy, spec) for spec in specs},
        normalise_saes(saes),
        texts,
        readout=lambda logits: logits.new_zeros(len(logits), 0),
        tokenizer=tokenizer,
        maxima=False,
        n_blocks=1,
        memory=memory,
        batch_size=batch_size,
        progress=progress,
    )
    return dict(survival.moments)
