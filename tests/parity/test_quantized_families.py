"""Quantized checkpoints of every family: hooked logits against transformers with the same weights, put there by hand.

Each family is written as LLM.int8() stores it (int8 rows and their largest magnitude), on the names that transformers
writes, so that fused, split, stacked and renamed weights go all the way from codes to the hooked model.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.tiny import SIZES_OF, tiny_hf_model, write_checkpoint
from tracelens import load
from tracelens.loading import Checkpoint
from tracelens.loading.architectures import ARCHITECTURES

IDS = torch.randint(4, 30, (3, 24), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-4
FAMILIES = [name for name in ARCHITECTURES if name not in ("Gemma3ForConditionalGeneration", "GptOssForCausalLM")]


def as_int8(weight, transposed):
    """The tensors that stand for a weight, and the weight that they stand for."""
    rows = weight.T if transposed else weight
    largest = rows.abs().amax(1)
    codes = (rows / largest[:, None] * 127).round().to(torch.int8)
    exact = codes * largest[:, None] * 0.007874015718698502
    # GPT-2's layers are quantized the other way round than they are stored.
    return {"": codes.contiguous(), "SCB": largest}, (exact.T if transposed else exact).contiguous()


def linear_names(model):
    """Weights of linear layers that quantizers take, by their names in the state dict."""
    kinds = (nn.Linear, Conv1D)
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not name.endswith(("lm_head", "embed_out", "gate"))
    }


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_in_int8(tmp_path, architecture, no_network):
    # Phi-3's default padding token lies outside a tiny vocabulary.
    config = {"pad_token_id": 0} if architecture == "Phi3ForCausalLM" else {}
    folder = write_checkpoint(tmp_path / "m", architecture, **config)
    tensors = load_file(folder / "model.safetensors")
    linear = linear_names(tiny_hf_model(architecture, **config))
    chosen = {name: linear[name] for name in tensors if name in linear}
    # Experts are stored one by one, under names that the model in memory does not have.
    chosen |= {name: False for name, tensor in tensors.items() if ".experts." in name and tensor.dim() == 2}
    assert chosen
    plain, stored = dict(tensors), dict(tensors)
    for name, transposed in chosen.items():
        parts, plain[name] = as_int8(tensors[name], transposed)
        stored |= {name.removesuffix("weight") + (part or "weight"): tensor for part, tensor in parts.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)(
            IDS
        ).logits

    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint(folder)
    quantized = [name for name in checkpoint.names() if checkpoint.quantized(name)]
    assert len(quantized) == len(chosen)
    for wrapper in ("hooked", "bridge") if architecture in ("LlamaForCausalLM", "MixtralForCausalLM") else ("hooked",):
        with torch.inference_mode():
            logits = load(checkpoint, wrapper=wrapper, device="cpu")(IDS)
        assert (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), wrapper


def test_gpt_oss_as_it_is_published(tmp_path, no_network):
    """Experts in MXFP4 blocks, everything else in bfloat16, the model in float32."""
    sizes = SIZES_OF["GptOssForCausalLM"] | {"intermediate_size": 64}
    folder = write_checkpoint(tmp_path / "m", "GptOssForCausalLM", dtype=torch.bfloat16, **sizes)
    tensors = load_file(folder / "model.safetensors")
    stacked = [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(stacked) == 6
    generator = torch.Generator().manual_seed(0)
    plain, stored = {name: tensor.float() for name, tensor in tensors.items()}, dict(tensors)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name in stacked:
        experts, into, out = tensors[name].shape
        codes = torch.randint(0, 16, (experts, out, into // 32, 32), generator=generator)
        scales = torch.randint(122, 126, (experts, out, into // 32), generator=generator)
        plain[name] = (values[codes] * 2.0 ** (scales - 127)[..., None]).flatten(2).transpose(1, 2).contiguous()
        del stored[name]
        stored[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = scales.to(torch.uint8)
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        wanted = model(IDS).logits
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "mxfp4"}}))
    for wrapper in ("hooked", "bridge"):
        with torch.inference_mode():
            logits = load(folder, wrapper=wrapper, device="cpu")(IDS)
        assert (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), wrapper
