"""`Source`, which every format of weights becomes, and what reading any of them takes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.formats.quantize import Groups
from compile.models.spec import LlamaConfig, VisionConfig

Rows = slice | NDArray[np.integer[Any]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class SourceTensor:
    """A weight `[rows, cols]` or `[n]` in a mapped file.

    `read(rows)` gives the rows at a slice or an index array, as float32, float16 or bfloat16
    (ml_dtypes); nothing else is brought into memory. GGUF weights are dequantized to float32.
    `groups(rows)`: the same rows as they are quantized in the file; None where they are not, or
    otherwise than `Groups` can hold.
    """

    shape: tuple[int, ...]
    read: Callable[[Rows], NDArray[Any]]
    groups: Callable[[Rows], Groups | None] | None = None


@dataclass(frozen=True)
class Source:
    """A Llama and its tokenizer, ready to be compiled; with a vision tower, where `vision` is set.

    `tensors` has token_embd, output_norm, output (absent when tied) and blk.{i}.attn_norm,
    attn_q, attn_k, attn_v, attn_output, ffn_norm, ffn_gate, ffn_up, ffn_down, each with
    ".weight", and whatever else the files hold under its own name. The rows of attn_q and attn_k
    are in Hugging Face's order (RoPE turns element j together with j + head_dim / 2).
    A vision tower has, with ".weight" and ".bias", v.blk.{i}.ln1, attn_q, attn_k, attn_v, attn_out,
    ln2, ffn_up, ffn_down; and v.patch_embd.weight [H, 3 * patch * patch] (channels outermost) and
    v.position_embd.weight. Idefics3 adds v.patch_embd.bias, v.post_ln and mm.fc.weight; LLaVA adds
    v.class_embd (its position is the first), v.pre_ln, mm.1 and mm.2.
    `image_settings` are the fields of sf_local's ImageSettings.
    `sha256` covers every input file; any of `eos_token_ids` ends generation.
    """

    name: str
    config: LlamaConfig
    tensors: Mapping[str, SourceTensor]
    sha256: str
    tokenizer_json: bytes
    tokenizer_config: Mapping[str, Any]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    vision: VisionConfig | None = None
    image_settings: Mapping[str, Any] | None = None

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        config = json.dumps(self.tokenizer_config, ensure_ascii=False, indent=2) + "\n"
        (folder / "tokenizer.json").write_bytes(self.tokenizer_json)
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
