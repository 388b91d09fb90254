"""Products of one row with 16-bit floats on GPUs: machine code beside plain loops and numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compile.gpu.kernel import Kernels
from compile.gpu.parts import Part
from compile.gpu.row import OneRow
from compile.gpu.rows_product import multiply
from compile.mlir.builder import Builder, Tensor
from compile.target import Target
from tests.hip.driver import Driver
from tests.hip.kernel_runs import Array, KernelRunner

CHIPS = ["gfx942", "gfx1100", pytest.param("gfx1201", marks=pytest.mark.slow)]
ODD = OneRow((Part("f16", 35),), 72, epilogue="add")  # no whole workgroup, pair, or step
NORM = OneRow((Part("f16", 48),), 1544, epsilon=1e-5)
GATED = OneRow((Part("f16", 42),), 2056, epsilon=1e-5, epilogue="silu")
WHOLE = OneRow((Part("f16", 16),), 4096)
CASES = [
    ODD, NORM,
    *(pytest.param(case, marks=pytest.mark.slow) for case in (GATED, WHOLE)),
]  # fmt: skip


def given_and_expected(product: OneRow, size: float = 1) -> tuple[dict[str, Array], Array]:
    """Arguments by name, whose alphabetical order is that of the bindings. size: of activations."""
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=product.depth), rng.normal(size=(product.columns, product.depth))
    x *= size
    dtype = np.float16 if product.epsilon is None else np.float32
    given: dict[str, Array] = {"x": x[None].astype(dtype), "y": weights.astype(np.float16)}
    activations = given["x"][0].astype(np.float64)
    if product.epsilon is not None:
        given["x_norm"] = rng.normal(size=product.depth).astype(np.float32)
        activations = x / np.sqrt((x**2).mean() + product.epsilon) * given["x_norm"]
    expected = given["y"].astype(np.float64) @ activations
    if product.epilogue == "add":
        given["z"] = rng.normal(size=(1, product.columns)).astype(np.float32)
        expected = expected + given["z"][0]
    if product.epilogue == "silu":
        gate, up = np.split(expected, 2)
        expected = gate / (1 + np.exp(-gate)) * up
    return given, expected


def module_text(product: OneRow, given: dict[str, Array], target: Target) -> str:
    """A function `main` of all bindings."""
    b, types = Builder(), {"float16": "f16", "float32": "f32"}
    kernels = Kernels(b, target)
    inputs = {
        name: Tensor(f"%{name}", given[name].shape, types[given[name].dtype.name])
        for name in sorted(given)
    }
    result = Tensor("", (1, product.features), product.result[0]).type
    arguments = ", ".join(f"{x.name}: {x.type}" for x in inputs.values())
    with b.block(f"func.func @main({arguments}) -> {result} {{"):
        activations = [x for name, x in inputs.items() if name.startswith("x")]
        found = multiply(kernels, product, activations, [inputs["y"]], inputs.get("z"))
        b.emit(f"return {found.name} : {found.type}")
    return kernels.write() + b.text("module")


@pytest.mark.parametrize(
    "chip", ["gfx942", "gfx1100", pytest.param("gfx1201", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("product", CASES, ids=lambda product: product.name)
def test_products_of_a_row(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str, product: OneRow
) -> None:
    check(hip_driver, hip_cache, tmp_path, chip, product)


@pytest.mark.parametrize("size", [1e6, 1e-4])
def test_a_norm_takes_rows_of_any_size(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, size: float
) -> None:
    check(hip_driver, hip_cache, tmp_path, "gfx942", NORM, size)


def check(
    driver: Driver, cache: Path, folder: Path, chip: str, product: OneRow, size: float = 1
) -> None:
    given, expected = given_and_expected(product, size)
    found = KernelRunner(driver, cache, folder, chip).run(
        product.name, lambda target: module_text(product, given, target),
        [given[name] for name in sorted(given)],
    )[0].astype(np.float64)  # fmt: skip
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()
