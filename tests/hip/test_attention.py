"""Attention of decode over pages: machine code beside plain loops, and both beside numpy; and the
sizes of what it allocates.

Slots of pages that no row reads hold NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compile.build import VMFB
from compile.gpu.attention import attend
from compile.gpu.kernel import Kernels
from compile.gpu.pages import Heads
from compile.mlir.builder import Builder, Tensor
from compile.target import Target
from tests.hip.driver import Driver, compile_code_object, compile_twins
from tests.hip.kernel_runs import Array, KernelRunner

LAYER, LAYERS = 1, 2
SPLIT = Heads(4, 2, 128, LAYERS, 16, 640, "f16")  # with two rows
ODD = Heads(9, 3, 48, LAYERS, 8, 64, "f32")  # no power of two
MANY = Heads(128, 64, 16, LAYERS, 8, 64, "f16")  # KV heads: with four rows no splits
WIDE = Heads(32, 2, 256, LAYERS, 16, 128, "f32")  # two workgroups share a KV head
DEFAULT = [(SPLIT, [600, 1]), (MANY, [1, 8, 9, 0])]
OTHERS = [(ODD, [17, 0, 63]), (WIDE, [33])]


@dataclass(frozen=True)
class Case:
    """Rows of one call. lengths: with the new token; 0 marks a row that pads the batch."""

    heads: Heads
    lengths: list[int]
    chip: str

    @property
    def num_pages(self) -> int:
        """Of a row"""
        return max(1, *(-(-length // self.heads.page_size) for length in self.lengths))

    def arguments(self) -> list[Array]:
        """As `attend` takes them, and the cache [pages, L, P, 2, KH, D]."""
        heads, n, rng = self.heads, len(self.lengths), np.random.default_rng(1)
        qkv = rng.normal(size=(n, heads.features)).astype(np.float32)
        angles = rng.uniform(0, 6, (heads.max_seq_len, heads.head_dim // 2))
        rope = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        ends = np.array(self.lengths)
        ids = 1 + rng.permutation(n * self.num_pages).reshape(n, self.num_pages)
        shape = (1 + n * self.num_pages, LAYERS, heads.page_size, 2, heads.num_kv_heads,
                 heads.head_dim)  # fmt: skip
        cache = np.full(shape, np.nan, {"f16": np.float16, "f32": np.float32}[heads.kv_dtype])
        for row, length in enumerate(self.lengths):
            for position in range(length - 1):
                page, slot = divmod(position, heads.page_size)
                cache[ids[row, page], LAYER, slot] = rng.normal(size=shape[3:])
        return [qkv, rope, np.maximum(ends - 1, 0), ends, ids, cache]

    def expected(self, given: list[Array]) -> tuple[NDArray[np.float64], Array]:
        """What rows attend to [n, H, D], and the cache."""
        qkv, rope, starts, ends, ids, cache = given
        heads, cache = self.heads, cache.copy()
        group = heads.num_heads // heads.num_kv_heads
        results = np.zeros((len(ends), heads.num_heads, heads.head_dim))
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            x = qkv[row].reshape(-1, heads.head_dim)
            x0, x1 = np.split(x, 2, axis=1)
            cos, sin = rope[start]
            rotated = np.concatenate([x0 * cos - x1 * sin, x1 * cos + x0 * sin], axis=1)
            queries = rotated[: heads.num_heads].astype(cache.dtype)
            keys = rotated[heads.num_heads : heads.num_heads + heads.num_kv_heads]
            new = np.stack([keys, x[heads.num_heads + heads.num_kv_heads :]]).astype(cache.dtype)
            if end > start:
                cache[ids[row, start // heads.page_size], LAYER, start % heads.page_size] = new
            old = cache[ids[row], LAYER].reshape(-1, *new.shape)[:start]
            context = np.concatenate([old, new[None]]).astype(np.float64)
            for head in range(heads.num_heads):
                k, v = context[:, 0, head // group], context[:, 1, head // group]
                scores = k @ queries[head].astype(np.float64) / np.sqrt(heads.head_dim)
                weights = np.exp(scores - scores.max())
                results[row, head] = weights @ v / weights.sum()
        return results, cache

    def text(self, target: Target) -> str:
        """A function `main` of all arguments: what rows attend to, and the cache."""
        heads, b = self.heads, Builder()
        kernels = Kernels(b, Target(self.chip), plain=target.device == "cpu")
        n = len(self.lengths)
        slots = (1 + n * self.num_pages) * LAYERS * heads.page_size
        given = [
            Tensor("%qkv", (n, heads.features), "f32"),
            Tensor("%rope", (heads.max_seq_len, 2, heads.head_dim // 2), "f32"),
            *(Tensor(f"%{name}", (n,), "i64") for name in ("starts", "ends")),
            Tensor("%ids", (n, "%num_pages"), "i64"),
            Tensor("%cache", (slots, heads.token), heads.kv_dtype),
        ]
        out = Tensor("", (n, heads.num_heads * heads.head_dim), heads.kv_dtype)
        arguments = ", ".join(f"{x.name}: {x.type}" for x in given)
        with b.block(f"func.func @main({arguments}) -> ({out.type}, {given[-1].type}) {{"):
            b.emit("%one = arith.constant 1 : index")
            b.emit(f"%num_pages = tensor.dim %ids, %one : {given[4].type}")
            *inputs, cache = given
            found, cache = attend(kernels, heads, out.dtype, inputs, cache, b.hidden(LAYER))
            b.emit(f"return {found.name}, {cache.name} : {found.type}, {cache.type}")
        return kernels.write() + b.text("module")


def check(runner: KernelRunner, heads: Heads, lengths: list[int]) -> None:
    case = Case(heads, lengths, runner.chip)
    given = case.arguments()
    *inputs, cache = given
    expected, stored = case.expected(given)
    names = {line.split("@")[1].split(" ")[0] for line in case.text(Target("cpu")).splitlines()
             if "hal.executable.source" in line}  # fmt: skip
    found, changed = runner.run_all(names, case.text, [*inputs, cache.reshape(-1, heads.token)])
    apart = np.abs(found.reshape(expected.shape) - expected).max()
    bound = {"f16": 2e-3, "f32": 1e-5}[heads.kv_dtype]
    assert apart <= bound * np.abs(expected).max()
    np.testing.assert_allclose(changed.reshape(stored.shape), stored, rtol=bound, atol=bound)


@pytest.mark.parametrize("chip", ["gfx942", "gfx1100"])
@pytest.mark.parametrize(("heads", "lengths"), DEFAULT, ids=["split", "whole"])
def test_decode(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str, heads: Heads,
    lengths: list[int],
) -> None:  # fmt: skip
    check(KernelRunner(hip_driver, hip_cache, tmp_path, chip), heads, lengths)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["gfx942", "gfx1100", "gfx1201"])
@pytest.mark.parametrize(("heads", "lengths"), OTHERS + DEFAULT)
def test_decode_of_other_shapes(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str, heads: Heads,
    lengths: list[int],
) -> None:  # fmt: skip
    check(KernelRunner(hip_driver, hip_cache, tmp_path, chip), heads, lengths)


ALL_WIDTHS = """
    import sys

    import iree.runtime
    import numpy as np
    from tests.hip.control import mark

    vmfb, given, most = sys.argv[1:4]
    with open(vmfb, "rb") as file:
        module = iree.runtime.load_vm_flatbuffer(file.read(), driver="hip")
    with np.load(given) as arrays:
        qkv, rope, starts, ends, _, cache = arrays.values()
    for width in range(1, int(most) + 1):
        module["main"](qkv, rope, starts, ends, np.ones((1, width), np.int64), cache)
"""


def test_splits_leave_few_sizes(hip_driver: Driver, hip_cache: Path, tmp_path: Path) -> None:
    """Of contexts from 1 to 8,192 tokens: the runtime keeps memory for each size."""
    chip = "gfx1100"
    case = Case(replace(SPLIT, max_seq_len=8192), [1], chip)
    code, plain, given = (tmp_path / name for name in ("a", "b", "c.npz"))
    code.write_text(case.text(Target(chip)))
    plain.write_text(case.text(Target("cpu")))
    *inputs, cache = case.arguments()
    np.savez(given, *inputs, cache.reshape(-1, case.heads.token))
    widths = 8192 // case.heads.page_size
    outcome = hip_driver.run(
        ALL_WIDTHS, compile_code_object(code, chip, hip_cache).parent / VMFB, given, widths,
        devices=f"{chip}:256MiB", twins=compile_twins(plain, hip_cache),
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    sizes = {call.notes["bytes"] for call in outcome.of("hipMalloc")}
    splits = {((4 * case.heads.summed << i) + 63) // 64 * 64 for i in range(8)}  # 1 to 128
    assert len(outcome.of("hipModuleLaunchKernel")) == 2 * widths
    assert splits <= sizes and len(sizes) <= len(splits) + 1  # and the result's
