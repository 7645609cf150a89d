"""What Hugging Face architectures are in hooked form: config fields and tensor names, as data.

`ARCHITECTURES` is keyed by the name in config.json's `architectures`, never by the name of a folder. A row is added
when its logits agree with transformers (tests/parity/test_loading.py).
"""

from collections.abc import Mapping
from typing import Any

from tracelens.errors import UnsupportedArchitectureError
from tracelens.loading.architectures import bloom, gemma, gpt2, gptj, llama, moe, neox, olmo, opt, phi, stablelm
from tracelens.loading.architectures.base import Architecture
from tracelens.loading.architectures.sources import Axes, Source

FAMILIES = (llama, gpt2, neox, gptj, opt, bloom, gemma, phi, olmo, stablelm, moe)
ARCHITECTURES: dict[str, Architecture] = {name: row for family in FAMILIES for name, row in family.TABLE.items()}
assert len(ARCHITECTURES) == sum(len(family.TABLE) for family in FAMILIES), "an architecture is registered twice"

__all__ = ["ARCHITECTURES", "Architecture", "Axes", "Source", "architecture_of"]


def architecture_of(name: str, config: Mapping[str, Any] | None = None) -> Architecture:
    """The row of an architecture; raises `UnsupportedArchitectureError` with the list of those supported.

    `config`: config.json, which may say that the architecture is code of its own; such code is never run.
    """
    if name not in ARCHITECTURES:
        remote = (
            " Its config.json has auto_map: the model is code in its repository, and remote code is never run."
            if config and config.get("auto_map")
            else ""
        )
        raise UnsupportedArchitectureError(
            f"architecture {name!r} has no conversion to a hooked model; supported: {', '.join(ARCHITECTURES)}.{remote} "
            "A hooked model that was built elsewhere can be passed as an object"
        )
    return ARCHITECTURES[name]
