from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracelens.errors import PrecisionSpecError
from tracelens.precision import ActivationConfig, QuantizationConfig, QuantizationType, parse

SPECS = [
    *("fp32", "bf16", "fp16", "int8-dynamic", "int2", "int4-g32", "int3-asym", "int8-g128-asym", "int4-tensor"),
    *("int4-g128-asym-mse", "int2-tensor-mse", "llm-int8", "llm-int8-t5.5", "llm-int8-t0", "llm-int8-weights"),
    *("nf4", "nf4-dq", "fp4-g128-dq", "fp8", "fp8-tensor", "fp8-block", "fp8-e5m2", "fp8-e5m2-block", "nvfp4"),
    *("mxfp4", "mxfp8", "pruned-s50", "pruned-s0", "pruned-s33.3", "int4+bf16", "nf4-dq+fp16", "fp32+a8", "bf16+kv8"),
    *("int8+a8-static", "int4-g128+bf16+a4+kvfp8-static", "fp8+afp8", "int8-dynamic+kv4", "llm-int8+kv8"),
]
NEEDS_SPARSITY = {QuantizationType.PRUNED: {"sparsity": 0.5}}
HALF = (QuantizationType.BF16, QuantizationType.FP16)
FIELDS = {
    "g": {"group_size": st.sampled_from([32, 64, 128, 4096])},
    "tensor": {"granularity": st.just("tensor")},
    "block": {"granularity": st.just("block")},
    "asym": {"symmetric": st.booleans()},
    "mse": {"clipping": st.sampled_from(["absmax", "mse"])},
    "dq": {"double_quant": st.booleans()},
    "t": {"outlier_threshold": st.floats(0, 1e6)},
    "s": {"sparsity": st.floats(0, 1, exclude_max=True)},
}


TAKEN = {kind: kind.options for kind in QuantizationType}


@st.composite
def arguments(draw):
    """Those of every config that is valid."""
    kind = draw(st.sampled_from(QuantizationType))
    chosen = draw(st.sets(st.sampled_from(TAKEN[kind]))) if TAKEN[kind] else set()
    if chosen & {"g", "block"}:
        chosen -= {"tensor"}
    if kind is QuantizationType.PRUNED:
        chosen = {"s"}
    fields = {name: draw(values) for option in sorted(chosen) for name, values in FIELDS[option].items()}
    rounding = st.none() | st.builds(ActivationConfig, st.sampled_from(["int8", "int4", "fp8"]), st.booleans())
    if kind not in HALF:
        fields["compute"] = draw(st.sampled_from([QuantizationType.FP32, *HALF]))
    if kind not in (QuantizationType.INT8_DYNAMIC, QuantizationType.LLM_INT8):
        fields["activations"] = draw(rounding)
    return {"type": kind, **fields, "kv_cache": draw(rounding)}


@given(arguments())
def test_every_config_is_what_its_specification_says(arguments):
    config = QuantizationConfig(**arguments)
    assert QuantizationConfig.parse(str(config)) == config
    assert str(QuantizationConfig.parse(str(config))) == str(config)


@given(arguments())
def test_weights_alone_have_no_activations_and_the_same_bits(arguments):
    config = QuantizationConfig(**arguments)
    alone = config.weights_only
    assert (alone.activations, alone.kv_cache, alone.needs_calibration) == (None, None, False)
    assert alone.type not in (QuantizationType.INT8_DYNAMIC, QuantizationType.LLM_INT8)
    assert alone.bits_per_weight == config.bits_per_weight
    assert alone.weight_group == config.weight_group
    assert alone.weights_only == alone


@pytest.mark.parametrize("spec", SPECS)
def test_a_specification_survives_the_round_trip(spec):
    config = QuantizationConfig.parse(spec)
    assert str(config) == spec
    assert QuantizationConfig.parse(config) is config
    assert QuantizationConfig.parse(f" {spec.upper()} ") == config


def test_every_type_is_reachable_by_its_name():
    for kind in QuantizationType:
        if kind is QuantizationType.PRUNED:
            continue
        assert QuantizationConfig.parse(kind.value) == QuantizationConfig.parse(kind) == QuantizationConfig(kind)


def test_options_may_come_in_any_order():
    assert QuantizationConfig.parse("int4-mse-asym-g32") == QuantizationConfig(
        QuantizationType.INT4, group_size=32, symmetric=False, clipping="mse"
    )
    assert QuantizationConfig.parse("int4+kv8+a8-static+bf16") == QuantizationConfig(
        QuantizationType.INT4,
        compute=QuantizationType.BF16,
        activations=ActivationConfig("int8", static=True),
        kv_cache=ActivationConfig("int8"),
    )


def test_what_needs_not_be_said():
    assert QuantizationConfig.parse("llm-int8-t6") == QuantizationConfig.parse("llm-int8")
    assert QuantizationConfig.parse("llm-int8").outlier_threshold == 6.0
    assert QuantizationConfig.parse("int8-dynamic+a8") == QuantizationConfig.parse("int8-dynamic")
    assert QuantizationConfig.parse("int8-dynamic").activations == ActivationConfig("int8")
    assert QuantizationConfig.parse("pruned-s07.50").sparsity == 0.075
    groups = {"nf4": 64, "fp4-g128": 128, "nvfp4": 16, "mxfp4": 32, "mxfp8": 32, "int4": None, "fp8": None}
    for spec, group in groups.items():
        assert QuantizationConfig.parse(spec).weight_group == group


@pytest.mark.parametrize(
    ("spec", "bits", "per_weight", "label"),
    [
        ("fp32", 32, 32, "FP32"),
        ("bf16", 16, 16, "BF16"),
        ("int3", 3, 3, "INT3"),
        ("int4-g32-asym", 4, 4 + 20 / 32, "INT4-g32-asym"),
        ("int4-g128+a8", 4, 4.125, "INT4-g128+a8"),
        ("int8-dynamic", 8, 8, "INT8-dynamic"),
        ("llm-int8-t5", 8, 8, "LLM.int8()-t5"),
        ("llm-int8-weights", 8, 8, "LLM.int8()-weights"),
        ("nf4", 4, 4.5, "NF4"),
        ("nf4-dq", 4, 4 + 8 / 64 + 32 / (64 * 256), "NF4-dq"),
        ("fp8-e5m2-tensor", 8, 8, "FP8-E5M2-tensor"),
        ("nvfp4", 4, 4.5, "NVFP4"),
        ("mxfp4", 4, 4.25, "MXFP4"),
        ("mxfp8", 8, 8.25, "MXFP8"),
        ("pruned-s75", 16, 4, "pruned-s75"),
    ],
)
def test_bits_and_label(spec, bits, per_weight, label):
    config = QuantizationConfig.parse(spec)
    assert (config.bits, config.bits_per_weight, config.label) == (bits, per_weight, label)


def test_only_static_scales_need_calibration():
    assert QuantizationConfig.parse("int8+a8-static").needs_calibration
    assert QuantizationConfig.parse("fp32+kvfp8-static").needs_calibration
    assert not QuantizationConfig.parse("int8+a8+kv8").needs_calibration


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("int9-g32", "there is no number format 'int9'"),
        ("int1", "there is no number format 'int1'"),
        ("", "there is no number format ''"),
        ("nf", "there is no number format 'nf'"),
        ("nf42", "there is no number format 'nf42'"),
        ("int4-g", "'g' is not an option"),
        ("int4-g0", "'g0' is not an option"),
        ("int4-g٣", "'g٣' is not an option"),
        ("int4-32", "'32' is not an option"),
        ("int4-sym", "'sym' is not an option"),
        ("llm-int8-t-1", "'t' is not an option"),
        ("int4-g32-g64", "'g64' is a second group size"),
        ("int4-asym-asym", "'asym' is given twice"),
        ("fp8-tensor-block", "'block' says again what shares a scale"),
        ("fp16-g32", "precision 'fp16' takes no -g<group size>"),
        ("int8-dynamic-g32-asym", "precision 'int8-dynamic' takes no -g<group size> and no -asym"),
        ("nf4-mse", "precision 'nf4' takes no -mse"),
        ("int4-dq", "precision 'int4' takes no -dq"),
        ("int4-block", "precision 'int4' takes no -block"),
        ("fp8-g128", "precision 'fp8' takes no -g<group size>"),
        ("mxfp4-g16", "precision 'mxfp4' takes no -g<group size>"),
        ("fp8-t6", "precision 'fp8' takes no -t<outlier threshold>"),
        ("llm-int8-weights-t6", "precision 'llm-int8-weights' takes no -t<outlier threshold>"),
        ("int4-s50", "precision 'int4' takes no -s<percent of the weights>"),
        ("int4+int8", "'+int8' is not known"),
        ("int4+a16", "'+a16' is not known"),
        ("int4+a8+a4", "'+a4' is a second activations"),
        ("int4+bf16+fp16", "'+fp16' is a second compute"),
    ],
)
def test_a_wrong_specification_says_which_part_and_what_exists(spec, fault):
    with pytest.raises(PrecisionSpecError) as error:
        QuantizationConfig.parse(spec)
    assert fault in str(error.value)
    for known in (
        "fp32",
        "bf16",
        "int2",
        "int8-dynamic",
        "nvfp4",
        "-asym",
        "-g<group size>",
        "-mse",
        "+kv8",
        "-static",
    ):
        assert known in str(error.value)


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("pruned", "pruning needs a sparsity from 0 to below 1, as in pruned-s50; got None"),
        ("pruned-s100", "pruning needs a sparsity from 0 to below 1, as in pruned-s50; got 1.0"),
        ("nf4-g48", "precision 'nf4' has no blocks of 48; sizes it has: 32, 64, 128, 256, 512, 1024, 2048, 4096"),
        ("int4-g32-tensor", "precision 'int4' cannot have both groups and one scale per tensor"),
        ("bf16+fp16", "precision 'bf16' says itself what it computes in; drop +fp16"),
        ("int8-dynamic+a4", "precision 'int8-dynamic' says itself how activations are rounded; drop +a4"),
        ("llm-int8+a8-static", "precision 'llm-int8' says itself how activations are rounded; drop +a8-static"),
    ],
)
def test_values_that_make_no_sense_are_refused(spec, fault):
    with pytest.raises(PrecisionSpecError) as error:
        QuantizationConfig.parse(spec)
    assert fault in str(error.value)


def test_the_constructor_refuses_the_same():
    with pytest.raises(PrecisionSpecError, match="'bf16' takes no -g<group size>"):
        QuantizationConfig(QuantizationType.BF16, group_size=32)
    with pytest.raises(PrecisionSpecError, match=r"group size -4 .* is not positive"):
        QuantizationConfig(QuantizationType.INT4, group_size=-4)
    with pytest.raises(PrecisionSpecError, match=r"compute is 'int4'; kernels compute in fp32, bf16 or fp16"):
        QuantizationConfig(QuantizationType.NF4, compute=QuantizationType.INT4)
    for threshold in (-1.0, float("inf"), float("nan")):
        with pytest.raises(PrecisionSpecError, match="must be 0 or more, and finite, as in llm-int8-t6; got"):
            QuantizationConfig(QuantizationType.LLM_INT8, outlier_threshold=threshold)
    with pytest.raises(PrecisionSpecError, match="got nan"):
        QuantizationConfig(QuantizationType.PRUNED, sparsity=float("nan"))


def test_types_without_an_option_refuse_it():
    given_options = {"asym": {"symmetric": False}, "dq": {"double_quant": True}, "block": {"granularity": "block"}}
    for kind, (option, fields) in product(QuantizationType, given_options.items()):
        required = NEEDS_SPARSITY.get(kind, {})
        if option in kind.options:
            assert option in str(QuantizationConfig(kind, **fields, **required))
        else:
            with pytest.raises(PrecisionSpecError, match=f"takes no -{option}"):
                QuantizationConfig(kind, **fields, **required)


def test_parse_is_there_as_a_function():
    config = parse("int4-g128+a8+kv8")
    assert (config.bits, config.group_size) == (4, 128)
    assert str(config.activations) == str(config.kv_cache) == "8"
    assert config == QuantizationConfig.parse(str(config))


@pytest.mark.parametrize("spec", ["int4-g32", "nf4-dq", "fp32", "int8", "pruned-s50"])
def test_precisions_of_weights_alone_round_no_activations(spec):
    assert not parse(spec).rounds_activations


@pytest.mark.parametrize(
    "spec", ["int8-dynamic", "llm-int8", "int4-g32+a8", "int4-g32+kv8", "int4+bf16", "bf16", "fp16"]
)
def test_what_rounds_activations_says_so(spec):
    assert parse(spec).rounds_activations
