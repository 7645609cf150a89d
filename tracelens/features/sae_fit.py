"""How well SAEs fit one model: what they reconstruct, and what the model still predicts from the reconstruction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tracelens.features.sae_encode import reconstruct, splice
from tracelens.features.sae_sites import SAEs
from tracelens.features.survival import N_BLOCKS, prompt_blocks
from tracelens.metrics.divergence import nll
from tracelens.metrics.reconstruction import Reconstruction, ReconstructionAccumulator
from tracelens.pair import PaddingSide, stream_aligned
from tracelens.sites import Site

Ablation = Literal["zero", "mean"]
"""What stands for "no information" at a site: zeros, or the mean activation over the tokens."""

MODEL = "model"

Replace = Callable[[Float[Tensor, "token ..."]], Float[Tensor, "token ..."]]


@dataclass(frozen=True, eq=False)
class SiteFit:
    """Sums of one SAE on one model, by block of prompts."""

    reconstruction: Reconstruction
    nll: Float64[Tensor, "block"]
    """Σ −log p(next token), nats, of the model as it is."""
    nll_spliced: Float64[Tensor, "block"]
    """The same with the SAE's reconstruction at the site, on all tokens but BOS."""
    nll_ablated: Float64[Tensor, "block"]
    """The same with the site ablated there."""
    n_targets: Float64[Tensor, "block"]
    """Tokens that have a next token."""

    def cross_entropy(self) -> float:
        """Mean −log p(next token) of the model as it is, nats."""
        return (self.nll.sum() / self.n_targets.sum()).item()

    def cross_entropy_recovered(self, weights: Float[Tensor, "resample block"]) -> Float64[Tensor, "resample"]:
        """(ablated − spliced) / (ablated − as it is): 1 if the reconstruction predicts as well, 0 if as badly as nothing.

        Below 0 if it is worse than nothing; NaN where ablation costs nothing to recover.
        """
        clean, spliced, ablated = (weights.double() @ s for s in (self.nll, self.nll_spliced, self.nll_ablated))
        gap = ablated - clean
        return (ablated - spliced) / gap.where(gap > 1e-6 * clean.abs(), torch.nan)


def measure_fit(
    model: Any,
    saes: SAEs,
    prompts: Sequence[Any],
    *,
    tokenizer: Any = None,
    ablation: Ablation = "zero",
    n_blocks: int = N_BLOCKS,
    batch_size: int = 32,
    padding_side: PaddingSide | None = None,
    progress: bool = False,
    name: str = "model",
) -> dict[Site, SiteFit]:
    """Runs the model over the prompts, once as it is and twice per SAE: with its reconstruction, and with its site ablated.

    Statistics are over real tokens after BOS, and only those are replaced; memory does not depend on the number of
    prompts. Takes a hook-point-compatible model, as `stream_aligned` does, and raises as it and `reconstruct`.
    """
    from tqdm.auto import tqdm

    block = prompt_blocks([str(getattr(prompt, "prompt", prompt)) for prompt in prompts], n_blocks)
    options = {"tokenizer": tokenizer or model.tokenizer, "batch_size": batch_size, "padding_side": padding_side}
    with tqdm(
        total=(1 + 2 * len(saes)) * len(prompts), unit="prompt", desc=f"fit of SAEs, {name}", disable=not progress
    ) as bar:

        def losses(of: Any) -> Float64[Tensor, "block"]:
            total = torch.zeros(n, dtype=torch.float64)
            for batch in stream_aligned({MODEL: of}, prompts, sites=(), **options):
                total += _by_block(batch, block, n)[0]
                bar.update(len(batch.last))
            return total

        n = int(block.max()) + 1
        sums, clean, targets = _as_it_is(model, saes, prompts, block, options, bar)
        fits = {}
        for site, sae in saes.items():
            ablate = _ablation(ablation, sums[site])
            spliced = losses(Spliced(model, site, lambda x, sae=sae: splice(sae, x), options["tokenizer"]))
            ablated = losses(Spliced(model, site, ablate, options["tokenizer"]))
            fits[site] = SiteFit(sums[site].reconstruction.finalize(), clean, spliced, ablated, targets)
    return fits


@dataclass
class _Sums:
    reconstruction: ReconstructionAccumulator
    total: Tensor
    """Σ of the activations as the model has them, in their own shape; the mean of an ablation."""
    n: int = 0


def _as_it_is(
    model: Any, saes: SAEs, prompts: Sequence[Any], block: Tensor, options: dict[str, Any], bar: Any
) -> tuple[dict[Site, _Sums], Float64[Tensor, "block"], Float64[Tensor, "block"]]:
    """One pass of the model as it is: sums at the sites, and Σ NLL and number of targets by block."""
    n = int(block.max()) + 1
    sums: dict[Site, _Sums] = {}
    losses = torch.zeros(2, n, dtype=torch.float64)
    for batch in stream_aligned({MODEL: model}, prompts, sites=saes, **options):
        losses += torch.stack(_by_block(batch, block, n))
        tokens = block.to(batch.prompt.device)[batch.prompt]
        for site, sae in saes.items():
            x = batch.activations[MODEL][site]
            features, read, output = reconstruct(sae, x)
            if site not in sums:
                accumulator = ReconstructionAccumulator(read.shape[1], features.shape[1], n)
                sums[site] = _Sums(accumulator, torch.zeros_like(x[0], dtype=torch.float64))
            sums[site].reconstruction.update(read, output, features, tokens)
            sums[site].total += x.double().sum(0)
            sums[site].n += len(x)
        bar.update(len(batch.last))
    return sums, losses[0], losses[1]


def _by_block(batch: Any, block: Int[Tensor, "prompt"], n: int) -> tuple[Float64[Tensor, "block"], ...]:
    """Σ NLL of the next tokens and their number, by block."""
    has = batch.next_token >= 0
    losses = torch.where(has, nll(batch.logits[MODEL], batch.next_token), 0).cpu()
    tokens = block[batch.prompt.cpu()]
    zeros = torch.zeros(n, dtype=torch.float64)
    return zeros.index_add(0, tokens, losses), zeros.index_add(0, tokens, has.double().cpu())


def _ablation(ablation: Ablation, sums: _Sums) -> Replace:
    if ablation == "zero":
        return torch.zeros_like
    mean = sums.total / sums.n
    return lambda x: mean.to(x).expand_as(x)


class Spliced:
    """A model in which what is at a site is replaced, at real tokens after BOS; otherwise used as the model is."""

    def __init__(self, model: Any, site: Site, replace: Replace, tokenizer: Any) -> None:
        self.model, self.site, self.replace = model, site, replace
        self.bos = getattr(tokenizer, "bos_token_id", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def run_with_hooks(
        self, tokens: Int[Tensor, "batch pos"], *, attention_mask: Tensor, fwd_hooks: Sequence[Any] = (), **options: Any
    ) -> Any:
        real = attention_mask.bool()
        # Leading padding and BOS; a BOS inside a prompt is a token like any other.
        leading = (tokens == -1 if self.bos is None else tokens == self.bos) | ~real
        rows = (real & ~leading.cumprod(1).bool()).flatten().nonzero().squeeze(1)

        def patch(value: Float[Tensor, "batch pos ..."], hook: Any) -> Float[Tensor, "batch pos ..."]:
            flat = value.flatten(0, 1)
            new = self.replace(flat.index_select(0, rows)).to(flat)
            return flat.index_copy(0, rows, new).view_as(value)

        hooks = [*fwd_hooks, (str(self.site), patch)]
        return self.model.run_with_hooks(tokens, attention_mask=attention_mask, fwd_hooks=hooks, **options)
