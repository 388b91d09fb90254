"""Products by matrix instructions: machine code beside plain loops, and both beside numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compile.build import VMFB
from compile.gpu.kernel import Kernels
from compile.gpu.matmul import Product, Tile, multiply
from compile.mlir.builder import Builder, Tensor
from compile.target import HIP_CHIPS, Target
from tests.hip.dispatches import compare_record, read_dispatches, wrong_ones
from tests.hip.driver import Driver, compile_code_object, compile_twins

RUN = """
    import sys

    import iree.runtime
    import numpy as np

    vmfb, given, found = sys.argv[1:4]
    with open(vmfb, "rb") as file:
        module = iree.runtime.load_vm_flatbuffer(file.read(), driver="hip")
    with np.load(given) as arrays:
        np.save(found, module["main"](*arrays.values()).to_host())
"""


def module_text(target: Target, product: Product) -> str:
    """A function `main` of activations, the matrix and a residual, for any number of rows."""
    b = Builder()
    kernels, n, k = Kernels(b, target), product.columns, product.depth
    x, matrix, residual = f"tensor<?x{k}xf16>", f"tensor<{n}x{k}xf16>", f"tensor<?x{n}xf32>"
    head = f"func.func @main(%x: {x}, %m: {matrix}, %r: {residual}) -> {residual} {{"
    with b.block(head):
        zero = b.scalar(0, "index")
        rows = b.op(f"tensor.dim %x, {zero.name} : {x}", "index").name
        added = Tensor("%r", (rows, n), "f32") if product.has_residual else None
        result = multiply(
            kernels, product, Tensor("%x", (rows, k), "f16"), Tensor("%m", (n, k), "f16"), added
        )
        b.emit(f"return {result.name} : {result.type}")
    return kernels.write() + b.text("module")


def whole_numbers(*shape: int, seed: int) -> NDArray[Any]:
    """Small ones, whose products and sums nothing rounds."""
    return np.random.default_rng(seed).integers(-4, 5, shape)


@dataclass(frozen=True)
class Run:
    """Of one product, on one chip."""

    driver: Driver
    cache: Path
    folder: Path
    chip: str

    def check(self, product: Product, rows: int, order: str = "random") -> None:
        """Machine code, its plain form and numpy give the same numbers."""
        code, plain, given, record = (self.folder / name for name in ("a", "b", "c.npz", "d"))
        code.write_text(module_text(Target(self.chip), product))
        plain.write_text(module_text(Target("cpu"), product))
        x = whole_numbers(rows, product.depth, seed=1).astype(np.float16)
        matrix = whole_numbers(product.columns, product.depth, seed=2).astype(np.float16)
        residual = whole_numbers(rows, product.columns, seed=3).astype(np.float32)
        np.savez(given, x, matrix, residual)
        vmfb = compile_code_object(code, self.chip, self.cache).parent / VMFB
        twins, found = compile_twins(plain, self.cache), self.folder / "found.npy"
        outcome = self.driver.run(
            RUN, vmfb, given, found, devices=f"{self.chip}:64MiB", twins=twins, runs="both",
            machine=order, record=record,
        )  # fmt: skip
        assert outcome.exit_code == 0, outcome.stderr
        differences = compare_record(record, read_dispatches(twins))
        assert set(differences) == {product.name} and wrong_ones(differences.values()) == []
        expected = x.astype(np.float32) @ matrix.astype(np.float32).T
        np.testing.assert_array_equal(
            np.load(found), expected + (residual if product.has_residual else 0)
        )


@pytest.fixture
def run(hip_driver: Driver, hip_cache: Path, tmp_path: Path) -> Any:
    return lambda chip: Run(hip_driver, hip_cache, tmp_path, chip)


@pytest.mark.parametrize("chip", ["gfx942", "gfx1100"])
def test_a_product_of_more_than_a_tile(run: Any, chip: str) -> None:
    run(chip).check(Product(Tile.of(Target(chip)), 144, 128, True), 133)


@pytest.mark.slow
@pytest.mark.parametrize("chip", HIP_CHIPS)
def test_products_of_odd_sizes(run: Any, chip: str) -> None:
    """One row; columns that are no multiple of an instruction's; a depth of one step."""
    tile = Tile.of(Target(chip))
    run(chip).check(Product(tile, 40, tile.depth, False), 1, "backward")
    run(chip).check(Product(tile, 256, 576, True), 130, "forward")
    run(chip).check(Product(tile, 129, 192, True), 40)
