"""Keys of config.json that would change what a model computes."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from tracelens.errors import CheckpointError

# Words in the names of such keys, over all models of transformers. Biases need no switch: they are tensors.
TELLING = re.compile(
    r"multiplier|soft_?cap|alibi|logits?_scal|mup|scale_(emb|depth|attn)|dim_model_base|qk_?(layer)?_?norm|attn_scalar"
    r"|clip_qkv|_proj_dim$|expert|^moe|sparse|layer_types|sliding|window|attention_chunk|no_?rope|rotary"
    r"|rope|parallel|residual|multi_query|cross_attention|bidirectional|encoder_decoder|sinks?$|do_layer_norm"
    r"|elementwise|layernorm|final_layer_norm|temperature_tuning|swiglu|gating|nextn|tie_encoder"
)
HARMLESS = re.compile(r"dropout|pdrop|fusion|skip_bias|router|aux_loss|^_|_loss|expert_capacity|ep_size")
READ = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "tie_word_embeddings")
"""Read for every model that rotates, and of no effect in others, whose config.json may have them all the same."""


def check_switches(config: Mapping[str, Any], understood: Collection[str]) -> None:
    """Raises `CheckpointError` for a switch that is set and that the architecture does not have.

    A key counts by its name (`TELLING`), and as unset if its value is null, false, zero or empty.
    """
    known = {*understood, *READ}
    for key, value in config.items():
        if value and key not in known and TELLING.search(key) and not HARMLESS.search(key):
            raise CheckpointError(
                f"config.json sets {key}={value!r}, which this architecture is not known to have and which may change "
                "what the model computes; if it does not, remove the key from config.json"
            )
