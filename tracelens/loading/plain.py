"""Float tensors of a checkpoint -> the transformers model of its architecture: what one would have without quantization.

transformers' own loader renames and fuses what older checkpoints name and split otherwise; it is run twice, first on
the meta device over shapes alone, so that nothing is read for a checkpoint that does not fit.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from tracelens.errors import CheckpointError, UnsupportedArchitectureError
from tracelens.loading.checkpoint import Checkpoint, shortened

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
NUMBERED = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
"""A tensor of one expert, which the loader stacks with those of the others in the order of their numbers."""

TALKATIVE = ("modeling_utils", "configuration_utils", "distributed.tensor_parallel")
"""Modules of transformers that comment on loading; what matters of it becomes an error here."""
UNFUSED = re.compile(r"^(\S+) *\| *\S*CONVERSION", re.MULTILINE)
"""A parameter in the loader's report that it could not make of the stored tensors."""


def build_plain(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The transformers model of the checkpoint's architecture with its dequantized weights, in eval mode, without
    gradients, with eager attention. Its config says nothing of quantization.

    Parameters are of `dtype` but for the few that transformers keeps in float32 for an architecture; buffers that are
    not stored (rotary frequencies) are computed as transformers computes them. Embeddings are tied if the config says
    so. No remote code runs and nothing is downloaded. Memory: the model, plus one tensor at a time (for fused experts,
    those of one layer).

    Raises:
        UnsupportedArchitectureError: transformers has no class of this name.
        CheckpointError: tensors that are missing, left over, given twice or of a wrong shape, by their names; tied
            embeddings that differ; a config that does not fit its architecture.
        NonFiniteError: NaN or infinity in a tensor.
    """
    model_class = _model_class(checkpoint.architecture)
    config = _config(checkpoint, model_class)
    _check_fit(checkpoint, model_class, config, dtype)

    lock = Lock()
    tensors = {name: _Tensor(checkpoint, name, lock) for name in checkpoint.names()}
    with _quiet():
        model, _ = _from_tensors(model_class, config, tensors, dtype, device)
    _check_tied(checkpoint, model)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"not filled: {left}"
    return model.eval().requires_grad_(False)


class _Tensor:
    """A tensor of the checkpoint in the form that transformers' loader takes: read at the moment it is converted to
    its parameter's dtype and device.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, lock: Lock) -> None:
        self._checkpoint, self._name, self._lock = checkpoint, name, lock

    def __getitem__(self, _: Any) -> "_Tensor":
        return self

    def to(self, *, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        # The loader reads in several threads; one at a time keeps memory at one tensor beside the model.
        with self._lock:
            tensor = self._checkpoint.weight(self._name, dtype=dtype, device=device or "cpu")
            # The model owns its memory: what was read may be mapped from the file, or a view of something larger.
            return tensor.clone(memory_format=torch.contiguous_format)


def _model_class(architecture: str) -> Any:
    import transformers

    found = getattr(transformers, architecture, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)) or found.config_class is None:
        raise UnsupportedArchitectureError(
            f"transformers {transformers.__version__} has no model class {architecture!r}, and remote code (auto_map) is "
            "never run; install a transformers that has it, or check `architectures` in config.json"
        )
    return found


def _config(checkpoint: Checkpoint, model_class: Any) -> Any:
    content = {key: value for key, value in checkpoint.config.items() if key not in QUANTIZATION_KEYS}
    kind, expected = content.get("model_type"), model_class.config_class.model_type
    if kind not in (None, expected):
        raise CheckpointError(
            f"{checkpoint.path}: config.json has the architecture {model_class.__name__}, whose model_type is "
            f"{expected!r}, and the model_type {kind!r}; get the checkpoint's original config.json"
        )
    try:
        return model_class.config_class.from_dict(content)
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path}: transformers does not accept config.json as that of a {model_class.__name__} "
            f"({error}); get the checkpoint's original config.json"
        ) from error


def _from_tensors(
    model_class: Any, config: Any, tensors: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str
) -> tuple[Any, Mapping[str, Any]]:
    """A model and what the loader says of the tensors: `missing_keys`, `unexpected_keys`, `mismatched_keys`."""
    return model_class.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        device_map={"": torch.device(device)},
        attn_implementation="eager",
        # Differences are reported by `_check_fit`, all of them and as an error.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=True,
    )


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Without the loader's progress bar and its warnings; yields those, as they come."""
    from transformers.utils import logging as transformers_logging

    warnings: list[str] = []

    def aside(record: logging.LogRecord) -> bool:
        warnings.append(record.getMessage())
        return record.levelno >= logging.ERROR

    loggers = [logging.getLogger(f"transformers.{name}") for name in TALKATIVE]
    showing = transformers_logging.is_progress_bar_enabled()
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addFilter(aside)
        logger.setLevel(logging.WARNING)  # others may have turned transformers down, and the report is a warning
    if showing:
        transformers_logging.disable_progress_bar()
    try:
        yield warnings
    finally:
        if showing:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeFilter(aside)
            logger.setLevel(level)


def _check_fit(checkpoint: Checkpoint, model_class: Any, config: Any, dtype: torch.dtype) -> None:
    """Raises `CheckpointError` unless every tensor has its place in the model and the other way round."""
    described = f"a {model_class.__name__} as config.json describes it"
    _check_experts(checkpoint)
    shapes = {
        name: torch.empty(checkpoint.shape(name), dtype=torch.float32, device="meta") for name in checkpoint.names()
    }
    with _quiet() as warnings:
        try:
            model, info = _from_tensors(model_class, config, shapes, dtype, "meta")
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            fused = sorted(set(UNFUSED.findall("\n".join(warnings))))
            reason = f"no {shortened(fused)} can be made of its parts" if fused else str(error)
            raise CheckpointError(
                f"transformers cannot make {described} from the tensors of {checkpoint.path}: {reason}; config and "
                "weights belong to different models, or tensors are missing"
            ) from error
    _check_once(checkpoint, model)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"the weights of {checkpoint.path} lack {len(missing)} tensors of {described}: {shortened(missing)}; "
            "get the whole checkpoint"
        )
    if extra := sorted(name for name in info["unexpected_keys"] if not checkpoint.adds_nothing(name)):
        raise CheckpointError(
            f"the weights of {checkpoint.path} hold {len(extra)} tensors that are no part of {described}: "
            f"{shortened(extra)}; a model without them would be another model: check config.json"
        )
    wrong = [f"{name} is {list(found)}, expected {list(want)}" for name, found, want in sorted(info["mismatched_keys"])]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors of {checkpoint.path} do not have the shape that config.json asks for: "
            f"{shortened(wrong)}; config and weights belong to different models"
        )


def _check_experts(checkpoint: Checkpoint) -> None:
    """Experts that are stored one by one are stacked by number: none may be left out, all must have one shape."""
    experts: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in checkpoint.names():
        if match := NUMBERED.fullmatch(name):
            experts[match[1], match[3]][int(match[2])] = name
    numbers: dict[str, set[int]] = defaultdict(set)
    for (layer, _), names in experts.items():
        numbers[layer] |= names.keys()
    for (layer, part), names in experts.items():
        if gaps := sorted(set(range(max(numbers[layer]) + 1)) - names.keys()):
            missing = [f"{layer}.{number}.{part}" for number in gaps]
            raise CheckpointError(
                f"the weights of {checkpoint.path} lack {len(missing)} tensors of experts: {shortened(missing)}; "
                "get the whole checkpoint"
            )
        first = checkpoint.shape(names[0])
        if odd := [name for name in names.values() if checkpoint.shape(name) != first]:
            raise CheckpointError(
                f"{odd[0]} of {checkpoint.path} is {list(checkpoint.shape(odd[0]))}, expected {list(first)} as "
                f"{names[0]} is; get the checkpoint again"
            )


def _check_once(checkpoint: Checkpoint, model: Any) -> None:
    """No two tensors may come to lie in one parameter, as one under an old and one under a new name would."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    parameters = model.state_dict()
    came_from: dict[str, str] = {}
    for name in checkpoint.names():
        target, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        source = repr(name) if fused is None else "its parts"
        if came_from.setdefault(target, source) != source:
            raise CheckpointError(
                f"{checkpoint.path} holds {target!r} twice, as {came_from[target]} and as {source}; "
                "get the checkpoint again"
            )


def _check_tied(checkpoint: Checkpoint, model: Any) -> None:
    """Raises `CheckpointError` for parameters that config.json ties together and that the checkpoint holds as two."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name, other in tied.items():
        if model.get_parameter(name) is not model.get_parameter(other):
            raise CheckpointError(
                f"{checkpoint.path}: config.json says tie_word_embeddings, but {name} differs from {other}; "
                "set tie_word_embeddings to false if the checkpoint is meant to have both"
            )
