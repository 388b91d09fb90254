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

FLOATS = {"bf16": ("bfloat16", ml_dtypes.bfloat16), "f32": ("float32", np.float32)}
QUANTIZATIONS = {"F16": gguf.GGMLQuantizationType.F16, "Q8_0": gguf.GGMLQuantizationType.Q8_0}


def demo_as_gguf(kind: str) -> Path:
    """The demo's matrices as Q4_1 (as they come), Q8_0 or F16; all of them, the embedding too."""
    if kind == "Q4_1":
        return demo_gguf()
    return kept(f"SmolLM2-135M-Instruct.{kind}.gguf", lambda path: _requantize(path, kind))


def demo_as_folder(dtype: str = "bf16") -> Path:
    """A Hugging Face folder, in bf16, or in f32 as the demo's 4-bit blocks say exactly."""
    name = {"bf16": "SmolLM2-135M-Instruct-hf", "f32": "SmolLM2-135M-Instruct-hf-f32"}[dtype]
    return kept(name, lambda folder: _write_folder(folder, "demo", dtype))


def as_folder(model: Path) -> Path:
    """A .gguf file of a Llama as a Hugging Face folder in bf16."""
    return kept(f"{model.stem}-hf", lambda folder: _write_folder(folder, str(model), "bf16"))


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


def _write_folder(folder: Path, model: str, dtype: str) -> None:
    source, (torch_name, numpy_type) = open_source(model), FLOATS[dtype]
    config = source.config
    assert config.rope_scaling is None
    folder.mkdir()
    tensors = {
        hf_name(name): np.asarray(tensor.read(slice(None)), numpy_type)
        for name, tensor in source.tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": torch_name,
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta, "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tied_embeddings, "bos_token_id": source.bos_token_id,
        "eos_token_id": source.eos_token_ids[0],
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
