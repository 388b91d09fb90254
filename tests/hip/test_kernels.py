"""Kernels of our own, by themselves: machine code beside plain loops, and both beside numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from compile.gpu.kernel import Kernel, Kernels, ThreadBuilder
from compile.mlir.builder import Builder, Tensor
from compile.mlir.executable import ExecutableBuilder
from compile.target import Target
from tests.hip.driver import Driver
from tests.hip.kernel_runs import KernelRunner

ROWS, SIZE = 3, 200


@dataclass(frozen=True)
class RowSums(Kernel):
    """Sums of rows [n, size] f32, each by a workgroup of 128 threads."""

    size: int

    @property
    def name(self) -> str:
        return f"row_sums_{self.size}"

    @property
    def threads(self) -> int:
        return 128

    @property
    def result(self) -> tuple[str, str]:
        return "f32", "f32"

    def write(self, k: ThreadBuilder) -> None:
        x, sums = (k.view(k.binding(), "f32") for _ in range(2))
        k.constant()
        thread, row, count = k.thread(), k.workgroup(), self.threads // k.subgroup
        [total] = k.fold(
            thread, self.size, [k.scalar(0.0, "f32")],
            lambda i, total: [total + x.load(row * self.size + i)], step=self.threads,
        )  # fmt: skip
        total, parts = k.reduce("add", total), k.shared(count, "f32")
        with k.when((thread % k.subgroup).equals(0)):
            parts.store(total, thread // k.subgroup)
        k.barrier()
        with k.when(thread.equals(0)):
            [total] = k.fold(
                1, count, [parts.load(0)], lambda i, total: [total + parts.load(i)]
            )  # fmt: skip
            sums.store(total, row)

    def write_plain(self, k: ExecutableBuilder) -> None:
        x, sums = (k.view(k.binding(), "f32") for _ in range(2))
        with k.loop(0, k.constant()) as row:
            [total] = k.fold(
                0, self.size, [k.scalar(0.0, "f32")],
                lambda i, total: [total + x.load(row * self.size + i)],
            )  # fmt: skip
            sums.store(total, row)


def module_text(target: Target) -> str:
    """A function `main` that calls the kernel."""
    b = Builder()
    kernels, x = Kernels(b, target), Tensor("%x", (ROWS, SIZE), "f32")
    with b.block(f"func.func @main(%x: {x.type}) -> tensor<{ROWS}xf32> {{"):
        [sums] = kernels.call(
            RowSums(SIZE), (ROWS, 1, 1), [ROWS], [x], outputs=[Tensor("", (ROWS,), "f32")]
        )
        b.emit(f"return {sums.name} : {sums.type}")
    return kernels.write() + b.text("module")


@pytest.mark.parametrize("chip", ["gfx942", "gfx1100"])
def test_a_kernel_beside_its_plain_form(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str
) -> None:
    x = np.random.default_rng(1).normal(size=(ROWS, SIZE)).astype(np.float32)
    found = KernelRunner(hip_driver, hip_cache, tmp_path, chip).run(
        RowSums(SIZE).name, module_text, [x]
    )
    np.testing.assert_allclose(found, x.sum(axis=1), rtol=1e-5)
