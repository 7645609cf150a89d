"""What single features do to a model's margin: by gradient for many, by taking them out for some.

Prompts of one length run together, so nothing is padded. Like all statistics of features, neither reads the BOS token.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracelens.auditing.assembly import Question
from tracelens.errors import UnknownNameError
from tracelens.features.saes import SAEs, encode
from tracelens.sites import Site


@dataclass(frozen=True)
class Feature:
    """A feature of the SAE at a site."""

    site: Site
    index: int


@dataclass
class Attribution:
    """First-order effect of one feature: Σ over tokens of q · (∇ margin · d), nats."""

    total: float = 0.0
    """Summed over prompts."""
    prompts: list[int] = field(default_factory=list)
    """On which the feature fires."""

    @property
    def n_prompts(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class _Batch:
    tokens: Int[Tensor, "batch pos"]
    prompt: Int[Tensor, "batch"]
    """Indices among the readable prompts."""
    start: int
    """First position that is no BOS."""


class MarginRuns:
    """Runs a model over the prompts of a question whose margin can be read.

    Needs of the model `run_with_hooks`, `cfg.device` and hook points at the SAEs' sites. Its rounding of activations, if it
    does any, passes gradients straight through.
    """

    def __init__(
        self,
        model: Any,
        saes: SAEs,
        question: Question,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> None:
        self.model, self.saes, self.question = model, saes, question
        names = list(question.answer_tokens)
        readable = [i for i, behaviour in enumerate(question.behaviours) if behaviour in names]
        self.column = torch.tensor([names.index(question.behaviours[i]) for i in readable], dtype=torch.long)
        self.n_prompts = len(readable)
        self.batch_size, self.progress = batch_size, progress
        texts = [question.texts[i] for i in readable]
        self.tokens: list[list[int]] = list(tokenizer(texts, verbose=False)["input_ids"]) if texts else []
        self.bos = tokenizer.bos_token_id
        self._plain: Tensor | None = None
        self._fires: dict[Feature, list[int]] = {}

    def attribution(self, features: Sequence[Feature]) -> dict[Feature, Attribution]:
        """The attribution of each feature, from one pass with gradients."""
        found = {feature: Attribution() for feature in features}
        if not features:
            return found
        by_site: dict[Site, list[int]] = defaultdict(list)
        for feature in features:
            by_site[feature.site].append(feature.index)
        for batch in self._batches(range(self.n_prompts), "attribution"):
            states, gradients = self._gradients(batch, list(by_site))
            for site, indices in by_site.items():
                sae = self.saes[site]
                shape = states[site].shape[:2]
                q = encode(sae, states[site].flatten(0, 1))[:, indices]
                slope = gradients[site].flatten(0, 1).flatten(1).to(sae.W_dec) @ sae.W_dec[indices].T
                effect = (q * slope).unflatten(0, shape).sum(1).double().sum(0)
                fires = (q > 0).unflatten(0, shape).any(1)
                for k, index in enumerate(indices):
                    one = found[Feature(site, index)]
                    one.total += effect[k].item()
                    one.prompts += batch.prompt[fires[:, k].cpu()].tolist()
        self._fires |= {feature: one.prompts for feature, one in found.items()}
        return found

    def effect(self, feature: Feature) -> Float[Tensor, "prompt"]:
        """Margin less the margin without the feature, per prompt, in nats, float64; 0 where it does not fire.

        Only prompts on which `attribution` found it firing are run; it raises `UnknownNameError` if that was not asked.
        """
        if feature not in self._fires:
            raise UnknownNameError(
                f"feature {feature.index} at {feature.site} has no attribution yet; call attribution first"
            )
        effect = torch.zeros(self.n_prompts, dtype=torch.float64)
        if self._plain is None:
            self._plain = self._margins(range(self.n_prompts), [])
        where = self._fires[feature]
        without = self._margins(where, [feature])
        effect[where] = (self._plain - without)[where]
        return effect

    def _gradients(self, batch: _Batch, sites: Sequence[Site]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
        """What the model holds at the sites, BOS left out, and the gradient there of each prompt's margin."""
        states, zeros = {}, {}

        def watch(site: Site) -> Callable[..., Tensor]:
            def add_zero(value: Tensor, hook: Any) -> Tensor:
                # A zero that asks for its gradient gives that of the value, and leaves the path from earlier sites whole.
                zeros[site] = torch.zeros_like(value, requires_grad=True)
                states[site] = value.detach()[:, batch.start :]
                return value + zeros[site]

            return add_zero

        with torch.enable_grad():
            margins = self._run(batch, [(str(site), watch(site)) for site in sites])
            gradients = torch.autograd.grad(margins.sum(), [zeros[site] for site in sites])
        return states, {site: g[:, batch.start :] for site, g in zip(sites, gradients, strict=True)}

    def _margins(self, prompts: Iterable[int], without: Sequence[Feature]) -> Float[Tensor, "prompt"]:
        """Margins of some prompts with features taken out, in their places among all; 0 elsewhere."""
        margins = torch.zeros(self.n_prompts, dtype=torch.float64)
        for batch in self._batches(prompts, "features taken out" if without else "margins"):
            hooks = [(str(f.site), self._remove(f, batch.start)) for f in without]
            with torch.no_grad():
                margins[batch.prompt] = self._run(batch, hooks).double().cpu()
        return margins

    def _remove(self, feature: Feature, start: int) -> Callable[..., Tensor]:
        sae = self.saes[feature.site]

        def subtract(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            rows = value[:, start:]
            amount = encode(sae, rows.flatten(0, 1))[:, feature.index].view(rows.shape[:2])
            written = amount[..., None] * sae.W_dec[feature.index].to(amount)
            value[:, start:] = rows - written.view(rows.shape).to(rows)
            return value

        return subtract

    def _run(self, batch: _Batch, hooks: list[tuple[str, Callable[..., Tensor]]]) -> Float[Tensor, "batch"]:
        was_training = self.model.training
        self.model.eval()
        try:
            tokens = batch.tokens.to(self.model.cfg.device)
            logits = self.model.run_with_hooks(
                tokens, attention_mask=torch.ones_like(tokens), return_type="logits", fwd_hooks=hooks
            )
        finally:
            self.model.train(was_training)
        columns = self.question.readout(logits[:, -1])
        return columns.gather(1, self.column[batch.prompt].to(columns.device)[:, None]).squeeze(1)

    def _batches(self, prompts: Iterable[int], what: str) -> Iterator[_Batch]:
        from tqdm.auto import tqdm

        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i in sorted(set(prompts)):
            ids = self.tokens[i]
            start = next((k for k, token in enumerate(ids) if token != self.bos), len(ids))
            alike[len(ids), start].append(i)
        parts = [
            (start, rows[k : k + self.batch_size])
            for (_, start), rows in alike.items()
            for k in range(0, len(rows), self.batch_size)
        ]
        for start, rows in tqdm(parts, desc=what, disable=not self.progress):
            yield _Batch(torch.tensor([self.tokens[i] for i in rows]), torch.tensor(rows), start)
