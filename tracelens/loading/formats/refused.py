"""Layouts that are known, and that nobody has undone exactly without the kernels they were made for.

They are recognised so that the error can say what they are; none is ever loaded.
"""

from dataclasses import dataclass
from typing import NoReturn

from tracelens.errors import CheckpointError
from tracelens.loading.formats.base import Stored, register


@dataclass(frozen=True)
class Refusal:
    """How one layout is recognised: by what the config calls it, or by the tensors of one module."""

    title: str
    methods: tuple[str, ...] = ()
    """Values of `quant_method`."""
    labels: tuple[str, ...] = ()
    """Values of `checkpoint_format`, `format`, `version` or `packing_format`."""
    flags: tuple[str, ...] = ()
    """Entries of the quantization config that are set."""
    tensors: tuple[tuple[str, ...], ...] = ()
    """Alternatives; each is the last parts of names that one module has together."""


REFUSALS = (
    Refusal("Marlin-24 (2:4 sparse GPTQ)", ("marlin-24",), ("marlin_24", "marlin-24"), (), (("B_24", "B_meta", "s"),)),
    Refusal("Marlin (weights shuffled for one CUDA kernel)", ("marlin",), ("marlin",), ("is_marlin_format",)),
    Refusal("QQQ", ("qqq",), ("qqq",), (), (("B", "s_channel"), ("B", "s_group"))),
    Refusal("Marlin (weights shuffled for one CUDA kernel)", tensors=(("B", "s"),)),
    Refusal("BitBLAS", ("bitblas",), ("bitblas",), ("is_bitblas_format",)),
    Refusal("EXL2 (ExLlamaV2)", ("exl2",), ("exl2",), (), (("q_weight", "q_scale", "q_groups"),)),
    Refusal("EXL3 (ExLlamaV3)", ("exl3",), ("exl3",), (), (("trellis", "svh"), ("trellis", "sv"))),
    Refusal("AQLM", ("aqlm",), ("aqlm",), (), (("codes", "codebooks"),)),
    Refusal("VPTQ", ("vptq",), ("vptq",), (), (("centroids", "indices"), ("centroids.weight", "indices"))),
    Refusal("SpQR", ("spqr",), ("spqr",), (), (("dense_weights", "row_offsets", "col_vals"),)),
    Refusal("QuIP#", ("quip", "quip#", "quip_sharp"), (), (), (("Qidxs", "SU", "SV"), ("Qidxs_0", "SU", "SV"))),
    Refusal("QTIP", ("qtip",), (), (), (("trellis", "SU", "SV"),)),
    Refusal("HIGGS", ("higgs",), ("higgs",), (), (("tables", "tables2", "scales"),)),
    Refusal("EETQ", ("eetq",), ("eetq",), (), (("weight", "weight_scales"),)),
    Refusal("Quark", ("quark",), ("quark",)),
    Refusal("FP-Quant", ("fp_quant", "fp-quant"), ("fp_quant",), (), (("qweight", "forward_hadamard_matrix"),)),
    Refusal("SINQ", ("sinq",), ("sinq",), (), (("W_q", "scale2"),)),
    Refusal("Four Over Six", ("fouroversix",), ("fouroversix",)),
    Refusal("Metal", ("metal",), ("metal",)),
    Refusal("MLX", ("mlx",), ("mlx", "auto_round:mlx"), (), (("weight", "scales", "biases"),)),
    Refusal("Gemma's own quantization", ("gemma",)),
    Refusal("ParoQuant", ("paroquant",), ("paroquant",), (), (("qweight", "theta", "pairs"),)),
    Refusal("llm-awq", ("llm-awq",), ("llm-awq",), (), (("qweight", "scaled_zeros"),)),
    Refusal("SqueezeLLM", ("squeezellm",), (), (), (("qweight", "lookup_table"),)),
    Refusal("GPTQModel with rotated activations", flags=("rotation",)),
    Refusal("auto-round's mxint4", (), ("auto_round:mx_int",)),
)
LABELS = ("checkpoint_format", "format", "version", "packing_format")
OTHERS = ("compressed-tensors",)
"""Methods whose own format knows which of its layouts to refuse."""


def refusal(stored: Stored) -> Refusal | None:
    """The first entry of the table that a checkpoint fits."""
    if stored.method in OTHERS:
        return None
    last = {name.rpartition(".")[2] for name in stored.names}
    return next((known for known in REFUSALS if _fits(known, stored, last)), None)


def _fits(known: Refusal, stored: Stored, last: set[str]) -> bool:
    labels = {str(stored.quantization.get(key) or "").lower() for key in LABELS}
    return (
        stored.method in known.methods
        or not labels.isdisjoint(known.labels)
        or any(stored.quantization.get(flag) for flag in known.flags)
        or any(last.issuperset(_last(together)) and _has(stored, *together) for together in known.tensors)
    )


def _last(names: tuple[str, ...]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def _has(stored: Stored, first: str, *others: str) -> bool:
    """Whether a module has tensors of all these last names."""
    return any(all(f"{module}.{other}" in stored for other in others) for module in stored.modules(first))


def _recognise(stored: Stored) -> bool:
    return refusal(stored) is not None


def _refuse(stored: Stored) -> NoReturn:
    found = refusal(stored)
    assert found is not None
    raise CheckpointError(
        f"{stored.path} is quantized as {found.title}, a layout that cannot be undone exactly here. Load the "
        "full-precision original, or dequantize it with the library that wrote it and save that, or quantize the "
        "original again in a layout that other libraries read too (GPTQ, AWQ, compressed-tensors, GGUF)"
    )


register("refused", _recognise, _refuse)
