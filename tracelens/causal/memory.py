"""How many runs go side by side: as many as a budget of bytes holds."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tracelens.causal.places import PATTERNS, UNITS, n_units
from tracelens.errors import MemoryBudgetError
from tracelens.sites import Site

SHARE = 0.4
"""Of the free memory, that is used where no budget is given."""
MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens of one pass beyond which a larger pass gains nothing."""
INDEX_BYTES = 80
"""Of the indices of one cell of an attention pattern."""
UNKNOWN = 2 * 2**30
"""Bytes taken to be free where the system does not say."""


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device; of a processor's memory, what the container that we run in leaves of it."""
    if device.type == "cuda":
        # What torch holds and does not use is free too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    limits = [bytes_ for bytes_ in (_available(), *_group_limits()) if bytes_ is not None]
    return max(0, min(limits)) if limits else UNKNOWN


def _available() -> int | None:
    """Of the whole machine: what Linux says can be given out without swapping; elsewhere half of what is built in."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _group_limits(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the control groups of this process leave, as mounted in a container: version 2, then version 1."""
    found = []
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            most, taken = int((root / limit).read_text()), int((root / used).read_text())
            # Files that are cached count as used, and are given up when memory is short.
            fields = dict(line.split()[:2] for line in (root / stat).read_text().splitlines())
        except (OSError, ValueError):
            continue
        found.append(most - taken + int(fields.get("inactive_file", 0)))
    return found


def site_bytes(cfg: Any, site: Site, pos: int) -> int:
    """Bytes of what a site holds for one run of `pos` tokens."""
    if site.name in PATTERNS:
        width = cfg.n_heads * pos
    elif site.name in UNITS:
        heads = UNITS[site.name] == "head"
        width = n_units(cfg, site) * (cfg.d_head if heads else 1)
    else:
        width = cfg.d_model
    return int(width * pos * cfg.dtype.itemsize)


def run_bytes(cfg: Any, pos: int, sites: Iterable[Site], *, whole: bool = False) -> int:
    """Bytes that one run of `pos` tokens needs at its height: a block's intermediate values, the logits, and a copy of each
    edited site.
    """
    heads = cfg.n_heads * cfg.d_head
    block = pos * (8 * cfg.d_model + 6 * heads + 4 * (cfg.d_mlp or 0)) + 4 * cfg.n_heads * pos * pos
    logits = 4 * cfg.d_vocab * (pos if whole else 1)
    sites = list(sites)
    copies = 2 * max((site_bytes(cfg, site, pos) for site in sites), default=0)
    # Every cell of a pattern that is replaced is named by row, head, query and key, twice, and by its prompt.
    cells = INDEX_BYTES * cfg.n_heads * pos * pos if any(site.name in PATTERNS for site in sites) else 0
    return int((block + logits) * cfg.dtype.itemsize) + copies + cells


def kept_bytes(
    cfg: Any,
    pos: int,
    keep: Iterable[Site],
    replaced: Iterable[Site],
    *,
    past: bool = False,
    n_features: int = 0,
    whole: bool = False,
) -> int:
    """Bytes that are kept of one prompt of `pos` tokens: what its unpatched run holds at `keep`, what is put into `replaced`,
    its keys and values, its features in both, and its logits.
    """
    heads = (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) * cfg.d_head
    cache = 2 * cfg.n_layers * pos * heads * cfg.dtype.itemsize if past else 0
    logits = cfg.d_vocab * (pos if whole else 1) * cfg.dtype.itemsize
    sites = sum(site_bytes(cfg, site, pos) for site in (*keep, *replaced))
    return int(sites + cache + 2 * 4 * pos * n_features + 2 * logits)


def max_tokens(device: torch.device) -> int:
    """Tokens of one pass beyond which a larger pass gains nothing."""
    return MAX_TOKENS.get(device.type, MAX_TOKENS["cpu"])


def limit_of(budget: Any, device: torch.device) -> int:
    """The budget in bytes, given or found. Raises `MemoryBudgetError` for what is no number of bytes."""
    if budget is None:
        return int(SHARE * free_bytes(device))
    if isinstance(budget, str) or not budget > 0:
        raise MemoryBudgetError(
            f"memory_budget is {budget!r}; give bytes as a number above 0, such as 4 * 2**30 for 4 GiB"
        )
    return int(budget)


def rows_in_memory(limit: int, fixed: int, row: int, pos: int) -> int:
    """How many runs of one pass fit beside `fixed` bytes.

    Raises `MemoryBudgetError`, with the estimate, if not even one does.
    """
    if fixed + row > limit:
        raise MemoryBudgetError(
            f"one run of {pos} tokens needs about {(fixed + row) / 2**20:.1f} MiB ({fixed / 2**20:.1f} of them for what is kept "
            f"of the prompts), but the memory budget is {limit / 2**20:.1f} MiB; give a larger memory_budget, shorter prompts, "
            "or fewer sites at a time"
        )
    return (limit - fixed) // row


def rows_that_fit(budget: int | None, fixed: int, row: int, pos: int, device: torch.device) -> int:
    """How many runs of one pass fit beside `fixed` bytes and gain by going together. Raises as `rows_in_memory`."""
    rows = rows_in_memory(limit_of(budget, device), fixed, row, pos)
    return max(1, min(rows, max_tokens(device) // pos))
