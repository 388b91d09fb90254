"""Products of a CPU's kernels by themselves: rows of activations times one quantized matrix."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.cpu.kernel import PHASE_COUNTERS
from compile.cpu.matmul import Format
from compile.cpu.matrix_kernel import Matrix, MatrixKernel
from compile.cpu.quantized_blocks import UNIT
from compile.formats.blocks import BLOCK_TYPES, GROUP, Groups, packed
from compile.mlir.builder import Builder, Tensor
from compile.mlir.executable import Views
from compile.mlir.values import Scalar
from compile.target import Target
from compile.toolchain import iree_compile

Floats = NDArray[Any]
ROWS, SIZE, COLS = 7, 96, 512  # of activations, of the matrix; 7 rows are products of 4, 2 and 1

RUN = """
import sys

import iree.runtime
import numpy as np

vmfb, given, found = sys.argv[1:]
with open(vmfb, "rb") as file:
    module = iree.runtime.load_vm_flatbuffer(file.read(), driver="local-sync")
with np.load(given) as arrays:
    x = arrays["x"]
    results = {name: module[name](x, arrays[name]).to_host() for name in arrays if name != "x"}
np.savez(found, **results)
"""


class ProductKernel(MatrixKernel):
    """x [ROWS, COLS] f32, which become integers, times a matrix [SIZE, COLS]: [ROWS, SIZE] f32."""

    def __init__(self, name: str, format_: Format) -> None:
        super().__init__(name, format_)
        k, lanes = self.k, format_.vectors.lanes
        self.weights = Views(k, k.binding(read_only=True)).open(*format_.view_types)
        x = k.view(k.binding(read_only=True), "f32")
        self.counters = k.view(k.binding(), "i32")
        out, act = self.result((ROWS, SIZE)), self.activations(COLS, ROWS)
        with (
            self.phase(k.scalar(0, "index"), k.scalar(ROWS, "index")) as row,
            k.loop(0, COLS, act.step) as i,
        ):
            starts = [row * COLS + i + j for j in range(0, act.step, lanes)]
            act.store([x.load_vector(start, lanes) for start in starts], row, i)

        def use(sums: list[Scalar], row: Scalar, block: Scalar) -> None:
            for value, r, feature in self.each(sums, row, block):
                out.store_vector(value, r * SIZE + feature)

        matrix = Matrix.whole((SIZE, COLS), format_, k.scalar(0, "index"))
        self.matmul(k.scalar(1, "index"), matrix, act, k.scalar(ROWS, "index"), use)

    def function(self, b: Builder, num_bytes: int) -> None:
        """Write a function named as the type of the matrix: its arguments are x and the bytes."""
        x, weights = Tensor("%x", (ROWS, COLS), "f32"), Tensor("%weights", (num_bytes,), "i8")
        with b.block(
            f"func.func @{self.layers.dtype}(%x: {x.type}, %weights: {weights.type}) -> "
            f"tensor<{ROWS}x{SIZE}xf32> {{"
        ):
            size, zero = 2 * PHASE_COUNTERS, b.scalar(0, "i32")
            splat = f"flow.tensor.splat {zero.name} : tensor<{size}xi32>"
            counters = b.tensor(splat, (size,), "i32")
            _, out, _ = self.dispatch(b, [], [weights, x], [counters], {})
            b.emit(f"return {out.name} : {out.type}")


@dataclass(frozen=True)
class Products:
    """Products with a random matrix of each of these types, of blocks.

    activation_dtype: "int8" or "int16".
    """

    dtypes: Sequence[str]
    activation_dtype: str

    @property
    def x(self) -> Floats:
        """The activations [ROWS, COLS] f32: a group of them is 0, one lies in the middle between
        integers, and one has NaN."""
        x = np.random.default_rng(1).standard_normal((ROWS, COLS)).astype(np.float32)
        x[2, GROUP : 2 * GROUP] = 0
        x[3, :GROUP] = [self._largest, *(0.5 - i for i in range(1, GROUP))]
        x[4, GROUP + 3] = np.nan
        return x

    @property
    def _largest(self) -> int:
        return {"int8": 127, "int16": 127 * 128 + 63}[self.activation_dtype]

    def expected(self, dtype: str) -> Floats:
        """The product [ROWS, SIZE] in f64, of activations rounded as they should be."""
        groups = self.x.reshape(ROWS, -1, GROUP)
        scales = np.abs(groups).max(axis=2, keepdims=True) / np.float32(self._largest)
        numbers = np.rint(groups * (1 / np.where(scales == 0, np.float32(1), scales)))
        rounded = (numbers.astype(np.float64) * scales).reshape(ROWS, COLS)
        result: Floats = rounded @ random_groups(dtype).dequantized().astype(np.float64).T
        return result

    def run(self, target: Target, folder: Path, *emulator: str) -> dict[str, Floats]:
        """What the kernels of a target compute, [ROWS, SIZE] f32 by type.

        emulator: a command that runs a program, e.g. qemu-x86_64.
        """
        vectors = target.vectors
        assert vectors is not None
        given = {d: packed(random_groups(d), vectors.block, UNIT).reshape(-1) for d in self.dtypes}
        b, layouts = Builder(), []
        for dtype, weights in given.items():
            format_ = Format(dtype, vectors, self.activation_dtype, has_half_sums=dtype == "q6_k")
            kernel = ProductKernel(f"product_{dtype}", format_)
            kernel.write(b)
            kernel.function(b, weights.size)
            layouts.append(kernel.layout())
        mlir, vmfb, npz, found = (folder / name for name in ("a.mlir", "vmfb", "a.npz", "b.npz"))
        mlir.write_text("\n".join([*layouts, b.text("module")]))
        iree_compile(mlir, vmfb, target)
        np.savez(npz, x=self.x, **{name: weights.view(np.int8) for name, weights in given.items()})
        command = [*emulator, sys.executable, "-c", RUN, vmfb, npz, found]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        with np.load(found) as results:
            return dict(results)


def random_groups(dtype: str) -> Groups:
    """A random matrix [SIZE, COLS] with every code, and scales of either sign."""
    kind, rng = BLOCK_TYPES[dtype], np.random.default_rng(2)

    def halves(cols: int) -> NDArray[np.float16]:
        return rng.uniform(-1, 1, (SIZE, cols)).astype(np.float16)

    shape, count = (SIZE, COLS // kind.group), 2 if kind.has_minima else 1
    integers = (-128, 128, np.int8) if kind.has_signed_scales else (0, 256, np.uint8)
    low, high, integer = integers
    return Groups(
        kind,
        rng.integers(0, 2**kind.bits, (SIZE, COLS), np.uint8),
        [rng.integers(low, high, shape, integer) if kind.has_super_blocks else halves(shape[1])
         for _ in range(count)],
        [halves(COLS // kind.columns) for _ in range(count if kind.has_super_blocks else 0)],
    )  # fmt: skip
