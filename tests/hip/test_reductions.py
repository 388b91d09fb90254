"""Reductions of the code for GPUs: which there are, and what iree-compile starts them from.

Read in the MLIR that we emit and in the LLVM IR that becomes machine code: the CPU twins of kernels
are other code, and cannot show what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compile.gpu.emitter import LlamaEmitter
from compile.mlir.builder import Tensor
from compile.models.spec import VisionConfig
from compile.options import ModelOptions
from compile.target import resolve_target
from compile.toolchain import iree_compile
from tests.support.tiny import TINY
from tests.support.vision_reference import IDEFICS3, LLAVA

ROWS = 4
LOWEST = np.finfo(np.float32).min


def emitter(
    dtype: str, vision: VisionConfig | None = None, **batches: tuple[int, ...]
) -> LlamaEmitter:
    sizes = {"prefill_batch_sizes": (1, 4), "decode_batch_sizes": (1, 8)} | batches
    images = (1, 2) if vision else ()
    return LlamaEmitter(
        TINY,
        ModelOptions(dtype, dtype, 8, max_seq_len=64, image_batch_sizes=images, **sizes),
        resolve_target("gfx1100"),
        vision,
    )


def reductions(text: str) -> list[tuple[str, str]]:
    """Headers and bodies of the `linalg.generic` reductions of a module."""
    found = re.findall(r"(linalg\.generic .*) \{\n((?:.*\n)*?) *linalg\.yield", text)
    return [(header, body) for header, body in found if '"reduction"' in header]


def combiners(text: str) -> set[str]:
    """The operations with which reductions use what they have so far."""
    found = set()
    for _, body in reductions(text):
        [arguments] = re.findall(r"\^bb0\((.*)\)", body)
        so_far = re.findall(r"(%\w+):", arguments)[-1]
        found |= set(re.findall(rf"= (\S+) .*{so_far}\b", body))
    return found


def numbered(text: str) -> list[str]:
    """Headers of reductions that use the numbers of the elements that they reduce."""
    found = []
    for header, body in reductions(text):
        [kinds] = re.findall(r"iterator_types = \[(.*?)\]", header)
        used = {int(d) for d in re.findall(r"linalg\.index (\d+)", body)}
        if any("reduction" in kinds.split(", ")[dimension] for dimension in used):
            found.append(header)
    return found


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("vision", [None, IDEFICS3, LLAVA], ids=["text", "idefics3", "llava"])
def test_no_signed_or_bitwise_reduction_is_emitted(dtype: str, vision: VisionConfig | None) -> None:
    """iree-compile starts i32 minsi, maxsi and andi from wrong numbers on AMD GPUs."""
    text = emitter(dtype, vision).emit()
    assert combiners(text) == {"arith.addf"}
    assert "linalg.reduce" not in text
    assert set(re.findall(r"vector\.reduction <(\w+)>.* into (\w+)", text)) <= {("add", "f32")}


@pytest.mark.parametrize("vision", [None, IDEFICS3, LLAVA], ids=["text", "idefics3", "llava"])
def test_no_reduction_numbers_its_elements(vision: VisionConfig | None) -> None:
    """Of more than 128 elements, iree-compile numbers those behind the first 128 from 0 on, where a
    subgroup has 32 lanes: the best token was too small by 128 on gfx11 and gfx12."""
    assert not numbered(emitter("f16", vision).emit())


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_masks_are_finite(dtype: str) -> None:
    """Scores that are hidden by -inf could be all of a row, whose softmax would be NaN."""
    for vision in IDEFICS3, LLAVA:
        constants = re.findall(
            r"arith\.constant (\S+e[+-]\d+) : (\w+)", emitter(dtype, vision).emit()
        )
        assert (f"{-1e4:.9e}", dtype) in constants
        for value, kind in constants:
            largest = {"f16": 65504, "bf16": 3e38, "f32": 3e38}[kind]
            assert abs(float(value)) <= largest, (value, kind)


@pytest.fixture(params=["gfx942", "gfx1100"])
def optimized(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """The LLVM IR of all kernels of a module for a chip."""

    def compiled(module: str) -> str:
        (tmp_path / "m.mlir").write_text(module)
        dump = f"--iree-hal-dump-executable-intermediates-to={tmp_path}"
        iree_compile(tmp_path / "m.mlir", tmp_path / "m.vmfb", resolve_target(request.param), dump)
        return "".join(path.read_text() for path in tmp_path.glob("*.optimized.ll"))

    return compiled


def constants(text: str, function: str) -> set[str]:
    """Constant arguments of calls of an LLVM intrinsic, which reductions begin with."""
    return set(re.findall(rf"@llvm\.{function}\([^)]*, \w+ ([^%)\s]+)\)", text))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_softmax_starts_from_a_finite_number(optimized: Callable[[str], str], dtype: str) -> None:
    """In f32, whatever the weights are in. From -inf, a row of masked scores would be
    exp(-inf + inf), which is NaN."""
    e = emitter(dtype)
    b, (heads, groups, dim) = e.b, (TINY.num_kv_heads, 3, TINY.head_dim)
    q = Tensor("%q", (ROWS, 1, heads, groups, dim), dtype)
    k, v = (Tensor(f"%{name}", (ROWS, 64, heads, dim), dtype) for name in "kv")
    mask = Tensor("%m", (ROWS, 1, 64), dtype)
    arguments = ", ".join(f"{x.name}: {x.type}" for x in (q, k, v, mask))
    with b.block(f"util.func public @f({arguments}) -> {q.type} {{"):
        spec = "nshgd,nchd,nchv,nsc->nshgv"
        out = b.attention("nhgsdcv", spec, q, k, v, 1.0, mask, dtype)
        b.emit(f"util.return {out.name} : {q.type}")
    text = optimized(b.text("module"))
    assert not re.search(r"@llvm\.max(num|imum)\.(v\w+)?b?f16", text)
    starts = {hexadecimal(c) for c in constants(text, "max(?:num|imum).f32")}
    assert LOWEST in starts


def hexadecimal(constant: str) -> float:
    """LLVM writes f32 numbers as the bits of an f64, or as decimals."""
    if constant.startswith("0x"):
        return float(np.array(int(constant, 16), np.uint64).view(np.float64))
    return float(constant)
