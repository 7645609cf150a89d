"""Ladders: precisions of one family, which differ in nothing but the width of their integers; or builds that are named."""

from collections.abc import Sequence
from dataclasses import replace

from tracelens.errors import MetricInputError, PrecisionSpecError, UnknownNameError
from tracelens.optimization_auditor import SweepResult
from tracelens.precision import QuantizationConfig, QuantizationType


def families(configs: Sequence[QuantizationConfig]) -> dict[str, list[str]]:
    """Family ("int-g32+a8": the specification without its width) → its precisions, most bits first.

    A format that has a single width is a family of its own.
    """
    found: dict[str, list[QuantizationConfig]] = {}
    for config in configs:
        as_int4 = replace(config, type=QuantizationType.INT4) if config.type.is_integer else None
        name = str(config) if as_int4 is None else str(as_int4).replace("int4", "int", 1)
        found.setdefault(name, []).append(config)
    return {
        name: [str(c) for c in sorted(members, key=lambda c: -c.bits_per_weight)] for name, members in found.items()
    }


def ladder(sweep: SweepResult, configs: Sequence[str | QuantizationConfig] | None = None) -> list[str]:
    """The entries of one ladder of a sweep, most bits first; by default of the one family of precisions that has several.

    Builds that were not simulated make a ladder too, if they are named: what was done to them is not known here, so it is
    the caller who says that they differ in width alone. Their bits per weight are those that the sweep knows.
    Raises `MetricInputError` for precisions of several families or beside builds, fewer than two, builds without bits or
    with equal ones, or if no default can be told; `UnknownNameError` for one that is not in the sweep.
    """
    if configs is None:
        known = {name: specs for name, specs in families(sweep.configs).items() if len(specs) > 1}
        if len(known) != 1:
            listed = "; ".join(", ".join(specs) for specs in families(sweep.configs).values())
            raise MetricInputError(
                f"the sweep holds {len(known)} families of several widths ({listed}); name the ladder: "
                "configs=['int8', 'int4', 'int3', 'int2']"
            )
        return next(iter(known.values()))
    names = list(dict.fromkeys(name_in(sweep, config) for config in configs))
    simulated = [QuantizationConfig.parse(name) for name in names if _is_precision(name)]
    if not simulated:
        return _builds(sweep, names)
    groups = families(simulated)
    if len(groups) != 1 or len(simulated) < 2 or len(simulated) < len(names):
        built = [name for name in names if not _is_precision(name)]
        listed = "; ".join(", ".join(specs) for specs in [*groups.values(), *([built] if built else [])])
        raise MetricInputError(
            f"a ladder needs at least two precisions that differ in nothing but the width of their integers; got {listed}"
        )
    return next(iter(groups.values()))


def name_in(sweep: SweepResult, config: str | QuantizationConfig) -> str:
    """What the sweep calls a precision or build; raises `UnknownNameError` if it has none of that name."""
    if isinstance(config, str) and config in sweep.reports:
        return config
    known = not isinstance(config, str) or _is_precision(config)
    name = str(QuantizationConfig.parse(config)) if known else str(config)
    if name not in sweep.reports:
        raise UnknownNameError.of("precision of this sweep", name, sweep.reports)
    return name


def _builds(sweep: SweepResult, names: list[str]) -> list[str]:
    bits = {name: sweep.bits[name] for name in names}
    if len(names) < 2 or len(set(bits.values())) < len(names) or any(b != b for b in bits.values()):
        listed = ", ".join(f"{name} ({b:g} bits)" for name, b in bits.items()) or "none"
        raise MetricInputError(
            f"a ladder of builds needs at least two that say their bits per weight, each another number; got {listed}"
        )
    return sorted(names, key=lambda name: -bits[name])


def _is_precision(name: str) -> bool:
    try:
        QuantizationConfig.parse(name)
    except PrecisionSpecError:
        return False
    return True
