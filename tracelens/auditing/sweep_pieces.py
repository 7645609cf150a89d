"""The pieces of a sweep on disk: one folder for each report that is finished, and whether it may be used again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracelens import __version__
from tracelens.audit_report import KIND as REPORT_KIND
from tracelens.audit_report import AuditReport
from tracelens.audit_settings import AuditSettings
from tracelens.auditing.question import Question
from tracelens.errors import ResultFileError
from tracelens.features.fingerprint import Fingerprint
from tracelens.features.saes import SAEs, sae_hash
from tracelens.output import MARKER, UNFINISHED, check_folder, write_atomically

KIND = "tracelens_sweep"
VERSION = 1
PIECE = "piece"
"""Name in a report's settings of the key of all that it depends on."""

_NO_MATTER = ("progress", "memory")
"""Settings that no number depends on. The size of a batch is not among them: it decides about last bits."""


class Pieces:
    """The folder of a sweep whose reports are written one by one.

    Args:
        keys: name of each entry → key of all that its report depends on (`piece_key`).
        resume: whether pieces of the same key that lie there are used.

    Raises `OutputError` if the folder holds something that is not a sweep.
    """

    def __init__(self, folder: str | Path, keys: Mapping[str, str], *, resume: bool) -> None:
        self.folder, self.keys = check_folder(folder, KIND), keys
        self.done: dict[str, AuditReport] = {}
        if resume:
            finished = [name for name, key in keys.items() if _key_of(self.folder / name) == key]
            self.done = {name: report for name in finished if (report := _load(self.folder / name))}
        for name in self.missing:
            check_folder(self.folder / name, REPORT_KIND)

    @property
    def missing(self) -> list[str]:
        return [name for name in self.keys if name not in self.done]

    def begin(self) -> None:
        """Says in the folder what is to come."""
        self._mark({KIND: UNFINISHED, "precisions": dict(self.keys)})

    def add(self, name: str, report: AuditReport) -> None:
        """Writes a report; one that is interrupted is as good as none."""
        report.save(self.folder / name)
        self.done[name] = report

    def finish(self) -> None:
        assert not self.missing
        self._mark({KIND: VERSION, "precisions": list(self.keys)})

    def _mark(self, data: dict[str, Any]) -> None:
        write_atomically(self.folder / MARKER, json.dumps(data) + "\n")


def missing_pieces(folder: Path) -> list[str]:
    """Entries of an interrupted sweep that have no report yet; none of a sweep that is whole, or of another folder."""
    data = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    if data.get(KIND) != UNFINISHED:
        return []
    return [name for name, key in data["precisions"].items() if _key_of(folder / name) != key] or ["its end"]


def _key_of(folder: Path) -> str | None:
    """The key of a piece; None if it is not there or not whole."""
    try:
        data = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return None if data[REPORT_KIND] == UNFINISHED else data["settings"].get(PIECE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _load(folder: Path) -> AuditReport | None:
    try:
        return AuditReport.load(folder)
    except ResultFileError:
        return None


def piece_key(sweep: str, entry: Any) -> str:
    """Of what a sweep's pieces have in common (`sweep_key`) and what tells an entry: a specification, or a build's `state_of`."""
    return _digest([sweep, entry])


def sweep_key(
    model: Any,
    saes: SAEs,
    question: Question,
    *,
    tokenizer: Any,
    fingerprint: Fingerprint | None,
    calibration: Sequence[Any] | None,
    settings: AuditSettings,
) -> str:
    """SHA-256 (hex) of what all reports of a sweep depend on: weights, SAEs, prompts as tokens, settings, versions."""
    texts = [*question.texts, *(text for text in calibration or () if isinstance(text, str))]
    return _digest(
        {
            "versions": [VERSION, __version__, torch.__version__],
            "model": state_of(model),
            "saes": {str(site): [sae_hash(sae), type(sae).__name__, _plain(sae)] for site, sae in saes.items()},
            "question": asdict(question),
            "tokens": texts if tokenizer is None else tokenizer(texts, verbose=False)["input_ids"],
            "calibration": [getattr(prompt, "prompt", prompt) for prompt in calibration or ()],
            "fingerprint": fingerprint and fingerprint.to_dict(),
            "settings": {name: value for name, value in asdict(settings).items() if name not in _NO_MATTER},
        }
    )


def state_of(model: Any) -> list[Any]:
    """What tells a model from others: its config, what it simulates, and a hash of its tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return [type(model).__name__, _plain(model), str(getattr(model, "precision", None)), digest.hexdigest()]


def files_of(path: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change of each file of a checkpoint: what tells a build without reading it."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def _plain(thing: Any) -> dict[str, Any]:
    """What of a thing's config is numbers, words and dtypes."""
    cfg = getattr(thing, "cfg", None)
    return {name: value for name, value in sorted(getattr(cfg, "__dict__", {}).items()) if not name.startswith("_")}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=_as_json).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    # Of other objects the kind: their text may hold an address, which is another in each process.
    return str(value) if isinstance(value, torch.dtype | torch.device | Path) else type(value).__name__
