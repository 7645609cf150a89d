"""What a paired audit costs over the two bare forward passes (budget 1.3 ×): `python -m tests.benchmarks.bench_audit [PROMPTS [REPEATS]]`.

A model of GPT-2-small size with random weights, its whole vocabulary and an SAE of 24k features, and the embedded model on its 400
prompts. Bare passes see the same batches, sorted by length. Streaming (passes, SAEs, sums, KL over the vocabulary) is what the number of
prompts multiplies; the whole audit adds what does not grow with it: fingerprint, bootstrap, tables, smeared pairs.
"""

import sys
from collections.abc import Callable
from typing import Any

from tests.benchmarks.measuring import in_turns
from tests.benchmarks.models import TOKENS, bare, gpt2_sized
from tracelens import Audit, load, load_saes
from tracelens.datasets import get_dataset
from tracelens.features.survival import measure_survival
from tracelens.precision import apply_precision


def bench(name: str, model: Any, saes: Any, dataset: Any, texts: list[str], repeats: int, **options: Any) -> None:
    quantized = apply_precision(model, "int4")
    audit = Audit(model, quantized).load_sae(saes)

    def streaming() -> Callable[[], Any]:
        return measure_survival(
            model, {"q": lambda: quantized}, audit.saes, texts, readout=lambda logits: logits[:, :1], smearing_of=["q"]
        )

    def whole(evidence_prompts: int) -> Callable[[], Any]:
        return lambda: audit.trace_features(dataset, controls=False, evidence_prompts=evidence_prompts, **options)

    jobs = {"streaming": streaming, "whole audit": whole(512), "whole audit without evidence": whole(0)}
    in_turns(f"{name}, {len(texts)} prompts: two bare passes", lambda: bare([model, quantized], texts), jobs, repeats)


def main(n_prompts: str = "128", repeats: str = "3") -> None:
    model, saes, prompts = gpt2_sized(24_576, (8,), int(n_prompts))
    texts = [text for half in prompts.values() for text in half]
    bench("GPT-2-small size, SAE of 24k", model, saes, prompts, texts, int(repeats), answer_tokens=TOKENS, chat="never")
    dataset = get_dataset("organism_refusal_v1")
    bench("organism", load("organism"), load_saes("organism"), dataset, dataset.prompts, int(repeats))


if __name__ == "__main__":
    main(*sys.argv[1:])
