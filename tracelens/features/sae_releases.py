"""SAEs on the hub: releases that SAELens knows by name, and repositories laid out as its folders."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from tracelens.errors import SAEError, SAENotFoundError, UnknownNameError
from tracelens.features.sae_folders import CONFIG, WEIGHTS, Folder, find, finished, quietly
from tracelens.sites import Site

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LAYER = re.compile(r"(?:blocks\.|layers?[._]?|^l|/l)(\d+)(?!\d)", re.IGNORECASE)
"""The layer in the ids that releases give their SAEs: `blocks.8.hook_z`, `layer_12/width_16k/…`, `l8r_8x`."""

Admits = Callable[[Site], bool]
AdmitsLayer = Callable[[int], bool]


@dataclass(frozen=True)
class Released:
    """One SAE of a release, or of a repository that is none."""

    release: str
    sae_id: str

    def __str__(self) -> str:
        return f"{self.release}/{self.sae_id}"

    def read(self, device: str | torch.device, dtype: torch.dtype) -> Any:
        from sae_lens import SAE

        with _hub_errors(self):
            sae = quietly(lambda: SAE.from_pretrained(self.release, self.sae_id, device=str(device), dtype="float32"))
        _override(sae, self)
        return finished(sae.to(dtype=torch.float32), dtype, f"SAE {self}")


def _override(sae: Any, item: Released) -> None:
    """Writes into the metadata what the directory says of the model; SAELens does so for configs before version 6 alone."""
    from sae_lens.loading.pretrained_sae_loaders import LLM_METADATA_KEYS
    from sae_lens.loading.pretrained_saes_directory import get_config_overrides

    for key, value in get_config_overrides(item.release, item.sae_id).items():
        if key in LLM_METADATA_KEYS:
            setattr(sae.cfg.metadata, key, value)


def directory() -> dict[str, Any]:
    """Release → what SAELens knows of it."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


def one(release: str, sae_id: str) -> Released:
    """One SAE by name; raises `SAENotFoundError`, with what is alike, for names that SAELens does not know."""
    known = directory()
    if release not in known:
        if REPOSITORY.fullmatch(release):
            return Released(release, sae_id)
        raise unknown(release)
    if sae_id not in known[release].saes_map:
        raise SAENotFoundError(f"release {release!r} has no SAE {sae_id!r}.{_alike(sae_id, known[release].saes_map)}")
    return Released(release, sae_id)


def all_of(release: str, admits: Admits, admits_layer: AdmitsLayer) -> list[Released]:
    """The SAEs of a release that are admitted; raises `SAEError` if that leaves several for one site."""
    by_site: dict[Site, list[str]] = {}
    nowhere: list[str] = []
    for sae_id in directory()[release].saes_map:
        layer = _LAYER.search(sae_id)
        if layer and not admits_layer(int(layer[1])):
            continue
        hook_name = _hook_name(release, sae_id)
        try:
            site = Site.parse(hook_name)
        except UnknownNameError:
            nowhere.append(hook_name)
            continue
        if admits(site):
            by_site.setdefault(site, []).append(sae_id)
    if nowhere and not by_site:
        raise SAEError(
            f"the SAEs of release {release!r} read {', '.join(sorted(set(nowhere))[:5])}, which are no sites"
        )
    for site, ids in by_site.items():
        if len(ids) > 1:
            some = ", ".join(repr(name) for name in ids[:5]) + (", ..." if len(ids) > 5 else "")
            raise SAEError(
                f"release {release!r} has {len(ids)} SAEs for {site}; name one of each site, "
                f"load_saes([({release!r}, {ids[0]!r}), ...]), of: {some}"
            )
    return [Released(release, ids[0]) for ids in by_site.values()]


def repository(name: str, admits_layer: AdmitsLayer) -> list[Folder]:
    """The SAEs of a hub repository in SAELens' layout, downloaded to the hub's cache unless they are there."""
    from huggingface_hub import snapshot_download

    with _hub_errors(name):
        root = Path(snapshot_download(name, allow_patterns=[f"*{CONFIG}"]))
        homes = sorted(file.parent.relative_to(root) for file in root.rglob(CONFIG))
        if not homes:
            raise SAEError(f"repository {name!r} holds no SAE in SAELens' layout ({CONFIG} and {WEIGHTS})")
        chosen = [h for h in homes if (layer := _LAYER.search(str(h))) is None or admits_layer(int(layer[1]))]
        wanted = [str(home / file) for home in chosen for file in (CONFIG, WEIGHTS)]
        root = Path(snapshot_download(name, allow_patterns=wanted)) if wanted else root
    return [folder for home in chosen for folder in find(root / home)]


def unknown(name: str) -> SAENotFoundError:
    """The error for a name that is no folder, release or repository."""
    return SAENotFoundError(
        f"no folder and no SAELens release is called {name!r}.{_alike(name, directory())} Give a folder with {CONFIG} and "
        f"{WEIGHTS}, a release of https://decoderesearch.github.io/SAELens/latest/pretrained_saes/, 'release/sae_id', a "
        "hub repository 'org/name', or 'organism'"
    )


def _alike(name: str, known: Any) -> str:
    close = get_close_matches(name, [*known], n=5, cutoff=0.5) or sorted(known)[:5]
    return f" Alike are: {', '.join(repr(other) for other in close)}."


def _hook_name(release: str, sae_id: str) -> str:
    """The id itself where it is one, and otherwise what the SAE's config says."""
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    try:
        return str(Site.parse(sae_id))
    except UnknownNameError:
        pass
    with _hub_errors(f"{release}/{sae_id}"):
        config = load_sae_config_from_huggingface(release, sae_id)
    return str(config["metadata"].get("hook_name"))


@contextmanager
def _hub_errors(what: Any) -> Iterator[None]:
    """Turns what the hub and SAELens raise into our errors."""
    import httpx
    import requests
    from huggingface_hub import errors

    try:
        yield
    except SAEError:
        raise
    except errors.GatedRepoError as error:
        raise SAENotFoundError(f"{what} is gated: accept its terms on the hub and log in (`hf auth login`)") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(what, error) from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise SAENotFoundError(f"the hub has no {what} ({error}); check the name") from error
    except (errors.HfHubHTTPError, httpx.HTTPError, requests.RequestException, ConnectionError) as error:
        raise _unreachable(what, error) from error
    except Exception as error:  # SAELens lets through whatever json, numpy, safetensors or torch raises
        raise SAEError(f"{what} is not an SAE that SAELens can read: {type(error).__name__}: {error}") from error


def _unreachable(what: Any, error: Exception) -> SAENotFoundError:
    return SAENotFoundError(
        f"{what} is not in the hub's cache, and the hub cannot be reached ({type(error).__name__}); load it once where "
        "there is a network (HF_HOME says where the cache is, HF_HUB_OFFLINE=1 that nothing else is asked), or give a "
        "local folder"
    )
