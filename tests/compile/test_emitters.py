"""Which types a model gets by default: those of its source, where the target computes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from compile.emitters import find_emitter
from compile.options import BuildOptions
from compile.sources.open import open_source
from compile.target import Target, resolve_target
from sf_local.errors import UnsupportedError
from tests.support.toy_sources import hf_weights, write_folder, write_gguf, write_wide_gguf

NO_BF16, AMX = "x86-64-v4", ("avx512f", "avx512_bf16", "f16c")
CASES = [
    ("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4"), ("Q5_0", "int8"), ("Q5_1", "int8"),
    ("F32", "f16"), ("F16", "f16"), ("BF16", "f16"),
]  # fmt: skip


def defaults(source: Path, options: BuildOptions) -> tuple[str, str]:
    target = resolve_target(options.target, options.cpu)
    model = find_emitter(open_source(source), options, target).options
    return model.weight_dtype, model.kv_dtype


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_the_default_follows_the_source(tmp_path: Path, kind: str, dtype: str) -> None:
    source = write_wide_gguf(tmp_path / "toy.gguf", gguf.GGMLQuantizationType[kind])
    assert defaults(source, BuildOptions(cpu=NO_BF16)) == (dtype, "f16")
    assert defaults(source, BuildOptions("gfx942")) == ("f16", "f16")
    assert defaults(source, BuildOptions(cpu=NO_BF16, row_major=True)) == ("f16", "f16")
    assert defaults(source, BuildOptions(cpu=NO_BF16, weight_dtype="f32")) == ("f32", "f32")
    narrow_heads = write_gguf(tmp_path / "narrow.gguf", gguf.GGMLQuantizationType[kind])
    assert defaults(narrow_heads, BuildOptions(cpu=NO_BF16)) == ("f16", "f16")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_become_what_the_cpu_multiplies(tmp_path: Path, dtype: type) -> None:
    source = open_source(write_folder(tmp_path / "toy", hf_weights(dtype)))
    for features, expected in ((AMX, "bf16"), (("f16c",), "f16"), ((), "f32")):
        target = replace(resolve_target("cpu"), cpu_features=features)
        assert find_emitter(source, BuildOptions(), target).options.weight_dtype == expected


def test_what_quantized_weights_are_multiplied_with(tmp_path: Path) -> None:
    source = open_source(write_wide_gguf(tmp_path / "toy.gguf", gguf.GGMLQuantizationType.Q4_0))
    with_dots = "avx512f", "avx512_vnni"
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
