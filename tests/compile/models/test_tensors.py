"""The table of a model's tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compile.models.spec import VisionConfig
from compile.models.tensors import (
    DECODER,
    VISION,
    decoder_tensors,
    has_bias,
    hf_names,
    model_tensors,
    source_shapes,
    vision_tensors,
)
from tests.support.tiny import TINY
from tests.support.vision_reference import IDEFICS3, LLAVA


def test_sources_of_a_decoder() -> None:
    c = replace(TINY, num_layers=1)
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    hidden, intermediate = c.hidden_size, c.intermediate_size
    assert source_shapes(model_tensors(c, None)) == {
        "token_embd.weight": (c.vocab_size, hidden),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (heads, hidden),
        "blk.0.attn_k.weight": (kv_heads, hidden),
        "blk.0.attn_v.weight": (kv_heads, hidden),
        "blk.0.attn_output.weight": (hidden, heads),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.ffn_gate.weight": (intermediate, hidden),
        "blk.0.ffn_up.weight": (intermediate, hidden),
        "blk.0.ffn_down.weight": (hidden, intermediate),
        "output_norm.weight": (hidden,),
    }
    untied = source_shapes(model_tensors(replace(c, tied_embeddings=False), None))
    assert untied["output.weight"] == (c.vocab_size, hidden)


def test_fused_and_padded() -> None:
    changed = decoder_tensors(TINY, hidden=64, intermediate=80, context=32)
    shapes = {tensor.name: tensor.shape for tensor in changed.all}
    qkv = (TINY.num_heads + 2 * TINY.num_kv_heads) * TINY.head_dim
    assert shapes["rope"] == (32, 2, TINY.head_dim // 2)
    assert shapes["blk.1.attn_qkv.weight"] == (qkv, 64)
    assert shapes["blk.1.ffn_gate_up.weight"] == (160, 64)
    assert [t.name for t in changed.layers[0] if t.is_interleaved] == ["blk.0.ffn_gate_up.weight"]
    assert not changed.rope.sources and not changed.rope.is_matrix


@pytest.mark.parametrize("config", [IDEFICS3, LLAVA], ids=["idefics3", "llava"])
def test_a_tower(config: VisionConfig) -> None:
    tensors = vision_tensors(config, 48)
    assert len(tensors.layers) == config.num_layers
    names = [tensor.name for tensor in tensors.all]
    assert len(set(names)) == len(names)
    assert ("v.class_embd" in names, "v.patch_embd.bias" in names) == (
        (True, False) if config.has_class_token else (False, True)
    )
    shapes = source_shapes(tensors.all)
    assert shapes["v.blk.0.attn_k.bias"] == (config.hidden_size,)
    assert shapes["v.patch_embd.weight"] == (config.hidden_size, config.patch_elements)


def test_names() -> None:
    assert hf_names(DECODER)["self_attn.o_proj"] == "blk.{}.attn_output"
    assert hf_names(VISION)["self_attn.out_proj"] == "v.blk.{}.attn_out"
    for entries in DECODER, VISION:
        names = hf_names(entries)
        assert len(set(names.values())) == len(names)
    assert has_bias("v.blk.12.attn_q.bias") and has_bias("mm.1.bias") and has_bias("v.pre_ln.bias")
    assert not has_bias("blk.0.attn_q.bias") and not has_bias("v.blk.0.attn_q.weight")
