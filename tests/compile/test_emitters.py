"""Which types a model gets by default: those of its source, where the target computes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from compile.emitters import find_emitter
from compile.models.spec import LlamaConfig
from compile.models.tensors import model_tensors, source_shapes
from compile.options import BuildOptions
from compile.sources.open import open_source
from compile.sources.source import Source, SourceTensor
from compile.target import Target, resolve_target
from sf_local.errors import UnsupportedError
from tests.support.toy_sources import hf_weights, write_folder, write_gguf, write_wide_gguf

NO_BF16, AMX = "x86-64-v4", ("avx512f", "avx512bw", "avx512dq", "avx512_bf16", "f16c")
CASES = [
    ("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4"), ("Q5_0", "q5_0"), ("Q5_1", "q5_1"),
    ("F32", "f16"), ("F16", "f16"), ("BF16", "f16"),
]  # fmt: skip


# Shape of Llama 3.2 1B
LLAMA = LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 500000.0, 131072, tied_embeddings=True)


def defaults(source: Path, options: BuildOptions) -> tuple[str, str]:
    target = resolve_target(options.target, options.cpu)
    model = find_emitter(open_source(source), options, target).options
    return model.weight_dtype, model.kv_dtype


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_the_default_follows_the_source(tmp_path: Path, kind: str, dtype: str) -> None:
    source = write_wide_gguf(tmp_path / "toy.gguf", gguf.GGMLQuantizationType[kind])
    assert defaults(source, BuildOptions(cpu=NO_BF16)) == (dtype, "f16")
    assert defaults(source, BuildOptions("gfx942")) == (dtype, "f16")
    assert defaults(source, BuildOptions(cpu=NO_BF16, row_major=True)) == (dtype, "f16")
    assert defaults(source, BuildOptions(cpu=NO_BF16, weight_dtype="f32")) == ("f32", "f32")
    narrow_heads = write_gguf(tmp_path / "narrow.gguf", gguf.GGMLQuantizationType[kind])
    assert defaults(narrow_heads, BuildOptions(cpu=NO_BF16)) == ("f16", "f16")
    assert defaults(narrow_heads, BuildOptions("gfx1100")) == (dtype, "f16")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_become_what_the_cpu_multiplies(tmp_path: Path, dtype: type) -> None:
    source = open_source(write_folder(tmp_path / "toy", hf_weights(dtype)))
    for features, expected in ((AMX, "bf16"), (("f16c",), "f16"), ((), "f32")):
        target = replace(resolve_target("cpu"), cpu_features=features)
        assert find_emitter(source, BuildOptions(), target).options.weight_dtype == expected


def test_what_quantized_weights_are_multiplied_with(tmp_path: Path) -> None:
    source = open_source(write_wide_gguf(tmp_path / "toy.gguf", gguf.GGMLQuantizationType.Q4_0))
    with_dots = "avx512f", "avx512bw", "avx512dq", "avx512_vnni"
    with_tiles = *with_dots, "avx512_bf16", "amx_tile", "amx_bf16"
    plain, dots, tiles = (
        replace(resolve_target("cpu"), cpu_features=features)
        for features in ((), with_dots, with_tiles)
    )

    def resolved(given: str | None, target: Target, weights: str | None = None) -> str | None:
        options = BuildOptions(activation_dtype=given, weight_dtype=weights)
        return find_emitter(source, options, target).options.activation_dtype

    assert [resolved(None, cpu) for cpu in (plain, dots, tiles)] == ["int16", "int16", "bf16"]
    assert [resolved("int8", cpu) for cpu in (plain, dots, tiles)] == ["int8"] * 3
    assert resolved("int16", tiles) == "int16"
    with pytest.raises(UnsupportedError, match=r"activation_dtype='bf16'.*AMX.*int16 or int8"):
        resolved("bf16", dots)
    for target, weights in ((plain, "f32"), (resolve_target("gfx942"), None)):
        assert resolved(None, target, weights) is None
        with pytest.raises(UnsupportedError, match=r"activation_dtype='int8'.*CPUs.*leave it out"):
            resolved("int8", target, weights)


def test_most_weights_of_the_layers_decide(tmp_path: Path) -> None:
    """Not the embedding, which files keep in more bits, nor the number of tensors."""
    source = open_source(write_wide_gguf(tmp_path / "toy.gguf", gguf.GGMLQuantizationType.Q4_0))
    types = {"token_embd": "Q8_0", "blk.0.attn_k": "Q6_K", "blk.1.attn_v": "Q6_K"}
    tensors = {
        name: replace(tensor, dtype=types.get(name.removesuffix(".weight"), tensor.dtype))
        for name, tensor in source.tensors.items()
    }
    assert replace(source, tensors=tensors).weight_dtype == "Q4_0"
    large = [name for name in tensors if "attn_q" in name or "ffn" in name]
    tensors |= {name: replace(tensors[name], dtype="Q8_0") for name in large}
    assert replace(source, tensors=tensors).weight_dtype == "Q8_0"


def unread(*args: Any) -> Any:
    raise AssertionError("only types and shapes are asked for")


def source_of(config: LlamaConfig, kind_of: Callable[[str], str]) -> Source:
    """A source whose matrices are of these types, by canonical name."""
    tensors = {
        name: SourceTensor(shape, kind_of(name) if len(shape) == 2 else "F32", unread)
        for name, shape in source_shapes(model_tensors(config, None)).items()
    }
    return Source("toy.gguf", config, tensors, "", b"", {}, None, ())


def q4_k_m(name: str, num_layers: int) -> str:
    """The type by which llama.cpp's Q4_K_M has a matrix of a model of whole super-blocks."""
    if name in ("token_embd.weight", "output.weight"):
        return "Q6_K"
    _, layer, part, _ = name.split(".")
    i, eighth = int(layer), num_layers // 8
    gets_more = i < eighth or i >= 7 * num_layers // 8 or (i - eighth) % 3 == 2
    return "Q6_K" if part in ("attn_v", "ffn_down") and gets_more else "Q4_K"


def dtypes(source: Source, target: str = "cpu", **options: Any) -> dict[str, str]:
    """What each matrix becomes, by canonical name."""
    resolved = resolve_target(target, NO_BF16)
    model = find_emitter(source, BuildOptions(cpu=NO_BF16, **options), resolved).options
    return {n: model.dtype_of(n) for n, t in source.tensors.items() if len(t.shape) == 2}


@pytest.mark.parametrize("target", ["cpu", "gfx1100"])
def test_each_tensor_keeps_its_type(target: str) -> None:
    source = source_of(LLAMA, lambda name: q4_k_m(name, LLAMA.num_layers))
    found = dtypes(source, target)
    assert found == {name: source.tensors[name].dtype.lower() for name in found}
    assert {"q4_k", "q6_k"} == set(found.values())
    assert source.weight_dtype == "Q4_K"


@pytest.mark.parametrize("target", ["cpu", "gfx1100"])
def test_a_q4_k_m_file_grows_by_at_most_a_twentieth(target: str) -> None:
    source = source_of(LLAMA, lambda name: q4_k_m(name, LLAMA.num_layers))
    bits = {"Q4_K": 4.5, "Q6_K": 6.5625, "F32": 32}
    of_file = sum(math.prod(t.shape) * bits[t.dtype] / 8 for t in source.tensors.values())
    options = BuildOptions(cpu=NO_BF16, max_seq_len=8192)
    emitter = find_emitter(source, options, resolve_target(target, NO_BF16))
    assert sum(p.num_bytes for p in emitter.parameters.values()) <= 1.05 * of_file


@pytest.mark.parametrize("dtype", ["int8", "int4", "f16"])
def test_an_option_makes_all_one_type(dtype: str) -> None:
    """But for the embedding, which is also the head, that has at least 8 bits."""
    found = dtypes(source_of(LLAMA, lambda name: q4_k_m(name, 16)), weight_dtype=dtype)
    assert found.pop("token_embd.weight") == ("int8" if dtype == "int4" else dtype)
    assert set(found.values()) == {dtype}


@pytest.mark.parametrize(
    ("kind", "embedding", "becomes"),
    [
        ("Q4_0", "Q4_0", "int8"), ("Q4_0", "Q6_K", "q6_k"), ("Q4_1", "Q8_0", "int8"),
        ("Q4_K", "F16", "int8"), ("Q4_K", "Q4_K", "q4_k"), ("Q8_0", "Q5_1", "q5_1"),
        ("Q2_K", "Q6_K", "q6_k"), ("Q6_K", "Q2_K", "int8"), ("BF16", "Q6_K", "f16"),
    ],
)  # fmt: skip
def test_embeddings(kind: str, embedding: str, becomes: str) -> None:
    source = source_of(LLAMA, lambda name: embedding if name == "token_embd.weight" else kind)
    assert dtypes(source)["token_embd.weight"] == becomes


def test_gates_and_ups_are_of_one_type() -> None:
    """Blocks hold both, so those that differ become int8."""
    found = dtypes(source_of(LLAMA, lambda name: "Q6_K" if "0.ffn_up" in name else "Q4_K"))
    others = {name for name, dtype in found.items() if dtype != "q4_k"}
    assert others == {f"blk.{i}.ffn_{part}.weight" for i in (0, 10) for part in ("gate", "up")}
    assert {found[name] for name in others} == {"int8"}
