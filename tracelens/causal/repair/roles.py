"""What a weight matrix is for, told by its name: both those of TransformerLens and those that transformers gives."""

import re
from collections.abc import Sequence
from typing import Any

from tracelens.causal.matrices import Matrix
from tracelens.causal.places import Place
from tracelens.errors import UnknownNameError

_QUERY = re.compile(r"W_Q$|\b(q_proj|q_lin|query|attn\.q|self_attn\.q)\b")
_KEY_VALUE = re.compile(r"_?W_[KV]$|\b([kv]_proj|[kv]_lin|key|value|attn\.[kv]|self_attn\.[kv])\b")
_ATTENTION = re.compile(r"\b(attn|attention|self_attn|self_attention)\b")
_WRITES = re.compile(
    r"W_O$|W_out(\.weight)?$|\b(o_proj|out_proj|down_proj|fc2|fc_out|c_proj|dense_4h_to_h|attention\.dense|self_attention\.dense|wo|w2)\b"
)


def writes_to_the_residual(matrix: Matrix, d_model: int) -> bool:
    """Whether a matrix's output is added to the residual stream: W_O and W_out, by whatever name.

    Raises `UnknownNameError` for the experts of a mixture that lie in one tensor: they are several matrices.
    """
    if not _WRITES.search(matrix.name):
        return False
    if matrix.reference.ndim == 3 and matrix.out_axes == (0, 1):
        raise UnknownNameError(
            f"{matrix.name} holds the output weights of all experts in one tensor, which cannot be corrected along a direction "
            "one by one; load the models with wrapper='hooked'"
        )
    return matrix.shape[0] == d_model


def components_fed(matrix: Matrix, places: Sequence[Place], cfg: Any) -> list[list[int]]:
    """Of each row of a matrix, which of `places` (heads as `z`, MLPs as `mlp_out`) it is part of.

    A row of Q, K or V makes its head, or with grouped queries those of its group; a row of O takes from all heads of the
    layer; a row of an MLP's matrices is part of that MLP.
    """
    here = [(i, place) for i, place in enumerate(places) if place.site.layer == matrix.layer]
    heads = {place.unit: i for i, place in here if place.site.name == "z"}
    if not _ATTENTION.search(matrix.name):
        return [[i for i, place in here if place.site.name == "mlp_out"]] * matrix.shape[0]
    d_head = int(cfg.d_head)
    if _QUERY.search(matrix.name) and matrix.shape[0] == d_head * cfg.n_heads:
        return [[heads[row // d_head]] for row in range(matrix.shape[0])]
    if _KEY_VALUE.search(matrix.name) and matrix.shape[0] % d_head == 0:
        group = int(cfg.n_heads) * d_head // matrix.shape[0]
        return [[heads[row // d_head * group + i] for i in range(group)] for row in range(matrix.shape[0])]
    return [sorted(heads.values())] * matrix.shape[0]
