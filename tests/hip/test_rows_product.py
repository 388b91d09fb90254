"""Products of few rows with matrices on GPUs, quantized or of 16-bit floats: machine code beside
plain loops and beside numpy, at sizes that no known model has as well.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from compile.formats.blocks import BLOCK_TYPES, BlockType, Groups
from compile.gpu.kernel import Kernels
from compile.gpu.matrix_rows import MatrixRows
from compile.gpu.matvec import FewRows
from compile.gpu.parts import Part
from compile.gpu.quantized import ROWS, packed
from compile.gpu.row import OneRow
from compile.gpu.rows_product import RowsProduct, multiply
from compile.mlir.builder import Builder, Tensor
from compile.target import Target
from tests.hip.driver import Driver
from tests.hip.kernel_runs import KernelRunner, bitcast

Arrays = dict[str, NDArray[Any]]

ODD = FewRows((Part("int4", 44),), 72, 2, epilogue="add")  # no whole block, group or set of rows
NORM = FewRows((Part("int4", 48),), 1544, epsilon=1e-5)  # more columns than are multiplied at once
GATED = FewRows((Part("int8", 144),), 72, 4, epilogue="silu")
CHUNKS = FewRows((Part("int8", 32),), 1544, 8)  # more columns than local memory has room for
# Of three types, which share local memory; two of them with rows that fill no block
MIXED = FewRows((Part("q4_k", 40), Part("int8", 16), Part("q6_k", 24)), 512, 1, 1e-5)
DEFAULT = [(ODD, 3), (NORM, 1), (MIXED, 1)]
OTHERS = [(GATED, 4), (CHUNKS, 9), (replace(MIXED, rows=8, epsilon=None, epilogue="add"), 9)]
TYPES = [
    (FewRows((Part(name, 32),), 2 * kind.columns, 1, 1e-5), 1) for name, kind in BLOCK_TYPES.items()
]
# By matrix instructions
MATRIX = MatrixRows((Part("int4", 44),), 1544, 8, 1e-5)  # no whole block, nor whole rounds
MATRIX_OTHERS = [
    (MatrixRows((Part("int4", 44),), 72, 2, epilogue="add"), 3),
    (MatrixRows((Part("int8", 144),), 72, 4, epilogue="silu"), 4),
    # Several blocks a workgroup, and more than it has in the last one
    (MatrixRows((Part("int8", 16 * 305), Part("int4", 8)), 64, 16, 1e-5, "add"), 16),
    (MatrixRows(MIXED.parts, 512, 5, 1e-5), 5),
    (MatrixRows((Part("f16", 35),), 72, 2, epilogue="add"), 3),
    (MatrixRows((Part("f16", 16 * 305 + 8),), 64, 16), 16),
]
ONE_NORM = OneRow((Part("f16", 48),), 1544, epsilon=1e-5)
FLOATS = [
    (MatrixRows((Part("f16", 42),), 1544, 8, 1e-5, "silu"), 8),
    (MatrixRows((Part("bf16", 35),), 72, 2, 1e-5, "add"), 3),
    (OneRow((Part("f16", 35),), 72, epilogue="add"), 1),
    (ONE_NORM, 1),
]
ONE_ROW = [
    (OneRow((Part("f16", 42),), 2056, epsilon=1e-5, epilogue="silu"), 1),
    (OneRow((Part("bf16", 35),), 72, epsilon=1e-5), 1),
    (OneRow((Part("f16", 16),), 4096), 1),
]
MATRIX_TYPES = [(MatrixRows(case.parts, case.depth, 3, 1e-5), 3) for case, _ in TYPES]
DTYPES = {"f16": np.float16, "bf16": bfloat16}
BOUNDS = {"f16": 1e-3, "bf16": 1e-2}  # of the largest
CHIPS = ["gfx942", "gfx1100", "gfx1201"]


def random_rows(kind: BlockType, rows: int, columns: int, rng: np.random.Generator) -> Groups:
    groups = Groups.zeros(kind, rows, columns)
    groups.codes[:] = rng.integers(0, 2**kind.bits, groups.codes.shape)
    lowest = -32 if kind.has_signed_scales else 0
    for values in groups.numbers:
        is_float = values.dtype == np.float16
        values[:] = (
            rng.normal(size=values.shape) / 16 if is_float
            else rng.integers(lowest, 64, values.shape)
        )  # fmt: skip
    for values in groups.factors:
        values[:] = rng.normal(size=values.shape) / 64
    return groups


def given_and_expected(
    product: RowsProduct, num_rows: int, size: float = 1
) -> tuple[Arrays, NDArray[np.float64]]:
    """Arguments by name, whose alphabetical order is that of the kernel's bindings; activations of
    a size."""
    rng, matrices = np.random.default_rng(1), []
    given: Arrays = {}
    for i, part in enumerate(product.parts):
        if part.kind in DTYPES:
            numbers = rng.normal(size=(part.rows, product.depth)).astype(DTYPES[part.kind])
            matrices.append(numbers.astype(np.float64))
            # The runtime has no bf16
            given[f"y_matrix_{i}"] = numbers.view(np.int16) if part.kind == "bf16" else numbers
            continue
        kind = BLOCK_TYPES[part.kind]
        whole = -(-product.depth // kind.columns) * kind.columns
        groups = random_rows(kind, part.rows, whole, rng)
        stored = Groups.zeros(kind, -(-part.rows // ROWS) * ROWS, whole)
        stored.put(slice(0, part.rows), groups)
        given[f"y_matrix_{i}"] = packed(stored).view(np.int8)
        matrices.append(groups.dequantized()[:, : product.depth].astype(np.float64))
    weights = np.concatenate(matrices)
    x = size * rng.normal(size=(num_rows, product.depth))
    given["x"] = x.astype(np.float16 if product.epsilon is None else np.float32)
    activations = given["x"].astype(np.float64)
    if product.epsilon is not None:
        given["x_norm"] = rng.normal(size=product.depth).astype(np.float32)
        mean = (x**2).mean(axis=1, keepdims=True)
        activations = x / np.sqrt(mean + product.epsilon) * given["x_norm"]
    expected = activations @ weights.T
    if product.epilogue == "add":
        given["z"] = rng.normal(size=expected.shape).astype(np.float32)
        expected = expected + given["z"]
    if product.epilogue == "silu":
        if product.parts[0].kind in DTYPES:
            gate, up = np.split(expected, 2, axis=1)
        else:
            gate, up = np.moveaxis(expected.reshape(num_rows, -1, 2, 8), 2, 0)
        expected = (gate / (1 + np.exp(-gate)) * up).reshape(num_rows, -1)
    return given, expected


def module_text(product: RowsProduct, given: Arrays, target: Target) -> str:
    """A function `main` of all bindings."""
    b, types = Builder(), {"float16": "f16", "float32": "f32", "int8": "i8", "int16": "i16"}
    kernels = Kernels(b, target)
    inputs = {
        name: Tensor(f"%{name}", given[name].shape, types[given[name].dtype.name])
        for name in sorted(given)
    }
    num_rows = given["x"].shape[0]
    result = Tensor("", (num_rows, product.features), product.result[0]).type
    arguments = ", ".join(f"{x.name}: {x.type}" for x in inputs.values())
    with b.block(f"func.func @main({arguments}) -> {result} {{"):
        activations = [x for name, x in inputs.items() if name.startswith("x")]
        matrices = [
            bitcast(b, x, "bf16") if x.dtype == "i16" else x
            for name, x in inputs.items() if name.startswith("y")
        ]  # fmt: skip
        found = multiply(kernels, product, activations, matrices, inputs.get("z"))
        b.emit(f"return {found.name} : {found.type}")
    return kernels.write() + b.text("module")


def check(
    driver: Driver, cache: Path, folder: Path, chip: str, case: tuple[RowsProduct, int],
    size: float = 1,
) -> None:  # fmt: skip
    product, num_rows = case
    given, expected = given_and_expected(product, num_rows, size)
    runner = KernelRunner(driver, cache, folder, chip)
    found = runner.run(
        product.name, lambda target: module_text(product, given, target),
        [given[name] for name in sorted(given)],
    ).astype(np.float64)  # fmt: skip
    assert np.abs(found - expected).max() <= BOUNDS[product.dtype] * np.abs(expected).max()


@pytest.mark.parametrize("chip", ["gfx942", "gfx1100"])
@pytest.mark.parametrize("case", DEFAULT, ids=["odd", "norm", "mixed"])
def test_products_in_4_bits(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str, case: tuple[RowsProduct, int]
) -> None:
    check(hip_driver, hip_cache, tmp_path, chip, case)


@pytest.mark.parametrize(
    "chip", ["gfx942", "gfx1100", pytest.param("gfx1201", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", FLOATS, ids=lambda case: case[0].name)
def test_products_of_floats(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str, case: tuple[RowsProduct, int]
) -> None:
    check(hip_driver, hip_cache, tmp_path, chip, case)


@pytest.mark.parametrize("size", [1, 1e6, 1e-4])
@pytest.mark.parametrize(
    "case", [(NORM, 1), (MATRIX, 8), (ONE_NORM, 1)], ids=["one", "eight", "floats"]
)
def test_a_norm_takes_rows_of_any_size(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, case: tuple[RowsProduct, int], size: float
) -> None:
    check(hip_driver, hip_cache, tmp_path, "gfx942", case, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "chip"),
    [(case, chip) for case in MATRIX_OTHERS for chip in CHIPS]
    + [(case, CHIPS[i % 3]) for i, case in enumerate(MATRIX_TYPES)],
    ids=lambda value: value if isinstance(value, str) else value[0].name,
)
def test_products_by_matrix_instructions(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str, case: tuple[RowsProduct, int]
) -> None:
    check(hip_driver, hip_cache, tmp_path, chip, case)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", OTHERS + ONE_ROW + TYPES, ids=lambda case: case[0].name)
def test_products_of_all_types(
    hip_driver: Driver, hip_cache: Path, tmp_path: Path, chip: str, case: tuple[RowsProduct, int]
) -> None:
    check(hip_driver, hip_cache, tmp_path, chip, case)
