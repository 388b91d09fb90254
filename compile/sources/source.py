"""What every kind of weights is read as: a `Source`, with its `SourceTensor`s."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.formats.blocks import Groups
from compile.models.spec import LlamaConfig, VisionConfig
from compile.models.tensors import has_bias
from compile.reading import unsupported

Rows = slice | NDArray[np.integer[Any]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class SourceTensor:
    """A weight [rows, columns] or [n] in a mapped file, stored as `dtype`: a name of GGUF's types.

    `read(rows)` gives the rows at a slice or an index array, as float32, float16 or bfloat16
    (ml_dtypes); nothing else is brought into memory. Quantized weights are dequantized to float32.
    `groups(rows)` gives the same rows as they are quantized in the file; None if they are not, or
    in a way that `Groups` cannot hold.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[Rows], NDArray[Any]]
    groups: Callable[[Rows], Groups | None] | None = None


@dataclass(frozen=True)
class Source:
    """A model and its tokenizer, ready to be compiled; with a vision tower if `vision` is set.

    `tensors` has the weights under the canonical names of `models.tensors`, and whatever else the
    files hold under its own name. The rows of attn_q and attn_k are in Hugging Face's order: RoPE
    turns element j together with j + head_dim / 2. Pixels of v.patch_embd.weight
    [H, 3 * patch * patch] are channel by channel, and the first row of v.position_embd.weight is
    that of the class token, if there is one.
    `image_settings` are the fields of sf_local's ImageSettings. `sha256` covers every input file;
    any of `eos_token_ids` ends generation. `sampling_defaults` are fields of SamplingParams.
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
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)

    @property
    def weight_dtype(self) -> str:
        """The type in which most weights of the layers' matrices are stored."""
        counts: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            if name.startswith("blk.") and len(tensor.shape) == 2:
                counts[tensor.dtype] += math.prod(tensor.shape)
        return counts.most_common(1)[0][0]

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json to `folder`."""
        config = json.dumps(self.tokenizer_config, ensure_ascii=False, indent=2) + "\n"
        (folder / "tokenizer.json").write_bytes(self.tokenizer_json)
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")


def check_bias(path: Path, name: str, canonical: str) -> None:
    """Raise UnsupportedError for a bias that no model here has.

    name: the tensor's in the file at `path`; canonical: its name in `models.tensors`, if any.
    """
    if name.endswith(".bias") and not has_bias(canonical):
        raise unsupported(path, f"tensor {name}", "a Llama without biases")
