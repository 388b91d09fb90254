"""Kernels of our own, by themselves: machine code beside plain loops, and both beside numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from compile.build import VMFB
from compile.gpu.kernel import Kernel, Kernels, ThreadBuilder
from compile.mlir.builder import Builder, Tensor
from compile.mlir.executable import ExecutableBuilder
from compile.target import Target
from tests.hip.dispatches import compare_record, read_dispatches, wrong_ones
from tests.hip.driver import Driver, compile_code_object, compile_twins

ROWS, SIZE = 3, 200
RUN = """
    import sys

    import iree.runtime
    import numpy as np

    vmfb, given, found = sys.argv[1:4]
    with open(vmfb, "rb") as file:
        module = iree.runtime.load_vm_flatbuffer(file.read(), driver="hip")
    np.save(found, module["main"](np.load(given)).to_host())
"""


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
    code, plain, given, found, record = (tmp_path / name for name in "abcde")
    code.write_text(module_text(Target(chip)))
    plain.write_text(module_text(Target("cpu")))
    x = np.random.default_rng(1).normal(size=(ROWS, SIZE)).astype(np.float32)
    np.save(given.with_suffix(".npy"), x)
    vmfb = compile_code_object(code, chip, hip_cache).parent / VMFB
    twins = compile_twins(plain, hip_cache)
    outcome = hip_driver.run(
        RUN, vmfb, given.with_suffix(".npy"), found.with_suffix(".npy"), devices=f"{chip}:64MiB",
        twins=twins, runs="both", machine="random", record=record,
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    differences = compare_record(record, read_dispatches(twins))
    assert set(differences) == {"row_sums_200"} and wrong_ones(differences.values()) == []
    np.testing.assert_allclose(np.load(found.with_suffix(".npy")), x.sum(axis=1), rtol=1e-5)
