"""`Source`, which every format of weights becomes, and what reading any of them takes."""

import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.models.spec import LlamaConfig, VisionConfig
from compile.formats.quantize import Groups
from sf_local.errors import SourceError, UnsupportedError

Rows = slice | NDArray[np.integer[Any]]
Progress = Callable[[str], None]
Where = Path | str  # a file, or a part of one
Supported = dict[str, tuple[list[Any], str]]  # what a key may have (None: be absent), and in words


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


@dataclass(frozen=True)
class Numbers:
    """The numbers of a config, all positive; a key that is absent or null means the default."""

    path: Where
    values: Mapping[str, Any]

    def number(self, key: str, default: float | None = None) -> float:
        value: Any = default if self.values.get(key) is None else self.values[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < 1e18:  # so neither inf nor nan
            raise corrupt(self.path, f"a positive number for {key}", value)
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise corrupt(self.path, f"a whole number for {key}", value)
        return int(value)

    def heads(self, hidden: int, heads: str, kv_heads: str, size: str) -> dict[str, int]:
        """num_heads, num_kv_heads and head_dim, by their keys."""
        num = self.integer(heads)
        num_kv = self.integer(kv_heads, num)
        dim = self.number(size, hidden / num)
        if num % num_kv or dim % 2:
            found = f"attention of {num} heads of size {dim:g} over {num_kv} key/value heads"
            supported = "a multiple of the key/value heads, of an even size"
            raise unsupported(self.path, found, supported)
        return {"num_heads": num, "num_kv_heads": num_kv, "head_dim": int(dim)}


def corrupt(path: Where, expected: str, found: object) -> SourceError:
    remedy = "the file is damaged or incomplete: download it again"
    return SourceError(f"{path}: expected {expected}, found {found}; {remedy}")


def unsupported(path: Where, found: str, supported: str) -> UnsupportedError:
    return UnsupportedError(f"{path}: {found} is not supported; supported: {supported}")


def check_supported(path: Where, values: Mapping[str, Any], supported: Supported) -> None:
    for key, (allowed, text) in supported.items():
        if values.get(key) not in allowed:
            raise unsupported(path, f"{key} {values.get(key)!r}", text)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise corrupt(path, "JSON", error) from error
    if not isinstance(value, dict):
        raise corrupt(path, "a JSON object", type(value).__name__)
    return value


def map_file(path: Path) -> mmap.mmap:
    """The file in memory, read as it is touched."""
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise corrupt(path, "a model file", "an empty file") from None
