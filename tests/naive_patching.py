"""Patching as one would write it down: one prompt and one arm at a time, the whole model run from its tokens, plain hooks."""

from functools import partial

import torch

from tracelens.causal.places import PATTERNS
from tracelens.features.sae_encode import encode


def run(model, ids, hooks=()):
    tokens = torch.tensor([ids])
    with torch.no_grad():
        return model.run_with_hooks(
            tokens, attention_mask=torch.ones_like(tokens), return_type="logits", fwd_hooks=list(hooks)
        )


def kept(model, ids, names, edits=None):
    """Hook name → what is there."""
    found = {}

    def keep(value, hook, name):
        found[name] = value.clone()

    hooks = [(name, lambda v, hook, e=edit: e(v)) for name, edit in (edits or {}).items()]
    hooks += [(name, lambda v, hook, n=name: keep(v, hook, n)) for name in names]
    run(model, ids, hooks)
    return found


def naive(target, source, prompts, arms, metric, *, source_prompts=None, saes=None):
    """The metric, of logits [row, d_vocab], with each arm: float64 [arm, prompt]."""
    out = torch.empty(len(arms), len(prompts), dtype=torch.float64)
    other = source_prompts or prompts
    names = {str(place.site) for arm in arms for place in arm}
    for i in range(len(prompts)):
        new = kept(source, other.tokens[i], names)
        for a, arm in enumerate(arms):
            hooks = [
                (name, partial(put, at=name, new=new[name], arm=arm, prompts=prompts, prompt=i, saes=saes))
                for name in names
            ]
            out[a, i] = metric(run(target, prompts.tokens[i], hooks)[:, -1])[0].double()
    return out


def put(value, hook, *, at, new, arm, prompts, prompt, saes):
    """The arm's places of one hook point, cell by cell."""
    before, value = value, value.clone()
    for place in arm:
        if str(place.site) != at:
            continue
        for p in prompts.positions(prompt, place.where):
            if place.feature is not None:
                sae = saes[place.site]
                move = encode(sae, new[:, p])[:, place.feature] - encode(sae, before[:, p])[:, place.feature]
                value[:, p] += (move[:, None] * sae.W_dec[place.feature]).view(value[:, p].shape)
            elif place.site.name in PATTERNS:
                heads = slice(None) if place.unit is None else place.unit
                for key in prompts.positions(prompt, place.key):
                    value[:, heads, p, key] = new[:, heads, p, key]
            elif place.unit is None:
                value[:, p] = new[:, p]
            else:
                value[:, p, place.unit] = new[:, p, place.unit]
    return value
