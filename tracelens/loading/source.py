"""Where a checkpoint is: a local folder or file, or a snapshot of a hub repository in the cache."""

import logging
import re
from os import PathLike
from pathlib import Path

from tracelens.errors import CheckpointError, CheckpointNotFoundError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
"""What an id on the hub looks like: `name` or `organisation/name`."""
GGUF_ON_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)/([\w./-]+\.gguf)")
BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
"""Kinds of weight files in the order of preference; one kind is downloaded."""

logger = logging.getLogger(__name__)


def resolve(source: str | PathLike[str], *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder or `.gguf` file that `source` names; of a folder with nothing but one `.gguf` in it, that file.

    What looks like the id of a hub repository (`org/model`, or `org/model/file.gguf`) and is nothing on this machine is
    downloaded to the hub's cache; huggingface_hub's settings (token, cache, endpoint, offline mode) are honoured.

    Raises `CheckpointNotFoundError` if there is no such thing, `CheckpointError` if the hub cannot be reached or does
    not let us in, for a file that is no model, and for what may not be read.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _lone_gguf(path) or path
        if path.is_file():
            with path.open("rb") as file:
                magic = file.read(4)
            if magic != b"GGUF":
                raise CheckpointError(
                    f"{path} is a file, but not a GGUF file; give the folder with config.json and the weights"
                )
            return path
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read ({error}); mend its permissions") from error
    if isinstance(source, str):
        if file := GGUF_ON_HUB.fullmatch(source):
            return _from_hub(file[1], revision, local_files_only, file=file[2])
        if REPOSITORY.fullmatch(source) and not source.endswith(".gguf"):
            return _from_hub(source, revision, local_files_only)
    raise CheckpointNotFoundError(
        f"no checkpoint folder at {str(source)!r}; give a folder with config.json and weights, a .gguf file, "
        "the id of a model on the hub ('org/model', 'org/model/file.gguf'), or 'organism'"
    )


def _lone_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds one, and no other kind of checkpoint; None otherwise."""
    files = sorted(file for file in folder.iterdir() if file.suffix == ".gguf")
    if not files or (folder / "config.json").is_file():
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8])
        raise CheckpointError(f"{folder} holds {len(files)} GGUF files ({names}); give the path of one: {files[0]}")
    return files[0]


def _from_hub(repository: str, revision: str | None, local_files_only: bool, file: str | None = None) -> Path:
    from huggingface_hub import errors

    where = repr(repository) + (f" at revision {revision!r}" if revision else "")
    try:
        try:
            return _cached(repository, revision, file) if local_files_only else _download(repository, revision, file)
        except errors.LocalEntryNotFoundError as error:
            # What stopped us from asking the hub says more than that the cache is empty.
            if isinstance(error.__cause__, errors.HfHubHTTPError):
                raise error.__cause__ from error
            raise
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{where} is gated: accept its terms on the hub and log in (`hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"{repository!r} has no revision {revision!r}; check the name") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"no folder and no model on the hub is called {where}; check the name, or log in if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"there is no folder {repository!r}, and the hub's cache does not hold {where} in full; download it where "
            f"there is a network (`hf download {repository}`), or give a local folder"
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointNotFoundError(f"{where} has no file {file!r}; check the name") from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"the hub did not give {where} ({error}); try again later") from error


def _cached(repository: str, revision: str | None, file: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    if file:
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=True))
    patterns = [*BESIDE_WEIGHTS, WEIGHTS[0]]
    return Path(
        snapshot_download(
            repository, revision=revision, local_files_only=True, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    )


def _download(repository: str, revision: str | None, file: str | None) -> Path:
    import httpx
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

    if file:
        return Path(hf_hub_download(repository, file, revision=revision))
    try:
        files = [name for name in HfApi().list_repo_files(repository, revision=revision) if "/" not in name]
    except (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        logger.info("the hub cannot be asked about %s (%s); looking in its cache", repository, error)
        try:
            return _cached(repository, revision, file)
        except errors.LocalEntryNotFoundError as missing:
            raise missing from error
    kind = next((kind for kind in WEIGHTS if any(name.endswith(kind[1:]) for name in files)), None)
    if kind is None and (models := [name for name in files if name.endswith(".gguf")]):
        raise CheckpointError(
            f"{repository!r} holds GGUF files ({', '.join(models[:8])}); name one: '{repository}/{models[0]}'"
        )
    patterns = [*BESIDE_WEIGHTS, *([kind] if kind else [])]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
