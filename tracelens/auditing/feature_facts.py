"""What a feature is, whichever tokens it fires on: the features whose decoder directions are like its own, the tokens that it promotes."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.auditing.evidence import Key
from tracelens.auditing.token_text import TokenText
from tracelens.features.sae_processing import WRITTEN
from tracelens.features.saes import SAEs
from tracelens.sites import Site

NEIGHBOURS = 5
TOKENS = 8
_CELLS = 2**24
"""Cosines or logits, and numbers of a matrix in a wider dtype, that exist at a time (64 MB)."""

Near = list[tuple[int, float]]
Logits = list[tuple[str, float]]


class FeatureFacts:
    """Neighbours and logit weights of features, each worked out when it is first asked for.

    **Neighbours** are the features of the same SAE whose decoder rows have the highest cosine with the feature's own.

    **Logit weights** (Bricken et al. 2023, "Towards Monosemanticity"; after the logit lens, nostalgebraist 2020) say what the direction
    that a feature writes does to the logits on the direct path: W_dec, less its mean where the final norm takes the mean away, times that
    norm's scale, times W_U, less the mean over the vocabulary. Logits per unit of activation, before the norm divides by the size of the
    residual stream, which differs from token to token. What later layers make of the feature is left out: of features of early layers
    logit weights say little. Of an SAE that normalises its input the unit of activation is one of the normalised space.

    There are none for a model without W_U, and at sites that do not lie in the residual stream; `z` is taken there by W_O, `mlp_post` by
    W_out.
    """

    def __init__(self, model: Any, saes: SAEs, text: TokenText) -> None:
        self._model, self._saes, self._text = model, saes, text
        self._near: dict[Key, Near] = {}
        self._logits: dict[Key, tuple[Logits, Logits]] = {}
        self._norm: tuple[Tensor, bool] | None = None

    @torch.no_grad()
    def near(self, features: Sequence[Key]) -> dict[Key, Near]:
        """The nearest `NEIGHBOURS` of each feature, most similar first, with cosines in [−1, 1]."""
        for site, indices in _missing(features, self._near):
            rows = self._saes[site].W_dec.detach()
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
            norms = torch.where(norms > 0, norms, torch.inf)  # a dead row is near nothing
            for part in indices.to(rows.device).split(_step(len(rows))):
                cosines = _product(rows[part].float(), rows.T).div_(norms).div_(norms[part, None]).clamp_(-1, 1)
                cosines[torch.arange(len(part)), part] = -torch.inf
                best = _best(cosines, min(NEIGHBOURS, len(rows) - 1))
                self._near |= {(str(site), i): row for i, row in zip(part.tolist(), best, strict=True)}
        return {key: self._near[key] for key in features}

    @torch.no_grad()
    def logits(self, features: Sequence[Key]) -> tuple[dict[Key, Logits], dict[Key, Logits]]:
        """The `TOKENS` tokens that each feature promotes most, and those that it suppresses most, with their logit weights."""
        for site, indices in _missing(features, self._logits):
            for part in indices.split(_step(self._model.cfg.d_vocab)):
                weights = self._weights(site, part)
                keys = [(str(site), i) for i in part.tolist()]
                if weights is None:
                    self._logits |= dict.fromkeys(keys, ([], []))
                    continue
                k = min(TOKENS, weights.shape[1])
                up, down = _best(weights, k), _best(weights.neg_(), k)
                for key, highest, lowest in zip(keys, up, down, strict=True):
                    promoted = [(self._text(token), weight) for token, weight in highest]
                    self._logits[key] = promoted, [(self._text(token), -weight) for token, weight in lowest]
        promoted = {key: self._logits[key][0] for key in features if self._logits[key][0]}
        return promoted, {key: self._logits[key][1] for key in promoted}

    def _weights(self, site: Site, indices: Tensor) -> Float[Tensor, "feature vocabulary"] | None:
        unembed = getattr(self._model, "W_U", None)
        through = _to_residual(self._model, site)
        rows = self._saes[site].W_dec.detach()
        rows = rows[indices.to(rows.device)]
        if not isinstance(unembed, Tensor) or through is None or rows.shape[1] != len(through):
            return None  # a transcoder may write elsewhere
        wide = torch.promote_types(unembed.dtype, torch.float32)
        written = rows.to(unembed.device, wide)
        if site.name not in WRITTEN:
            written = _product(written, through)
        if self._norm is None:
            self._norm = final_norm(self._model)
        scale, centres = self._norm
        written = (written - written.mean(1, keepdim=True) if centres else written) * scale.to(written)
        weights = _product(written, unembed.detach()[:, : len(self._text)])
        return weights.sub_(weights.mean(1, keepdim=True))


@torch.no_grad()
def final_norm(model: Any) -> tuple[Float[Tensor, "d_model"], bool]:
    """The scale of the model's final norm, ones where it has none, and whether the norm takes the mean away.

    Read from what the norm does and not from its weights, which wrappers name and store in different ways (Gemma's as an offset from 1).
    """
    width, unembed = model.cfg.d_model, model.W_U
    norm = getattr(model, "ln_final", None)
    if norm is None or isinstance(norm, torch.nn.Identity):
        return torch.ones(width), False

    def through(x: Tensor) -> Tensor:
        return norm(x.to(unembed)[None, None])[0, 0].float().cpu()

    bias = through(torch.zeros(width))
    x = torch.ones(width)
    centres = bool(torch.allclose(through(x), bias, atol=1e-3))
    x[1::2] = -1
    deviation = x - x.mean() if centres else x
    return (through(x) - bias) * deviation.square().mean().sqrt() / deviation, centres


def _to_residual(model: Any, site: Site) -> Float[Tensor, "d_out d_model"] | None:
    """What takes a direction of the site to one of the residual stream; None where nothing linear does."""
    cfg = model.cfg
    if site.name in WRITTEN:
        return torch.empty(cfg.d_model, 0)  # it is one already
    if getattr(cfg, "use_normalization_before_and_after", False) or not hasattr(model, "blocks"):
        return None
    block = model.blocks[site.layer]
    if site.name == "z":
        heads = getattr(block.attn, "W_O", None)
        return heads.detach().flatten(0, 1) if isinstance(heads, Tensor) and heads.dim() == 3 else None
    out = getattr(getattr(block, "mlp", None), "W_out", None) if site.name == "mlp_post" else None
    if not isinstance(out, Tensor) or out.dim() != 2 or cfg.d_mlp == cfg.d_model:
        return None  # a square one does not say which way round a wrapper stores it
    return out.detach() if out.shape == (cfg.d_mlp, cfg.d_model) else out.detach().T


def _missing(features: Sequence[Key], known: dict[Key, Any]) -> Iterator[tuple[Site, Tensor]]:
    missing = sorted(key for key in features if key not in known)
    for site, keys in groupby(missing, key=lambda key: key[0]):
        yield Site.parse(site), torch.tensor([index for _, index in keys])


def _product(x: Float[Tensor, "row inner"], matrix: Float[Tensor, "inner column"]) -> Float[Tensor, "row column"]:
    """x @ matrix in x's dtype; a matrix of another one is converted in parts."""
    if matrix.dtype == x.dtype:
        return x @ matrix
    return torch.cat([x @ part.to(x.dtype) for part in matrix.split(_step(len(matrix)), dim=1)], 1)


def _step(width: int) -> int:
    return max(1, _CELLS // max(1, width))


def _best(scores: Float[Tensor, "row column"], k: int) -> list[list[tuple[int, float]]]:
    """By row: its `k` highest columns with their scores, highest first."""
    values, columns = scores.topk(k, dim=1)
    return [list(zip(*row, strict=True)) for row in zip(columns.tolist(), values.tolist(), strict=True)]
