import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_checkpoint
from tracelens.errors import CheckpointError, CheckpointNotFoundError
from tracelens.loading import Checkpoint
from tracelens.loading.diagnosis import Diagnosis, Function, TensorRow
from tracelens.loading.doctor import doctor

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
GROUP = 16
BROKEN = "model.layers.1.self_attn.o_proj"
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEARS = [
    f"model.layers.{layer}.{'self_attn' if part in PARTS[:4] else 'mlp'}.{part}" for layer in range(3) for part in PARTS
]
Tensors = dict[str, torch.Tensor]


def write(folder: Path, reference: Path, tensors: Tensors, quantization: dict | None) -> Path:
    folder.mkdir(parents=True)
    config = json.loads((reference / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization} if quantization else config)
    )
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes along the rows, eight to an int32 word, low bits first."""
    words = sum(codes[i::8].to(torch.int64) << 4 * i for i in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq(tensors: Tensors) -> Tensors:
    """GPTQ's second layout, 4 bits, asymmetric, rounded to nearest."""
    made = dict(tensors)
    for module in LINEARS:
        groups = made.pop(f"{module}.weight").T.unflatten(0, (-1, GROUP))
        low, high = groups.amin(1), groups.amax(1)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(0, 15)
        codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15).flatten(0, 1)
        made |= {
            f"{module}.qweight": pack(codes),
            f"{module}.qzeros": pack(zeros.T).T,
            f"{module}.scales": scales,
            f"{module}.g_idx": (torch.arange(len(codes)) // GROUP).to(torch.int32),
        }
    return made


GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "sym": False,
    "desc_act": False,
    "checkpoint_format": "gptq_v2",
}


def int8(tensors: Tensors) -> Tensors:
    """bitsandbytes' LLM.int8: one scale for each output."""
    made = dict(tensors)
    for module in LINEARS:
        weight = made.pop(f"{module}.weight")
        largest = weight.abs().amax(1)
        made |= {
            f"{module}.weight": (weight / largest[:, None] * 127).round().to(torch.int8),
            f"{module}.SCB": largest,
            f"{module}.weight_format": torch.zeros((), dtype=torch.uint8),
        }
    return made


INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}


def hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotated(tensors: Tensors) -> Tensors:
    """compressed-tensors W8A16 with an online Hadamard rotation of what `down_proj` reads."""
    made, turn = dict(tensors), hadamard(128)
    for module in LINEARS:
        weight = made.pop(f"{module}.weight")
        if module.endswith("down_proj"):
            weight = weight @ turn / math.sqrt(128)
            made[f"{module}.R4_input.weight"] = turn.double()
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        codes = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        made |= {f"{module}.weight": codes, f"{module}.weight_scale": scale}
    return made


WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False, "group_size": None}
APPLY = {"targets": ["re:.*down_proj$"], "ignore": []}
R4 = {
    "type": "hadamard",
    "apply": [
        {**APPLY, "location": "input", "inverse": False},
        {**APPLY, "location": "weight_input", "inverse": True},
    ],
    **{"head_dim": None, "precision": "torch.float64", "randomize": False, "requires_grad": False},
}
ROTATED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "format": "int-quantized"}},
    "transform_config": {"config_groups": {"R4": R4}},
}
FORMATS = {"gptq": (gptq, GPTQ), "int8": (int8, INT8), "rotated": (rotated, ROTATED)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("doctor") / "reference", **SIZES)


@pytest.fixture(scope="module")
def good(reference) -> dict[str, Tensors]:
    """Format -> the tensors of a good checkpoint; never written to."""
    tensors = load_file(reference / "model.safetensors")
    return {name: quantize(tensors) for name, (quantize, _) in FORMATS.items()}


@pytest.fixture
def examine(reference, good, tmp_path):
    """The diagnosis of a checkpoint in a format after an edit of its tensors (and of its quantization config)."""

    def run(kind: str, edit=None, *, against: Path | None = reference, **options) -> Diagnosis:
        tensors, quantization = dict(good[kind]), json.loads(json.dumps(FORMATS[kind][1]))
        if edit:
            edit(tensors, quantization)
        return doctor(
            write(tmp_path / kind, reference, tensors, quantization), reference=against, device="cpu", **options
        )

    return run


def faults(diagnosis: Diagnosis) -> dict[str, str]:
    return {row.name: row.fault for row in diagnosis.tensors if row.severity}


def failed(diagnosis: Diagnosis) -> dict[str, str]:
    return {check.name: check.evidence for check in diagnosis.checks if check.outcome == "failed"}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_good_checkpoint_is_verified(examine, kind, no_network):
    found = examine(kind)
    assert found.verdict == "verified", found.summary()
    assert [check.name for check in found.checks] == [
        *("opens", "finite", "plain model", "hooked model", "logits", "same model", "weights", "function")
    ]
    assert {check.outcome for check in found.checks} == {"passed"}
    assert len(found.tensors) == len(LINEARS) + 9
    for row in found.tensors:
        if row.scheme == "plain":
            assert row.ratio == 0
        else:
            assert 0.9 < row.ratio < 1.1
            assert row.relative_error == pytest.approx(row.ratio * row.yardstick)
    assert found.function is not None
    assert 0.7 < found.function.ratio < 1.4
    assert 0 < found.function.kl < found.function.kl_uniform


@pytest.mark.parametrize("kind", FORMATS)
def test_without_a_reference_it_says_so(examine, kind):
    found = examine(kind, against=None)
    assert found.verdict == "no reference"
    assert [check.name for check in found.checks] == ["opens", "finite", "plain model", "hooked model", "logits"]
    assert (found.tensors, found.function) == ((), None)


def test_full_precision_is_its_own_reference(reference):
    found = doctor(Checkpoint(reference), reference=reference, device="cpu")
    assert found.verdict == "verified"
    assert found.format == "full precision"
    assert max(row.ratio for row in found.tensors) == 0
    assert found.function is not None
    assert found.function.error == 0


def zeros_off(tensors: Tensors, _, modules=LINEARS) -> None:
    for module in modules:
        # No field is 15 or 0 after this, or neighbours would take the carry.
        zeros = tensors[f"{module}.qzeros"].clone()
        tensors[f"{module}.qzeros"] = zeros.bitwise_xor(torch.tensor(0x11111111, dtype=torch.int32))


def test_all_zero_points_off_by_one(examine):
    found = examine("gptq", zeros_off)
    assert found.verdict == "wrong"
    assert set(faults(found)) == {f"{module}.weight" for module in LINEARS}
    for fault in faults(found).values():
        assert fault == "zero point off: values shifted by -1 or +1 steps in every block"


def test_one_zero_point_off_by_one(examine):
    def edit(tensors, _):
        zeros = tensors[f"{BROKEN}.qzeros"].clone()
        zeros[2, 1] ^= 1 << 8
        tensors[f"{BROKEN}.qzeros"] = zeros

    found = examine("gptq", edit)
    assert found.verdict == "wrong"
    # The third field of the second word is output 10, the third row group 2.
    [(name, fault)] = faults(found).items()
    assert name == f"{BROKEN}.weight"
    assert fault.endswith("in 1 of 256 blocks (outputs 10 to 10, inputs 32 to 47)")
    assert fault.startswith("zero point off: values shifted by ")
    assert f"{BROKEN}.weight" in failed(found)["weights"]


@pytest.mark.parametrize(("kind", "part"), [("gptq", "scales"), ("int8", "SCB"), ("rotated", "weight_scale")])
def test_a_scale_halved(examine, kind, part):
    found = examine(kind, lambda tensors, _: tensors.update({f"{BROKEN}.{part}": tensors[f"{BROKEN}.{part}"] / 2}))
    assert found.verdict == "wrong"
    [(name, fault)] = faults(found).items()
    assert name == f"{BROKEN}.weight"
    assert fault.endswith("throughout: a scale is lost or wrong")
    assert float(fault.split()[2]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("kind", "part"), [("gptq", "scales"), ("int8", "SCB"), ("rotated", "weight_scale")])
def test_scales_of_one(examine, kind, part):
    key = f"{BROKEN}.{part}"
    found = examine(kind, lambda tensors, _: tensors.update({key: torch.ones_like(tensors[key])}))
    assert found.verdict == "wrong"
    [(name, fault)] = faults(found).items()
    assert name == f"{BROKEN}.weight"
    assert fault.startswith(("scales lost", "scaled by"))


def test_one_scale_of_a_group(examine):
    def edit(tensors, _):
        scales = tensors[f"{BROKEN}.scales"].clone()
        scales[1, 5] *= 3
        tensors[f"{BROKEN}.scales"] = scales

    [(name, fault)] = faults(examine("gptq", edit)).items()
    assert name == f"{BROKEN}.weight"
    assert fault.endswith("in 1 of 256 blocks (outputs 5 to 5, inputs 16 to 31)")
    assert fault.startswith("scales lost or wrong: values are ")


def test_transposed(examine):
    key = f"{BROKEN}.weight"
    found = examine("int8", lambda tensors, _: tensors.update({key: tensors[key].T}))
    assert found.verdict == "wrong"
    assert faults(found) == {key: "transposed: inputs and outputs changed places"}


def test_a_rotation_dropped(examine):
    def edit(tensors, quantization):
        quantization.pop("transform_config")
        for name in [name for name in tensors if "R4" in name]:
            del tensors[name]

    found = examine("rotated", edit)
    assert found.verdict == "wrong"
    fault = "a Hadamard rotation of size 128 is missing or left over on the input side"
    assert faults(found) == {f"{module}.weight": fault for module in LINEARS if module.endswith("down_proj")}


def test_a_weight_of_another_layer(examine):
    def edit(tensors, _):
        for part in ("weight", "SCB"):
            tensors[f"{BROKEN}.{part}"] = tensors[f"model.layers.0.self_attn.o_proj.{part}"]

    found = faults(examine("int8", edit))
    assert found == {f"{BROKEN}.weight": "this is the reference's model.layers.0.self_attn.o_proj.weight"}


def test_a_norm_rescaled_alone(examine):
    name = "model.layers.2.input_layernorm.weight"
    found = examine("int8", lambda tensors, _: tensors.update({name: tensors[name] * 1.2}))
    assert found.verdict == "wrong"
    words = f"{name} has new factors, and this weight, which reads it, does not have their inverses"
    assert faults(found) == {f"model.layers.2.self_attn.{part}.weight": words for part in PARTS[:3]}


def test_a_plain_tensor_that_changed(examine):
    key = "model.embed_tokens.weight"
    noise = 0.01 * torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    found = examine("int8", lambda tensors, _: tensors.update({key: tensors[key] + noise}))
    assert found.verdict == "wrong"
    assert list(faults(found)) == [key]


def test_plain_tensors_may_be_rounded_to_half_precision(examine):
    def edit(tensors, _):
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            tensors[name] = tensors[name].bfloat16()

    assert examine("int8", edit).verdict == "verified"


def test_awq_is_compared_with_its_norms(reference, tmp_path):
    tensors = load_file(reference / "model.safetensors")
    factors = torch.linspace(0.5, 2, 64)
    tensors["model.layers.0.input_layernorm.weight"] /= factors
    for part in PARTS[:3]:
        tensors[f"model.layers.0.self_attn.{part}.weight"] *= factors
    found = doctor(write(tmp_path / "awq", reference, gptq(tensors), GPTQ), reference=reference, device="cpu")
    assert found.verdict == "verified", found.summary()
    assert "1 norms are rescaled and compared with what reads them" in found.notes


def test_a_unit_of_a_rescaled_pair_may_have_been_lost_by_either(reference, tmp_path):
    """A row of up_proj too small beside its column of down_proj: what AWQ does where it moved too much."""
    tensors = load_file(reference / "model.safetensors")
    factors = torch.linspace(0.5, 3, 128)
    tensors["model.layers.1.mlp.up_proj.weight"] *= factors[:, None]
    tensors["model.layers.1.mlp.down_proj.weight"] /= factors
    assert doctor(write(tmp_path / "moved", reference, gptq(tensors), GPTQ), reference=reference).verdict == "verified"
    tensors["model.layers.1.mlp.up_proj.weight"][7] *= 0.4
    lost = doctor(write(tmp_path / "lost", reference, gptq(tensors), GPTQ), reference=reference)
    assert lost.verdict == "degraded", lost.summary()
    (fault,) = faults(lost).items()
    assert fault[0] in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight")
    assert "or lost by the weight that factors were moved to or from" in fault[1]


def test_a_poor_quantizer_is_degraded(examine):
    generator = torch.Generator().manual_seed(1)

    def edit(tensors, _):
        for module in LINEARS:
            codes = tensors[f"{module}.weight"].int()
            codes += (torch.randn(codes.shape, generator=generator) * 1.8).round().int()
            tensors[f"{module}.weight"] = codes.clamp(-127, 127).to(torch.int8)

    found = examine("int8", edit)
    assert found.verdict == "degraded", found.summary()
    assert {row.severity for row in found.tensors if row.scheme != "plain"} == {"poor"}
    assert not failed(found)


def test_a_missing_tensor(examine):
    found = examine("int8", lambda tensors, _: tensors.pop("model.norm.weight"))
    assert found.verdict == "wrong"
    assert failed(found).keys() == {"plain model", "hooked model", "same model"}
    assert all("model.norm.weight" in evidence for evidence in failed(found).values())
    # What is there is compared all the same.
    assert len(found.tensors) == len(LINEARS) + 8
    assert not faults(found)


def test_an_extra_tensor(examine):
    found = examine("gptq", lambda tensors, _: tensors.update({"model.layers.0.extra.weight": torch.ones(3)}))
    assert found.verdict == "wrong"
    assert all("model.layers.0.extra.weight" in evidence for evidence in failed(found).values())
    assert failed(found).keys() == {"plain model", "hooked model", "same model"}


def test_a_nan_in_a_scale(examine):
    key = f"{BROKEN}.scales"
    found = examine("gptq", lambda tensors, _: tensors.update({key: tensors[key] * math.nan}))
    assert found.verdict == "wrong"
    assert key in failed(found)["finite"]
    assert list(faults(found)) == [f"{BROKEN}.weight"]
    assert "holds NaN or infinity" in faults(found)[f"{BROKEN}.weight"]


def test_a_checkpoint_that_does_not_open(examine):
    def edit(_, quantization):
        quantization["bits"] = 17

    found = examine("gptq", edit)
    assert found.verdict == "wrong"
    assert found.format == "not readable"
    [check] = found.checks
    assert (check.name, check.outcome) == ("opens", "failed")


@pytest.mark.parametrize("parameter", ["blocks.1.attn.W_Q", "blocks.0.mlp.W_in", "ln_final.w"])
def test_a_wrong_conversion_disagrees_with_the_plain_model(examine, monkeypatch, parameter):
    from tracelens.loading import hooked

    build = hooked.build_hooked

    def wrong(*args, **options):
        model = build(*args, **options)
        weight = dict(model.named_parameters())[parameter]
        weight.data.copy_(weight.data.flip(-1))
        return model

    monkeypatch.setattr(hooked, "build_hooked", wrong)
    found = examine("int8")
    assert found.verdict == "wrong"
    assert failed(found).keys() == {"logits"}
    assert "HookedTransformer and plain model" in failed(found)["logits"]


def test_a_wrong_mask_is_seen_in_padded_prompts_only(examine, monkeypatch):
    from transformer_lens import HookedTransformer

    forward = HookedTransformer.forward
    monkeypatch.setattr(
        HookedTransformer, "forward", lambda self, ids, attention_mask=None, **o: forward(self, ids, **o)
    )
    evidence = failed(examine("int8"))["logits"]
    whole, left, _ = (float(part.split()[2]) for part in evidence.split("logit: ")[1].split(" (")[0].split("; "))
    assert whole < 1e-5
    assert left > 1e-3


def test_an_architecture_without_a_conversion_is_checked_as_a_bridge(examine, monkeypatch):
    from tracelens.loading import architectures

    monkeypatch.delitem(architectures.ARCHITECTURES, "LlamaForCausalLM")
    found = examine("int8")
    outcomes = {check.name: check.outcome for check in found.checks}
    assert outcomes["hooked model"] == "skipped"
    assert outcomes["bridge model"] == outcomes["logits"] == "passed"
    assert found.verdict == "verified"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 1e-06, the reference's 0.001"),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope_theta is 10000.0, the reference's 500000.0",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is silu, the reference's gelu"),
    ],
)
def test_settings_that_make_another_model(examine, reference, tmp_path, change, said):
    other = write(tmp_path / "other", reference, load_file(reference / "model.safetensors"), None)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    found = examine("int8", against=other)
    assert found.verdict == "wrong"
    assert failed(found) == {"same model": said}


def test_a_reference_of_another_shape(examine, tmp_path):
    other = write_checkpoint(tmp_path / "other", **{**SIZES, "intermediate_size": 64})
    found = examine("int8", against=other)
    assert found.verdict == "wrong"
    assert "model.layers.0.mlp.up_proj.weight is [128, 64], the reference's [64, 64]" in failed(found)["same model"]
    assert found.function is None


def test_what_is_not_there_raises(reference, tmp_path):
    with pytest.raises(CheckpointNotFoundError):
        doctor(tmp_path / "nothing", local_files_only=True)
    with pytest.raises(CheckpointNotFoundError):
        doctor(reference, reference=tmp_path / "nothing", local_files_only=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        doctor(reference, reference=tmp_path / "empty")


def test_tokens_may_be_given(examine):
    found = examine("int8", tokens=torch.arange(2, 12).view(2, 5))
    assert found.verdict == "verified"
    assert found.function is not None
    assert found.function.agreement * 10 == pytest.approx(round(found.function.agreement * 10))


def test_diagnosis_as_text_dict_and_table(examine):
    found = examine("gptq", lambda tensors, _: tensors.update({f"{BROKEN}.scales": tensors[f"{BROKEN}.scales"] * 4}))
    text = found.summary()
    assert text.startswith("WRONG: ")
    assert f"    {BROKEN}.weight (int4, block 1×16, asymmetric): scaled by 4" in text
    assert "1 of 30 tensors with faults:" in text
    assert text.endswith(("report it.", "report it"))
    assert str(found) == text
    content = json.loads(json.dumps(found.to_dict()))
    assert content["verdict"] == "wrong"
    assert content["function"]["ratio"] == found.function.ratio
    assert len(content["tensors"]) == 30
    frame = found.to_frame()
    assert list(frame.columns) == list(TensorRow.__dataclass_fields__)
    assert frame.set_index("name").loc[f"{BROKEN}.weight", "severity"] == "wrong"
    assert found.worst(1)[0].name == f"{BROKEN}.weight"
    with pytest.raises(FrozenInstanceError):
        found.verdict = "verified"


def test_a_good_summary_names_the_largest_errors(examine):
    text = examine("gptq").summary()
    assert text.startswith("VERIFIED: ")
    assert "largest errors, as multiples of rounding to nearest:" in text
    assert text.count(" passed  ") == 8


def test_the_function_of_a_guess_is_gone():
    kept = Function(kl=1.0, kl_rounding=0.9, error=0.4, error_rounding=0.5, kl_uniform=2.0, agreement=0.5)
    assert not kept.gone
    assert kept.ratio == pytest.approx(0.8)
    assert Function(kl=2.0, kl_rounding=2.0, error=1.2, error_rounding=1.2, kl_uniform=2.0, agreement=0.1).gone
