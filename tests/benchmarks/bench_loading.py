"""Opening a quantized Llama of about 0.5 B parameters: seconds and peak memory, each side in a process of its own.

    python -m tests.benchmarks.bench_loading [--small] [--rounds N] [--keep FOLDER]

Sides, for NF4 (double-quantized, as bitsandbytes writes it) and for 4-bit GPTQ (groups of 128), in two shards:
- `tracelens`: `tracelens.load(folder)`, a HookedTransformer in float32;
- `read + dequantize`: the floor: each stored tensor copied into memory, then dequantized once, and kept, as a model
  is; `dropped` is the same without keeping, which spares the first touch of the memory;
- `detour`: what one does without Tracelens: transformers opens it, dequantizes, and transformer-lens converts it. For
  NF4 it needs bitsandbytes; for GPTQ transformers refuses without optimum and gptqmodel, and the reason is printed.

Imports are done before the clock starts and memory is counted from there. The files are in the page cache for every
side, and memory that will be needed was touched once, since a virtual machine may have to ask its host for it. Codes
and scales are random: neither time nor memory depends on them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.benchmarks.bench_smearing import Peak

LARGE = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}
LARGE |= {"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048}
SMALL = {**LARGE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUP = 128
NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
GOAL = 1.5


def linears(config: dict) -> Iterator[tuple[str, int, int]]:
    """Module, outputs and inputs of every linear layer of a block, layer by layer."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
    for layer in range(config["num_hidden_layers"]):
        for module, out, into in (
            *(("self_attn.q_proj", width, width), ("self_attn.k_proj", narrow, width)),
            *(("self_attn.v_proj", narrow, width), ("self_attn.o_proj", width, width)),
            *(("mlp.gate_proj", hidden, width), ("mlp.up_proj", hidden, width), ("mlp.down_proj", width, hidden)),
        ):
            yield f"model.layers.{layer}.{module}", out, into


def nf4(module: str, out: int, into: int, generator: torch.Generator) -> dict[str, Tensor]:
    count = out * into
    blocks = count // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, into]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03}
    return {
        f"{module}.weight": torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, generator=generator),
        f"{module}.weight.absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
        f"{module}.weight.nested_absmax": torch.full((-(-blocks // 256),), 0.02),
        f"{module}.weight.nested_quant_map": torch.linspace(-1, 1, 256),
        f"{module}.weight.quant_map": torch.tensor(NF4),
        f"{module}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def gptq(module: str, out: int, into: int, generator: torch.Generator) -> dict[str, Tensor]:
    groups = into // GROUP

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=generator).to(torch.int32)

    return {
        f"{module}.qweight": words(into // 8, out),
        f"{module}.qzeros": torch.full((groups, out // 8), 0x77777777, dtype=torch.int32),
        f"{module}.scales": (torch.rand(groups, out, generator=generator) * 0.01).half(),
        f"{module}.g_idx": (torch.arange(into) // GROUP).to(torch.int32),
    }


QUANTIZATION = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    | {"checkpoint_format": "gptq"},
}
WRITERS: dict[str, Callable[..., dict[str, Tensor]]] = {"nf4": nf4, "gptq": gptq}


def write(folder: Path, kind: str, config: dict) -> None:
    """A checkpoint of random codes in two shards with an index."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    outside = {
        "model.embed_tokens.weight": torch.randn(vocabulary, width, generator=generator).mul_(0.02).bfloat16(),
        "lm_head.weight": torch.randn(vocabulary, width, generator=generator).mul_(0.02).bfloat16(),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
    }
    shards: list[dict[str, Tensor]] = [outside, {}]
    for module, out, into in linears(config):
        layer = int(module.split(".")[2])
        shard = shards[layer >= config["num_hidden_layers"] // 2]
        shard |= WRITERS[kind](module, out, into, generator)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shard[f"model.layers.{layer}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    homes = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        homes |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", **config}
    config |= {"rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION[kind]}))


def run_tracelens(folder: Path) -> int:
    import transformer_lens  # noqa: F401

    import tracelens.loading.hooked

    touch_memory(folder)
    with Peak() as peak:
        model = tracelens.load(folder, device="cpu")
    return report(peak, sum(p.numel() * p.element_size() for p in model.parameters()))


def run_floor(folder: Path, *, keep: bool = True) -> int:
    from tracelens.loading import Checkpoint

    kept = []
    touch_memory(folder)
    with Peak() as peak:
        checkpoint = Checkpoint(folder)
        for name in checkpoint.names():
            memory = {part: checkpoint.stored.read(part).clone() for part in checkpoint.parts(name)}
            quantized = checkpoint.quantized(name)
            tensor = quantized.dequantize(memory.__getitem__) if quantized else memory[name].float()
            if keep:
                kept.append(tensor)
    return report(peak, 0)


def run_dropped(folder: Path) -> int:
    return run_floor(folder, keep=False)


def touch_memory(folder: Path) -> None:
    """More than any side needs beside the detour: eight times the files, the size of float32 beside 4 bits."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    torch.ones(8 * size // 4)


def run_detour(folder: Path) -> int:
    import transformers
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens import loading_from_pretrained as conversion

    touch_memory(folder)
    with Peak() as peak:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        if hasattr(model, "dequantize"):
            model = model.dequantize()
        model = model.float()
        model.config.__dict__.pop("quantization_config", None)
        fields = conversion.get_pretrained_model_config(str(folder), hf_cfg=model.config.to_dict(), dtype=torch.float32)
        cfg = HookedTransformerConfig.from_dict(
            fields.to_dict() | {"device": "cpu", "init_weights": False, "tokenizer_name": None}
        )
        weights = conversion.get_pretrained_state_dict(str(folder), cfg, model)
        hooked = HookedTransformer(cfg, move_to_device=False)
        hooked.load_and_process_state_dict(
            weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
    return report(peak, sum(p.numel() * p.element_size() for p in hooked.parameters()))


def report(peak: Peak, model_bytes: int) -> int:
    print(json.dumps({"seconds": peak.seconds, "peak": peak.peak_gb - peak.start_gb, "model": model_bytes / 2**30}))
    return 0


SIDES = {"tracelens": run_tracelens, "read + dequantize": run_floor, "dropped": run_dropped, "detour": run_detour}


def measure(side: str, folder: Path) -> dict[str, float] | str:
    """Seconds, peak and model size (GiB) of one side in a fresh process, or the reason it failed."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_loading", "--side", side, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:300]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(config: dict, rounds: int, root: Path) -> None:
    for kind in WRITERS:
        folder = root / kind
        if not folder.exists():
            write(folder, kind, config)
        shards = sorted(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{kind}: {sum(shards) / 2**30:.2f} GB on disk, largest shard {shards[-1] / 2**30:.2f} GB")
        results: dict[str, list[dict[str, float]]] = {}
        for side in SIDES:
            measure(side, folder)  # fills the page cache, and is not counted
        for _ in range(rounds):
            for side in SIDES:
                result = measure(side, folder)
                if isinstance(result, str):
                    results.setdefault(f"{side} (fails: {result})", [])
                else:
                    results.setdefault(side, []).append(result)
        for side, runs in results.items():
            if not runs:
                print(f"  {side}")
                continue
            best = min(runs, key=lambda run: run["seconds"])
            times = ", ".join(f"{run['seconds']:.2f}" for run in runs)
            line = f"  {side:<18} {best['seconds']:6.2f} s ({times}), peak {max(r['peak'] for r in runs):.2f} GB"
            if best["model"]:
                line += f" = {max(r['peak'] for r in runs) / best['model']:.2f} × the model ({best['model']:.2f} GB)"
            print(line)
        ratio = min(r["seconds"] for r in results["tracelens"]) / min(
            r["seconds"] for r in results["read + dequantize"]
        )
        print(f"  tracelens / (read + dequantize) = {ratio:.2f} (goal: under {GOAL})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a model of 4 M parameters: does it run at all?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints, kept for the next time")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        sys.exit(SIDES[args.side](args.folder))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        main(SMALL if args.small else LARGE, args.rounds, args.keep or Path(temporary))
    print(f"{time.perf_counter() - started:.0f} s in all")
