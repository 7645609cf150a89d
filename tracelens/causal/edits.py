"""What the runs of a pass hold in place of their own: the cells that are replaced, found for all runs at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracelens.causal.places import PATTERNS
from tracelens.causal.rerun import Edit
from tracelens.causal.schedule import ArmTable, Positions, Runs, order, repeated
from tracelens.features.sae_encode import encode
from tracelens.sites import Site

_AT_ONCE = 512
"""Tokens that are encoded together: an SAE's features of many would be the largest tensor there is."""


@dataclass(frozen=True)
class FeatureValues:
    """Of one SAE, the features that some arm replaces."""

    sae: Any
    features: Int[Tensor, "feature"]
    wanted: Float[Tensor, "prompt pos feature"]
    own: Float[Tensor, "prompt pos feature"]
    """In the target's unpatched run."""


def read_features(
    sae: Any, values: Float[Tensor, "prompt pos *width"], features: Sequence[int]
) -> Float[Tensor, "prompt pos feature"]:
    """Some features of an SAE at every position."""
    tokens = values.flatten(0, 1)
    found = [encode(sae, tokens[i : i + _AT_ONCE])[:, list(features)] for i in range(0, len(tokens), _AT_ONCE)]
    return torch.cat(found).unflatten(0, values.shape[:2])


class PassEdits:
    """The edits of one pass.

    Values may come with their last positions alone, and where runs begin with the rows that begin there alone; a cell that
    such a value does not have is left out.
    """

    def __init__(
        self,
        table: ArmTable,
        positions: Positions,
        runs: Runs,
        live: Bool[Tensor, "place prompt"],
        new: Mapping[Site, Tensor],
        features: Mapping[Site, FeatureValues],
        n_heads: int,
    ) -> None:
        self._table, self._positions, self._runs = table, positions, runs
        self._new, self._features, self._n_heads = new, features, n_heads
        count = torch.bincount(table.arm, minlength=table.n_arms)
        row, nth = repeated(count[runs.arm])
        place = (count.cumsum(0) - count)[runs.arm[row]] + nth
        seen = live[place, runs.prompt[row]]
        self._row, self._place = row[seen], place[seen]
        self._site = table.site[self._place]
        orders = torch.tensor([order(site) for site in table.sites], dtype=torch.long)
        self._order = orders[self._site]
        self._early = self._order < runs.begin[self._row]

    def late(self) -> dict[str, Edit]:
        """Hook name → what is done there, for all that is changed at or behind the place where its run begins."""
        present = self._site[~self._early].unique().tolist()
        return {str(site): self._edit(site, self._members(site, early=False), 0) for site in self._named(present)}

    def early(self, site: Site, rows: slice) -> Edit | None:
        """What is done to a site's value, in the runs `rows` alone, before they begin."""
        if site not in self._table.sites:
            return None
        members = self._members(site, early=True)
        row = self._row[members]
        members = members[(row >= rows.start) & (row < rows.stop)]
        return self._edit(site, members, rows.start) if len(members) else None

    def _named(self, indices: Sequence[int]) -> list[Site]:
        return [self._table.sites[index] for index in indices]

    def _members(self, site: Site, *, early: bool) -> Int[Tensor, "member"]:
        return ((self._site == self._table.sites.index(site)) & (self._early == early)).nonzero().squeeze(1)

    def _edit(self, site: Site, members: Int[Tensor, "member"], begun: int) -> Edit:
        """`begun`: the row of the pass that is the first of the value."""
        place = self._place[members]
        unit, featured = self._table.unit[place], self._table.feature[place] >= 0
        square = site.name in PATTERNS
        if square:
            cells = [self._square_cells(members)]
        else:
            chosen = (members[~featured & (unit < 0)], members[~featured & (unit >= 0)])
            cells = [self._cells(some, units=bool(i)) for i, some in enumerate(chosen) if len(some)]
        moved = members[featured]
        length, prompt = self._positions.length, self._runs.prompt

        def edit(value: Tensor) -> Tensor:
            value = value.clone()
            shift = length - value.shape[2 if square else 1]
            for row, *rest in cells:
                _put(value, self._new[site], (row - begun, *rest), prompt[row], 2 if square else 1, shift)
            if len(moved):
                self._move(value, site, moved, begun, shift)
            return value

        return edit

    def _at(self, members: Int[Tensor, "member"]) -> tuple[Int[Tensor, "cell"], Int[Tensor, "cell"]]:
        """(member, position) of every position that the members' places have."""
        return self._positions.expand(self._table.where[self._place[members]], self._runs.prompt[self._row[members]])

    def _cells(self, members: Int[Tensor, "member"], *, units: bool) -> list[Tensor]:
        """Row and position, and the unit if these are `units`, of every cell that is replaced."""
        pair, position = self._at(members)
        members = members[pair]
        unit = [self._table.unit[self._place[members]]] if units else []
        return [self._row[members], position, *unit]

    def _square_cells(self, members: Int[Tensor, "member"]) -> list[Tensor]:
        """Row, head, query position and key position of every cell that is replaced."""
        pair, query = self._at(members)
        members = members[pair]
        keys = self._table.key[self._place[members]]
        pair, key = self._positions.expand(keys, self._runs.prompt[self._row[members]])
        members, query = members[pair], query[pair]
        unit = self._table.unit[self._place[members]]
        cell, nth = repeated(torch.where(unit < 0, self._n_heads, 1))
        head = torch.where(unit[cell] < 0, nth, unit[cell])
        return [self._row[members][cell], head, query[cell], key[cell]]

    def _move(self, value: Tensor, site: Site, members: Int[Tensor, "member"], begun: int, shift: int) -> None:
        """Moves features to where they shall be along their decoder rows, all of a site together; all else, the SAE's error
        too, stays. What features are is known where the site is the first that a run changes, and encoded elsewhere."""
        known = self._features[site]
        pair, position = self._at(members)
        seen = position >= shift
        pair, position = pair[seen], position[seen]
        members = members[pair]
        row, feature = self._row[members], self._table.feature[self._place[members]]
        at = tuple(index.to(known.wanted.device) for index in (self._runs.prompt[row], position, feature))
        wanted, current = known.wanted[at], known.own[at].clone()
        changed = ~self._untouched()[members]
        if changed.any():
            cell, back = (row * self._positions.length + position)[changed].unique(return_inverse=True)
            rows = (cell // self._positions.length - begun, cell % self._positions.length - shift)
            found = read_features(known.sae, value[_on(value, rows)][None], known.features.tolist())[0]
            current[changed.to(current.device)] = found[_on(found, (back, feature[changed]))].to(current)
        directions = known.sae.W_dec[known.features[feature].to(known.sae.W_dec.device)]
        steps = (wanted - current).to(value)[:, None] * directions.to(value)
        flat = value.view(*value.shape[:2], -1)
        flat.index_put_(_on(value, (row - begun, position - shift)), steps, accumulate=True)

    def _untouched(self) -> Bool[Tensor, "member"]:
        """Whether nothing of its run is changed before this place's site, nor anything but features there."""
        far = int(self._order.max()) + 1 if len(self._order) else 0
        plain = self._table.feature[self._place] < 0
        none = torch.full((len(self._runs),), far, dtype=torch.long)
        first = none.scatter_reduce(0, self._row, self._order, "amin")
        first_plain = none.scatter_reduce(0, self._row, torch.where(plain, self._order, far), "amin")
        return (self._order == first[self._row]) & (first_plain[self._row] > self._order)


def _put(
    value: Tensor, new: Tensor, cells: tuple[Tensor, ...], prompt: Int[Tensor, "cell"], axis: int, shift: int
) -> None:
    """Writes `new` into the cells of a value that lacks the first `shift` positions; positions are on axis `axis`."""
    if shift:
        there = cells[axis] >= shift
        cells, prompt = tuple(index[there] for index in cells), prompt[there]
    source = new[_on(new, (prompt, *cells[1:]))]
    target = tuple(index - shift if i == axis else index for i, index in enumerate(cells))
    value[_on(value, target)] = source.to(value)


def _on(tensor: Tensor, indices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(index.to(tensor.device) for index in indices)
