"""What is rounded where, on models of all kinds; the numbers are compared with transformers in tests/parity."""

import copy

import pytest
import torch

import tracelens
from tests import handmade
from tests.tiny import TEXTS, tiny_tokenizer, write_checkpoint
from tracelens.errors import NonFiniteError, PrecisionSpecError, PromptError
from tracelens.precision import apply_precision
from tracelens.precision.activation_grids import round_at, round_beside_outliers, round_fixed, round_rows, scale_of

FORMATS = ("int8", "int4", "fp8")


@pytest.fixture
def ids(tiny_model):
    return tiny_model.to_tokens(TEXTS[1])


def captured(model, ids, *names):
    values = {}
    hooks = [(name, lambda value, hook: values.__setitem__(hook.name, value)) for name in names]
    model.run_with_hooks(ids, fwd_hooks=hooks)
    return [values[name] for name in names]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


class TestGrids:
    @pytest.mark.parametrize("format", FORMATS)
    def test_rounding_again_changes_nothing(self, format):
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
        largest = x.abs().amax()
        once = round_fixed(x, format, largest)
        assert torch.equal(round_fixed(once, format, largest), once)
        assert not torch.equal(once, x)

    @pytest.mark.parametrize("format", FORMATS)
    def test_error_is_at_most_half_a_step(self, format):
        x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
        scale = scale_of(x.abs().amax(-1, keepdim=True), format)
        error = (round_rows(x, format) - x).abs()
        # E4M3 has 3 bits behind the leading one, and steps of 2^-9 near 0.
        half_step = torch.maximum(x.abs() / 16, scale * 2**-10) if format == "fp8" else scale / 2
        assert (error <= half_step * (1 + 1e-4)).all()

    @pytest.mark.parametrize("format", FORMATS)
    def test_a_row_does_not_depend_on_others_nor_its_scale_on_units(self, format):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        rounded = round_rows(x, format)
        assert torch.equal(round_rows(x[2:3], format), rounded[2:3])
        assert torch.equal(round_rows(4 * x, format), 4 * rounded)
        assert torch.equal(round_rows(torch.zeros(2, 8), format), torch.zeros(2, 8))

    def test_beyond_the_range_is_saturated(self):
        x = torch.tensor([[-100.0, -1.0, 0.4, 100.0]])
        assert round_fixed(x, "int8", torch.tensor(127.5)).tolist() == [[-100, -1, 0, 100]]
        assert round_fixed(x, "int4", torch.tensor(7.5)).tolist() == [[-8, -1, 0, 7]]
        assert round_fixed(x, "fp8", torch.tensor(44.8)).tolist()[0][0::3] == pytest.approx([-44.8, 44.8])
        assert round_at(x, torch.ones(()), "fp8").tolist() == [[-96.0, -1.0, 0.40625, 96.0]]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtype_is_kept(self, dtype):
        x = torch.randn(3, 16).to(dtype)
        for rounded in (round_rows(x, "int8"), round_fixed(x, "fp8", x.abs().amax()), round_beside_outliers(x, 1.0)):
            assert rounded.dtype is dtype

    def test_outliers_stay_and_do_not_set_the_scale(self):
        x = torch.tensor([[0.5, -1.0, 60.0, 0.123], [0.5, -1.0, 2.0, 0.123]])
        rounded = round_beside_outliers(x, 6.0)
        assert rounded[0, 2] == 60
        assert rounded[0, [0, 1, 3]].tolist() == pytest.approx([64 / 127, -1, 16 / 127])
        assert rounded[1].tolist() == pytest.approx([64 / 127, -128 / 127, 2, 16 / 127], abs=1e-6)
        # A threshold of 0 knows none, and one of next to nothing knows only outliers.
        assert round_beside_outliers(x, 0.0)[0].tolist() == pytest.approx([60 / 127, -120 / 127, 60, 0])
        assert torch.equal(round_beside_outliers(x, 1e-30), x)


class TestPlaces:
    def test_inputs_of_all_linear_layers(self, tiny_model, ids):
        for spec, format in (("fp32+a4", "int4"), ("fp32+afp8", "fp8")):
            model = apply_precision(tiny_model, spec)
            resid, mid, z, post, gate, up = captured(
                model, ids, *(f"blocks.1.{n}" for n in ("hook_resid_pre", "hook_resid_mid", "attn.hook_z")),
                *(f"blocks.1.mlp.{n}" for n in ("hook_post", "hook_pre", "hook_pre_linear")),
            )  # fmt: skip
            exact = tiny_model.blocks[1]
            for norm, source in (("ln1", resid), ("ln2", mid)):
                expected = round_rows(getattr(exact, norm)(source).flatten(0, 1), format)
                assert torch.equal(getattr(model.blocks[1], norm)(source).flatten(0, 1), expected)
            close(post.flatten(0, 1), round_rows((torch.nn.functional.silu(gate) * up).flatten(0, 1), format))
            assert torch.equal(round_rows(z.flatten(2).flatten(0, 1), format), z.flatten(2).flatten(0, 1)) == (
                format == "fp8"
            )

    def test_keys_are_rounded_as_they_are_cached_and_queries_are_not(self, tiny_model, ids):
        model = apply_precision(tiny_model, "fp32+kv8")
        names = [f"blocks.0.attn.hook_{n}" for n in ("q", "k", "rot_q", "rot_k", "v", "z")]
        q, k, rot_q, rot_k, v, _ = captured(model, ids, *names)
        exact = captured(tiny_model, ids, *names)
        assert torch.equal(q, exact[0])
        assert torch.equal(k, exact[1])
        assert torch.equal(rot_q, exact[2])
        assert rot_k.shape[2] == 2  # key-value heads: one scale for each
        for rounded, source in ((rot_k, exact[3]), (v, exact[4])):
            assert torch.equal(rounded, round_rows(source.reshape(-1, 8), "int8").view_as(source))
            assert not torch.equal(rounded, source)

    def test_only_what_is_asked_for(self, tiny_model, ids):
        exact = tiny_model(ids)
        weights = apply_precision(tiny_model, "int8")(ids)
        assert not torch.equal(weights, exact)
        assert torch.equal(apply_precision(tiny_model, "int8+kv8")(ids), apply_precision(tiny_model, "int8+kv8")(ids))
        changed = [apply_precision(tiny_model, spec)(ids) for spec in ("int8", "int8+a8", "int8+a8+kv8", "int8+kv8")]
        assert len({tuple(logits.flatten().tolist()) for logits in changed}) == 4
        assert torch.equal(changed[1], apply_precision(tiny_model, "int8-dynamic")(ids))

    def test_a_token_does_not_depend_on_the_prompts_beside_it(self, tiny_folder):
        model = apply_precision(tracelens.load(tiny_folder, device="cpu", dtype=torch.float64), "fp32+afp8+kvfp8")
        short, long = model.to_tokens(TEXTS[0]), model.to_tokens(TEXTS[1])
        n, width = short.shape[1], long.shape[1]
        batch = torch.cat([torch.nn.functional.pad(short, (0, width - n)), long])
        mask = torch.ones_like(batch)
        mask[0, n:] = 0
        torch.testing.assert_close(model(batch, attention_mask=mask)[0, :n], model(short)[0], rtol=0, atol=1e-8)

    def test_generation_with_a_cache_sees_the_same_keys_and_values(self, tiny_folder):
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        model = apply_precision(tracelens.load(tiny_folder, device="cpu", dtype=torch.float64), "fp32+kvfp8")
        ids = model.to_tokens(TEXTS[1])
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)
        steps = torch.cat([model(ids[:, i : i + 1], past_kv_cache=cache) for i in range(ids.shape[1])], 1)
        torch.testing.assert_close(steps, model(ids), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("option", ["use_split_qkv_input", "use_attn_result", "ungroup_grouped_query_attention"])
    def test_ways_of_running_attention_do_not_matter(self, tiny_folder, option):
        model = tracelens.load(tiny_folder, device="cpu", dtype=torch.float64)
        ids, logits = model.to_tokens(TEXTS[1]), []
        for spec in ("fp32+afp8+kvfp8", "fp32+afp8-static+kv8-static"):
            rounded = apply_precision(model, spec, calibration=TEXTS)
            logits = [rounded(ids)]
            getattr(rounded, f"set_{option}")(True)
            logits.append(rounded(ids))
            torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-8)

    def test_values_are_clipped_before_they_are_stored(self, tmp_path):
        folder = write_checkpoint(tmp_path / "m", "OlmoForCausalLM", clip_qkv=0.3)
        model = tracelens.load(folder, device="cpu")
        ids = model.to_tokens(TEXTS[1])
        (exact,) = captured(model, ids, "blocks.0.attn.hook_v")
        (rounded,) = captured(apply_precision(model, "fp32+kv4"), ids, "blocks.0.attn.hook_v")
        assert exact.abs().max() > 0.3
        assert torch.equal(rounded, round_rows(exact.clamp(-0.3, 0.3).reshape(-1, 8), "int4").view_as(exact))

    @pytest.mark.parametrize(
        ("architecture", "config"),
        [("MixtralForCausalLM", {}), ("Qwen3MoeForCausalLM", {}), ("GptOssForCausalLM", {"sliding_window": 5})],
    )
    def test_experts_read_rounded_inputs_and_their_router_does_not(self, tmp_path, architecture, config):
        model = tracelens.load(write_checkpoint(tmp_path / "m", architecture, **config), device="cpu")
        ids, seen = model.to_tokens(TEXTS[1]), {}
        quantized = apply_precision(model, "fp32+a8")
        mlp = quantized.blocks[0].mlp

        def see(name):
            def hook(module, args):
                seen[name] = args[0]

            return hook

        mlp.W_gate.register_forward_pre_hook(see("router"))
        for i, expert in enumerate(mlp.experts):
            expert.W_in.register_forward_pre_hook(see(i))
        mid, post = captured(quantized, ids, "blocks.0.hook_resid_mid", "blocks.0.mlp.experts.0.hook_post")
        normed = model.blocks[0].ln2(mid).flatten(0, 1)
        assert torch.equal(seen["router"].reshape(normed.shape), normed)
        rows = {tuple(row) for row in round_rows(normed, "int8").tolist()}
        inputs = torch.cat([seen[i] for i in range(4) if i in seen])
        assert len(inputs) == 2 * len(normed)
        assert all(tuple(row) in rows for row in inputs.tolist())
        assert (post / scale_of(post.abs().amax(-1, keepdim=True), "int8")).unique().numel() <= 256 * len(post)
        static = apply_precision(model, "fp32+a8-static", calibration=[[5, 6]])
        shared = [name for name in static.static_ranges if name.startswith("blocks.0.mlp")]
        assert shared == ["blocks.0.mlp.experts", "blocks.0.mlp.experts.hook_post"]
        assert static(ids).isfinite().all()

    def test_norms_behind_the_layers(self, tmp_path):
        model = tracelens.load(write_checkpoint(tmp_path / "m", "Olmo2ForCausalLM"), device="cpu")
        ids = model.to_tokens(TEXTS[1])
        quantized = apply_precision(model, "fp32+a8")
        resid, q = captured(quantized, ids, "blocks.0.hook_resid_pre", "blocks.0.attn.hook_q")
        rounded = round_rows(resid.flatten(0, 1), "int8").view_as(resid)
        weight = model.blocks[0].attn.W_Q
        torch.testing.assert_close(q, torch.einsum("bpd,hde->bphe", rounded, weight), rtol=1e-4, atol=1e-5)
        assert torch.equal(resid, captured(model, ids, "blocks.0.hook_resid_pre")[0])  # the residual itself is not

    def test_a_model_without_norms(self):
        model = handmade.model()
        ids = model.tokenizer("the cat no", return_tensors="pt").input_ids
        assert apply_precision(model, "fp32+a8+kv8")(ids).isfinite().all()


class TestComposition:
    def test_what_a_kernel_quantizes_is_bf16_first(self, tiny_model, ids):
        model = apply_precision(tiny_model, "fp32+bf16+kvfp8")
        (key,) = captured(model, ids, "blocks.0.attn.hook_rot_k")
        (half,) = captured(apply_precision(tiny_model, "bf16"), ids, "blocks.0.attn.hook_rot_k")
        assert torch.equal(key, round_rows(half.reshape(-1, 8), "fp8").view_as(half))

    def test_bf16_as_type_and_as_compute_are_the_same(self, tiny_model, ids):
        assert torch.equal(apply_precision(tiny_model, "bf16")(ids), apply_precision(tiny_model, "fp32+bf16")(ids))

    @pytest.mark.parametrize("spec", ["fp32+a4", "fp32+afp8-static+kv4-static", "llm-int8", "fp32+kv8"])
    def test_rounding_survives_resets_and_copies_and_lets_gradients_through(self, tiny_model, ids, spec):
        model = apply_precision(tiny_model, spec, calibration=TEXTS)
        logits = model(ids)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(ids), logits)
        assert torch.equal(copy.deepcopy(model)(ids), logits)
        embedding = model.embed.W_E.detach().clone().requires_grad_()
        model.embed.W_E = torch.nn.Parameter(embedding)
        model(ids)[0, -1].square().sum().backward()
        rounded = model.embed.W_E.grad
        exact_model = copy.deepcopy(tiny_model)
        exact_model.embed.W_E.requires_grad_()
        exact_model(ids)[0, -1].square().sum().backward()
        assert torch.cosine_similarity(exact_model.embed.W_E.grad.flatten(), rounded.flatten(), dim=0) > 0.8

    def test_llm_int8_keeps_outliers(self, tiny_model, ids):
        tiny_model.blocks[0].ln1.w.data[3] *= 60
        every = apply_precision(tiny_model, "llm-int8-t0.000000000001")
        some, none = apply_precision(tiny_model, "llm-int8"), apply_precision(tiny_model, "llm-int8-t1000")
        source = captured(tiny_model, ids, "blocks.0.hook_resid_pre")[0]
        exact = tiny_model.blocks[0].ln1(source)
        error = {
            name: (m.blocks[0].ln1(source) - exact).norm()
            for name, m in (("every", every), ("some", some), ("none", none))
        }
        assert error["every"] < 1e-6 < error["some"] < error["none"] / 3
        outlier = exact.half().abs() >= 6
        assert outlier.any()
        assert torch.equal(some.blocks[0].ln1(source)[outlier], exact[outlier])


class TestCalibration:
    def test_ranges_are_those_of_all_tokens_of_all_prompts(self, tiny_model):
        model = apply_precision(tiny_model, "int4+a8-static+kv8-static", calibration=TEXTS)
        weights = apply_precision(tiny_model, "int4")
        places = {"blocks.2.ln1", "blocks.2.attn.hook_z", "blocks.2.attn.hook_rot_k", "blocks.2.attn.hook_v"}
        assert len(model.static_ranges) == 3 * 6
        assert places < set(model.static_ranges)
        for name in places:
            read = {"blocks.2.ln1": "blocks.2.hook_resid_pre"}.get(name, name)
            values = [captured(weights, weights.to_tokens(text), read)[0] for text in TEXTS]
            values = [weights.blocks[2].ln1(value) for value in values] if name.endswith("ln1") else values
            assert model.static_ranges[name] == max(value.abs().max().item() for value in values)
        # Texts, token ids and objects with a text mean the same.
        ids = [tiny_model.tokenizer(text).input_ids for text in TEXTS]
        again = apply_precision(tiny_model, "int4+a8-static+kv8-static", calibration=ids)
        assert again.static_ranges == model.static_ranges

    def test_what_was_not_seen_saturates(self, tiny_model, ids):
        model = apply_precision(tiny_model, "fp32+a8-static", calibration=["yes"])
        assert model.static_ranges["blocks.0.mlp.hook_post"] > 0
        (post,) = captured(model, ids, "blocks.0.mlp.hook_post")
        limit = model.static_ranges["blocks.0.mlp.hook_post"]
        exact = captured(tiny_model, ids, "blocks.0.mlp.hook_post")[0]
        assert exact.abs().max() > limit * 1.01
        assert post.abs().max() <= limit * 128 / 127.5

    @pytest.mark.parametrize("prompts", [None, [], "a text"])
    def test_static_scales_need_prompts(self, tiny_model, prompts):
        with pytest.raises(
            PrecisionSpecError, match=r"static scales are found on calibration prompts.*calibration=\[\.\.\.\]"
        ):
            apply_precision(tiny_model, "int8+a8-static", calibration=prompts)
        apply_precision(tiny_model, "int8+a8", calibration=prompts)

    def test_prompts_that_do_not_run(self, tiny_model):
        for prompts, message in (
            ([[5], [5] * 65], "calibration prompt 1 has 65 tokens; expected 1 to 64"),
            ([[]], "calibration prompt 0 has 0 tokens"),
            ([[48]], "calibration prompt 0 has token ids outside 0 to 47"),
        ):
            with pytest.raises(PromptError, match=message):
                apply_precision(tiny_model, "fp32+kv8-static", calibration=prompts)
        tiny_model.tokenizer = None
        with pytest.raises(PromptError, match="the model has no tokenizer; give lists of token ids"):
            apply_precision(tiny_model, "fp32+kv8-static", calibration=["the cat"])

    def test_a_model_that_gives_nan_is_named(self, tiny_model):
        tiny_model.blocks[1].mlp.W_gate.data[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match=r"activations at blocks\.1\.mlp\.hook_post hold NaN"):
            apply_precision(tiny_model, "fp32+a8-static", calibration=TEXTS)


class TestErrors:
    @pytest.mark.parametrize("spec", ["fp32+a8", "int8-dynamic", "llm-int8"])
    def test_folded_norms(self, tiny_model, spec):
        tiny_model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
        with pytest.raises(
            PrecisionSpecError, match=r"norm weights are folded into them \(normalization_type RMSPre\)"
        ):
            apply_precision(tiny_model, spec)
        assert apply_precision(tiny_model, "fp32+kv8")(torch.tensor([[5, 6]])).isfinite().all()

    def test_a_model_of_another_kind(self):
        model = torch.nn.Linear(2, 2)
        model.tokenizer = tiny_tokenizer()
        with pytest.raises(
            PrecisionSpecError, match="those of a Linear are not known; load the model with wrapper='hooked'"
        ):
            apply_precision(model, "fp32+kv8")
