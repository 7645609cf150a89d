"""A model and SAEs of real size with random weights, and prompts for them."""

from typing import Any

import torch

from tracelens.behaviour import AnswerTokens
from tracelens.pair import stream_aligned
from tracelens.sites import Site

BATCH = 32
TOKENS = {"refusal": AnswerTokens((5,), (6,))}


class RandomSAE:
    """A ReLU SAE of which `l0` features fire on a token, on average."""

    def __init__(self, d_model: int, d_sae: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=generator), dim=1)
        self.W_enc, self.bias = self.W_dec.T.contiguous(), torch.zeros(d_sae)

    def calibrate(self, activations: torch.Tensor, l0: int) -> None:
        kept = max(1, round(len(activations) * l0 / len(self.bias)))
        self.bias = -(activations @ self.W_enc).topk(kept + 1, dim=0).values[-1]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.W_enc).relu_()


def gpt2_sized(
    d_sae: int, layers: tuple[int, ...], n_prompts: int, l0: int = 64
) -> tuple[Any, dict[Site, RandomSAE], dict]:
    """GPT-2 small's shape, vocabulary included; prompts of 13 to 40 tokens by behaviour."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from tests.tiny import tiny_tokenizer

    cfg = HookedTransformerConfig(
        **{"n_layers": 12, "d_model": 768, "n_ctx": 128, "d_head": 64, "n_heads": 12, "d_vocab": 50257, "d_mlp": 3072},
        **{"act_fn": "gelu_new", "normalization_type": "LN", "device": "cpu", "seed": 0},
    )
    model = HookedTransformer(cfg).eval().requires_grad_(False)
    model.tokenizer = tiny_tokenizer()
    words = model.tokenizer.convert_ids_to_tokens(range(4, 28))
    generator = torch.Generator().manual_seed(0)

    def texts(n: int, last: str) -> list[str]:
        lengths = torch.randint(12, 40, (n,), generator=generator).tolist()
        picks = (torch.randint(0, len(words), (length,), generator=generator) for length in lengths)
        return [" ".join([*(words[i] for i in pick), last]) for pick in picks]

    prompts = {"refusal": texts(n_prompts // 2, "no"), "baseline": texts(n_prompts // 2, "yes")}
    saes = {Site(layer): RandomSAE(768, d_sae, layer) for layer in layers}
    (batch,) = stream_aligned({"": model}, prompts["refusal"][:32], sites=list(saes), logits=False)
    for site, sae in saes.items():
        sae.calibrate(batch.activations[""][site], l0)
    return model, saes, prompts


def bare(models: list[Any], texts: list[str]) -> None:
    """The forward passes alone, on the batches that Tracelens makes: sorted by length, padded."""
    rows = sorted(models[0].tokenizer(texts)["input_ids"], key=len)
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            batch = [torch.tensor(ids) for ids in rows[start : start + BATCH]]
            tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            for model in models:
                model(tokens)
