"""What the layers of attention are called in transformers and in other libraries."""

from __future__ import annotations

from itertools import chain

SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
"""The query, key and value layers of an attention, in this order."""
FUSED = ("qkv", "c_attn", "in_proj", "in_proj_weight", "query_key_value", "qkv_proj", "Wqkv", "W_pack")
"""One matrix for all three. State space models call their input `in_proj` too, which is no attention."""
FUSED_ALONE = tuple(name for name in FUSED if name != "in_proj")
"""Those of them that nothing else is called by."""
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
"""The output projection; other layers are called so too, which are in no attention."""

_QKV = {*chain(*SEPARATE), *FUSED_ALONE}


def is_qkv(parameter: str) -> bool:
    """Whether a parameter, by its dotted name, is of a projection to queries, keys or values, in one or in three."""
    return not _QKV.isdisjoint(parameter.split(".")[:-1])
