"""`quantize`: GPTQ, AWQ, SmoothQuant and rounding to nearest by llm-compressor, from prompts to a checkpoint on disk."""

import json
import logging
import shutil
from collections.abc import Sequence
from math import gcd
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tracelens.chat import Chat
from tracelens.errors import CheckpointError, PrecisionSpecError, PromptError, QuantizeError, UnknownNameError
from tracelens.output import replaced
from tracelens.precision.calibration_prompts import Calibration, read_calibration
from tracelens.precision.recipes import Recipe

if TYPE_CHECKING:
    from tracelens.loading import Checkpoint

RECORD = "tracelens_quantize.json"
"""What was done, in the folder that it made."""
BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja")
OUTPUT_LAYER = "lm_head"
LARGEST_GROUP = 1024

logger = logging.getLogger(__name__)


def quantize(
    model: "str | PathLike[str] | Checkpoint",
    recipe: str | PathLike[str] | Recipe,
    calibration: Any,
    out: str | PathLike[str],
    *,
    tokenizer: Any = None,
    n_samples: int | None = None,
    max_length: int | None = None,
    ignore: Sequence[str] = (OUTPUT_LAYER,),
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    chat: Chat = "auto",
) -> Path:
    """Quantizes the linear layers of a checkpoint, fitted to prompts, and writes a checkpoint that `load` opens.

    Needs the extra `full` (llm-compressor, which does the work; the checkpoint is in its format, compressed-tensors).
    Methods: GPTQ (Frantar et al., arXiv 2210.17323), AWQ (Lin et al., arXiv 2306.00978), SmoothQuant (Xiao et al., arXiv
    2211.10438), with the library's defaults (GPTQ: damping .01, columns by activation; SmoothQuant: strength .5).

    Args:
        model: a full-precision Hugging Face folder, the id of a model on the hub, `"organism"`, or a `Checkpoint`.
        recipe: `gptq-int4-g128`, `awq-int4-g128-asym`, `smoothquant-int8` (weights, and activations per token),
            `gptq-int8+a8`, `fp8`; or the path of a llm-compressor recipe (`.yaml`).
        calibration: prompts like those that the model will be asked (`read_calibration`); None, or not run, for rounding
            to nearest without static scales of activations.
        out: a new or empty folder, or one of an earlier call, which is replaced once the new one is complete.
        tokenizer: instead of the checkpoint's own.
        n_samples: prompts to use, drawn with `seed`; by default all, and at most 256.
        max_length: tokens of a prompt that are kept; by default as many as the model has positions, at most 2048.
        ignore: modules to leave in full precision: names, classes, or `re:` and a regular expression; `lm_head` is the
            output layer, whatever its name. A recipe file says itself what it ignores.
        device: where layers are computed, one at a time; by default a GPU if there is one.
        chat: whether prompts are put into the tokenizer's chat template (`tracelens.chat.as_chat`).

    Returns:
        The folder: weights, config and tokenizer; `recipe.yaml`, as llm-compressor writes it; and what was done in
        `tracelens_quantize.json`, with the sha256 of the calibration tokens and what llm-compressor warned of.

    Raises:
        PrecisionSpecError: an unknown recipe, or groups that do not divide the width of every layer.
        PromptError: no prompts, too few, or prompts in words that the model does not know.
        CheckpointError: a model that is quantized already, or has no tokenizer.
        UnknownNameError: an `ignore` that names nothing.
        OutputError: `out` holds something else.
        QuantizeError: llm-compressor is missing, does not know the architecture, fails, or writes what cannot be read
            (3-bit codes of a layer so narrow that its shape does not tell how they are packed).
    """
    from tracelens.loading import open_checkpoint

    recipe = Recipe.parse(recipe)
    if recipe.needs_calibration and calibration is None:
        raise PromptError(f"recipe {recipe.name!r} is fitted to prompts; give calibration=[...], a file or a data set")
    with replaced(Path(out), RECORD) as folder:
        checkpoint = open_checkpoint(model)
        _check_source(checkpoint)
        tokenizer = _tokenizer(checkpoint, tokenizer)
        prompts = None
        if recipe.needs_calibration:
            prompts = read_calibration(
                calibration,
                checkpoint,
                tokenizer=tokenizer,
                n_samples=n_samples,
                max_length=max_length,
                chat=chat,
                seed=seed,
            )
        warned = _run(checkpoint, recipe, prompts, folder, tokenizer, list(ignore), seed, device, progress)
        copy_beside(checkpoint.path, folder, tokenizer if tokenizer is not checkpoint.tokenizer else None)
        record = {
            "recipe": recipe.name,
            "model": checkpoint.name,
            "calibration": prompts.to_dict() if prompts else None,
            "ignore": None if recipe.file else list(ignore),
            "seed": seed,
            "warnings": warned,
            "versions": _versions(),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _check_result(folder, recipe)
    return Path(out)


def _check_result(folder: Path, recipe: Recipe) -> None:
    """What cannot be opened is not handed over."""
    from tracelens.loading import open_checkpoint

    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        raise QuantizeError(
            f"what llm-compressor wrote for {recipe.name!r} cannot be read back, and is not kept: {error}"
        ) from error


def _check_source(checkpoint: "Checkpoint") -> None:
    if checkpoint.path.is_file():
        raise CheckpointError(
            f"{checkpoint.path} is a GGUF file; quantize the full-precision Hugging Face folder that it was made from"
        )
    if checkpoint.layout is not None:
        raise CheckpointError(
            f"{checkpoint.path} is quantized already ({checkpoint.format}); quantize the full-precision original"
        )


def _tokenizer(checkpoint: "Checkpoint", given: Any) -> Any:
    if isinstance(given, str | PathLike):
        from transformers import AutoTokenizer

        given = AutoTokenizer.from_pretrained(given, trust_remote_code=False)
    tokenizer = checkpoint.tokenizer if given is None else given
    if tokenizer is None:
        raise CheckpointError(f"{checkpoint.path} has no tokenizer to read the prompts with; pass tokenizer=...")
    return tokenizer


def _run(
    checkpoint: "Checkpoint",
    recipe: Recipe,
    prompts: Calibration | None,
    folder: Path,
    tokenizer: Any,
    ignore: list[str],
    seed: int,
    device: str | torch.device | None,
    progress: bool,
) -> list[str]:
    """Writes the quantized weights and config into the folder; what llm-compressor warned of."""
    from tracelens.precision.compressor import opened

    with opened(device, progress) as warned, torch.random.fork_rng():
        from llmcompressor.entrypoints.oneshot import oneshot
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=recipe.dtype or "auto", local_files_only=True, trust_remote_code=False
        )
        ignored = [_output_layer(model) if name == OUTPUT_LAYER else name for name in ignore]
        if recipe.file is None:
            _check_model(model, recipe, ignored)
        if prompts and recipe.rounding == "gptq":
            _warn_of_few(prompts, model)
        try:
            oneshot(model=model, tokenizer=tokenizer, recipe=recipe.modifiers(ignored), **_data(prompts))
            model.save_pretrained(folder, save_compressed=True)
        except Exception as error:
            reason = str(error.__cause__ or error).strip() or type(error).__name__
            raise QuantizeError(
                f"llm-compressor could not apply {recipe.name!r} to {checkpoint.name} ({checkpoint.architecture}): {reason}"
            ) from error
    if not (folder / "config.json").is_file() or "quantization_config" not in (folder / "config.json").read_text():
        raise QuantizeError(f"recipe {recipe.name!r} quantized nothing of {checkpoint.name}; name layers it has")
    return warned


def _data(prompts: Calibration | None) -> dict[str, Any]:
    """One prompt at a time, so that nothing is padded: a padding token would count like any other."""
    if prompts is None:
        return {}
    rows = [
        {"input_ids": torch.tensor(row), "attention_mask": torch.ones(len(row), dtype=torch.long)}
        for row in prompts.ids
    ]
    loader = torch.utils.data.DataLoader(rows, batch_size=1)  # pyright: ignore[reportArgumentType]
    return {"dataset": loader, "num_calibration_samples": len(rows)}


def _output_layer(model: Any) -> str:
    layer = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is layer), OUTPUT_LAYER)


def _matching(model: Any, names: list[str], ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Modules by what llm-compressor calls them: names, classes, `re:` and an expression."""
    from compressed_tensors.utils import match_named_modules

    return dict(match_named_modules(model, names, list(ignore)))


def _check_model(model: Any, recipe: Recipe, ignore: list[str]) -> None:
    """Raises for what llm-compressor would find late, or pass over in silence."""
    for name in ignore:
        if name != OUTPUT_LAYER and not _matching(model, [name]):
            raise UnknownNameError.of("module to ignore", name, _matching(model, ["Linear"]))
    layers = _matching(model, ["Linear"], ignore)
    kind = type(model).__name__
    if not layers:
        raise QuantizeError(f"{kind} has no linear layers that llm-compressor quantizes, or all of them are ignored")
    assert recipe.config is not None
    _check_groups(recipe, {name: layer.in_features for name, layer in layers.items()})
    if recipe.smoothing:
        from tracelens.precision.compressor import smoothed_architectures

        known = smoothed_architectures(recipe.smoothing)
        if kind not in known:
            raise QuantizeError(
                f"llm-compressor has no {recipe.smoothing} mappings for {kind}, which say what layer feeds which. It has "
                f"them for {', '.join(known)}. Use gptq, or write mappings into a recipe file (.yaml)"
            )


def _check_groups(recipe: Recipe, widths: dict[str, int]) -> None:
    assert recipe.config is not None
    group = recipe.config.weight_group
    wrong = {name: width for name, width in widths.items() if group and width % group}
    if not wrong:
        return
    common = gcd(*widths.values())
    fitting = [size for size in range(2, min(common, LARGEST_GROUP) + 1) if common % size == 0]
    name, width = next(iter(wrong.items()))
    raise PrecisionSpecError(
        f"recipe {recipe.name!r}: groups of {group} do not divide the input width {width} of {name} (and {len(wrong) - 1} "
        f"more layers); sizes that divide every width: {', '.join(map(str, fitting)) or 'none'}. Or name the layers in ignore"
    )


def _warn_of_few(prompts: Calibration, model: Any) -> None:
    widest = max(layer.in_features for layer in _matching(model, ["Linear"]).values())
    if prompts.n_tokens < widest:
        logger.warning(
            "GPTQ knows the inputs of its layers, up to %d wide, from %d tokens only; give more prompts",
            widest,
            prompts.n_tokens,
        )


def copy_beside(source: Path, folder: Path, tokenizer: Any) -> None:
    """The tokenizer's files as they were, or a given tokenizer's; and how the model generates."""
    if tokenizer is None:
        for pattern in BESIDE:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
    else:
        tokenizer.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from tracelens import __version__

    libraries = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    return {"tracelens": __version__, **{name: version(name) for name in libraries}}
