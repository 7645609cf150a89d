"""Runs of a model that begin at a layer, from a residual stream that is given, and read off what a metric needs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tracelens.causal.past import Past
from tracelens.causal.reach import check_reach, reaching
from tracelens.sites import Site

if TYPE_CHECKING:
    from tracelens.causal.probing import Abilities

Edit = Callable[[Tensor], Tensor]
"""What a site holds [row, pos, ...] → what it shall hold; it must not write into what it is given."""
Block = Literal["sequential", "parallel", "attention"]
"""How a block adds up: the MLP behind the attention, beside it, or none."""


class Rerunner:
    """A model that can be run from any layer on.

    Where the model can start at a layer (`HookedTransformer`), it does; elsewhere (`TransformerBridge`, shortformer
    positions) it runs from the tokens and the residual stream is put in its place at that layer: the same numbers, at the
    cost of the layers below. What a model can do is found out by a run of a few tokens and not taken on trust.
    All rows of a call have the same length, so nothing is masked.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.n_layers = int(model.cfg.n_layers)
        self.device = torch.device(model.cfg.device)
        self.reached: set[str] = set()
        """Names of sites at which edits are known to take effect: `check_reach`."""

    @property
    def resumes(self) -> bool:
        """Whether the model can start at a layer."""
        return self._abilities.resumes

    @property
    def continues(self) -> bool:
        """Whether it can start at a layer and a position, beside the keys and values of the positions before, with rows
        joining on the way."""
        return self._abilities.continues

    @property
    def adds_up(self) -> bool:
        """Whether its residual stream is, to the last bit, the sum of what its hook points show."""
        return self._abilities.adds_up

    @cached_property
    def block(self) -> Block:
        names = getattr(self.model, "hook_dict", {})
        if all(str(Site(layer, "resid_mid")) in names for layer in range(self.n_layers)):
            return "sequential"
        return "attention" if getattr(self.model.cfg, "attn_only", False) else "parallel"

    @property
    def end(self) -> Site:
        """What the last block leaves."""
        return Site(self.n_layers - 1, "resid_post")

    def run(
        self,
        tokens: Int[Tensor, "row pos"],
        *,
        edits: Mapping[str, Edit] | None = None,
        keep: Sequence[Site] = (),
        start: int | None = None,
        residual: Float[Tensor, "row pos d_model"] | None = None,
        stop: int | None = None,
        whole: bool = False,
        cache: Any = None,
    ) -> tuple[Float[Tensor, "row *pos d_vocab"] | None, dict[Site, Tensor]]:
        """Logits of the last position (of all, [row, pos, d_vocab], if `whole`) and what the sites of `keep` hold.

        Args:
            tokens: of each row.
            edits: hook name → what is done to the value there; at layers below `start`, nothing.
            keep: sites whose values are returned, after any edit.
            start: the layer to begin at (`n_layers`: after the last), with `residual` as its input, which the rounding of a
                precision meets as it would any; None begins at the tokens.
            stop: the layer before which the run ends; logits are then None.
            cache: of TransformerLens, to be filled with keys and values.
        """
        check_reach(self, edits or ())
        found: dict[Site, Tensor] = {}

        def reader(site: Site) -> Callable[..., None]:
            def store(value: Tensor, hook: Any) -> None:
                found[site] = value

            return store

        hooks: list[tuple[str, Callable[..., Any]]] = []
        options: dict[str, Any] = {} if cache is None else {"past_kv_cache": cache}
        source = tokens = tokens.to(self.device)
        if start is not None and self.resumes:
            assert residual is not None
            source, options["start_at_layer"] = residual, start
        elif start is not None:
            assert residual is not None
            into = self.end if start == self.n_layers else Site(start, "resid_pre")
            hooks.append((str(into), _changing(lambda value: residual.to(value))))
        if "start_at_layer" not in options:
            # Always explicit: a model left to itself guesses the mask from its tokenizer's pad token.
            options["attention_mask"] = torch.ones_like(tokens)
        hooks += [(name, _changing(edit)) for name, edit in reaching(self.model, (edits or {}).items())]
        hooks += [(str(site), reader(site)) for site in keep]
        if stop is not None:
            options["stop_at_layer"] = stop
        with _last_only(self.model, off=whole or stop is not None):
            out = self.model.run_with_hooks(source, return_type="logits", fwd_hooks=hooks, **options)
        if stop is not None:
            return None, found
        return (out if whole else out[:, -1]), found

    def new_cache(self, n_prompts: int) -> Any:
        """An empty cache for `run` to fill."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.model.cfg, self.device, n_prompts)

    def through(self, site: Site, value: Tensor) -> Tensor:
        """A value as it leaves a hook point, with what a precision rounds there."""
        return self.model.hook_dict[str(site)](value)

    def resume(
        self,
        tokens: Int[Tensor, "row pos"],
        entries: Sequence[tuple[Site, Float[Tensor, "_ _ d_model"]]],
        *,
        edits: Mapping[str, Edit] | None = None,
        past: tuple[Past, int, Int[Tensor, "row"]] | None = None,
        whole: bool = False,
    ) -> Float[Tensor, "row *pos d_vocab"]:
        """Logits of rows that begin at different places and run side by side from there: one pass, in which a layer computes
        the rows that have begun.

        Args:
            tokens: of each row.
            entries: in the order of the model: `resid_pre` or `resid_mid` of a layer, or `end` → what the rows that begin
                there hold, after all hooks of that place. Row numbers count through the entries.
            edits: hook name → what is done to the value there. They see the rows that have begun, and may see the last
                positions only.
            past: keys and values, the position from which on the rows of `entries` are given, and the prompt of each row.
            whole: logits of all positions; otherwise of the last, and the last block computes as little as that needs.
        """
        check_reach(self, [*(edits or ()), *(str(site) for site, _ in entries)])
        if self.resumes:
            return self.joined(entries, edits=edits, past=past, whole=whole, narrow=self.continues and not whole)
        changes: list[tuple[str, Edit]] = []
        begun = 0
        for site, rows in entries:
            changes.append((str(site), _replacing(rows, begun)))
            begun += len(rows)
        changes += (edits or {}).items()
        tokens = tokens.to(self.device)
        with _last_only(self.model, off=whole):
            out = self.model.run_with_hooks(
                tokens,
                attention_mask=torch.ones_like(tokens),
                return_type="logits",
                fwd_hooks=[(name, _changing(edit)) for name, edit in reaching(self.model, changes)],
            )
        return out if whole else out[:, -1]

    def joined(
        self,
        entries: Sequence[tuple[Site, Float[Tensor, "_ _ d_model"]]],
        *,
        edits: Mapping[str, Edit] | None = None,
        past: tuple[Past, int, Int[Tensor, "row"]] | None = None,
        whole: bool = False,
        narrow: bool = False,
    ) -> Float[Tensor, "row *pos d_vocab"]:
        """`resume` on a model that can start at a layer. `narrow`: the last block goes on with the last position alone."""
        hooks = [(str(site), _changing(_joining(rows, i == 0))) for i, (site, rows) in enumerate(entries)]
        hooks += [(name, _changing(edit)) for name, edit in (edits or {}).items()]
        hooks += self._narrowing() if narrow else []
        site, rows = entries[0]
        options = {} if past is None else {"past_kv_cache": past[0].before(past[1], past[2])}
        with _last_only(self.model, off=whole):
            out = self.model.run_with_hooks(
                # An attention behind which the first runs begin has no rows yet.
                rows[:0] if site.name == "resid_mid" else rows,
                start_at_layer=self.n_layers if site == self.end else site.layer,
                return_type="logits",
                fwd_hooks=hooks,
                **options,
            )
        return out if whole else out[:, -1]

    def _narrowing(self) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks by which the last block goes on with the last position alone, behind its attention's weighted sum.

        The block then adds one position's output to the whole stream; the sum's last position is right, and alone is kept.
        """
        last = self.n_layers - 1
        names = ["z", *(["resid_mid"] if self.block == "sequential" else []), "resid_post"]
        return [(str(Site(last, name)), _changing(lambda value: value[:, -1:])) for name in names]

    @property
    def _abilities(self) -> "Abilities":
        from tracelens.causal.probing import abilities

        return abilities(self)


def _changing(edit: Edit) -> Callable[..., Tensor]:
    return lambda value, hook: edit(value)


def _joining(rows: Tensor, first: bool) -> Edit:
    """Rows are put behind those that run already; the positions of both end together."""

    def join(value: Tensor) -> Tensor:
        given = rows[:, -value.shape[1] :].to(value)
        return given if first else torch.cat([value, given])

    return join


def _replacing(rows: Tensor, begun: int) -> Edit:
    def replace(value: Tensor) -> Tensor:
        return torch.cat([value[:begun], rows.to(value), value[begun + len(rows) :]])

    return replace


@contextmanager
def _last_only(model: Any, *, off: bool) -> Iterator[None]:
    """Within it the model unembeds the last position alone: logits are the largest tensors there are."""

    def last(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3:
            return None
        return (args[0][:, -1:], *args[1:])

    unembed = getattr(model, "unembed", None)
    handle = unembed.register_forward_pre_hook(last) if isinstance(unembed, nn.Module) and not off else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
