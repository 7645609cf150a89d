"""SAEs that EleutherAI's Sparsify wrote (`cfg.json`, `sae.safetensors`, in a folder named for the module), as SAELens' TopK.

Sparsify keeps `W_dec` as [latent, d_in] and always takes `b_dec` from an autoencoder's input. SAELens' own converter turns
`W_dec` once more, and leaves `b_dec` in wherever the decoder was normalised, so it is not used.
"""

import json
from pathlib import Path
from typing import Any

import torch

from tracelens.errors import SAEError

WEIGHTS = "sae.safetensors"

_PLAIN: dict[str, Any] = {"activation": "topk", "signed": False, "transcode": False, "skip_connection": False}
"""What is read: how the encoder selects, and that it reconstructs what it reads; each by its default."""


def read_sparsify(home: Path, device: str) -> Any:
    """The SAE in a folder; raises `SAEError` for a transcoder and for another selection than per-token top-k."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from safetensors.torch import load_file

    config = json.loads((home / "cfg.json").read_text(encoding="utf-8"))
    for key, expected in _PLAIN.items():
        if (value := config.get(key, expected)) != expected:
            raise SAEError(f"{home} is a Sparsify coder with {key}={value!r}; only {key}={expected!r} is read")
    d_in = config["d_in"]
    tensors = {name: tensor.to(torch.float32) for name, tensor in load_file(home / WEIGHTS, device=device).items()}
    sae = TopKSAE(
        TopKSAEConfig(
            d_in=d_in,
            d_sae=config.get("num_latents") or d_in * config["expansion_factor"],
            k=config["k"],
            apply_b_dec_to_input=True,
            device=device,
            metadata=SAEMetadata(hook_name=home.name),
        )
    )
    sae.load_state_dict(
        {
            "W_enc": tensors["encoder.weight"].T,
            "b_enc": tensors["encoder.bias"],
            "W_dec": tensors["W_dec"],
            "b_dec": tensors["b_dec"],
        }
    )
    return sae
