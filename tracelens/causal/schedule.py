"""Which runs a set of arms needs, where each begins, and which of them go side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tracelens.causal.places import PATTERNS, Arm, Where
from tracelens.causal.probing import SUMS
from tracelens.causal.prompts import Batch, PromptSet
from tracelens.causal.rerun import Rerunner
from tracelens.sites import Site

IN_BLOCK: Mapping[str, int] = {
    **{"resid_pre": 0, "q": 1, "k": 1, "v": 1, "attn_scores": 2, "pattern": 3, "z": 4, "attn_out": 5, "resid_mid": 6},
    **{"mlp_pre": 7, "mlp_post": 8, "mlp_out": 9, "resid_post": 10},
}
"""The order in which a block comes to its sites."""
PRE, MID, POST, STEPS = 0, 6, 11, 12
"""Where in a block runs may begin: at `resid_pre`, at `resid_mid`, behind `resid_post`; and steps of a block."""
_MIXING = ("resid_pre", "k", "v")
"""Sites of the last block that reach the last position from all others."""


def order(site: Site) -> int:
    """A number that grows from site to site in the order in which a model comes to them."""
    return STEPS * site.layer + IN_BLOCK[site.name]


def begin_of(site: Site, runner: Rerunner) -> int:
    """The latest step at which a run that changes this site can begin: nothing before it has to be computed again."""
    layer = STEPS * site.layer
    if not (runner.resumes and runner.adds_up):
        return layer + PRE
    if site.name == "resid_post" or (site.name in SUMS[runner.block] and site.name.endswith("_out")):
        # A sum of what is kept and what is new: in a sequential block that of the attention is `resid_mid`.
        return layer + POST
    if runner.block == "sequential" and IN_BLOCK[site.name] >= IN_BLOCK["attn_out"]:
        return layer + MID
    return layer + PRE


def entry_site(begin: int, runner: Rerunner) -> Site:
    """The site at which runs that begin there join the others."""
    layer, step = divmod(begin, STEPS)
    if step == MID:
        return Site(layer, "resid_mid")
    layer += step == POST
    return Site(layer, "resid_pre") if layer < runner.n_layers else runner.end


def parts_of(begin: int, sites: Sequence[Site], runner: Rerunner) -> list[Site]:
    """Sites whose sum is what a run holds where it begins, if it changes some of `sites` before that."""
    layer, step = divmod(begin, STEPS)
    if step == PRE:
        return [Site(layer, "resid_pre")]
    names = ("resid_pre", "attn_out") if step == MID else SUMS[runner.block]
    parts = [Site(layer, name) for name in names]
    if any(part in sites for part in parts if part.name.endswith("_out")):
        return parts
    return [Site(layer, "resid_mid" if step == MID else "resid_post")]


@dataclass(frozen=True)
class ArmTable:
    """The places of all arms as columns, arm by arm."""

    n_arms: int
    sites: list[Site]
    wheres: list[Where]
    arm: Int[Tensor, "place"]
    site: Int[Tensor, "place"]
    """Index in `sites`; `where` and `key` index `wheres`."""
    where: Int[Tensor, "place"]
    key: Int[Tensor, "place"]
    unit: Int[Tensor, "place"]
    """-1: the whole site."""
    feature: Int[Tensor, "place"]
    """Index among the features of the site, in `features`; -1: none."""
    features: dict[Site, list[int]]

    @classmethod
    def of(cls, arms: Sequence[Arm]) -> "ArmTable":
        sites: dict[Site, int] = {}
        wheres: dict[Where, int] = {}
        features: dict[Site, dict[int, int]] = {}
        rows: list[tuple[int, ...]] = []
        for index, arm in enumerate(arms):
            for place in arm:
                known = features.setdefault(place.site, {}) if place.feature is not None else {}
                rows.append(
                    (
                        index,
                        sites.setdefault(place.site, len(sites)),
                        wheres.setdefault(place.where, len(wheres)),
                        wheres.setdefault(place.key, len(wheres)) if place.site.name in PATTERNS else -1,
                        -1 if place.unit is None else place.unit,
                        -1 if place.feature is None else known.setdefault(place.feature, len(known)),
                    )
                )
        columns = torch.tensor(rows, dtype=torch.long).reshape(-1, 6).T
        return cls(
            len(arms),
            list(sites),
            list(wheres),
            *columns,
            features={site: list(known) for site, known in features.items()},
        )


@dataclass(frozen=True)
class Positions:
    """The positions that each `where` means in each prompt of a batch, one after the other."""

    length: int
    flat: Int[Tensor, "position"]
    offset: Int[Tensor, "where prompt"]
    count: Int[Tensor, "where prompt"]
    first: Int[Tensor, "where prompt"]
    """The smallest; `length` where there is none."""
    has_last: Bool[Tensor, "where prompt"]

    @classmethod
    def of(cls, prompts: PromptSet, batch: Batch, wheres: Sequence[Where]) -> "Positions":
        length = batch.tokens.shape[1]
        lists = [list(prompts.positions(i, where)) for where in wheres for i in batch.prompt.tolist()]
        shape = (len(wheres), len(batch))
        count = torch.tensor([len(found) for found in lists], dtype=torch.long)
        return cls(
            length=length,
            flat=torch.tensor([position for found in lists for position in found], dtype=torch.long),
            offset=(count.cumsum(0) - count).view(shape),
            count=count.view(shape),
            first=torch.tensor([min(found, default=length) for found in lists], dtype=torch.long).view(shape),
            has_last=torch.tensor([length - 1 in found for found in lists], dtype=torch.bool).view(shape),
        )

    def expand(
        self, where: Int[Tensor, "pair"], prompt: Int[Tensor, "pair"]
    ) -> tuple[Int[Tensor, "cell"], Int[Tensor, "cell"]]:
        """(pair, position) of every position that each (where, prompt) has."""
        pair, nth = repeated(self.count[where, prompt])
        return pair, self.flat[self.offset[where, prompt][pair] + nth]


def repeated(count: Int[Tensor, "item"]) -> tuple[Int[Tensor, "copy"], Int[Tensor, "copy"]]:
    """Every index as often as its count says, and how manieth it is of its kind."""
    item = torch.repeat_interleave(count)
    return item, torch.arange(len(item)) - (count.cumsum(0) - count)[item]


@dataclass(frozen=True)
class Runs:
    """The runs that a batch needs, and no others: those whose arm changes nothing that the metric can see have its
    unpatched number."""

    arm: Int[Tensor, "run"]
    prompt: Int[Tensor, "run"]
    """In the batch."""
    begin: Int[Tensor, "run"]
    """The step at which it begins; see `begin_of`."""
    first: Int[Tensor, "run"]
    """The first position that it changes."""

    def __len__(self) -> int:
        return len(self.arm)

    def __getitem__(self, index: Any) -> "Runs":
        return Runs(self.arm[index], self.prompt[index], self.begin[index], self.first[index])

    @classmethod
    def of(cls, table: ArmTable, positions: Positions, runner: Rerunner, *, whole: bool) -> "Runs":
        n_prompts = positions.count.shape[1]
        live = live_places(table, positions, runner, whole=whole)
        begins = torch.tensor([begin_of(site, runner) for site in table.sites], dtype=torch.long)[table.site]
        far = STEPS * (runner.n_layers + 1)
        begin = _smallest(torch.where(live, begins[:, None], far), table, far)
        first = _smallest(torch.where(live, positions.first[table.where], positions.length), table, positions.length)
        arm, prompt = (begin < far).nonzero().T if table.n_arms else torch.zeros(2, 0, dtype=torch.long)
        assert begin.shape == (table.n_arms, n_prompts)
        return cls(arm, prompt, begin[arm, prompt], first[arm, prompt])


def live_places(
    table: ArmTable, positions: Positions, runner: Rerunner, *, whole: bool
) -> Bool[Tensor, "place prompt"]:
    """Whether a place has positions in a prompt, and the metric can see one of them: in the last block, what stands behind
    the mixing of positions is read at the last alone."""
    live = positions.count[table.where] > 0
    square = table.key >= 0
    live[square] &= positions.count[table.key[square]] > 0
    if whole or not len(live):
        return live
    last = [site.layer == runner.n_layers - 1 and site.name not in _MIXING for site in table.sites]
    tail = torch.tensor(last)[table.site]
    live[tail] &= positions.has_last[table.where[tail]]
    return live


def _smallest(values: Int[Tensor, "place prompt"], table: ArmTable, none: int) -> Int[Tensor, "arm prompt"]:
    out = torch.full((table.n_arms, values.shape[1]), none, dtype=torch.long)
    return out.scatter_reduce(0, table.arm[:, None].expand_as(values), values, "amin")


def passes(runs: Runs, length: int, rows: int, tokens: int, *, split: bool) -> Iterator[tuple[int, Runs]]:
    """Runs that go side by side, with the position from which on they are computed.

    In a pass runs stand in the order in which they begin: a layer then computes those alone that have begun. If `split`,
    runs that change late positions only go apart from the others, in as many groups as
    a quarter of a pass fills: TransformerLens copies the weights of a layer each time that it is called.

    Args:
        length: tokens of each prompt.
        rows, tokens: the most runs of a pass, and the most tokens.
    """
    groups = max(1, min(length, len(runs) * length // max(1, tokens // 4))) if split else 1
    by_first = runs[torch.argsort(runs.first, descending=True, stable=True)]
    size = -(-len(runs) // groups) if len(runs) else 1
    for i in range(0, len(runs), size):
        group = by_first[slice(i, i + size)]
        begin = int(group.first.min()) if split else 0
        group = group[torch.argsort(group.begin, stable=True)]
        most = max(1, min(rows, tokens // (length - begin)))
        for j in range(0, len(group), most):
            yield begin, group[slice(j, j + most)]
