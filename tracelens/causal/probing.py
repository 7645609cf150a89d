"""What a model's runs may leave out, found out on a few tokens."""

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tracelens.causal.past import Past
from tracelens.sites import Site

if TYPE_CHECKING:
    from tracelens.causal.rerun import Rerunner

SAME, NEAR = 1e-4, 5e-2
"""Largest relative L2 difference of logits between two ways to run: with the same shapes, where bits agree but for a kernel's
whims, and with others, where sums are taken in another order and a rounding of activations may fall to the other side.
A lost position or a wrong mask costs far more."""

_POSITIONS = ("standard", "rotary", "alibi")
"""Positional embeddings of which a run that begins at a position loses nothing."""


_KNOWN: WeakKeyDictionary[Any, tuple[int, "Abilities"]] = WeakKeyDictionary()
"""Of models that have been asked already, with the number of hooks that they had."""


class Abilities(NamedTuple):
    """What a `Rerunner`'s properties of the same names say."""

    resumes: bool
    continues: bool
    adds_up: bool


@torch.no_grad()
def abilities(runner: "Rerunner") -> Abilities:
    """What the runs of a model may leave out; asked anew when hooks that stay have been added or taken away."""
    model = runner.model
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    if model not in _KNOWN or _KNOWN[model][0] != hooks:
        _KNOWN[model] = hooks, _found(runner)
    return _KNOWN[model][1]


def _found(runner: "Rerunner") -> Abilities:
    cfg, n = runner.model.cfg, runner.n_layers
    length = min(4, int(cfg.n_ctx))
    tokens = torch.arange(2 * length, device=runner.device).remainder(cfg.d_vocab).view(2, length)
    names = ["resid_pre", "attn_out", "mlp_out", "resid_post"] + ["resid_mid"] * (runner.block == "sequential")
    hooks = getattr(runner.model, "hook_dict", {})
    keep = [site for site in (Site(layer, name) for layer in range(n) for name in names) if str(site) in hooks]
    logits, own = runner.run(tokens, keep=keep)
    assert logits is not None
    if not _starts(runner.model, own, logits, n):
        return Abilities(False, False, False)
    plain = length > 2 and getattr(cfg, "positional_embedding_type", "") in _POSITIONS
    plain = plain and getattr(cfg, "attention_dir", "causal") == "causal"
    return Abilities(True, plain and _continues(runner, tokens, own, logits), _adds_up(runner, own))


def _starts(model: Any, own: dict[Site, Tensor], logits: Tensor, n: int) -> bool:
    """Whether the last layer alone, from what it held, gives the same logits. The first layer is tried by `_continues`; what
    is lost with the tokens is lost to every layer."""
    try:
        again = model.forward(own[Site(n - 1, "resid_pre")], start_at_layer=n - 1, return_type="logits")
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        return False
    return _agree(again[:, -1], logits, SAME)


def _continues(runner: "Rerunner", tokens: Tensor, own: dict[Site, Tensor], logits: Tensor) -> bool:
    """Whether the last two positions, beside the past of the others and with a row that joins late, give the same logits."""
    n, begin = runner.n_layers, tokens.shape[1] - 2
    try:
        cache = runner.new_cache(2)
        runner.run(tokens, cache=cache, stop=n)
        entries = [(Site(0, "resid_pre"), own[Site(0, "resid_pre")][:1, begin:])]
        late = Site(n - 1, "resid_pre" if n > 1 else "resid_post")
        entries.append((late, own[late][1:, begin:]))
        past = (Past.of(cache), begin, torch.tensor([0, 1]))
        return _agree(runner.joined(entries, past=past, narrow=True), logits, NEAR)
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False


def _adds_up(runner: "Rerunner", own: dict[Site, Tensor]) -> bool:
    def same(into: Site, *parts: str) -> bool:
        total = sum(own[Site(into.layer, part)] for part in parts)
        return isinstance(total, Tensor) and torch.equal(runner.through(into, total), own[into])

    try:
        for layer in range(runner.n_layers):
            mid, post = Site(layer, "resid_mid"), Site(layer, "resid_post")
            if runner.block == "sequential":
                good = same(mid, "resid_pre", "attn_out") and same(post, "resid_mid", "mlp_out")
            else:
                good = same(post, *SUMS[runner.block])
            if not good:
                return False
    except KeyError:
        return False
    return True


SUMS: dict[str, tuple[str, ...]] = {
    "sequential": ("resid_mid", "mlp_out"),
    "parallel": ("resid_pre", "attn_out", "mlp_out"),
    "attention": ("resid_pre", "attn_out"),
}
"""Kind of block → what `resid_post` is the sum of, in the order in which it is added."""


def _agree(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    # Unknown numbers agree with nothing, so that a NaN falls back to the plain way.
    return bool((ours - theirs).float().norm() <= tolerance * theirs.float().norm())
