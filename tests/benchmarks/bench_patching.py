"""Patching sweeps beside transformer_lens.patching, GPT-2 small in size: `python -m tests.benchmarks.bench_patching`.

Random weights, one pair of prompts of 16 tokens. Both sides run in turns in one process and their numbers are compared.
Where the other side would take minutes it runs a random part of the sweep, and its time is that of as many runs as there
are: each of its runs is a whole forward pass and takes as long as any other. `--parts` says how many; 0 is all.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.models import gpt2_sized
from tracelens.causal.arms import ArmRunner, OtherRun
from tracelens.causal.places import Arm, Place
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import LogitDifference
from tracelens.causal.rerun import Rerunner
from tracelens.precision import apply_precision
from tracelens.sites import Site

N_POS, CORRECT, WRONG = 16, 11, 13
os.environ.setdefault("TQDM_DISABLE", "1")


@dataclass
class Sweep:
    """One kind of sweep: what we run, and what the other side runs, by the index of the arm."""

    name: str
    arms: list[Arm]
    other: Callable[[Sequence[int]], Tensor]
    """Indices of arms → metric of each."""


def timed(job: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """Seconds on the clock and of the processor, and what the job gives."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, cpu = perf_counter(), process_time()
    out = job()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start, process_time() - cpu, out


def compare(sweep: Sweep, ours: Callable[[], Tensor], parts: int, repeats: int, device: str) -> None:
    """Prints the ratio of times (median and range over the repeats) and the largest difference of numbers."""
    generator = torch.Generator().manual_seed(0)
    n = len(sweep.arms)
    chosen = sorted(torch.randperm(n, generator=generator)[: parts or n].tolist())
    ratios, cpu_ratios, seconds, worst = [], [], [], 0.0
    for _ in range(repeats):
        other_seconds, other_cpu, theirs = timed(lambda: sweep.other(chosen), device)
        other_seconds *= n / len(chosen)
        our_seconds, our_cpu, numbers = timed(ours, device)
        cpu_ratios.append(other_cpu * n / len(chosen) / our_cpu)
        ratios.append(other_seconds / our_seconds)
        seconds.append((other_seconds, our_seconds))
        found = numbers[chosen]
        worst = max(worst, float((found - theirs.double().cpu().view_as(found)).abs().max()))
    other_seconds, our_seconds = (median(column) for column in zip(*seconds, strict=True))
    ran = "all" if len(chosen) == n else f"{len(chosen)} of them"
    print(
        f"{sweep.name:44s} {n:5d} runs: theirs {other_seconds:7.2f} s ({ran}), ours {our_seconds:6.2f} s, ratio "
        f"{median(ratios):6.1f} ({min(ratios):.1f} to {max(ratios):.1f}), of processor time "
        f"{median(cpu_ratios):.1f}, largest difference {worst:.1e}",
        flush=True,
    )


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, CORRECT] - logits[0, -1, WRONG]


def lens_sweeps(model: Any, corrupted: Tensor, clean_cache: Any) -> list[Sweep]:
    """The sweeps that transformer_lens.patching has."""
    import pandas as pd
    from transformer_lens import patching

    setters = {2: patching.layer_pos_patch_setter, 3: patching.layer_pos_head_vector_patch_setter}

    def other(name: str, columns: list[str], rows: list[tuple[int, ...]], setter: Any) -> Callable[..., Tensor]:
        def run(chosen: Sequence[int]) -> Tensor:
            frame = pd.DataFrame([rows[i] for i in chosen], columns=columns)
            return patching.generic_activation_patch(
                model, corrupted, clean_cache, metric, setter, name, index_df=frame
            )

        return run

    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    sweeps = []
    by_position = [(layer, p) for layer in layers for p in range(N_POS)]
    for name in ("resid_pre", "attn_out", "mlp_out"):
        arms: list[Arm] = [(Place(Site(layer, name), p),) for layer, p in by_position]
        sweeps.append(
            Sweep(f"{name} by layer and position", arms, other(name, ["layer", "pos"], by_position, setters[2]))
        )
    by_head = [(layer, head) for layer in layers for head in heads]
    arms = [(Place(Site(layer, "z"), None, head),) for layer, head in by_head]
    setter = patching.layer_head_vector_patch_setter
    sweeps.append(Sweep("heads (z), all positions", arms, other("z", ["layer", "head"], by_head, setter)))
    rows = [(layer, p, head) for layer in layers for p in range(N_POS) for head in heads]
    arms = [(Place(Site(layer, "z"), p, head),) for layer, p, head in rows]
    sweeps.append(Sweep("heads (z) by position", arms, other("z", ["layer", "pos", "head"], rows, setters[3])))
    return sweeps


def naive(model: Any, tokens: Tensor, caches: Any, arms: Sequence[Arm]) -> Callable[[Sequence[int]], Tensor]:
    """One run from the tokens for each arm, all positions of its places replaced."""

    def hook(place: Place) -> tuple[str, Callable[..., Tensor]]:
        new = caches[str(place.site)]

        def replace(value: Tensor, hook: Any) -> Tensor:
            if place.unit is None:
                return new
            value[:, :, place.unit] = new[:, :, place.unit]
            return value

        return str(place.site), replace

    def run(chosen: Sequence[int]) -> Tensor:
        with torch.no_grad():
            runs = (model.run_with_hooks(tokens, fwd_hooks=[hook(p) for p in arms[i]]) for i in chosen)
            return torch.stack([logits[:, -1, CORRECT] - logits[:, -1, WRONG] for logits in runs])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", type=int, default=48)
    parser.add_argument("--only", default="", help="part of the names of the sweeps to run")
    options = parser.parse_args()
    device = options.device
    torch.set_num_threads(options.threads)
    # Of a random model's margins of some units, float32 sums in another order leave 1e-6; TF32 would leave 1e-3.
    torch.backends.cuda.matmul.allow_tf32 = False
    model = gpt2_sized(8, (), 2)[0].to(device)
    generator = torch.Generator().manual_seed(1)
    clean, corrupted = (torch.randint(50257, (1, N_POS), generator=generator).tolist() for _ in range(2))
    prompts, sources = PromptSet.of(corrupted, model), PromptSet.of(clean, model)
    answer = LogitDifference((CORRECT,), (WRONG,))
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor(clean, device=device))
    tokens = torch.tensor(corrupted, device=device)

    def ours(arms: list[Arm]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            runner = ArmRunner(model, prompts, answer)
            return runner.run(arms, OtherRun(Rerunner(model), sources))[1]

        return run

    where = torch.cuda.get_device_name() if device == "cuda" else f"{options.threads} threads"
    print(f"GPT-2 small's shape, random weights, {N_POS} tokens, on {device} ({where})")
    with torch.no_grad():
        for sweep in lens_sweeps(model, tokens, cache):
            if options.only in sweep.name:
                compare(sweep, ours(sweep.arms), options.parts, options.repeats, device)
    pairs: list[Arm] = [
        (Place(Site(i, "attn_out")), Place(Site(j, "attn_out"))) for i, j in combinations(range(model.cfg.n_layers), 2)
    ]
    sweep = Sweep("pairs of layers (attn_out), naive", pairs, naive(model, tokens, cache, pairs))
    if options.only in sweep.name:
        compare(sweep, ours(pairs), options.parts, options.repeats, device)
    across(model, options)


def across(model: Any, options: argparse.Namespace) -> None:
    """Every head repaired in a quantized model, on eight prompts; the other side runs the prompts as one batch."""
    quantized = apply_precision(model, "int4-g64")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(50257, (8, N_POS), generator=generator)
    prompts = PromptSet.of(ids.tolist(), model)
    answer = LogitDifference((CORRECT,) * 8, (WRONG,) * 8)
    with torch.no_grad():
        _, cache = model.run_with_cache(ids.to(options.device))
    heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    arms: list[Arm] = [(Place(Site(layer, "z"), None, head),) for layer, head in heads]
    sweep = Sweep(
        "heads across precisions, 8 prompts, naive", arms, naive(quantized, ids.to(options.device), cache, arms)
    )

    def ours() -> Tensor:
        return ArmRunner(quantized, prompts, answer).run(arms, OtherRun(Rerunner(model)))[1]

    if options.only in sweep.name:
        compare(sweep, ours, min(options.parts or 12, 12), options.repeats, options.device)


if __name__ == "__main__":
    main()
