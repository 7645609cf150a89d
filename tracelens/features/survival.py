"""What becomes of every feature in several models, each measured against the same reference on the same tokens.

The reference runs once however many models there are, and one other model is in memory at a time. What is summed are blocks of prompts:
memory grows with the features and not with the prompts, bar a few numbers per prompt, and what is kept of the reference goes to disk
beyond a bound.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracelens.features.firings import FiringLog, PromptSample, TokenFirings
from tracelens.features.kept import KeptPass
from tracelens.features.maxima import Maxima, PromptMaxima
from tracelens.features.saes import SAEs
from tracelens.features.stream import FeatureStream, Seen
from tracelens.metrics.divergence import Divergence, DivergenceAccumulator
from tracelens.metrics.moments import FeatureMoments, MomentAccumulator
from tracelens.metrics.smearing import SmearingAccumulator
from tracelens.metrics.spool import Kept, Spool
from tracelens.metrics.support import JointSupport
from tracelens.pair import AlignedBatch, PaddingSide
from tracelens.sites import Site

log = logging.getLogger(__name__)

REFERENCE = "reference"
N_BLOCKS = 64
"""Groups of prompts that the bootstrap draws from; fewer prompts than that are a group each."""
MEMORY = 2.0
"""GB of what is kept (the reference's pass, the sums of finished models) that stay in memory; what is more goes to disk."""

Readout = Callable[[Float[Tensor, "prompt d_vocab"]], Float[Tensor, "prompt readout"]]
Makers = Mapping[str, Callable[[], Any]]


class KeptMoments(Mapping[str, FeatureMoments]):
    """Model → moments, which are read back when they are asked for: 64 bytes × blocks × features each."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._kept: dict[str, tuple[Kept, torch.device]] = {}

    def put(self, name: str, moments: FeatureMoments) -> None:
        arrays = [getattr(moments, f.name).cpu().numpy() for f in fields(FeatureMoments)]
        self._kept[name] = self._spool.put(arrays), moments.n.device

    def include(self, other: "KeptMoments") -> None:
        """Those of another, without reading them."""
        self._kept |= other._kept

    def __getitem__(self, name: str) -> FeatureMoments:
        kept, device = self._kept[name]
        return FeatureMoments(*(torch.from_numpy(array).to(device) for array in kept()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


@dataclass
class Survival:
    """What the passes leave; features of all sites stand side by side, in the order of `sites`."""

    sites: dict[Site, int]
    """Site → number of features."""
    answers: dict[str, Float[Tensor, "prompt readout"]]
    """Model (the reference included) → what `readout` made of the logits at each prompt's last token."""
    maxima: Mapping[Site, Maxima]
    """The reference's maxima per prompt; empty unless asked for."""
    moments: Mapping[str, FeatureMoments]
    divergence: dict[str, Divergence] = field(default_factory=dict)
    smearing: dict[str, dict[Site, SmearingAccumulator]] = field(default_factory=dict)
    firings: dict[str, TokenFirings] = field(default_factory=dict)

    def include(self, other: "Survival") -> "Survival":
        """Adds the models that were measured against the same reference elsewhere."""
        assert isinstance(self.moments, KeptMoments)
        assert isinstance(other.moments, KeptMoments)
        self.moments.include(other.moments)
        for mine, theirs in ((self.answers, other.answers), (self.divergence, other.divergence)):
            mine |= theirs  # pyright: ignore
        self.smearing |= other.smearing
        self.firings |= other.firings
        return self


def prompt_blocks(prompts: Sequence[Any], n_blocks: int = N_BLOCKS) -> Int[Tensor, "prompt"]:
    """Block of each prompt, by the rank of a hash of its text: the same whatever the order in which prompts come.

    Prompts of the same text share a block: they say one thing, and a bootstrap that drew them apart would take it for several.
    """
    distinct = sorted({str(prompt) for prompt in prompts}, key=lambda text: hashlib.sha256(text.encode()).digest())
    size = min(n_blocks, len(distinct))
    block = {text: rank * size // len(distinct) for rank, text in enumerate(distinct)}
    return torch.tensor([block[str(prompt)] for prompt in prompts])


def measure_survival(
    reference: Any,
    others: Makers,
    saes: SAEs,
    prompts: Sequence[str],
    *,
    smearing_of: Iterable[str] = (),
    **options: Any,
) -> Survival:
    """`ReferencePass(reference, saes, prompts, **options).measure(others, smearing_of)`; its pass is kept if there are several others."""
    return ReferencePass(reference, saes, prompts, keep=len(others) > 1, **options).measure(others, smearing_of)


class ReferencePass:
    """A reference on some prompts, and other models measured against it, some now and some later: N models cost N + 1 passes.

    Args:
        readout: logits at the prompts' last tokens [prompt, d_vocab] → the numbers to keep per prompt.
        maxima: whether to keep the reference's maxima per prompt and feature, as a fingerprint needs them.
        keep: whether the reference's pass is kept, for several models one after the other. Otherwise the models of one call of `measure`
            run beside the reference and are in memory together.
        memory: GB that are kept in memory; what is more goes to disk (`KeptPass`), where it leaves nothing behind.
        folder: where on disk; by default where the system puts temporary files.
        sample: prompts whose firings can be kept token by token (`firings_of`).
        progress: a bar for each call of `measure`.
    """

    def __init__(
        self,
        reference: Any,
        saes: SAEs,
        prompts: Sequence[Any],
        *,
        readout: Readout,
        tokenizer: Any = None,
        maxima: bool = True,
        keep: bool = True,
        n_blocks: int = N_BLOCKS,
        memory: float | None = None,
        folder: str | Path | None = None,
        batch_size: int = 32,
        padding_side: PaddingSide | None = None,
        sample: PromptSample | None = None,
        progress: bool = False,
    ) -> None:
        self.reference, self.saes, self.readout, self.progress = reference, saes, readout, progress
        self.sample = sample
        self.stream = FeatureStream(saes, prompts, tokenizer, batch_size, padding_side)
        self.sites = {site: sae.W_dec.shape[0] for site, sae in saes.items()}
        self.blocks = prompt_blocks(prompts, n_blocks)
        self.spool = Spool(int(1e9 * (MEMORY if memory is None else memory)), folder)
        self._keep = keep
        self._kept: KeptPass | None = None
        self._with_maxima, self._maxima = maxima, PromptMaxima(len(prompts))
        self._answers = _Answers(len(prompts), readout)
        self._done = False

    def measure(self, others: Makers, smearing_of: Iterable[str] = (), firings_of: Iterable[str] = ()) -> Survival:
        """Runs the models that `others` make over the prompts, encodes them with the reference's SAEs, and sums.

        Args:
            others: name → function that makes the model when its turn comes; it is let go before the next is made.
            smearing_of: names of the models whose smearing is measured.
            firings_of: names of the models whose firings are kept token by token, beside the reference's.
        """
        from tqdm.auto import tqdm

        smeared, logged = set(smearing_of), set(firings_of)
        assert not logged or self.sample is not None, "firings are kept of a sample of prompts"
        moments = KeptMoments(self.spool)
        result = Survival(self.sites, {}, {}, moments)
        passes = 1 if not self._keep else len(others) + (not self._done)
        with tqdm(total=passes * len(self.blocks), unit="prompt", disable=not self.progress) as bar:
            if not self._keep:
                sums = {name: _Sums(self, name in smeared, name in logged) for name in others}
                self._run_together({name: make() for name, make in others.items()}, sums, bar)
                for name in list(sums):
                    sums.pop(name).write(name, result, moments)
            elif not self._done:
                self._run_reference(bar)
            for name, make in others.items() if self._keep else ():
                log.info("%s against the reference", name)
                self._run_one(name, make(), _Sums(self, name in smeared, name in logged), bar).write(
                    name, result, moments
                )
        result.answers = {REFERENCE: self._answers.kept} | result.answers
        result.maxima = self._maxima.finalize()
        return result

    def _run_together(self, models: dict[str, Any], sums: Mapping[str, "_Sums"], bar: Any) -> None:
        assert not self._done, "a pass that was not kept is measured against once"
        for batch, seen in self.stream.run({REFERENCE: self.reference, **models}):
            reference = seen.pop(REFERENCE)
            self._take(batch, reference)
            for name, other in seen.items():
                sums[name].take(batch, reference, other)
            bar.update(len(batch.last))
        self._done = True

    def _run_reference(self, bar: Any) -> None:
        kept = KeptPass(self.reference, self.spool)
        try:
            for batch, seen in self.stream.run({REFERENCE: self.reference}):
                self._take(batch, seen[REFERENCE])
                kept.put(batch, seen[REFERENCE])
                bar.update(len(batch.last))
        finally:
            kept.close()
        self._kept, self._done = kept, True

    def _run_one(self, name: str, model: Any, sums: "_Sums", bar: Any) -> "_Sums":
        assert self._kept is not None
        for index, (batch, seen) in enumerate(self.stream.run({name: model})):
            sums.take(batch, self._kept.get(index, batch, self.sites), seen[name])
            bar.update(len(batch.last))
        return sums

    def _take(self, batch: AlignedBatch, reference: Seen) -> None:
        self._answers.take(batch, reference)
        if self._with_maxima:
            for site, features in reference.features.items():
                self._maxima.update(site, features, batch.prompt)


class _Answers:
    """What `readout` makes of the logits at each prompt's last token."""

    def __init__(self, n_prompts: int, readout: Readout) -> None:
        self.n_prompts, self.readout = n_prompts, readout
        self.kept = torch.zeros(n_prompts, 0)

    def take(self, batch: AlignedBatch, seen: Seen) -> None:
        answers = self.readout(seen.logits[batch.last]).float().cpu()
        if self.kept.shape[1] != answers.shape[1]:
            self.kept = torch.zeros(self.n_prompts, answers.shape[1])
        self.kept[batch.prompt[batch.last].cpu()] = answers


class _Sums:
    """Accumulators of one model against the reference."""

    def __init__(self, run: ReferencePass, smeared: bool, logged: bool) -> None:
        n_blocks = int(run.blocks.max()) + 1
        self.blocks = run.blocks
        self.answers = _Answers(len(run.blocks), run.readout)
        self.divergence = DivergenceAccumulator(n_blocks)
        self.moments = {site: MomentAccumulator(size, n_blocks) for site, size in run.sites.items()}
        sites = run.sites.items() if smeared else ()
        self.smearing = {site: SmearingAccumulator(size, spool=run.spool) for site, size in sites}
        self.starts = dict(zip(run.sites, accumulate(run.sites.values(), initial=0), strict=False))
        self.firings = FiringLog(run.sample) if logged and run.sample is not None else None

    def take(self, batch: AlignedBatch, reference: Seen, other: Seen) -> None:
        block = self.blocks.to(batch.prompt.device)[batch.prompt]
        self.answers.take(batch, other)
        self.divergence.update(reference.logits, other.logits, batch.next_token, block)
        for site, moments in self.moments.items():
            support = JointSupport.of(reference.features[site], other.features[site])
            moments.add(support, block)
            if site in self.smearing:
                self.smearing[site].add(support)
            if self.firings is not None:
                self.firings.add(support, batch, self.starts[site])

    def write(self, name: str, result: Survival, moments: KeptMoments) -> None:
        moments.put(name, FeatureMoments.concatenate([self.moments.pop(site).finalize() for site in result.sites]))
        result.answers[name] = self.answers.kept
        result.divergence[name] = self.divergence.finalize()
        if self.smearing:
            result.smearing[name] = {site: seen.seal() for site, seen in self.smearing.items()}
        if self.firings is not None:
            result.firings[name] = self.firings.finalize()
