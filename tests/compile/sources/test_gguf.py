"""GGUF files, whole and damaged, with toy weights."""

import contextlib
import hashlib
import json
import mmap
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from compile.models.spec import RopeScaling
from compile.sources.gguf import source_tensor
from compile.sources.open import open_source
from compile.weights import check_tensors
from sf_local.errors import SourceError, UnsupportedError
from tests.support.toy_sources import (
    CONFIG,
    HIDDEN,
    VOCAB,
    canonical_name,
    hf_weights,
    refused,
    whole,
    write_gguf,
)


def test_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    source = open_source(path)
    assert source.name == "toy.gguf"
    assert source.config == replace(CONFIG, rms_eps=float(np.float32(1e-5)))
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source.bos_token_id, source.eos_token_ids) == (0, (1,))
    for name, weight in hf_weights().items():  # q and k in Hugging Face's order again
        np.testing.assert_array_equal(whole(source, canonical_name(name)), weight)


def test_tokenizer_is_written(tmp_path: Path) -> None:
    open_source(write_gguf(tmp_path / "toy.gguf")).write_tokenizer(tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ab").tokens == ["ab"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<eos>"


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_types(tmp_path: Path, quant: str) -> None:
    kind = gguf.GGMLQuantizationType[quant]
    source = open_source(write_gguf(tmp_path / "toy.gguf", kind))
    for name, weight in hf_weights().items():
        found = whole(source, canonical_name(name))
        assert found.dtype == np.float32 and found.shape == weight.shape
        if weight.ndim == 2:  # quantization is by row, so it commutes with the permutation
            weight = gguf.dequantize(gguf.quantize(weight, kind), kind)
        np.testing.assert_array_equal(found, weight)


def dequantizable() -> list[gguf.GGMLQuantizationType]:
    kinds = []
    for kind, (_, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        with contextlib.suppress(NotImplementedError):
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            kinds.append(kind)
    return kinds


@pytest.mark.parametrize("kind", dequantizable(), ids=lambda kind: kind.name)
def test_every_type_that_gguf_dequantizes(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Six rows of two blocks of random bytes, read in parts."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 255, (6, 2 * block_bytes), np.uint8)
    (tmp_path / "raw").write_bytes(b"head" + raw.tobytes())
    with (tmp_path / "raw").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensor = source_tensor(tmp_path, mapped, "any", (6, 2 * block), int(kind), 4)
    found = np.concatenate([tensor.read(slice(0, 4)), tensor.read(np.array([4, 5]))])
    np.testing.assert_array_equal(found, gguf.dequantize(raw, kind))


def test_rope(tmp_path: Path) -> None:
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


def test_untied_and_key_length(tmp_path: Path) -> None:
    head = {"output.weight": np.ones((VOCAB, HIDDEN), np.float32)}
    source = open_source(write_gguf(tmp_path / "toy.gguf", extra_tensors=head))
    assert not source.config.tied_embeddings and (whole(source, "output.weight") == 1).all()
    path = write_gguf(tmp_path / "toy.gguf", llama__attention__key_length=16)
    refused(path, SourceError, "blk.0.attn_q.weight has shape (32, 32)", "(64, 32)")


def test_end_of_turn(tmp_path: Path) -> None:
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
        ({"llama__attention__head_count_kv": 3}, ["4 heads of size 8 over 3"]),
        ({"llama__attention__head_count": 5}, ["5 heads of size 6.4"]),
        ({"split__count": 2}, ["split into 2", "--merge"]),
        ({"tokenizer__ggml__pre": "qwen2"}, ["toy.gguf", "'qwen2'"]),
        ({"extra_tensors": {"blk.0.attn_q.bias": np.ones(4, np.float32)}}, ["blk.0.attn_q.bias"]),
        ({"extra_tensors": {"odd": np.ones(4, np.float64)}}, ["tensor odd", "F64"]),
    ],
)
def test_refusals_by_name(tmp_path: Path, extra: dict[str, Any], words: list[str]) -> None:
    path = write_gguf(tmp_path / "toy.gguf", **extra)
    refused(path, UnsupportedError, "toy.gguf", *words)


def write_other(path: Path, arch: str, endian: Any = gguf.GGUFEndian.LITTLE, **fields: str) -> Path:
    """A GGUF of one tensor that is no model's."""
    made = gguf.GGUFWriter(path, arch, endianess=endian)
    for key, value in fields.items():
        made.add_string(key.replace("__", "."), value)
    made.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((4, HIDDEN), np.float32))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return path


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"arch": "llama", "general__type": "adapter"}, ["LoRA adapter", "llama-export-lora -m"]),
        ({"arch": "clip", "general__type": "mmproj"}, ["vision part", "the model's own .gguf"]),
        ({"arch": "clip"}, ["vision part", "the model's own .gguf"]),
        ({"arch": "", "general__type": "imatrix"}, ["importance matrix"]),
        ({"arch": "controlvector"}, ["control vector", "the model's own .gguf"]),
        ({"arch": "llama", "endian": gguf.GGUFEndian.BIG}, ["a big-endian GGUF",
                                                            "other.gguf little"]),
    ],
)  # fmt: skip
def test_files_that_are_no_models(tmp_path: Path, fields: dict[str, Any], words: list[str]) -> None:
    path = write_other(tmp_path / "other.gguf", **fields)
    refused(path, UnsupportedError, "other.gguf", "is not supported", *words)


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    """As convert_hf_to_gguf.py --vocab-only writes it."""
    data = bytearray(write_gguf(tmp_path / "vocab.gguf").read_bytes())
    data[8:16] = bytes(8)  # the number of tensors
    (tmp_path / "vocab.gguf").write_bytes(data)
    refused(tmp_path / "vocab.gguf", UnsupportedError, "vocabulary without weights")


@pytest.mark.parametrize("number", [1, 2])
def test_a_part_of_a_split(tmp_path: Path, number: int) -> None:
    """Written by gguf; the parts after the first say nothing of the model."""
    writer = gguf.GGUFWriter(tmp_path / "a b.gguf", "llama", split_max_tensors=1)
    for name in ("one", "two"):
        writer.add_tensor(name, np.ones((4, HIDDEN), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part = tmp_path / f"a b-0000{number}-of-00002.gguf"
    first = tmp_path / "a b-00001-of-00002.gguf"
    command = f"llama-gguf-split --merge '{first}' WHOLE.gguf"
    refused(part, UnsupportedError, part.name, "split into 2", command)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"GGUF" + struct.pack("<I", 1), "GGUF version 1"),
        (b"GGUF" + struct.pack("<I", 4), "GGUF version 4"),
        (struct.pack("<II", 0x67676A74, 3), "the format before GGUF"),  # "ggjt"
    ],
)
def test_other_versions(tmp_path: Path, start: bytes, words: str) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    path.write_bytes(start + path.read_bytes()[8:])
    refused(path, UnsupportedError, "toy.gguf", words, "convert_hf_to_gguf.py")


def test_type_unknown_to_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    data[at : at + 4] = struct.pack("<I", 999)
    path.write_bytes(data)
    refused(path, UnsupportedError, "output_norm.weight (999")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"llama__block_count": None}, "block_count"),
        ({"llama__context_length": "long"}, "context_length"),
        ({"llama__context_length": 2**31}, "at most 16777216 for context_length"),
        ({"llama__block_count": 2**31}, "at most 4096 for block_count"),
        ({"tokenizer__ggml__model": None}, "tokenizer.ggml.model"),
        ({"tokenizer__ggml__token_type": [1]}, "token_type"),
    ],
)
def test_metadata_missing(tmp_path: Path, extra: dict[str, Any], words: str) -> None:
    refused(write_gguf(tmp_path / "toy.gguf", **extra), SourceError, "toy.gguf", words)


def test_cut_anywhere(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    good = path.read_bytes()
    for size in [*range(200), *range(200, len(good) - 32, 1013), len(good) - 64]:
        path.write_bytes(good[:size])
        refused(path, SourceError, "toy.gguf", "download it again")


def test_garbage(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    good = path.read_bytes()
    huge = struct.pack("<Q", 2**63)
    for data in [
        b"\0" * 64,
        b"GGUF" + b"\xff" * 64,
        b"version https",
        good[:8] + huge + good[16:],  # tensors
        good[:16] + huge + good[24:],  # metadata keys
        good[:24] + huge + good[32:],  # length of the first key
    ]:
        path.write_bytes(data)
        refused(path, SourceError, "toy.gguf", "GGUF file")


def test_flipped_bytes_never_escape(tmp_path: Path) -> None:
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
            check_tensors(source)
        except (SourceError, UnsupportedError):
            continue
        for name in source.tensors:
            whole(source, name)


@pytest.mark.model
def test_smollm2_tokenizes_like_llama_cpp(tmp_path: Path) -> None:
    data = Path(__file__).parents[4] / "shared/data/smollm2_greedy.json"
    if not data.exists():
        pytest.skip(f"no reference ids: {data} is missing")
    source = open_source("demo")
    source.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for case in json.loads(data.read_text())["cases"]:
        assert tokenizer.encode(case["prompt"], add_special_tokens=True).ids == case["prompt_ids"]
