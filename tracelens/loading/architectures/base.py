"""What an architecture is, as data: its parameters, and which config keys mean what."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tracelens.errors import CheckpointError
from tracelens.loading.architectures.rope import long_rope, rope_fields
from tracelens.loading.architectures.sources import Axes, Source, Sources, linear
from tracelens.loading.architectures.switches import check_switches

Config = Mapping[str, Any]


def no_window(config: Config, layer: int) -> bool:
    return False


def nothing_more(config: Config) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """One family of checkpoints."""

    sources: Sources
    """Where the parameters of every such model lie."""
    embed: str = "model.embed_tokens.weight"
    """Tensor of the token embedding, which is the unembedding too if the two are tied."""
    unembed: str = "lm_head.weight"
    optional: Mapping[str, Sources] = field(default_factory=dict)
    """Switch in config.json -> parameters there are if it is on; with `not ` before it, if it is off."""
    variants: tuple[Sources, ...] = ()
    """Ways in which the rest may lie on disk; the first that is there is used."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for keys that config.json may leave out."""
    spelled: Mapping[str, str] = field(default_factory=dict)
    """Key as this family has it in config.json -> the name used here."""
    understood: frozenset[str] = frozenset()
    """Further keys that are allowed to be set: they are read by `more`, or change nothing."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Key -> the only value that a hooked model can represent."""
    norm: Literal["RMS", "LN"] = "RMS"
    eps: str | float = "rms_norm_eps"
    """Key of the epsilon of all norms, or its value."""
    positions: Literal["rotary", "learned", "alibi"] = "rotary"
    first_position: int = 0
    """Row of the table of learned positions that belongs to the first token."""
    partial_rotary: bool = False
    long_rope: bool = False
    """Whether rope may depend on the length of the prompt; the context is then as long as it does not."""
    layered_rope: bool = False
    """Whether windowed layers have rope parameters of their own."""
    windowed: Callable[[Config, int], bool] = no_window
    """Whether a layer attends only to the last `sliding_window` tokens."""
    grouped: bool = True
    """Whether keys and values may have fewer heads than queries."""
    mlp_ratio: int | None = None
    """Width of the MLP by that of the model, where config.json does not say."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the hooked config that all models of the family share."""
    more: Callable[[Config], dict[str, Any]] = nothing_more
    """Fields of the hooked config that depend on keys of this family's own. Raises `CheckpointError`."""
    buffers: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
    """Names of what old checkpoints store and every model computes for itself."""
    dispensable: tuple[str, ...] = ()
    """Names that checkpoints may lack, where the hooked model starts with transformers' own constants."""
    foreign: tuple[str, ...] = ()
    """Names of other models in the same checkpoint, which are left alone."""
    renames: tuple[tuple[str, str], ...] = ((r"^(layers|embed_tokens|norm)\.", r"model.\1."),)
    """Regular expression and replacement, in turn, for names that some checkpoints use."""
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """End of a tensor's name -> those of the tensors, one above the other, that some quantizers store instead."""
    inside: str | None = None
    """Key of config.json under which this model's own config is."""

    def canonical(self, name: str) -> str:
        """The name in the transformers model's state dict of a tensor that may be stored under an older one."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def config(self, raw: Config) -> dict[str, Any]:
        """config.json with one name for each key and with defaults.

        Raises `CheckpointError` for contradictions and for whatever a hooked model would not compute.
        """
        config = dict(raw)
        if self.inside and isinstance(raw.get(self.inside), Mapping):
            outer = {key: raw[key] for key in ("tie_word_embeddings",) if key in raw}
            config = {**raw[self.inside], **outer}
        given = {key: value for key, value in config.items() if value is not None}
        for theirs, ours in self.spelled.items():
            if theirs not in given:
                continue
            if ours in given and given[ours] != given[theirs] and ours != "hidden_act":
                raise CheckpointError(
                    f"config.json says {theirs}={given[theirs]!r} and {ours}={given[ours]!r}, which mean the same; "
                    "get the checkpoint's original config.json"
                )
            given[ours] = given[theirs]
        defaults = dict(self.defaults)
        if "rope_scaling" in given:
            defaults.pop("rope_parameters", None)
        complete = {**defaults, **config, **given}
        names = {*self.defaults, *self.spelled, *self.spelled.values(), *self.optional, *self.only, *self.understood}
        names |= {switch.removeprefix("not ") for switch in self.optional}
        names |= set() if self.windowed is no_window else {"sliding_window"}
        check_switches(complete, names)
        for key, value in self.only.items():
            if key in complete and complete[key] is not None and complete[key] != value:
                raise CheckpointError(
                    f"config.json: {key}={complete[key]!r} is not supported, only {value!r}; "
                    "a hooked model would compute something else"
                )
        return complete

    def switched_on(self, config: Config) -> Iterator[Sources]:
        for switch, sources in self.optional.items():
            wanted = not switch.startswith("not ")
            if bool(config.get(switch.removeprefix("not "))) is wanted:
                yield sources

    def all_sources(self, config: Config, present: Collection[str]) -> dict[str, Source]:
        """Hooked parameter -> its source, for every tensor that a checkpoint of this config must hold.

        `present`: names in the checkpoint, which decide between the `variants`.
        """
        templates = dict(self.sources)
        for sources in self.switched_on(config):
            templates |= sources
        if self.variants:
            found = (v for v in self.variants if any(s.at(layer=0, expert=0).name in present for s in v.values()))
            templates |= next(found, self.variants[0])
        unembed = self.embed if config.get("tie_word_embeddings") else self.unembed
        templates["unembed.W_U"] = linear(unembed, d_out="vocab")
        layers, experts = range(need_size(config, "num_hidden_layers")), range(config.get("num_experts") or 1)
        expanded = {
            name.format(layer=layer, expert=expert): source.at(layer=layer, expert=expert)
            for name, source in templates.items()
            for layer in (layers if "{layer}" in name else (0,))
            for expert in (experts if "{expert}" in name else (0,))
        }
        return {
            name: source
            for name, source in expanded.items()
            if source.name in present or not any(re.search(pattern, source.name) for pattern in self.dispensable)
        }

    def is_buffer(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a stored tensor is a mask, a table of frequencies or the like, not a weight of the same name."""
        if not any(re.search(pattern, name) for pattern in self.buffers):
            return False
        # A causal mask is (1, 1, n_ctx, n_ctx); a bias has one axis.
        return not name.endswith(".bias") or (len(shape) == 4 and shape[:2] == (1, 1))

    def is_foreign(self, name: str) -> bool:
        """Whether a stored tensor belongs to another model, such as the vision tower of a multimodal checkpoint."""
        return any(re.search(pattern, name) for pattern in self.foreign)

    def axes(self, config: Config, fields: Mapping[str, Any]) -> Axes:
        """Sizes of all axes that sources name."""
        head, kv = fields["n_heads"], fields["n_key_value_heads"] or fields["n_heads"]
        rows = config["max_position_embeddings"] + self.first_position
        return {
            **{axis: fields[axis] for axis in ("d_model", "d_head", "d_mlp")},
            **{"head": head, "kv": kv, "heads": head + 2 * kv, "vocab": fields["d_vocab"]},
            **{"queries": slice(0, head), "keys": slice(head, head + kv), "values": slice(head + kv, head + 2 * kv)},
            **{"qkv": 3, "two": 2, "one": 1, "expert": config.get("num_experts") or 1, "pos": rows},
            "positions": slice(self.first_position, self.first_position + fields["n_ctx"]),
        }

    def fields(self, config: Config, n_ctx: int | None = None) -> dict[str, Any]:
        """Fields of the hooked model's config, from what `config` returned.

        Raises `CheckpointError` for a key that is missing, contradictory or not understood.
        """
        sizes = _sizes(config, self.mlp_ratio, grouped=self.grouped)
        fields = {
            **sizes,
            "n_ctx": self._context(config, n_ctx),
            "eps": config[self.eps] if isinstance(self.eps, str) else self.eps,
            "act_fn": activation(need(config, "hidden_act")),
            "normalization_type": self.norm,
            "positional_embedding_type": {"learned": "standard"}.get(self.positions, self.positions),
            **self.fixed,
        }
        windowed = [self.windowed(config, layer) for layer in range(fields["n_layers"])]
        if self.positions == "rotary":
            fields |= rope_fields(
                config,
                fields["d_head"],
                partial=self.partial_rotary,
                layered=self.layered_rope,
                windowed=any(windowed),
                long=self.long_rope,
            )
        # A window as long as the context hides nothing, and layers differ only if their rope does.
        if any(windowed) and (self.layered_rope or need_size(config, "sliding_window") < fields["n_ctx"]):
            fields |= {
                "use_local_attn": True,
                "window_size": need_size(config, "sliding_window"),
                "attn_types": ["local" if local else "global" for local in windowed],
            }
        return fields | self.more(config)

    def _context(self, config: Config, n_ctx: int | None) -> int:
        longest, limited = need_size(config, "max_position_embeddings"), self.positions == "learned"
        if self.long_rope and (rope := long_rope(config)):
            longest, limited = min(longest, need_size(rope, "original_max_position_embeddings")), True
        if n_ctx is None:
            return longest
        if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or n_ctx < 1:
            raise CheckpointError(f"n_ctx is {n_ctx!r}; give a positive number of tokens, or None for the config's own")
        if limited and n_ctx > longest:
            kind = "has learned" if self.positions == "learned" else "rotates without regard to the prompt's length"
            raise CheckpointError(
                f"n_ctx={n_ctx} is more than the {longest} positions that the checkpoint {kind}; give at most {longest}"
            )
        return n_ctx


def _sizes(config: Config, mlp_ratio: int | None, *, grouped: bool) -> dict[str, Any]:
    d_model, n_heads = need_size(config, "hidden_size"), need_size(config, "num_attention_heads")
    n_key_value_heads = (grouped and config.get("num_key_value_heads")) or n_heads
    if not config.get("head_dim") and d_model % n_heads:
        raise CheckpointError(
            f"config.json: hidden_size={d_model} is not divisible by num_attention_heads={n_heads}; "
            "get the checkpoint's original config.json"
        )
    if n_heads % n_key_value_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads={n_heads} is not divisible by num_key_value_heads={n_key_value_heads}; "
            "get the checkpoint's original config.json"
        )
    d_mlp = config.get("intermediate_size") or (mlp_ratio and mlp_ratio * d_model)
    return {
        "d_model": d_model,
        "d_head": config.get("head_dim") or d_model // n_heads,
        "n_heads": n_heads,
        "n_key_value_heads": None if n_key_value_heads == n_heads else n_key_value_heads,
        "d_mlp": d_mlp or need_size(config, "intermediate_size"),
        "n_layers": need_size(config, "num_hidden_layers"),
        "d_vocab": need_size(config, "vocab_size"),
    }


def need(mapping: Config, key: str, where: str = "config.json") -> Any:
    """The value of a key that must be there; raises `CheckpointError` with its name."""
    if mapping.get(key) is None:
        raise CheckpointError(f"{where} lacks {key!r}; get the checkpoint's original config.json")
    return mapping[key]


def need_size(config: Config, key: str) -> int:
    """The value of a key that must be there and be a positive whole number."""
    value = need(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"config.json: {key}={value!r} is no positive whole number; get the checkpoint's original config.json"
        )
    return value


def window_by_layer_types(config: Config, layer: int) -> bool:
    """Whether `layer_types` calls a layer windowed."""
    kind = config["layer_types"][layer] if layer < len(config["layer_types"]) else None
    if kind not in ("sliding_attention", "full_attention"):
        raise CheckpointError(
            f"config.json: layer_types has {kind!r} for layer {layer}; supported: sliding_attention, full_attention"
        )
    return kind == "sliding_attention" and config.get("sliding_window") is not None


ACTIVATIONS = {name: name for name in ("silu", "gelu", "gelu_new", "gelu_fast", "relu", "relu2", "xielu")}
ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_pytorch_tanh", "swish": "silu", "gelu_python": "gelu"}


def activation(name: str) -> str:
    """transformer-lens' name of an activation function; raises `CheckpointError` for one that it lacks."""
    if name not in ACTIVATIONS:
        raise CheckpointError(f"config.json: hidden_act {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
