"""SAEs in folders: SAELens' layout, finished or a checkpoint of training, and Sparsify's."""

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tracelens.errors import NonFiniteError, SAEError, SAENotFoundError
from tracelens.features import sae_sparsify
from tracelens.features.sae_sites import refuse_unfit

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
"""The two files of an SAE in SAELens' format."""
SCALER = "activation_scaler.json"
"""Beside an SAE that is not finished: the scale of its input, which SAELens folds into the weights at the end."""
FOREIGN = {"params.npz": "Gemma Scope's", "ae.pt": "dictionary_learning's"}


@dataclass(frozen=True)
class Folder:
    """A folder that holds one SAE."""

    home: Path

    def __str__(self) -> str:
        return str(self.home)

    def read(self, device: str | torch.device, dtype: torch.dtype) -> Any:
        weights = sae_sparsify.WEIGHTS if _is_sparsify(self.home) else WEIGHTS
        for name in (CONFIG, weights):
            if not (self.home / name).is_file():
                raise SAEError(f"{self.home} is not an SAE in SAELens' format: {name} is missing")
        try:
            sae = quietly(lambda: _read(self.home, str(device)))
        except SAEError:
            raise
        except Exception as error:  # SAELens lets through whatever json, safetensors, torch or a config class raises
            raise SAEError(
                f"{self.home} is not an SAE that SAELens can read: {type(error).__name__}: {error}"
            ) from error
        return finished(sae, dtype, f"SAE in {self.home}")


def find(source: str | Path) -> list[Folder]:
    """The folders of SAEs in a folder; raises `SAENotFoundError` if it does not exist, `SAEError` if it holds none."""
    root = locate(source)
    if not root.is_dir():
        raise SAEError(f"{root} is a file; give the folder that holds {CONFIG} and {WEIGHTS}")
    if _holds_one(root):
        return [Folder(root)]
    homes = [Folder(child) for child in sorted(root.iterdir()) if child.is_dir() and _holds_one(child)]
    if homes:
        return homes
    for file, whose in FOREIGN.items():
        if any(root.glob(file)) or any(root.glob(f"*/{file}")):
            raise SAEError(
                f"{root} is in {whose} layout ({file}), which SAELens reads from the hub alone: give the name of its "
                "release and SAE, load_saes((release, sae_id)), or save the SAE with SAELens' save_model. "
                "Folders are read in SAELens' and Sparsify's layouts"
            )
    raise SAEError(
        f"no SAE in {root}: neither it nor a sub-folder holds {CONFIG} and {WEIGHTS} (SAELens' layout) or {sae_sparsify.WEIGHTS} "
        "(Sparsify's)"
    )


def locate(source: str | Path) -> Path:
    """The existing file or folder that is meant; raises `SAENotFoundError`."""
    root = Path(source).expanduser()
    if str(source) == "organism" or (not root.exists() and root.parts == ("saes", "organism")):
        package = Path(__file__).parent.parent
        in_wheel = package / "_saes" / "organism"
        root = in_wheel if in_wheel.is_dir() else package.parent / "saes" / "organism"
    if not root.exists():
        raise SAENotFoundError(
            f"no folder {str(source)!r} ({root.absolute()}); give a folder with {CONFIG} and {WEIGHTS}, "
            "a folder of such folders, the name of a SAELens release, or 'organism'"
        )
    return root


def finished(sae: Any, dtype: torch.dtype, what: str) -> Any:
    """An SAE that was read in float32: checked, in `dtype` but for JumpReLU thresholds, and frozen."""
    refuse_unfit(sae)
    for name, tensor in sae.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{what}: tensor {name!r} holds NaN or infinity; save the SAE again")
    if getattr(sae.cfg, "normalize_activations", None) == "covariance_whitening":
        raise SAEError(
            f"{what} was trained on whitened activations, and the whitening is not folded into its weights; save it with "
            "SAELens' fold_activation_whitening first"
        )
    if dtype != torch.float32:
        # Kept aside: `to` rewrites parameters in place.
        threshold = sae.threshold.detach().clone() if hasattr(sae, "threshold") else None
        sae = sae.to(dtype=dtype)
        if threshold is not None:
            sae.threshold = torch.nn.Parameter(threshold.to(torch.promote_types(dtype, torch.float32)))
    return sae.eval().requires_grad_(False)


def quietly(read: Callable[[], Any]) -> Any:
    """What `read` returns, without SAELens' advice on how to load the model: the advice is followed here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        return read()


def _holds_one(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, WEIGHTS, sae_sparsify.WEIGHTS))


def _is_sparsify(folder: Path) -> bool:
    return (folder / sae_sparsify.WEIGHTS).is_file() and not (folder / WEIGHTS).is_file()


def _read(home: Path, device: str) -> Any:
    from sae_lens import SAE
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    if _is_sparsify(home):
        return sae_sparsify.read_sparsify(home, device)
    config = json.loads((home / CONFIG).read_text(encoding="utf-8"))
    kind = config.get("architecture")
    if kind in SAE_TRAINING_CLASS_REGISTRY and kind not in SAE_CLASS_REGISTRY:
        return _for_inference(home, device)
    sae = SAE.load_from_disk(home, device=device, dtype="float32")
    return _scaled(sae, home)


def _for_inference(home: Path, device: str) -> Any:
    """A checkpoint of training as the SAE that SAELens would save for use: BatchTopK's and Matryoshka's are JumpReLU."""
    from sae_lens import SAE, TrainingSAE

    trained = _scaled(TrainingSAE.load_from_disk(home, device=device, dtype="float32"), home)
    state = trained.state_dict()
    trained.process_state_dict_for_saving_inference(state)
    sae = SAE.from_dict(trained.cfg.get_inference_sae_cfg_dict() | {"device": device})
    sae.load_state_dict(state)
    return sae


def _scaled(sae: Any, home: Path) -> Any:
    """With the scale of the input folded into the weights, as SAELens does at the end of training."""
    if sae.cfg.normalize_activations != "expected_average_only_in":
        return sae
    scaler = home / SCALER
    scale = json.loads(scaler.read_text(encoding="utf-8"))["scaling_factor"] if scaler.is_file() else None
    if scale is None:
        log.warning(
            "the SAE in %s expects activations of mean norm sqrt(d_in), and no %s gives their scale; taken as folded into "
            "the weights: see sae_health",
            home,
            SCALER,
        )
    else:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae
