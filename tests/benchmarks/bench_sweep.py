"""A sweep of 6 precisions against the 12 forward passes of 6 separate audits: `python -m tests.benchmarks.bench_sweep [PROMPTS [REPEATS]]`.

The sweep runs 7 times through the prompts, once with what it keeps of the reference in memory and once all on disk, where the reference's
unembedding is done again for each precision. For comparison the 6 separate audits too.
"""

import sys
from collections.abc import Callable
from typing import Any

from tests.benchmarks.measuring import in_turns
from tests.benchmarks.models import TOKENS, bare, gpt2_sized
from tracelens import Audit, OptimizationAuditor, load, load_saes
from tracelens.datasets import get_dataset
from tracelens.features.survival import ReferencePass
from tracelens.precision import apply_precision

PRECISIONS = ["int8", "int4", "int4-g32", "nf4", "int3", "int2-g32"]


def bench(name: str, model: Any, saes: Any, dataset: Any, texts: list[str], repeats: int, **options: Any) -> None:
    made = [apply_precision(model, spec) for spec in PRECISIONS]
    auditor = OptimizationAuditor(model, saes)
    options |= {"controls": False}

    def streaming(memory: float) -> Callable[[], Any]:
        def run() -> None:
            one = ReferencePass(model, auditor.saes, texts, readout=lambda logits: logits[:, :1], memory=memory)
            one.measure({str(i): lambda other=other: other for i, other in enumerate(made)}, map(str, range(len(made))))

        return run

    def separately() -> None:
        for spec in PRECISIONS:
            Audit(model, precision=spec).load_sae(saes).trace_features(dataset, **options)

    jobs = {
        "streaming, kept in memory": streaming(8.0),
        "streaming, kept on disk": streaming(0.0),
        "whole sweep": lambda: auditor.run_sweep(dataset, PRECISIONS, **options),
        "six whole audits": separately,
    }
    twelve = [m for other in made for m in (model, other)]
    in_turns(f"{name}, {len(texts)} prompts: twelve bare passes", lambda: bare(twelve, texts), jobs, repeats)


def main(n_prompts: str = "32", repeats: str = "2") -> None:
    model, saes, prompts = gpt2_sized(24_576, (8,), int(n_prompts))
    texts = [text for half in prompts.values() for text in half]
    bench("GPT-2-small size, SAE of 24k", model, saes, prompts, texts, int(repeats), answer_tokens=TOKENS, chat="never")
    dataset = get_dataset("organism_refusal_v1")
    bench("organism", load("organism"), load_saes("organism"), dataset, dataset.prompts, int(repeats))


if __name__ == "__main__":
    main(*sys.argv[1:])
