"""Steps with a known effect are given just that effect; the rest of a decomposition follows from an audit."""

import math

import pytest
import torch

from tests import handmade
from tests.handmade import OPTIONS, ReadOut
from tracelens import Audit
from tracelens.errors import MetricInputError, PrecisionSpecError, ResultFileError, UnknownNameError
from tracelens.precision import QuantizationConfig, apply_precision
from tracelens.stats import bootstrap_weights
from tracelens.studies.decomposition import decompose
from tracelens.studies.decomposition_result import UNITS, Decomposition, largest_step
from tracelens.studies.steps import STEPS, step_precisions

PROMPTS = handmade.prompts()
SAES = {layer: ReadOut() for layer in (0, 1)}
METRICS = {"top": lambda logits: logits.amax(-1)}


def on_the_grid(shape, inputs, generator):
    """Weights that int8 with a zero point holds exactly: every output channel has both ends of the grid."""
    codes = torch.randint(-128, 128, shape, generator=generator).double().movedim(inputs, -1)
    codes[..., 0], codes[..., 1] = -128, 127
    return codes.movedim(-1, inputs).float() * 2.0**-9


@pytest.fixture(scope="module")
def plain():
    """Blocks that write nothing."""
    return handmade.model()


@pytest.fixture(scope="module")
def exact():
    """Blocks that write, with weights that int8-asym leaves as they are."""
    model, generator = handmade.model(), torch.Generator().manual_seed(0)
    for block in model.blocks:
        for parameter, inputs in ((block.mlp.W_in, 0), (block.mlp.W_out, 0)):
            parameter.copy_(on_the_grid(parameter.shape, inputs, generator))
        for parameter in (block.attn.W_Q, block.attn.W_K, block.attn.W_V):
            parameter.copy_(on_the_grid(parameter.shape, 1, generator))
        out = block.attn.W_O
        # The input of W_O is all heads together, so the ends of the grid belong to the flattened axis.
        out.copy_(on_the_grid((out.shape[0] * out.shape[1], out.shape[2]), 0, generator).view_as(out))
    return model


def run(model, precision, **options) -> Decomposition:
    return decompose(
        model, precision, saes=SAES, dataset=PROMPTS, **{"metrics": METRICS, "compute": None, **OPTIONS, **options}
    )


def assert_nothing(change, p):
    assert (change.value, change.low, change.high) == (0, 0, 0)
    assert p in (None, 1)


@pytest.mark.parametrize(
    ("precision", "culprit"),
    [("int8-asym+a4", "activations"), ("int8-asym+kv4", "kv_cache"), ("int8-asym+a4+kv8", None), ("int3+a4+kv4", None)],
)
def test_exact_weights_are_not_to_blame(exact, precision, culprit):
    assert torch.equal(apply_precision(exact, "int8-asym").W_out, exact.W_out)
    found = run(exact, precision)
    for metric in ("cpfr_safety", "cpfr_capability", "kl", "margin", "top"):
        steps = found.of(metric)
        if "asym" in precision:
            assert_nothing(steps["weights"].change, steps["weights"].p)
        if culprit:
            assert steps[culprit].change == found.total[metric]
            assert abs(steps[culprit].change.value) > 1e-6
            assert largest_step(steps) in (culprit, None)
    if culprit:
        assert largest_step(found.of("kl")) == culprit
        assert f"Most by {culprit}." in found.summary()


def test_where_blocks_write_nothing_only_the_dtype_of_the_residual_stream_counts(plain):
    found = run(plain, "int4+a4+kv4", compute="bf16")
    assert [step.name for step in found.steps] == list(STEPS)
    for metric in found.metrics:
        for step, contribution in found.of(metric).items():
            if step != "compute":
                assert_nothing(contribution.change, contribution.p)
    assert found.of("kl")["compute"].change.value == found.total["kl"].value > 0


def test_full_precision_changes_nothing(exact):
    found = run(exact, "fp32")
    assert set(found.metrics) == {*UNITS, "top"}
    for metric in found.metrics:
        assert_nothing(found.total[metric], None)
        for contribution in found.of(metric).values():
            assert_nothing(contribution.change, contribution.p)
            assert contribution.value == found.start[metric] or metric in ("survived", "flips")
    assert found.start["cpfr_safety"].value == found.start["survived"].value == 1
    assert found.start["kl"].value == found.start["flips"].value == 0


def test_changes_add_up_and_the_end_is_that_of_an_audit(exact):
    found = run(exact, "int3+a4+kv4", compute="bf16")
    report = (
        Audit(exact, precision="int3+bf16+a4+kv4").load_sae(SAES).trace_features(PROMPTS, **OPTIONS, controls=False)
    )
    end = {metric: list(found.of(metric).values())[-1].value for metric in found.metrics}
    assert end["cpfr_safety"] == report.cpfr["safety"]
    assert end["cpfr_capability"] == report.cpfr["capability"]
    assert end["kl"] == report.divergence.kl
    assert end["perplexity"] == report.divergence.perplexity_quantized
    assert found.start["perplexity"] == report.divergence.perplexity_reference
    assert end["flips"].value == report.flips.rate.value
    for metric in found.metrics:
        value = found.start[metric].value
        for contribution in found.of(metric).values():
            value += contribution.change.value
            assert value == pytest.approx(contribution.value.value, abs=1e-9)
        assert value - found.start[metric].value == pytest.approx(found.total[metric].value, abs=1e-9)


def test_a_metric_of_ones_own_is_the_mean_over_prompts_and_its_interval_is_paired(exact):
    found = run(exact, "int3", n_blocks=10_000)
    quantized = apply_precision(exact, "int3")
    texts = [*PROMPTS["refusal"], *PROMPTS["baseline"]]
    tops = {
        name: torch.stack([m(m.tokenizer(t, return_tensors="pt").input_ids)[0, -1].amax() for t in texts]).double()
        for name, m in (("reference", exact), ("quantized", quantized))
    }
    difference = tops["quantized"] - tops["reference"]
    contribution = found.of("top")["weights"]
    assert found.start["top"].value == pytest.approx(tops["reference"].mean().item(), rel=1e-5)
    assert contribution.change.value == pytest.approx(difference.mean().item(), rel=1e-4)
    # Which prompt is which block does not matter to a percentile of many resamples, but for chance.
    weights = bootstrap_weights(len(texts), 4000, seed=9)
    low, high = torch.quantile(weights @ difference / len(texts), torch.tensor([0.025, 0.975], dtype=torch.float64))
    width = (high - low).item()
    assert contribution.change.low == pytest.approx(low.item(), abs=0.25 * width)
    assert contribution.change.high == pytest.approx(high.item(), abs=0.25 * width)
    assert contribution.change.n == len(texts)
    assert contribution.p is not None


def test_order_shares_out_differently_and_the_total_stays(exact):
    forward = run(exact, "int3+a4")
    backward = run(exact, "int3+a4", order=("kv_cache", "activations", "weights", "compute"))
    assert [step.name for step in backward.steps] == ["activations", "weights"]
    assert [step.precision for step in backward.steps] == ["fp32+a4", "int3+a4"]
    assert backward.total["kl"].value == pytest.approx(forward.total["kl"].value, abs=1e-12)
    assert backward.of("kl")["weights"].change.value != forward.of("kl")["weights"].change.value


def test_static_scales_are_found_on_calibration_prompts(exact):
    prompts = PROMPTS["baseline"][:4]
    found = run(exact, "int8-asym+a8-static", calibration=prompts)
    assert found.of("kl")["activations"].change.value > 0
    with pytest.raises(PrecisionSpecError, match="calibration"):
        run(exact, "int8-asym+a8-static")


class TestSteps:
    @pytest.mark.parametrize(
        ("spec", "compute", "expected"),
        [
            ("int4-g128+a8+kv8", "bf16", ["fp32+bf16", "int4-g128+bf16", "int4-g128+bf16+a8", "int4-g128+bf16+a8+kv8"]),
            ("int4-g128+fp16", "bf16", ["fp32+fp16", "int4-g128+fp16"]),
            ("int8-dynamic", None, ["int8", "int8-dynamic"]),
            ("int8-dynamic+kv8", "bf16", ["fp32+bf16", "int8+bf16", "int8-dynamic+bf16", "int8-dynamic+bf16+kv8"]),
            ("llm-int8-t5", None, ["llm-int8-weights", "llm-int8-t5"]),
            ("bf16", "fp16", ["fp32+bf16"]),
            ("fp32+kv8", None, ["fp32+kv8"]),
            ("fp32", None, ["fp32"]),
            ("nf4-dq+afp8-static", None, ["nf4-dq", "nf4-dq+afp8-static"]),
        ],
    )
    def test_precisions(self, spec, compute, expected):
        found = step_precisions(spec, compute=compute)
        assert [str(config) for config in found.values()] == expected
        assert all(QuantizationConfig.parse(str(config)) == config for config in found.values())

    def test_llm_int8_weights_leave_inputs_alone(self, exact):
        weights = apply_precision(exact, step_precisions("llm-int8", compute=None)["weights"])
        x = torch.randn(1, 5, 24)
        assert torch.equal(weights.blocks[0].ln1(x), x)
        assert not torch.equal(apply_precision(exact, "llm-int8").blocks[0].ln1(x), x)

    def test_orders_that_make_no_sense(self):
        with pytest.raises(PrecisionSpecError, match=r"order is \('weights',\); expected each of"):
            step_precisions("int4", order=("weights",))
        with pytest.raises(PrecisionSpecError, match="put weights before activations"):
            step_precisions("llm-int8", order=("compute", "activations", "weights", "kv_cache"))


class TestResult:
    @pytest.fixture(scope="class")
    def found(self, exact):
        return run(exact, "int3+a8+kv8", compute="bf16", metrics={"<b>own": METRICS["top"]})

    def test_file(self, found, tmp_path):
        assert Decomposition.load(found.save(tmp_path / "decomposition.json")) == found
        (tmp_path / "junk.json").write_text('{"something": 1}')
        with pytest.raises(ResultFileError, match="is not a tracelens_decomposition file"):
            Decomposition.load(tmp_path / "junk.json")

    def test_table(self, found):
        table = found.to_dataframe()
        assert len(table) == len(found.metrics) * 4
        row = table.query("metric == 'kl' and step == 'activations'").iloc[0]
        assert row["precision"] == "int3+bf16+a8"
        assert row["change"] == found.of("kl")["activations"].change.value
        assert math.isnan(row["p"])
        with pytest.raises(UnknownNameError, match="unknown metric 'KL'"):
            found.of("KL")

    def test_figure(self, found):
        figure = found.plot()
        bars = [trace for trace in figure.data if trace.type == "bar"]
        assert len(bars) == len(found.metrics) * 4
        kl = [bar for bar in bars if bar.xaxis == "x4"]
        assert [bar.y[0] for bar in kl] == [c.change.value for c in found.of("kl").values()]
        assert kl[1].base[0] == found.of("kl")["compute"].value.value
        titles = [annotation.text for annotation in figure.layout.annotations]
        assert "&lt;b&gt;own" in titles

    def test_summary(self, found):
        text = found.summary()
        assert "int3+bf16+a8+kv8" in text
        assert all(f"{metric}: " in text for metric in found.metrics)


def test_metrics_that_cannot_be_decomposed(plain):
    for bad in (lambda logits: logits, lambda logits: logits.mean(), lambda logits: logits[:, 0] * math.nan):
        with pytest.raises(
            MetricInputError, match=r"metric 'bad' gave shape .*; expected one finite number for each prompt"
        ):
            run(plain, "int4", metrics={"bad": bad})
    with pytest.raises(MetricInputError, match="cannot be called kl: these are measured already"):
        run(plain, "int4", metrics={"kl": METRICS["top"]})


def test_without_readable_answers_decisions_are_left_out(plain):
    options = {key: value for key, value in OPTIONS.items() if key != "answer_tokens"}
    found = decompose(plain, "int4", saes=SAES, dataset=PROMPTS, compute=None, **options)
    assert {"flips", "margin"}.isdisjoint(found.metrics)
    assert "cpfr_safety" in found.metrics
