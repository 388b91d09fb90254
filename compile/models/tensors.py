"""TODO."""

from __future__ import annotations

from compile.models.spec import LlamaConfig, VisionConfig


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes [out, in] of all source tensors, by canonical name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, hidden),
        "output_norm.weight": (hidden,),
    }
    if not config.tied_embeddings:
        shapes["output.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (heads, hidden),
            f"blk.{i}.attn_k.weight": (kv, hidden),
            f"blk.{i}.attn_v.weight": (kv, hidden),
            f"blk.{i}.attn_output.weight": (hidden, heads),
            f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.ffn_gate.weight": (inner, hidden),
            f"blk.{i}.ffn_up.weight": (inner, hidden),
            f"blk.{i}.ffn_down.weight": (hidden, inner),
        }
    return shapes


def vision_shapes(config: VisionConfig, text_hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a vision tower's tensors and of those that make its output a Llama's input."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (hidden, config.patch_elements),
        "v.position_embd.weight": (config.num_positions, hidden),
    }
    biased: dict[str, tuple[int, ...]] = {}
    for i in range(config.num_layers):
        biased |= {f"v.blk.{i}.{norm}": (hidden,) for norm in ("ln1", "ln2")}
        biased |= {f"v.blk.{i}.attn_{x}": (hidden, hidden) for x in ("q", "k", "v", "out")}
        biased |= {f"v.blk.{i}.ffn_up": (inner, hidden), f"v.blk.{i}.ffn_down": (hidden, inner)}
    if config.has_class_token:
        shapes["v.class_embd"] = (hidden,)
        biased |= {"v.pre_ln": (hidden,)}
        biased |= {"mm.1": (text_hidden, hidden), "mm.2": (text_hidden, text_hidden)}
    else:
        shapes["v.patch_embd.bias"] = (hidden,)
        shapes["mm.fc.weight"] = (text_hidden, hidden * config.scale_factor**2)
        biased |= {"v.post_ln": (hidden,)}
    for name, shape in biased.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
