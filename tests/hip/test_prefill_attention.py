"""Attention of prefill over pages: machine code beside plain loops, and both beside numpy.

Slots of pages that no row reads hold NaN, as do queries, keys and values of padding; page tables
name no page behind a row's last token.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import dataclass
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
from compile.toolchain import iree_compile
from tests.hip.driver import Driver
from tests.hip.kernel_runs import Array, KernelRunner, bitcast

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
        """A function `main` of all arguments, of any S and B: what tokens attend to [N * S, H * D],
        and the cache."""
        heads, b, n = self.heads, Builder(), len(self.rows)
        kernels = Kernels(b, Target(chip), plain=target.device == "cpu")
        given = [
            Tensor("%qkv", ("%all", heads.features), "f32"),
            Tensor("%rope", (heads.max_seq_len, 2, heads.head_dim // 2), "f32"),
            *(Tensor(f"%{name}", (n,), "i64") for name in ("starts", "ends")),
            Tensor("%ids", (n, "%num_pages"), "i64"),
            Tensor("%cache", ("%slots", heads.token), _given(heads.kv_dtype)),
        ]
        out = Tensor("", ("%all", heads.num_heads * heads.head_dim), "f32")
        arguments = ", ".join(f"{x.name}: {x.type}" for x in given)
        with b.block(f"func.func @main({arguments}) -> ({out.type}, {given[-1].type}) {{"):
            for axis, x in ((0, given[0]), (1, given[4]), (0, given[5])):
                number = b.scalar(axis, "index")
                b.emit(f"{x.shape[axis]} = tensor.dim {x.name}, {number.name} : {x.type}")
            *inputs, cache = given
            cache = bitcast(b, cache, heads.kv_dtype)
            found, cache = attend_prefill(
                kernels, heads, out.dtype, (b.index("%all") // n).name, inputs, cache,
                b.hidden(LAYER),
            )  # fmt: skip
            cache = bitcast(b, cache, given[-1].dtype)
            b.emit(f"return {found.name}, {cache.name} : {found.type}, {cache.type}")
        return kernels.write() + b.text("module")


def _given(dtype: str) -> str:
    """As what the runtime takes numbers, for which numpy has no bf16."""
    return "i16" if dtype == "bf16" else dtype


def check(runner: KernelRunner, case: Case, order: str) -> None:
    """The machine code, as the plain form and as numpy."""
    given, text = case.arguments(), case.text(Target("cpu"), runner.chip)
    names = {line.split("@")[1].split(" ")[0] for line in text.splitlines()
             if "hal.executable.source" in line}  # fmt: skip
    found = runner.run_all(
        names, lambda target: case.text(target, runner.chip), as_given(given), order
    )
    check_results(case, given, *found)


def as_given(arguments: list[Array]) -> list[Array]:
    """With the cache as the function takes it."""
    *inputs, cache = arguments
    kind = np.int16 if cache.dtype == bfloat16 else cache.dtype
    return [*inputs, cache.reshape(-1, np.prod(cache.shape[3:])).view(kind)]


def check_results(case: Case, given: list[Array], found: Array, changed: Array) -> None:
    """As numpy computes them."""
    expected, stored = case.expected(given)
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


PLAIN_CALLS = """
    import sys

    import iree.runtime
    import numpy as np

    vmfb, given, found = sys.argv[1:]
    with open(vmfb, "rb") as file:
        module = iree.runtime.load_vm_flatbuffer(file.read(), driver="local-sync")
    results = {}
    with np.load(given) as arrays:
        for i in range(len(arrays.files) // 6):
            call = module["main"](*(arrays[f"{i} {k}"] for k in range(6)))
            results |= {f"{i} {k}": result.to_host() for k, result in enumerate(call)}
    np.savez(found, **results)
"""


def test_plain_form_of_any_rows(tmp_path: Path) -> None:
    """Starts, lengths and padding at random."""
    rng, heads, cases = np.random.default_rng(2), Heads(3, 1, 12, LAYERS, 8, 96, "f32"), []
    for _ in range(60):
        num_tokens = 8 * rng.integers(1, 5)
        starts = rng.integers(0, 97 - num_tokens, 3)
        rows = [(start, start + rng.integers(1, num_tokens + 1)) for start in starts]
        rows[rng.integers(3)] = (0, 0)
        cases.append(Case(heads, rows, num_tokens))
    given = [case.arguments() for case in cases]
    mlir, vmfb, arrays, found = (tmp_path / name for name in ("a", "b", "c.npz", "d.npz"))
    mlir.write_text(cases[0].text(Target("cpu"), "gfx1100"))
    iree_compile(mlir, vmfb, Target("cpu"))
    named = {f"{i} {k}": x for i, call in enumerate(given) for k, x in enumerate(as_given(call))}
    np.savez(arrays, **named)  # type: ignore[arg-type]
    command = [sys.executable, "-c", textwrap.dedent(PLAIN_CALLS), vmfb, arrays, found]
    subprocess.run(command, check=True, timeout=120)
    with np.load(found) as results:
        for i, (case, call) in enumerate(zip(cases, given, strict=True)):
            check_results(case, call, results[f"{i} 0"], results[f"{i} 1"])
