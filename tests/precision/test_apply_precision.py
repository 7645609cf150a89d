import copy
import re
from dataclasses import replace

import pytest
import torch

from tests.tiny import TEXTS, write_checkpoint
from tracelens import load
from tracelens.errors import NonFiniteError, PrecisionSpecError
from tracelens.precision import QuantizationConfig, QuantizationType, apply_precision, weight_matrices
from tracelens.precision.grids import round_to_integers
from tracelens.precision.rounding import round_weight

LINEAR = {"W_Q", "_W_K", "_W_V", "W_O", "W_in", "W_gate", "W_out"}


@pytest.fixture
def ids(tiny_model):
    return tiny_model.to_tokens(TEXTS[1])


def storages(model):
    return {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def test_fp32_is_the_same_model(tiny_model, ids):
    same = apply_precision(tiny_model, "fp32")
    assert type(same) is type(tiny_model)
    assert same is not tiny_model
    assert torch.equal(same(ids), tiny_model(ids))
    assert storages(same) == storages(tiny_model)
    assert same.precision == QuantizationConfig(QuantizationType.FP32)


def test_only_the_weights_of_linear_layers_change_and_all_else_is_shared(tiny_model):
    before = {name: parameter.clone() for name, parameter in tiny_model.named_parameters()}
    quantized = apply_precision(tiny_model, QuantizationConfig(QuantizationType.INT4))
    ours, theirs = storages(tiny_model), storages(quantized)
    assert {name.rpartition(".")[2] for name in ours if ours[name] != theirs[name]} == LINEAR
    assert sum(ours[name] != theirs[name] for name in ours) == 7 * tiny_model.cfg.n_layers
    assert all(torch.equal(parameter, before[name]) for name, parameter in tiny_model.named_parameters())
    assert quantized.tokenizer is tiny_model.tokenizer


def test_a_weight_matrix_is_that_of_nn_linear(tiny_model):
    weights = {weight.name: weight for weight in weight_matrices(tiny_model)}
    query, output = weights["blocks.0.attn.W_Q"], weights["blocks.0.attn.W_O"]
    x = torch.randn(32)
    heads = torch.einsum("d,hde->he", x, query.parameter)
    torch.testing.assert_close(query.matrix @ x, heads.flatten())
    torch.testing.assert_close(output.matrix @ x, torch.einsum("he,hed->d", x.view(4, 8), output.parameter))
    up = weights["blocks.0.mlp.W_in"]
    torch.testing.assert_close(up.matrix @ x, x @ up.parameter)
    for weight in weights.values():
        assert torch.equal(weight.restore(weight.matrix), weight.parameter)


def test_groups_lie_along_the_input(tiny_model):
    quantized = apply_precision(tiny_model, "int3-g8-asym")
    sources = {weight.name: weight.matrix for weight in weight_matrices(tiny_model)}
    for weight in weight_matrices(quantized):
        for start in range(0, weight.matrix.shape[1], 8):
            part = sources[weight.name][:, start : start + 8]
            assert torch.equal(weight.matrix[:, start : start + 8], round_to_integers(part, 3, symmetric=False))


@pytest.mark.parametrize(
    "spec", ["int4-tensor-mse", "nf4-dq", "fp4", "fp8-block", "fp8-e5m2", "llm-int8-weights", "pruned-s50"]
)
def test_every_format_rounds_the_matrix_of_nn_linear(tiny_model, ids, spec):
    quantized = apply_precision(tiny_model, spec)
    sources = {weight.name: weight.matrix for weight in weight_matrices(tiny_model)}
    for weight in weight_matrices(quantized):
        expected = round_weight(sources[weight.name], QuantizationConfig.parse(spec))
        assert torch.equal(weight.matrix, expected)
        assert not torch.equal(weight.matrix, sources[weight.name])
    assert str(quantized.precision) == spec
    assert not torch.equal(quantized(ids), tiny_model(ids))


def test_a_format_whose_groups_do_not_fit_names_the_weight(tiny_model):
    with pytest.raises(
        PrecisionSpecError, match=r"group size 16 does not divide the input width 40 of blocks\.0\.mlp\.W_out"
    ):
        apply_precision(tiny_model, "nvfp4")


def test_a_weight_that_is_no_number_is_named(tiny_model):
    tiny_model.blocks[1].attn.W_Q.data[0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.attn\.W_Q holds NaN or infinity"):
        apply_precision(tiny_model, "nf4")


def test_a_group_size_that_does_not_fit_names_the_weight_and_what_fits(tiny_model):
    with pytest.raises(PrecisionSpecError) as error:
        apply_precision(tiny_model, "int4-g32")
    message = str(error.value)
    assert "group size 32 does not divide the input width 40 of blocks.0.mlp.W_out" in message
    assert "2, 4, 5, 8, 10, 20, 40" in message


def test_hooks_of_the_source_are_not_copied(tiny_model, ids):
    seen = []
    tiny_model.add_hook("blocks.0.hook_resid_post", lambda value, hook: seen.append(value))
    tiny_model.add_perma_hook("blocks.1.hook_resid_post", lambda value, hook: seen.append(value))
    tiny_model.blocks[0].register_forward_hook(lambda *args: seen.append(args))
    apply_precision(tiny_model, "int8")(ids)
    assert not seen
    tiny_model(ids)
    assert len(seen) == 3


def test_a_model_that_carries_a_precision_is_refused(tiny_model):
    quantized = apply_precision(tiny_model, "int8-dynamic")
    with pytest.raises(PrecisionSpecError, match="already carries the simulated precision int8-dynamic; start from"):
        apply_precision(quantized, "int4")
    apply_precision(apply_precision(tiny_model, "fp32"), "int4")


def test_a_matrix_it_does_not_know_is_refused(tiny_model):
    tiny_model.blocks[1].mlp.extra = torch.nn.Linear(4, 4)
    with pytest.raises(PrecisionSpecError, match=r"cannot tell the input axes of blocks\.1\.mlp\.extra\.weight"):
        apply_precision(tiny_model, "int8")


def captured(model, ids, name):
    values = []
    model.run_with_hooks(ids, fwd_hooks=[(name, lambda value, hook: values.append(value))])
    return values[0]


class TestDynamicActivations:
    def test_what_enters_a_linear_layer_is_rounded_per_token_over_all_heads(self, tiny_model, ids):
        quantized = apply_precision(tiny_model, "int8-dynamic")
        names = (
            "attn.hook_pattern",
            "attn.hook_v",
            "attn.hook_z",
            "mlp.hook_pre",
            "mlp.hook_pre_linear",
            "mlp.hook_post",
        )
        pattern, v, z, gate, up, post = (captured(quantized, ids, f"blocks.1.{name}") for name in names)
        exact_z = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(2, dim=2))
        for rounded, exact in ((z, exact_z), (post, torch.nn.functional.silu(gate) * up)):
            exact, rounded = exact.flatten(2), rounded.flatten(2)
            torch.testing.assert_close(rounded, round_to_integers(exact, 8), rtol=0, atol=1e-6)
            assert not torch.equal(rounded, exact)

    def test_the_input_is_rounded_behind_the_norm_weight(self, tiny_model, ids):
        quantized = apply_precision(tiny_model, "int8-dynamic")
        residual = captured(quantized, ids, "blocks.0.hook_resid_pre")
        expected = round_to_integers(tiny_model.blocks[0].ln1(residual), 8)
        torch.testing.assert_close(quantized.blocks[0].ln1(residual), expected, rtol=0, atol=0)

    def test_weights_are_those_of_int8(self, tiny_model):
        ours = dict(apply_precision(tiny_model, "int8-dynamic").named_parameters())
        assert all(torch.equal(p, ours[name]) for name, p in apply_precision(tiny_model, "int8").named_parameters())

    def test_rounding_survives_the_removal_of_hooks_and_a_copy(self, tiny_model, ids):
        quantized = apply_precision(tiny_model, "int8-dynamic")
        logits = quantized(ids)
        assert not torch.equal(logits, apply_precision(tiny_model, "int8")(ids))
        quantized.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_z", lambda value, hook: None)])
        quantized.reset_hooks(including_permanent=True)
        assert torch.equal(quantized(ids), logits)
        assert torch.equal(copy.deepcopy(quantized)(ids), logits)

    def test_gradients_pass_straight_through(self, tiny_model, ids):
        def gradient(model):
            model.embed.W_E.requires_grad_()
            model.zero_grad()
            model(ids)[0, -1].square().sum().backward()
            return model.embed.W_E.grad.clone()

        exact, rounded = gradient(tiny_model), gradient(apply_precision(tiny_model, "int8-dynamic"))
        assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.95


class TestHalfPrecision:
    @pytest.mark.parametrize(("spec", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
    def test_all_that_a_kernel_stores_fits_the_format(self, tiny_model, ids, spec, dtype):
        half = apply_precision(tiny_model, spec)
        names = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "attn.hook_z", "attn.hook_q", "mlp.hook_post")
        values = {name: captured(half, ids, f"blocks.2.{name}") for name in names}
        for name, value in [*values.items(), *half.named_parameters()]:
            assert value.dtype is torch.float32
            assert torch.equal(value, value.to(dtype).float()), name
        assert not torch.equal(half(ids), tiny_model(ids))
        torch.testing.assert_close(half(ids), tiny_model(ids), rtol=0.1, atol=0.1)

    def test_weights_are_held_in_half_precision_before_and_after_they_are_rounded(self, tiny_model):
        half = {name: p.bfloat16() for name, p in tiny_model.named_parameters()}
        quantized = apply_precision(tiny_model, "int4-g8+bf16")
        for weight in weight_matrices(quantized):
            source = replace(weight, parameter=half.pop(weight.name)).matrix
            assert torch.equal(weight.matrix, round_weight(source, QuantizationConfig.parse("int4-g8")).float())
        others = dict(quantized.named_parameters())
        assert half
        assert all(torch.equal(others[name], p.float()) for name, p in half.items())

    def test_a_weight_beyond_fp16_is_named(self, tiny_model):
        tiny_model.blocks[0].mlp.W_in.data[0, 0] = 1e6
        with pytest.raises(NonFiniteError, match=r"blocks\.0\.mlp\.W_in does not fit float16: .* 1e\+06.*; use bf16"):
            apply_precision(tiny_model, "fp16")
        apply_precision(tiny_model, "bf16")


def test_error_grows_as_bits_shrink(tiny_model, ids):
    exact = tiny_model(ids)
    errors = [(apply_precision(tiny_model, spec)(ids) - exact).norm() for spec in ("int8", "int6", "int4", "int2")]
    assert errors == sorted(errors)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_experts_are_rounded_one_by_one_and_their_router_is_not(architecture, tmp_path):
    model = load(write_checkpoint(tmp_path, architecture))
    config = QuantizationConfig.parse("int4-g8")
    quantized = dict(apply_precision(model, config).named_parameters())
    for name, before in model.named_parameters():
        if re.search(r"experts\.\d+\.W_\w+\.weight", name):
            assert torch.equal(quantized[name], round_weight(before, config)), name
            assert not torch.equal(quantized[name], before), name
        elif ".mlp." in name:
            assert quantized[name] is before, name
    experts = [weight.name for weight in weight_matrices(model) if "experts" in weight.name]
    assert len(experts) == 3 * 4 * model.cfg.n_layers
    assert len(list(weight_matrices(model))) == len(experts) + 4 * model.cfg.n_layers
