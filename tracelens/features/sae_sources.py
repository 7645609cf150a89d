"""Where SAEs come from: folders, releases that SAELens knows by name, repositories on the hub."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tracelens.errors import SAEError
from tracelens.features import sae_folders, sae_releases
from tracelens.features.sae_sites import own_site
from tracelens.sites import Site

Source = str | Path | tuple[str, ...]


def load_saes(
    source: Source | list[Source],
    *,
    layers: Iterable[int] | None = None,
    sites: Iterable[Site | str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> dict[Site, Any]:
    """SAEs by site, lowest layer first.

    Args:
        source: one of the following, or a list of several, whose SAEs are put together:

            - a folder that holds one SAE (`cfg.json`, `sae_weights.safetensors`; or Sparsify's `sae.safetensors`) or one
              sub-folder per SAE; other sub-folders are passed over. `"organism"`, and `"saes/organism"` where no such
              folder exists, mean the SAEs that come with Tracelens;
            - the name of a release in SAELens' directory (`"gpt2-small-res-jb"`), of which all SAEs are taken that
              `layers` and `sites` admit;
            - one SAE of a release or of a hub repository: `(release, sae_id)` or `"release/sae_id"`;
            - a hub repository (`"org/name"`) laid out as such a folder.
        layers, sites: which SAEs to take (all); of what is on the hub, no others are downloaded.
        device: where the tensors go.
        dtype: what they are converted to. JumpReLU thresholds stay in float32: rounded, they move which features fire.
        progress: show a bar over the SAEs.

    The hub is asked through SAELens and huggingface_hub, whose settings (token, cache, offline mode) are honoured; what
    their cache holds needs no network.

    Raises:
        SAENotFoundError: there is no such folder, release or SAE, or the hub cannot be reached.
        SAEError: no SAE at the source, one that SAELens cannot read or that cannot be used here, one without a hook name
            that Tracelens knows, two for one site.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    from tqdm.auto import tqdm

    wanted = _Wanted.of(layers, sites)
    sources: list[Source] = source if isinstance(source, list) else [source]
    found = [item for one in sources for item in _items(one, wanted)]
    saes, homes = {}, {}
    for item in tqdm(found, unit="SAE", disable=not progress):
        sae = item.read(device, dtype)
        try:
            site = own_site(sae)
        except SAEError as error:
            raise SAEError(f"SAE in {item}: {error}") from error
        if not wanted(site):
            continue
        if site in saes:
            raise SAEError(f"two SAEs for {site}: {homes[site]} and {item}; keep one of them")
        saes[site], homes[site] = sae, item
    if not saes:
        raise SAEError(f"no SAE of {source!r} is {wanted}; leave out layers= and sites= to load all")
    return dict(sorted(saes.items()))


def _items(source: Source, wanted: "_Wanted") -> list[Any]:
    if isinstance(source, tuple):
        if len(source) != 2 or not all(isinstance(part, str) for part in source):
            raise SAEError(f"{source!r} is no source of SAEs; a tuple means (release, sae_id)")
        return [sae_releases.one(source[0], source[1])]
    if isinstance(source, Path) or source in ("organism", "saes/organism") or Path(source).expanduser().exists():
        return sae_folders.find(source)
    release, _, sae_id = source.partition("/")
    if Path(source).is_absolute() or source.startswith((".", "~")):
        return sae_folders.find(source)  # which says that there is none
    if source in (known := sae_releases.directory()):
        return sae_releases.all_of(source, wanted, wanted.layer)
    if sae_id and release in known:
        return [sae_releases.one(release, sae_id)]
    if sae_releases.REPOSITORY.fullmatch(source):
        return sae_releases.repository(source, wanted.layer)
    raise sae_releases.unknown(source)


@dataclass(frozen=True)
class _Wanted:
    """Which sites were asked for; None means all."""

    layers: frozenset[int] | None
    sites: frozenset[Site] | None

    @classmethod
    def of(cls, layers: Iterable[int] | None, sites: Iterable[Site | str] | None) -> "_Wanted":
        return cls(
            None if layers is None else frozenset(layers),
            None if sites is None else frozenset(Site.parse(site) for site in sites),
        )

    def __call__(self, site: Site) -> bool:
        return self.layer(site.layer) and (self.sites is None or site in self.sites)

    def layer(self, layer: int) -> bool:
        """Whether a site of this layer may be wanted."""
        admitted = self.sites is None or layer in {site.layer for site in self.sites}
        return admitted and (self.layers is None or layer in self.layers)

    def __str__(self) -> str:
        layers = "" if self.layers is None else f"at layers {', '.join(map(str, sorted(self.layers)))}"
        sites = "" if self.sites is None else f"at {', '.join(map(str, sorted(self.sites)))}"
        return " and ".join(filter(None, (layers, sites)))
