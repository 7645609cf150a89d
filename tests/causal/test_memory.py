import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.benchmarks.measuring import Peak
from tracelens.causal import memory
from tracelens.causal.arms import ArmRunner, OtherRun
from tracelens.causal.places import Place
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import LogitDifference
from tracelens.causal.rerun import Rerunner
from tracelens.errors import MemoryBudgetError
from tracelens.sites import Site

CPU = torch.device("cpu")


@contextmanager
def nothing_is_kept_back() -> Iterator[None]:
    """Blocks that are freed go back to the system at once, so that what is resident is what is held."""
    m_mmap_threshold, m_trim_threshold = -3, -1
    try:
        mallopt, trim = ctypes.CDLL(None).mallopt, ctypes.CDLL(None).malloc_trim
    except AttributeError:
        pytest.skip("needs an allocator that can be told to keep nothing")
    gc.collect()
    mallopt(m_mmap_threshold, 2**16)
    # What earlier tests freed and the allocator still holds would be handed out again without growing.
    trim(0)
    try:
        yield
    finally:
        # Where glibc settles by itself once large blocks have been freed.
        mallopt(m_mmap_threshold, 2**25)
        mallopt(m_trim_threshold, 2**26)


@pytest.mark.parametrize(
    ("name", "length", "budget", "n_prompts", "every"),
    [("resid_pre", 64, 96 * 2**20, 32, 4), ("pattern", 128, 128 * 2**20, 8, 16)],
)
def test_a_budget_is_kept(name, length, budget, n_prompts, every):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 3, "d_model": 128, "n_ctx": 512, "d_head": 32, "n_heads": 4, "d_vocab": 500, "d_mlp": 512}
    model = HookedTransformer(HookedTransformerConfig(**sizes, act_fn="gelu", device="cpu", seed=0)).eval()

    def prompts(seed):
        ids = torch.randint(500, (n_prompts, length), generator=torch.Generator().manual_seed(seed))
        return PromptSet.of(ids.tolist(), model)

    where = [None if name == "pattern" else position for position in range(0, length, every)]
    arms = [(Place(Site(layer, name), position),) for layer in range(3) for position in where]
    source, metric = OtherRun(Rerunner(model), prompts(1)), LogitDifference((1,) * n_prompts, (2,) * n_prompts)
    job = ArmRunner(model, prompts(0), metric, memory_budget=budget)
    estimate = job.estimate(arms).bytes
    assert estimate <= budget
    with nothing_is_kept_back():
        job.run(arms[:1], source)
        with Peak() as peak:
            job.run(arms, source)
    assert 0.1 * estimate < peak.above_gb * 2**30 < estimate


def test_the_found_budget_is_a_share_of_what_is_free():
    free = memory.free_bytes(CPU)
    assert 0 < free < 2**50
    assert abs(memory.limit_of(None, CPU) / (memory.SHARE * free) - 1) < 0.2
    assert memory.limit_of(12345, CPU) == 12345


def test_the_limit_of_a_container_counts(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert memory._group_limits(tmp_path) == [450]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_limits(tmp_path) == []


def test_what_does_not_fit_is_named_with_numbers():
    with pytest.raises(
        MemoryBudgetError, match=r"7 tokens needs about 3\.0 MiB \(1\.0 of them .* budget is 2\.5 MiB; give a"
    ):
        memory.rows_in_memory(5 * 2**19, 2**20, 2 * 2**20, 7)
    assert memory.rows_in_memory(5 * 2**20, 2**20, 2 * 2**20, 7) == 2
    assert memory.rows_that_fit(2**40, 0, 1, 10, CPU) == memory.MAX_TOKENS["cpu"] // 10


@pytest.mark.parametrize("budget", ["1GB", 0, -5, float("nan")])
def test_what_is_no_number_of_bytes_is_no_budget(budget):
    with pytest.raises(MemoryBudgetError, match=r"memory_budget is .*; give bytes as a number above 0"):
        memory.limit_of(budget, CPU)
    assert memory.limit_of(1e6, CPU) == 1_000_000


def test_what_is_kept_of_the_prompts_leaves_less_room_for_runs(tiny_model):
    n, length = 16, 9
    ids = torch.randint(4, 40, (2, n, length), generator=torch.Generator().manual_seed(0)).tolist()
    prompts, other = (PromptSet.of(rows, tiny_model) for rows in ids)
    sites = [Site(layer, name) for layer in range(3) for name in ("resid_pre", "mlp_out", "resid_post")]
    arms = [(Place(site, position),) for site in sites for position in range(length)]
    kept = 2 * len(sites) * n * length * 32 * 4
    row = memory.run_bytes(tiny_model.cfg, length, sites)
    budget = 3 * kept
    job = ArmRunner(tiny_model, prompts, LogitDifference((1,) * n, (2,) * n), memory_budget=budget)
    estimate, together = job.estimate(arms), []
    tiny_model.add_hook("blocks.2.hook_resid_pre", lambda value, hook: together.append(len(value)))
    assert job.runner.resumes
    together.clear()
    job.run(arms, OtherRun(Rerunner(tiny_model), other))
    # All prompts at once, so that all is kept at once, and more runs than fit beside it.
    assert together[0] == n
    assert estimate.runs > budget // row
    assert kept + max(together) * row <= budget
    assert kept + max(together) * row <= estimate.bytes <= budget
