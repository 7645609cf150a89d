"""What quantizers call the linear layers of a checkpoint: TransformerLens' parameter → the module of transformers.

The names come from the tables by which checkpoints are loaded, so they hold for every architecture that can be loaded. Where
a checkpoint fuses layers (`c_attn`, `qkv_proj`, `gate_up_proj`), several parameters have one module.
"""

import re
from collections.abc import Iterable

from tracelens.errors import PlanError, UnsupportedArchitectureError
from tracelens.loading.architectures import Architecture, architecture_of

OUTPUT_LAYER = "lm_head"
"""What transformers 5 calls the unembedding of every architecture in the tables."""
OLDER_OUTPUT_LAYERS = {"GPTNeoXForCausalLM": ("embed_out",)}
"""What other versions of transformers call it."""

_SPLIT = {
    **{"q": "attn.W_Q", "k": "attn.W_K", "v": "attn.W_V", "o": "attn.W_O"},
    **{"gate": "mlp.W_gate", "in": "mlp.W_in"},
}
"""Last part of a name that a `TransformerBridge` has of its own, for a layer that it split or renamed → the hooked name."""
_HOOKED = re.compile(r"blocks\.(\d+)\.(.+)")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.(.+)")


def module_of(name: str, architecture: str) -> str:
    """The module of transformers that holds a parameter, which may be a hooked model's or a bridge's.

    Experts that a checkpoint stacks in one tensor give that tensor's name, which is no linear layer.
    Raises `PlanError`, with the name, for one that the architecture's table does not have.
    """
    try:
        table = architecture_of(architecture)
    except UnsupportedArchitectureError as error:
        raise PlanError(
            f"the modules of {architecture!r} are not known, so none can be named to a quantizer: {error}"
        ) from error
    if hooked := _HOOKED.fullmatch(name):
        return _from_table(name, hooked[2], int(hooked[1]), table, architecture)
    prefix, _, last = name.removesuffix(".weight").rpartition(".")
    layer = _LAYER.search(name)
    if last in _SPLIT and layer:
        return _from_table(name, _SPLIT[last], int(layer[1]), table, architecture)
    return f"{prefix}.{last}"


def modules_of(names: Iterable[str], architecture: str) -> dict[str, str]:
    """`module_of` each name."""
    return {name: module_of(name, architecture) for name in names}


def aliases(module: str) -> tuple[str, ...]:
    """All names under which libraries know a module, its own first: experts are called otherwise where they are unpacked,
    and Mixtral's were by older versions of transformers.
    """
    found = _EXPERT.fullmatch(module)
    renamed = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    if not found or found[3] not in renamed:
        return (module,)
    start, expert, last = found.groups()
    older = start.replace(".mlp.experts.", ".block_sparse_moe.experts.")
    return (module, f"{start}{expert}.{renamed[last]}", f"{older}{expert}.{last}")


def output_layers(architecture: str) -> tuple[str, ...]:
    """Names of the unembedding, which quantizers leave alone and must go on to."""
    return (OUTPUT_LAYER, *OLDER_OUTPUT_LAYERS.get(architecture, ()))


def is_linear(module: str) -> bool:
    """Whether it is a layer of its own, not a tensor of several experts."""
    return not re.search(r"\.experts\.(gate_up_proj|down_proj)(_bias)?$", module)


def _from_table(name: str, leaf: str, layer: int, table: Architecture, architecture: str) -> str:
    expert = re.search(r"experts\.(\d+)\.", leaf)
    leaf = re.sub(r"experts\.\d+\.", "experts.{expert}.", leaf).replace("._W_", ".W_")
    key = f"blocks.{{layer}}.{leaf}"
    for sources in (table.sources, *table.optional.values(), *table.variants):
        if key in sources:
            numbers = {"layer": layer, "expert": int(expert[1]) if expert else 0}
            return sources[key].name.format(**numbers).removesuffix(".weight")
    raise PlanError(f"{architecture} has no tensor from which {name} is made, so it cannot be named to a quantizer")
