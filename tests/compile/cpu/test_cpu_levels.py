"""What CPUs of each level get: the instructions of their products, and integers that are equal.

For CPUs other than this one the assembly is read; qemu runs what has no AVX-512.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from compile import BuildOptions, build
from compile.emitters import find_emitter
from compile.formats.blocks import BLOCK_TYPES
from compile.sources.open import open_source
from compile.target import resolve_target
from compile.toolchain import iree_compile
from sf_local.artifact.open import host_cpu_features
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from tests.support.cpu_product import Products
from tests.support.reference import forward
from tests.support.running import open_runner
from tests.support.tiny import CI, ONE_SIZE, QUANTIZABLE, TINY_OPTIONS, TinyModel

EMULATED = {"generic": "Nehalem", "x86-64-v3": "Haswell"}  # CPUs of these levels, with no more
LEVELS = (*EMULATED, "x86-64-v3+avx_vnni", "x86-64-v4", "x86-64-v4+avx512_vnni")
VNNI, BF16 = "x86-64-v4+avx512_vnni", "x86-64-v4+avx512_vnni+avx512_bf16"
SLOW_DOT = f"{BF16}+avx512_fp16"
AMX = f"{BF16}+amx_tile+amx_bf16"
# By level: what multiplies floats and what integers, and what no such CPU has
INSTRUCTIONS = {
    "generic": (r"\tmulps.*%xmm", r"\tpmaddwd.*%xmm", r"%[yz]mm|\tv[a-z0-9]+\t"),
    "x86-64-v3": (r"\tvfmadd.*%ymm", r"\tvpmaddwd.*%ymm", r"%zmm|%k\d|\tvpdp"),
    "x86-64-v3+avx_vnni": (
        r"\tvfmadd.*%ymm", r"\{vex\}\s+vpdpbusd.*%ymm", r"%zmm|%k\d|vpmaddwd"
    ),
    "x86-64-v4": (r"\tvfmadd.*%zmm", r"\tvpmaddwd.*%zmm", r"\tvpdp|\tvdpbf16|\ttdp"),
    VNNI: (r"\tvfmadd.*%zmm", r"\tvpdpbusd.*%zmm", r"vpmaddwd|\tvdpbf16|\ttdp"),
    BF16: (r"\tvdpbf16ps.*%zmm", r"\tvpdpbusd.*%zmm", r"vpmaddwd|\ttdp"),
    AMX: (r"\ttdpbf16ps", r"\ttdpbf16ps", "vpmaddwd"),  # in prefill; decode is as without AMX
}  # fmt: skip


def emulator(level: str) -> list[str]:
    """A command that runs a program on a CPU of this level."""
    if not shutil.which("qemu-x86_64"):
        assert not CI, "qemu-x86_64 is missing: apt-get install qemu-user"
        pytest.skip("qemu-x86_64 is missing: apt-get install qemu-user")
    return ["qemu-x86_64", "-cpu", EMULATED[level]]


def assert_close(products: Products, found: Mapping[str, np.ndarray]) -> None:
    """But for sums of f32."""
    for dtype, product in found.items():
        expected = products.expected(dtype)
        assert np.isnan(expected).sum() == expected.shape[1]  # a row
        for row, right in zip(product, expected, strict=True):
            np.testing.assert_allclose(row, right, rtol=0, atol=2e-6 * np.abs(right).max())


def test_products_on_a_cpu_with_avx2(tmp_path: Path) -> None:
    products = Products(["int8", "int4"], "int16")
    found = products.run(resolve_target("cpu", "x86-64-v3"), tmp_path, *emulator("x86-64-v3"))
    assert_close(products, found)


def test_prefill_in_f32_where_dot_products_are_slow(
    make_tiny: Callable[..., TinyModel], tmp_path: Path
) -> None:
    """All but the head, where activations become bf16, which costs less than in all products."""
    if missing := set(resolve_target("cpu", SLOW_DOT).cpu_features) - host_cpu_features():
        pytest.skip(f"this CPU lacks {missing}")
    tiny = make_tiny(has_code=False)
    options = replace(TINY_OPTIONS, weight_dtype="bf16", cpu=SLOW_DOT, **ONE_SIZE)
    artifact = build(tiny.source, tmp_path / "artifact", options)
    rounded = {name: w if w.ndim == 1 else w.astype(ml_dtypes.bfloat16).astype(np.float32)
               for name, w in tiny.weights.items()}  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 300, 21).tolist()

    async def use(runner: ModelRunner) -> tuple[np.ndarray, np.ndarray]:
        every = (await runner.prefill_all([Row(tokens, 0, [1, 2, 3])]))[0]
        return every, (await runner.decode([Row(tokens[-1:], 20, [1, 2, 3])])).logits[0]

    with open_runner(artifact) as run:
        every, last = run(use)
    expected = forward(tiny.config, rounded, tokens)
    np.testing.assert_allclose(every, expected, rtol=0, atol=0.005 * np.abs(expected).max())
    np.testing.assert_allclose(last, expected[-1], rtol=0, atol=0.05 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["int16", "int8"])
def test_products_are_equal_on_all_cpus(tmp_path: Path, activations: str) -> None:
    """To the bit, as the sums of a group are integers. Levels that this CPU has run on it, too."""
    products = Products(list(BLOCK_TYPES), activations)
    runs = []
    for level in LEVELS:
        target = resolve_target("cpu", level)
        if set(target.cpu_features) <= host_cpu_features():
            runs.append(products.run(target, tmp_path))
        if level in EMULATED:
            runs.append(products.run(target, tmp_path, *emulator(level)))
    assert_close(products, runs[0])
    for found in runs[1:]:
        for dtype in BLOCK_TYPES:
            np.testing.assert_array_equal(found[dtype], runs[0][dtype])


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("level", INSTRUCTIONS)
def test_instructions(
    make_tiny: Callable[..., TinyModel], tmp_path: Path, level: str, weights: str | None
) -> None:
    """Of a model whose matrices are whole AMX tiles; weights: None for the level's default."""
    tiny = make_tiny(has_code=False, **(QUANTIZABLE | {"hidden_size": 96, "intermediate_size": 96}))
    options = BuildOptions(weight_dtype=weights, cpu=level, page_size=8, **ONE_SIZE)
    target = resolve_target("cpu", level)
    mlir = tmp_path / "model.mlir"
    mlir.write_text(find_emitter(open_source(tiny.source), options, target).emit())
    dump = f"--iree-hal-dump-executable-intermediates-to={tmp_path}"
    iree_compile(mlir, tmp_path / "vmfb", target, dump)
    code = kernels("".join(path.read_text() for path in tmp_path.glob("*.s")))
    is_integer = weights is not None
    for name, text in code.items():
        without_tiles = BF16 if level == AMX and name == "decode_next" else level
        assert re.search(INSTRUCTIONS[without_tiles][is_integer], text)
        assert not re.search(INSTRUCTIONS[level][-1], text)
        assert level == AMX or "\tprefetcht1\t" in text  # of the next block


def kernels(assembly: str) -> dict[str, str]:
    """The text of each kernel, by its name."""
    parts = re.split(r"^\t\.type\t(\w+),@function$", assembly, flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: texts[name] for name in ("prefill", "prefill_next", "decode_next")}
