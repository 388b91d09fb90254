"""Attention of prefill over pages: machine code beside plain loops, and both beside numpy.

Slots of pages that no row reads hold NaN, as do queries, keys and values of padding; page tables
name no page behind a row's last token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from compile.gpu.kernel import Kernels
from compile.gpu.pages import Heads
from compile.gpu.prefill_attention import attend_prefill
from compile.mlir.builder import Builder, Tensor
from compile.target import Target
from tests.hip.driver import Driver
from tests.hip.kernel_runs import Array, KernelRunner

LAYER, LAYERS = 1, 2
NO_PAGE = 12_345_679
DTYPES = {"f16": np.float16, "bf16": bfloat16, "f32": np.float32}
BOUNDS = {"f16": 2e-3, "bf16": 2e-2, "f32": 1e-5}  # of the largest


@dataclass(frozen=True)
class Case:
    """Rows of one call. rows: start and end of each; an end of 0 marks a row that pads the batch.
    num_tokens: of each row, with padding."""

    heads: Heads
    rows: list[tuple[int, int]]
    num_tokens: int

    @property
    def num_pages(self) -> int:
        """Of a row"""
        return max(-(-(start + self.num_tokens) // self.heads.page_size) for start, _ in self.rows)

    def arguments(self) -> list[Array]:
        """As `attend_prefill` takes them, and the cache [pages, L, P, 2, KH, D]."""
        heads, n, rng = self.heads, len(self.rows), np.random.default_rng(1)
        qkv = rng.normal(size=(n, self.num_tokens, heads.features)).astype(np.float32)
        angles = rng.uniform(0, 6, (heads.max_seq_len, heads.head_dim // 2))
        rope = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        ids = 1 + rng.permutation(n * self.num_pages).reshape(n, self.num_pages)
        shape = (1 + n * self.num_pages, LAYERS, heads.page_size, 2, heads.num_kv_heads,
                 heads.head_dim)  # fmt: skip
        cache = np.full(shape, np.nan, DTYPES[heads.kv_dtype])
        for row, (start, end) in enumerate(self.rows):
            for position in range(start):
                page, slot = divmod(position, heads.page_size)
                cache[ids[row, page], LAYER, slot] = rng.normal(size=shape[3:])
            qkv[row, max(0, end - start) :] = np.nan
            ids[row, -(-end // heads.page_size) :] = NO_PAGE
        starts, ends = np.array(self.rows).T
        return [qkv.reshape(-1, heads.features), rope, starts, ends, ids, cache]

    def expected(self, given: list[Array]) -> tuple[NDArray[np.float64], Array]:
        """What tokens attend to [n * S, H, D], zeros for padding, and the cache."""
        qkv, rope, starts, ends, ids, cache = given
        heads, cache = self.heads, cache.copy()
        kv_heads, group = heads.num_kv_heads, heads.num_heads // heads.num_kv_heads
        results = np.zeros((len(qkv), heads.num_heads, heads.head_dim))
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            for position in range(start, end):
                x = qkv[row * self.num_tokens + position - start].reshape(-1, heads.head_dim)
                cos, sin = rope[position]
                x0, x1 = np.split(x[:-kv_heads], 2, axis=1)
                rotated = np.concatenate([x0 * cos - x1 * sin, x1 * cos + x0 * sin], axis=1)
                new = np.stack([rotated[heads.num_heads :], x[-kv_heads:]])
                page, slot = divmod(position, heads.page_size)
                cache[ids[row, page], LAYER, slot] = new
                known = ids[row, : page + 1]
                context = cache[known, LAYER].reshape(-1, *new.shape)[: position + 1]
                keys, values = context.astype(np.float64).swapaxes(0, 1)
                queries = rotated[: heads.num_heads].astype(cache.dtype).astype(np.float64)
                for head in range(heads.num_heads):
                    scores = keys[:, head // group] @ queries[head] / np.sqrt(heads.head_dim)
                    weights = np.exp(scores - scores.max())
                    found = weights @ values[:, head // group] / weights.sum()
                    results[row * self.num_tokens + position - start, head] = found
        return results, cache

    def text(self, target: Target, chip: str) -> str:
        """A function `main` of all arguments: what tokens attend to, and the cache."""
        heads, b = self.heads, Builder()
        kernels = Kernels(b, Target(chip), plain=target.device == "cpu")
        n = len(self.rows)
        slots = (1 + n * self.num_pages) * LAYERS * heads.page_size
        given = [
            Tensor("%qkv", (n * self.num_tokens, heads.features), "f32"),
            Tensor("%rope", (heads.max_seq_len, 2, heads.head_dim // 2), "f32"),
            *(Tensor(f"%{name}", (n,), "i64") for name in ("starts", "ends")),
            Tensor("%ids", (n, self.num_pages), "i64"),
            Tensor("%cache", (slots, heads.token), _given(heads.kv_dtype)),
        ]
        out = Tensor("", (n * self.num_tokens, heads.num_heads * heads.head_dim), "f32")
        arguments = ", ".join(f"{x.name}: {x.type}" for x in given)
        with b.block(f"func.func @main({arguments}) -> ({out.type}, {given[-1].type}) {{"):
            *inputs, cache = given
            cache = _bitcast(b, cache, heads.kv_dtype)
            found, cache = attend_prefill(
                kernels, heads, out.dtype, self.num_tokens, inputs, cache, b.hidden(LAYER)
            )
            cache = _bitcast(b, cache, given[-1].dtype)
            b.emit(f"return {found.name}, {cache.name} : {found.type}, {cache.type}")
        return kernels.write() + b.text("module")


def _given(dtype: str) -> str:
    """As what the runtime takes numbers, for which numpy has no bf16."""
    return "i16" if dtype == "bf16" else dtype


def _bitcast(b: Builder, x: Tensor, dtype: str) -> Tensor:
    """The same bits as another type."""
    if x.dtype == dtype:
        return x
    result = replace(x, dtype=dtype)
    return b.tensor(f"flow.tensor.bitcast {x.name} : {x.type} -> {result.type}", x.shape, dtype)


def check(runner: KernelRunner, case: Case, order: str = "random") -> None:
    """The machine code, as the plain form and as numpy."""
    given = case.arguments()
    *inputs, cache = given
    expected, stored = case.expected(given)
    cache_type = np.int16 if cache.dtype == bfloat16 else cache.dtype
    text = case.text(Target("cpu"), runner.chip)
    names = {line.split("@")[1].split(" ")[0] for line in text.splitlines()
             if "hal.executable.source" in line}  # fmt: skip
    found, changed = runner.run_all(
        names, lambda target: case.text(target, runner.chip),
        [*inputs, cache.reshape(-1, case.heads.token).view(cache_type)], order,
    )  # fmt: skip
    bound = BOUNDS[case.heads.kv_dtype]
    apart = np.abs(found.reshape(expected.shape) - expected).max()
    assert apart <= bound * np.abs(expected).max()
    changed = changed.view(stored.dtype).reshape(stored.shape)
    np.testing.assert_allclose(
        changed.astype(np.float64), stored.astype(np.float64), rtol=bound, atol=bound
    )


CHIPS = ("gfx942", "gfx1100", "gfx1201")
CASES = {
    "llama": Case(Heads(8, 2, 128, LAYERS, 16, 128, "f16"), [(5, 75), (0, 17)], 80),
    "smol": Case(Heads(9, 3, 64, LAYERS, 8, 128, "f16"), [(0, 0), (40, 90)], 64),
    "small": Case(Heads(6, 2, 8, LAYERS, 8, 128, "f16"), [(0, 60)], 64),
    "bf16": Case(Heads(2, 2, 80, LAYERS, 16, 512, "bf16"), [(200, 330)], 144),
    "f32": Case(Heads(3, 1, 64, LAYERS, 16, 128, "f32"), [(9, 20), (0, 0)], 16),
}
ORDERS = ("forward", "backward", "random")  # of waves
ROTATED = [
    pytest.param(name, chip, order, marks=() if (i + j) % 3 == 0 else pytest.mark.slow)
    for i, name in enumerate(CASES)
    for j, (chip, order) in enumerate(zip(CHIPS, ORDERS, strict=True))
]


@pytest.mark.parametrize(("name", "chip", "order"), ROTATED)
def test_prefill(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, name: str, chip: str, order: str
) -> None:
    check(KernelRunner(hip_driver, hip_cache, tmp_path, chip), CASES[name], order)
