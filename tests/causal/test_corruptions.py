"""Corruptions: what stands in the embedding afterwards, whatever the batching, and in either wrapper."""

import pytest
import torch

import tracelens
from tests.tiny import TEXTS, write_checkpoint
from tracelens.causal.contrasts import Contrasts
from tracelens.causal.corruptions import (
    HOOK,
    Corruption,
    EmbeddingNoise,
    MeanEmbedding,
    ResampleEmbedding,
    ZeroEmbedding,
    embeddings,
)
from tracelens.causal.prompts import PromptSet
from tracelens.causal.rerun import Rerunner
from tracelens.errors import PromptError, UnknownNameError

KINDS = [
    EmbeddingNoise("w"),
    ZeroEmbedding("w"),
    MeanEmbedding("w"),
    MeanEmbedding("w", per_position=True),
    ResampleEmbedding("w"),
]
SPANS = {"w": [[1, 2], [4, 5], [1], [-1]]}


@pytest.fixture
def prompts(tiny_model):
    return PromptSet.of([*TEXTS, "the mat", "no"], tiny_model, chat="never", spans={"w": [*SPANS["w"], [1, 2], [1]]})


def embedded(corruption: Corruption, prompts: PromptSet, model, size: int = 32) -> list[torch.Tensor]:
    """What the embedding of each prompt holds under the corruption."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for batch in prompts.batches(size):
        kept: list[torch.Tensor] = []

        def read(value, hook, kept=kept):
            kept.append(value)

        edits = corruption.edits(batch, prompts, model)
        hooks = [(name, lambda value, hook, edit=edit: edit(value)) for name, edit in edits.items()]
        with torch.no_grad():
            model.run_with_hooks(batch.tokens, fwd_hooks=[*hooks, (HOOK, read)])
        for index, value in zip(batch.prompt.tolist(), kept[0], strict=True):
            found[index] = value
    return found


def original(prompts: PromptSet, model) -> list[torch.Tensor]:
    return [model.W_E[list(ids)] for ids in prompts.tokens]


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_only_its_group_is_touched_and_the_batching_does_not_matter(kind, prompts, tiny_model):
    whole = embedded(kind, prompts, tiny_model)
    for size in (1, 2):
        for a, b in zip(embedded(kind, prompts, tiny_model, size), whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    for index, (before, after) in enumerate(zip(original(prompts, tiny_model), whole, strict=True)):
        moved = (before - after).abs().sum(-1).nonzero().flatten().tolist()
        assert set(moved) <= set(prompts.groups["w"][index])
        # Another prompt's group may share a token with this one's.
        assert moved if isinstance(kind, ResampleEmbedding) else tuple(moved) == prompts.groups["w"][index]
    # The prompts' place in the set decides, not which others run beside them.
    assert isinstance(kind, Corruption)


def test_noise_has_three_times_the_spread_of_the_embeddings(prompts, tiny_model):
    cells = [
        tiny_model.W_E[ids[p]] for ids, where in zip(prompts.tokens, prompts.groups["w"], strict=True) for p in where
    ]
    sd = torch.stack(cells).std(correction=0).item()
    assert EmbeddingNoise("w").standard_deviation(prompts, tiny_model) == pytest.approx(sd, rel=1e-5)
    many = PromptSet.of([TEXTS[0]] * 400, tiny_model, chat="never")
    noise = [
        after - before
        for before, after in zip(
            original(many, tiny_model), embedded(EmbeddingNoise(None), many, tiny_model), strict=True
        )
    ]
    values = torch.stack(noise)
    spread = tiny_model.W_E[list(many.tokens[0])].std(correction=0).item()
    assert values.std().item() == pytest.approx(3 * spread, rel=0.01)
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    # Each prompt has noise of its own, and so has each seed.
    assert (values[0] - values[1]).abs().min() > 0
    other = embedded(EmbeddingNoise(None, seed=1), many, tiny_model)
    assert (other[0] - many_first(many, tiny_model)).abs().min() > 0
    small = embedded(EmbeddingNoise(None, scale=1.0), many, tiny_model)
    torch.testing.assert_close(small[3] - original(many, tiny_model)[3], noise[3] / 3, atol=1e-5, rtol=0)


def many_first(prompts: PromptSet, model) -> torch.Tensor:
    return embedded(EmbeddingNoise(None), prompts, model)[0]


def test_zero_and_mean_by_hand(prompts, tiny_model):
    before, where = original(prompts, tiny_model), prompts.groups["w"]
    for value, at in zip(embedded(ZeroEmbedding("w"), prompts, tiny_model), where, strict=True):
        assert value[list(at)].abs().max() == 0
    mean = torch.cat([value[list(at)] for value, at in zip(before, where, strict=True)]).mean(0)
    for value, at in zip(embedded(MeanEmbedding("w"), prompts, tiny_model), where, strict=True):
        torch.testing.assert_close(value[list(at)], mean.expand(len(at), -1))
    firsts = torch.stack([value[at[0]] for value, at in zip(before, where, strict=True)]).mean(0)
    seconds = torch.stack([value[at[1]] for value, at in zip(before, where, strict=True) if len(at) > 1]).mean(0)
    for value, at in zip(embedded(MeanEmbedding("w", per_position=True), prompts, tiny_model), where, strict=True):
        torch.testing.assert_close(value[list(at)], torch.stack([firsts, seconds])[: len(at)])


def test_the_mean_of_another_set(prompts, tiny_model):
    over = PromptSet.of(["the cat", "a cat"], tiny_model, chat="never", spans={"w": [[1], [2]]})
    mean = (tiny_model.W_E[over.tokens[0][1]] + tiny_model.W_E[over.tokens[1][2]]) / 2
    value = embedded(MeanEmbedding("w", over), prompts, tiny_model)[0]
    torch.testing.assert_close(value[[1, 2]], mean.expand(2, -1))
    with pytest.raises(PromptError, match=r"no prompt of the set has 2 tokens in 'w', but a prompt to corrupt has"):
        embedded(MeanEmbedding("w", over, per_position=True), prompts, tiny_model)


def test_resampled_embeddings_are_another_prompts(prompts, tiny_model):
    rows = [tuple(ids[p] for p in where) for ids, where in zip(prompts.tokens, prompts.groups["w"], strict=True)]
    kind = ResampleEmbedding("w")
    for index, value in enumerate(embedded(kind, prompts, tiny_model)):
        given = kind.tokens(prompts, index)
        assert given != rows[index]
        assert given in rows
        torch.testing.assert_close(value[list(prompts.groups["w"][index])], tiny_model.W_E[list(given)])
    drawn = {ResampleEmbedding("w", seed=seed).tokens(prompts, 0) for seed in range(30)}
    assert drawn == {row for row in rows if len(row) == 2 and row != rows[0]}
    source = PromptSet.of(["a dog", "no"], tiny_model, chat="never", spans={"w": [[1, 2], [1]]})
    assert ResampleEmbedding("w", source).tokens(prompts, 0) == source.tokens[0][1:]
    lonely = prompts.select([0])
    with pytest.raises(
        PromptError, match=r"no other prompt has 2 tokens in 'w' to give to prompt 0; give more prompts"
    ):
        embedded(kind, lonely, tiny_model)


def test_resampling_all_of_a_prompt_is_running_the_other(tiny_model):
    made = PromptSet.of(["the cat sat", "a dog ran"], tiny_model, chat="never")
    contrasts = Contrasts.of_corruption(made, tiny_model, ResampleEmbedding(None))
    (batch,) = made.batches(8)
    logits = contrasts.baselines(tiny_model)
    torch.testing.assert_close(logits["corrupted"](batch), logits["clean"](batch).flip(0))


def test_nothing_to_corrupt(prompts, tiny_model):
    none = prompts.with_groups({"w": [()] * len(prompts)})
    for kind in (EmbeddingNoise("w"), MeanEmbedding("w")):
        with pytest.raises(PromptError, match=r"no prompt has tokens in 'w', so there is nothing to corrupt"):
            kind.edits(none.batches(8)[0], none, tiny_model)
    with pytest.raises(UnknownNameError, match="unknown group of positions 'object'"):
        ZeroEmbedding().edits(prompts.batches(8)[0], prompts, tiny_model)
    # A prompt without the group among others that have it stays as it is.
    some = prompts.with_groups({"w": [(1,), *[()] * (len(prompts) - 1)]})
    for kind in (EmbeddingNoise("w"), ZeroEmbedding("w"), MeanEmbedding("w", per_position=True)):
        for index, (a, b) in enumerate(zip(original(some, tiny_model), embedded(kind, some, tiny_model), strict=True)):
            assert torch.equal(a, b) == (index > 0 or isinstance(kind, MeanEmbedding))


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "GemmaForCausalLM", "BloomForCausalLM"]
)
def test_both_wrappers_are_corrupted_alike(architecture, tmp_path):
    sizes = {"head_dim": 8} if "Gemma" in architecture else {}
    folder = write_checkpoint(tmp_path / "model", architecture, **sizes)
    models = [tracelens.load(folder, device="cpu", wrapper=wrapper) for wrapper in ("hooked", "bridge")]
    texts = [TEXTS[0], TEXTS[1], TEXTS[3]]
    for kind in (EmbeddingNoise(-1), ZeroEmbedding(-1), MeanEmbedding(-1), ResampleEmbedding(-1)):
        runs = []
        for model in models:
            made = Contrasts.of_corruption(texts, model, kind, chat="never")
            runs.append({name: [run(b) for b in made.clean.batches(8)] for name, run in made.baselines(model).items()})
        torch.testing.assert_close(runs[0], runs[1], atol=2e-5, rtol=0)
        assert all((a - b).abs().max() > 0.01 for a, b in zip(runs[0]["clean"], runs[0]["corrupted"], strict=True))


def test_embeddings_of_many_tokens(tiny_model):
    tokens = [*range(48), 3, 3]
    tiny_model.cfg.n_ctx = 16
    torch.testing.assert_close(embeddings(tiny_model, tokens), tiny_model.W_E[tokens])


def test_a_batch_is_not_written_into(tiny_model, prompts):
    (batch,) = prompts.select([0]).batches(4)
    edit = ZeroEmbedding("w").edits(batch, prompts.select([0]), tiny_model)[HOOK]
    value = torch.ones(1, 7, 32)
    edit(value)
    assert value.min() == 1
    with pytest.raises(PromptError, match="a corruption of 1 prompts was put on 2 rows"):
        edit(torch.ones(2, 7, 32))


def test_half_precision(tiny_folder):
    model = tracelens.load(tiny_folder, device="cpu", dtype=torch.bfloat16)
    made = Contrasts.of_corruption(TEXTS[:2], model, EmbeddingNoise(-1), chat="never")
    for batch in made.clean.batches(4):
        logits, _ = Rerunner(model).run(batch.tokens, edits=made.edits(model)(batch))
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()
