"""Which parameters are of a projection to queries, keys and values, by name."""

from __future__ import annotations

from overhaul.interop.attention import is_qkv


def test_every_way_to_call_the_three_is_known_and_what_is_called_alike_is_not():
    known = ("a.q_proj.weight", "a.key.bias", "a.v_lin.weight", "a.q.weight", "a.c_attn.weight", "a.Wqkv.weight")
    others = ("a.o_proj.weight", "a.mlp.up_proj.weight", "query", "mixer.in_proj.weight", "norm.weight")

    assert all(map(is_qkv, known))
    assert not any(map(is_qkv, others))
