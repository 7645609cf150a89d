"""Checkpoints that the libraries that own the formats wrote, and what they must dequantize to.

The small selection under tests/fixtures is always there; a larger collection is read where there is one, beside the
repository or at TRACELENS_CHECKPOINTS. Each checkpoint has an expected.json (sha256 of the float32 bytes of every
quantized weight), and expected_logits.safetensors, those of the plain transformers model with these weights.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tracelens
from tracelens.errors import CheckpointError
from tracelens.loading import Checkpoint

COLLECTION = Path(os.environ.get("TRACELENS_CHECKPOINTS", Path(__file__).parents[3] / "shared" / "checkpoints"))
FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
LOGIT_TOLERANCE = 1e-4
"""Relative to the largest logit."""


def expectations(root: Path) -> list:
    return [
        pytest.param(file.parent, json.loads(file.read_text()), id=str(file.parent.relative_to(root)))
        for file in sorted(root.rglob("expected.json"))
    ]


CASES = [*expectations(FIXTURES), *expectations(COLLECTION)]
REFERENCED = [case for case in CASES if not case.values[1]["status"].startswith("no reference")]
OTHERS = [case for case in CASES if case.values[1]["status"].startswith("no reference")]


def source(folder: Path) -> Path:
    """The folder, or the GGUF file in it."""
    return next(iter(folder.glob("*.gguf")), folder)


@pytest.mark.parametrize(("folder", "expected"), REFERENCED)
def test_weights(folder, expected, no_network):
    checkpoint = Checkpoint(source(folder))
    close = load_file(folder / "expected.safetensors") if (folder / "expected.safetensors").exists() else {}
    for name, tensor in expected["tensors"].items():
        weight = checkpoint.tensor(name)
        assert list(weight.shape) == tensor["shape"], name
        if name in close:
            assert (weight - close[name]).abs().max() <= expected["max_abs_diff_allowed"], name
        else:
            assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == tensor["sha256_float32"], name
    assert checkpoint.layout is not None


@pytest.mark.parametrize(
    ("folder", "expected"), [c for c in REFERENCED if (c.values[0] / "expected_logits.safetensors").exists()]
)
def test_logits(folder, expected, no_network):
    # Where the library multiplies in bfloat16, so do the logits; the hashes of test_weights are of float32.
    round_to = torch.bfloat16 if "bfloat16" in expected["status"] else None
    model = tracelens.load(source(folder), device="cpu", round_to=round_to)
    wanted = load_file(folder / "expected_logits.safetensors")["logits"]
    tokens = load_file(COLLECTION / "tokens.safetensors")
    with torch.inference_mode():
        logits = model(next(iter(tokens.values())), return_type="logits")
    assert (logits - wanted).abs().max() <= LOGIT_TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize(("folder", "expected"), OTHERS)
def test_what_nobody_verified_is_refused(folder, expected):
    with pytest.raises(CheckpointError, match="original"):
        Checkpoint(source(folder))
