"""Names of precisions: `QuantizationConfig` and its one-line form (`int4-g128+a8+kv8`)."""

from dataclasses import KW_ONLY, dataclass
from math import inf

from tracelens.errors import PrecisionSpecError
from tracelens.precision.spec import number, parse_spec
from tracelens.precision.types import (
    BLOCKS_4BIT,
    FIXED_GROUPS,
    HALF_TYPES,
    OPTIONS,
    ActivationConfig,
    ActivationFormat,
    Clipping,
    Granularity,
    QuantizationType,
    grammar,
)

__all__ = ["ActivationConfig", "ActivationFormat", "Granularity", "QuantizationConfig", "QuantizationType"]

_LABELS = {
    QuantizationType.INT8_DYNAMIC: "INT8-dynamic",
    QuantizationType.LLM_INT8: "LLM.int8()",
    QuantizationType.LLM_INT8_WEIGHTS: "LLM.int8()-weights",
    QuantizationType.PRUNED: "pruned",
}
_OUTLIER_THRESHOLD = 6.0  # of LLM.int8() (Dettmers et al., arXiv 2208.07339), and the library's default


@dataclass(frozen=True)
class QuantizationConfig:
    """A number format with its options: `QuantizationConfig(QuantizationType.INT4, group_size=32)`.

    Attributes:
        type: of the weights.
        group_size: input weights that share a scale; None for one scale per `granularity`. NF4 and FP4 have blocks of 64
            unless another size is named; NVFP4, MXFP4 and MXFP8 have the groups of their definition.
        symmetric: False adds an integer zero point.
        granularity: what shares a scale where there are no groups.
        clipping: "mse" searches the range whose squared error is least instead of taking the largest magnitude.
        double_quant: NF4 and FP4: the scales are quantized to 8 bits themselves.
        outlier_threshold: LLM.int8(): inputs of this magnitude and above stay in 16 bits; 6 unless said, 0 for none of
            them, as in bitsandbytes.
        sparsity: share of the weights of each matrix that pruning sets to zero, from 0 to below 1; it has no default.
        compute: what activations that nothing else rounds are stored in.
        activations: how the inputs of linear layers are rounded.
        kv_cache: how keys and values are rounded.

    `INT8_DYNAMIC` is symmetric int8 per channel with symmetric int8 activations per token. `LLM_INT8` rounds
    activations too; `LLM_INT8_WEIGHTS` has the same weights and rounds no activations.
    Raises `PrecisionSpecError` for options that the format does not have.
    """

    type: QuantizationType
    _: KW_ONLY
    group_size: int | None = None
    symmetric: bool = True
    granularity: Granularity = "channel"
    clipping: Clipping = "absmax"
    double_quant: bool = False
    outlier_threshold: float | None = None
    sparsity: float | None = None
    compute: QuantizationType = QuantizationType.FP32
    activations: ActivationConfig | None = None
    kv_cache: ActivationConfig | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if self.type is QuantizationType.LLM_INT8 and self.outlier_threshold is None:
            object.__setattr__(self, "outlier_threshold", _OUTLIER_THRESHOLD)
        if self.type is QuantizationType.INT8_DYNAMIC:
            object.__setattr__(self, "activations", ActivationConfig("int8"))
        self._check_values()

    def _check_options(self) -> None:
        given = {
            "g": self.group_size is not None,
            "asym": not self.symmetric,
            "mse": self.clipping != "absmax",
            "dq": self.double_quant,
            "t": self.outlier_threshold is not None,
            "s": self.sparsity is not None,
            "tensor": self.granularity == "tensor",
            "block": self.granularity == "block",
        }
        wrong = [OPTIONS[name] for name, there in given.items() if there and name not in self.type.options]
        name = self.type.value
        if wrong:
            raise PrecisionSpecError(f"precision {name!r} takes no {' and no '.join(wrong)}. {grammar()}")
        if self.compute not in (QuantizationType.FP32, *HALF_TYPES):
            raise PrecisionSpecError(f"compute is {self.compute.value!r}; kernels compute in fp32, bf16 or fp16")
        if self.type in HALF_TYPES and self.compute is not QuantizationType.FP32:
            raise PrecisionSpecError(f"precision {name!r} says itself what it computes in; drop +{self.compute.value}")
        own = {QuantizationType.INT8_DYNAMIC: (None, ActivationConfig("int8")), QuantizationType.LLM_INT8: (None,)}
        if self.activations not in own.get(self.type, (self.activations,)):
            raise PrecisionSpecError(
                f"precision {name!r} says itself how activations are rounded; drop +a{self.activations}"
            )

    def _check_values(self) -> None:
        name, size = self.type.value, self.group_size
        if self.type is QuantizationType.PRUNED and not (self.sparsity is not None and 0 <= self.sparsity < 1):
            raise PrecisionSpecError(
                f"pruning needs a sparsity from 0 to below 1, as in pruned-s50; got {self.sparsity}"
            )
        if self.outlier_threshold is not None and not 0 <= self.outlier_threshold < inf:
            raise PrecisionSpecError(
                f"the outlier threshold of {name!r} must be 0 or more, and finite, as in llm-int8-t6; "
                f"got {self.outlier_threshold}"
            )
        if size is not None and size < 1:
            raise PrecisionSpecError(f"group size {size} of precision {name!r} is not positive")
        if size is not None and not self.type.is_integer and size not in BLOCKS_4BIT:
            raise PrecisionSpecError(
                f"precision {name!r} has no blocks of {size}; sizes it has: {', '.join(map(str, BLOCKS_4BIT))}"
            )
        if size is not None and self.granularity != "channel":
            raise PrecisionSpecError(f"precision {name!r} cannot have both groups and one scale per {self.granularity}")

    @classmethod
    def parse(cls, spec: "str | QuantizationType | QuantizationConfig") -> "QuantizationConfig":
        """The config that `spec` names; a config passes through, and `parse(str(config)) == config`.

        Raises `PrecisionSpecError` that says which part is wrong and lists what exists.
        """
        if isinstance(spec, QuantizationConfig):
            return spec
        if isinstance(spec, QuantizationType):
            return cls(spec)
        kind, fields = parse_spec(spec)
        return cls(kind, **fields)

    def __str__(self) -> str:
        return self.type.value + self._options()

    def _options(self) -> str:
        """What follows the name of the format."""
        threshold = self.outlier_threshold
        options = [
            "" if self.group_size is None else f"-g{self.group_size}",
            "" if self.granularity == "channel" else f"-{self.granularity}",
            "" if self.symmetric else "-asym",
            "" if self.clipping == "absmax" else "-mse",
            "-dq" if self.double_quant else "",
            "" if threshold in (None, _OUTLIER_THRESHOLD) else f"-t{number(threshold)}",
            "" if self.sparsity is None else f"-s{number(self.sparsity, percent=True)}",
        ]
        parts = [
            "" if self.compute is QuantizationType.FP32 else f"+{self.compute.value}",
            f"+a{self.activations}" if self.activations and self.type is not QuantizationType.INT8_DYNAMIC else "",
            f"+kv{self.kv_cache}" if self.kv_cache else "",
        ]
        return "".join([*options, *parts])

    @property
    def bits(self) -> int:
        """Bits per weight, scales aside."""
        return self.type.bits

    @property
    def weight_group(self) -> int | None:
        """Input weights that share a scale, where the format has groups."""
        if self.type in (QuantizationType.NF4, QuantizationType.FP4):
            return self.group_size or 64
        return FIXED_GROUPS.get(self.type, self.group_size)

    @property
    def bits_per_weight(self) -> float:
        """`bits` and the share of the scales (and zero points) of a group; scales per channel weigh next to nothing.

        Integers have 16-bit scales; NF4 and FP4 32-bit ones (8-bit with `double_quant`, in groups of 256); NVFP4, MXFP4
        and MXFP8 8-bit ones. Pruning counts the weights that are left in 16 bits, and nothing for where they are.
        """
        if self.sparsity is not None:
            return 16 * (1 - self.sparsity)
        if self.weight_group is None:
            return float(self.bits)
        if self.type.is_integer:
            scale = 16.0 if self.symmetric else 16.0 + self.bits
        elif self.type in FIXED_GROUPS:
            scale = 8.0
        else:
            scale = 8 + 32 / 256 if self.double_quant else 32.0
        return self.bits + scale / self.weight_group

    @property
    def weights_only(self) -> "QuantizationConfig":
        """The same weights, and no activations rounded."""
        if self.type is QuantizationType.INT8_DYNAMIC:
            return QuantizationConfig(QuantizationType.INT8)
        if self.type is QuantizationType.LLM_INT8:
            return QuantizationConfig(QuantizationType.LLM_INT8_WEIGHTS)
        names = ("group_size", "symmetric", "granularity", "clipping", "double_quant", "sparsity")
        return QuantizationConfig(self.type, **{name: getattr(self, name) for name in names})

    @property
    def rounds_activations(self) -> bool:
        """Whether anything but weights is rounded: what enters linear layers, the KV cache, or all in half precision."""
        half = self.type in HALF_TYPES or self.compute in HALF_TYPES
        inputs = self.activations is not None or self.type is QuantizationType.LLM_INT8
        return half or inputs or self.kv_cache is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether a scale must be found on prompts before anything can run."""
        return any(part is not None and part.static for part in (self.activations, self.kv_cache))

    @property
    def label(self) -> str:
        """For people: `INT4-g32`."""
        return _LABELS.get(self.type, self.type.value.upper()) + self._options()


def parse(spec: str | QuantizationType | QuantizationConfig) -> QuantizationConfig:
    """The config of a specification: `parse("int4-g128+a8+kv8")`; see `QuantizationConfig.parse`."""
    return QuantizationConfig.parse(spec)
