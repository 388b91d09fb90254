"""The demo model in the formats that the peers read, made once and kept in the cache folder.

`models.py` prints the Hugging Face folder.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from compile.models.llama import NAMES
from compile.sources.demo import demo_gguf
from compile.sources.open import open_source
from sf_local.artifact.cache import cache_dir

QUANTIZATIONS = {"F16": gguf.GGMLQuantizationType.F16, "Q8_0": gguf.GGMLQuantizationType.Q8_0}


def demo_as_gguf(kind: str) -> Path:
    """The demo's matrices as Q4_1 (as they come), Q8_0 or F16; all of them, the embedding too."""
    if kind == "Q4_1":
        return demo_gguf()
    return kept(f"SmolLM2-135M-Instruct.{kind}.gguf", lambda path: _requantize(path, kind))


def demo_as_folder() -> Path:
    """A Hugging Face folder, in bf16."""
    return kept("SmolLM2-135M-Instruct-hf", _write_folder)


def kept(name: str, write: Callable[[Path], None]) -> Path:
    """The file or folder of that name; written in full, or not there."""
    path = cache_dir() / "models" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".make-") as folder:
            write(Path(folder) / name)
            os.replace(Path(folder) / name, path)
    return path


def _requantize(path: Path, kind: str) -> None:
    reader = gguf.GGUFReader(demo_gguf())
    writer = gguf.GGUFWriter(path, arch="llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in (
            "general.architecture", "general.file_type", "general.quantization_version",
        ):  # fmt: skip
            types = field.types
            inner = types[-1] if types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:  # norms stay f32
            writer.add_tensor(tensor.name, values)
        else:
            data = gguf.quants.quantize(values, QUANTIZATIONS[kind])
            writer.add_tensor(tensor.name, data, raw_dtype=QUANTIZATIONS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_folder(folder: Path) -> None:
    source = open_source("demo")
    config = source.config
    assert config.tied_embeddings and config.rope_scaling is None
    folder.mkdir()
    tensors = {
        hf_name(name): np.asarray(tensor.read(slice(None)), ml_dtypes.bfloat16)
        for name, tensor in source.tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta, "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    source.write_tokenizer(folder)


def hf_name(name: str) -> str:
    *layer, part, suffix = name.split(".")
    names = {ours: theirs for theirs, ours in NAMES.items()}
    if layer:
        return f"model.layers.{layer[1]}.{names[f'blk.{{}}.{part}']}.{suffix}"
    return f"{names[part]}.{suffix}"


if __name__ == "__main__":
    print(demo_as_folder())
