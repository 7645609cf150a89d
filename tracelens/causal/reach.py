"""Whether what is put in at a hook point gets anywhere.

Some hook points of a `TransformerBridge` show a value that the model computes with elsewhere: an edit there changes nothing, or
a part of what it should. A patch would then silently measure nothing.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.errors import UnknownNameError
from tracelens.sites import Site

if TYPE_CHECKING:
    from tracelens.causal.rerun import Rerunner

Edit = Callable[[Tensor], Tensor]
N_TOKENS = 3


def reaching(model: Any, edits: Iterable[tuple[str, Edit]]) -> list[tuple[str, Edit]]:
    """The same edits at hook points where they reach all that they should.

    A bridge's `resid_mid` is what its second norm reads, beside which the residual stream goes on unchanged. There, what an
    edit adds to `resid_mid` is added to the attention's output, after any edit of that: equal up to one rounding.
    """
    found: list[tuple[str, Edit]] = []
    behind: list[tuple[str, Edit]] = []
    for name, edit in edits:
        if _is_beside(model, name):
            behind += _through_attention(Site.parse(name).layer, edit)
        else:
            found.append((name, edit))
    return found + behind


def _is_beside(model: Any, name: str) -> bool:
    point = getattr(model, "hook_dict", {}).get(name)
    return name.endswith("hook_resid_mid") and point is not None and point.name != name


def _through_attention(layer: int, edit: Edit) -> list[tuple[str, Edit]]:
    before: list[Tensor] = []

    def remember(value: Tensor) -> Tensor:
        before[:] = [value]
        return value

    def add(value: Tensor) -> Tensor:
        middle = before.pop() + value
        return value + (edit(middle) - middle)

    return [(str(Site(layer, "resid_pre")), remember), (str(Site(layer, "attn_out")), add)]


def check_reach(runner: "Rerunner", names: Iterable[str]) -> None:
    """Raises `UnknownNameError` for the hook name of a site where an edit does not reach what its layer leaves.

    Tried once for each kind of site, on a prompt of three tokens.
    """
    points = getattr(runner.model, "hook_dict", {})
    for name in names:
        if name not in points or (site := _site(name)) is None or site.name in runner.reached:
            continue
        runner.reached.add(site.name)
        # A model that can begin at a layer computes with what its hook points give back.
        if not runner.resumes:
            _try(runner, site, points[name].name)


def _site(name: str) -> Site | None:
    try:
        return Site.parse(name)
    except UnknownNameError:
        return None


@torch.no_grad()
def _try(runner: "Rerunner", site: Site, point: str) -> None:
    tokens = torch.arange(N_TOKENS)[None] % runner.model.cfg.d_vocab
    left, stop = Site(site.layer, "resid_post"), site.layer + 1
    plain = runner.run(tokens, keep=[left], stop=stop)[1][left]
    moved = runner.run(tokens, edits={str(site): _disturbed}, keep=[left], stop=stop)[1][left]
    if torch.equal(plain, moved):
        raise UnknownNameError(
            f"what is put in at {site} gets nowhere in this model: its hook point {point!r} only shows the value; load the "
            "model with wrapper='hooked', or choose another site"
        )
    if site.name != "resid_mid":
        return
    parts = [Site(site.layer, name) for name in ("resid_pre", "attn_out", "resid_mid")]
    found = runner.run(tokens, keep=parts, stop=stop)[1]
    before, added, middle = (found[part].float() for part in parts)
    if (before + added - middle).norm() > 0.02 * middle.norm():
        raise UnknownNameError(
            f"{site} cannot be replaced in this model: it is not the sum of resid_pre and attn_out, and its hook point "
            f"{point!r} does not reach the residual stream; load the model with wrapper='hooked'"
        )


def _disturbed(value: Tensor) -> Tensor:
    return value.flip(-1) + 1
