"""Products by matrix instructions, and rows of quantized tables: by machine code, in plain loops
and by numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from compile.formats.blocks import BLOCK_TYPES, BlockType, Groups
from compile.gpu.embedding import Embedding
from compile.gpu.kernel import Kernels
from compile.gpu.matmul import Product, Tile, multiply
from compile.gpu.parts import Part
from compile.gpu.quantized import ROWS, packed
from compile.mlir.builder import Builder, Tensor, tensor_type
from compile.target import HIP_CHIPS, Target
from tests.hip.driver import Driver
from tests.hip.kernel_runs import Array, KernelRunner


def module_text(target: Target, product: Product, shapes: Sequence[tuple[int, ...]]) -> str:
    """A function `main` of activations, the matrix and a residual, for any number of rows."""
    b = Builder()
    kernels, n, dtype = Kernels(b, target), product.columns, product.result[0]
    matrices = [
        Tensor(f"%m{i}", shape, "f16" if part.kind == "f16" else "i8")
        for i, (part, shape) in enumerate(zip(product.parts, shapes, strict=True))
    ]
    given = ", ".join(f"{matrix.name}: {matrix.type}" for matrix in matrices)
    x, residual = tensor_type(("?", product.width), "f16"), tensor_type(("?", n), "f32")
    result_type = tensor_type(("?", n // 2 if product.ending == "gate" else n), dtype)
    head = f"func.func @main(%x: {x}, {given}, %r: {residual}) -> {result_type} {{"
    with b.block(head):
        zero = b.scalar(0, "index")
        rows = b.op(f"tensor.dim %x, {zero.name} : {x}", "index").name
        added = Tensor("%r", (rows, n), "f32") if product.ending == "add" else None
        lhs = Tensor("%x", (rows, product.width), "f16")
        result = multiply(kernels, product, lhs, matrices, added)
        b.emit(f"return {result.name} : {result.type}")
    return kernels.write() + b.text("module")


def embedding_text(target: Target, embedding: Embedding, shape: tuple[int, ...]) -> str:
    """A function `main` of five tokens and a table."""
    b = Builder()
    kernels, tokens = Kernels(b, target), Tensor("%x", (5,), "i64")
    table, result = Tensor("%table", shape, "i8"), Tensor("", (5, embedding.columns), "f32")
    with b.block(f"func.func @main(%x: {tokens.type}, %table: {table.type}) -> {result.type} {{"):
        [rows] = kernels.call(embedding, (5, 1, 1), [5], [tokens, table], outputs=[result])
        b.emit(f"return {rows.name} : {rows.type}")
    return kernels.write() + b.text("module")


def whole_numbers(*shape: int, seed: int) -> Array:
    """Small ones, whose products and sums nothing rounds."""
    return np.random.default_rng(seed).integers(-4, 5, shape)


def random_groups(kind: BlockType, rows: int, columns: int) -> Groups:
    """Quantized weights that f16 does not round."""
    rng = np.random.default_rng(2)
    zeros = Groups.zeros(kind, -(-rows // ROWS) * ROWS, -(-columns // kind.columns) * kind.columns)
    codes = rng.integers(0, 1 << kind.bits, zeros.codes.shape).astype(np.uint8)
    low = -4 if kind.has_signed_scales or not kind.has_super_blocks else 0
    numbers = [rng.integers(low, 5, x.shape).astype(x.dtype) for x in zeros.numbers]
    factors = [rng.choice([0.25, 0.5, 1], x.shape).astype(np.float16) for x in zeros.factors]
    return Groups(kind, codes, numbers, factors)


def random_matrix(part: Part, depth: int) -> tuple[Array, Array]:
    """Rows as they are stored, and their numbers, of which f16 rounds none."""
    if part.kind == "f16":
        matrix = whole_numbers(part.rows, depth, seed=2).astype(np.float16)
        return matrix, matrix
    groups = random_groups(BLOCK_TYPES[part.kind], part.rows, depth)
    return packed(groups).view(np.int8), groups.dequantized()[: part.rows, :depth]


def expected(product: Product, x: Array, matrix: Array, residual: Array) -> Array:
    """The result by numpy."""
    y: Array = x[:, : product.depth].astype(np.float32) @ matrix.astype(np.float32).T
    if product.ending == "gate":
        gates, ups = y.reshape(len(y), -1, 2, 8).swapaxes(0, 2).swapaxes(1, 2)
        gates, ups = (part.reshape(len(y), -1).astype(np.float64) for part in (gates, ups))
        return (gates / (1 + np.exp(-gates)) * ups).astype(np.float16)
    return y + residual if product.ending else y


class ProductRunner(KernelRunner):
    """Of products on one chip."""

    @property
    def tile(self) -> Tile:
        """The chip's."""
        return Tile.of(Target(self.chip))

    def check(self, product: Product, rows: int, order: str = "random") -> None:
        """Machine code, its plain form and numpy give the same numbers."""
        stored, matrices = zip(
            *(random_matrix(part, product.depth) for part in product.parts), strict=True
        )
        x = whole_numbers(rows, product.width, seed=1).astype(np.float16)
        x[:, product.depth :] = 0
        if product.ending == "gate":
            x /= 256  # so that gates are neither all zero nor the identity
        residual = whole_numbers(rows, product.columns, seed=3).astype(np.float32)
        got = self.run(
            product.name, partial(module_text, product=product, shapes=[m.shape for m in stored]),
            [x, *stored, residual], order,
        )  # fmt: skip
        wanted = expected(product, x, np.concatenate(matrices), residual)
        if product.ending == "gate":
            np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-3)
        else:
            np.testing.assert_array_equal(got, wanted)


On = Callable[[str], ProductRunner]


@pytest.fixture
def on(hip_driver: Driver, hip_cache: Path, tmp_path: Path) -> On:
    return lambda chip: ProductRunner(hip_driver, hip_cache, tmp_path, chip)


@pytest.mark.parametrize("chip", ["gfx942", "gfx1100"])
def test_a_quantized_product_of_more_than_a_tile(on: On, chip: str) -> None:
    runner = on(chip)
    runner.check(Product(runner.tile, (Part("int4", 144),), 96, "add"), 133)


@pytest.mark.slow
@pytest.mark.parametrize("chip", HIP_CHIPS)
def test_products_of_f16(on: On, chip: str) -> None:
    """One row; columns that are no multiple of an instruction's; a depth of one step."""
    runner = on(chip)
    tile = runner.tile
    runner.check(Product(tile, (Part("f16", 40),), tile.depth), 1, "backward")
    runner.check(Product(tile, (Part("f16", 256),), 576, "add"), 130, "forward")
    runner.check(Product(tile, (Part("f16", 129),), 192, "add"), 40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("chip", ["gfx90a", "gfx942", "gfx1100", "gfx1201"])
def test_products_of_quantized_types(on: On, chip: str, kind: str) -> None:
    runner = on(chip)
    runner.check(Product(runner.tile, (Part(kind, 72),), 512), 21, "backward")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["gfx942", "gfx1100", "gfx1201"])
def test_a_matrix_of_several_types(on: On, chip: str) -> None:
    """The first part of two tiles, the others of a part of one."""
    runner = on(chip)
    parts = Part("q4_k", 136), Part("int8", 40), Part("q6_k", 24)
    runner.check(Product(runner.tile, parts, 256), 21)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["gfx942", "gfx1100", "gfx1201"])
def test_gates_and_ups(on: On, chip: str) -> None:
    runner = on(chip)
    runner.check(Product(runner.tile, (Part("int4", 288),), 128, "gate"), 130)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("chip", ["gfx942", "gfx1100", "gfx1201"])
def test_rows_of_a_quantized_table(on: On, chip: str, kind: str) -> None:
    """To the bit; of the first and last row, and of tokens that are none."""
    embedding, block = Embedding(kind, 300, 2304), BLOCK_TYPES[kind]
    groups = random_groups(block, embedding.rows, embedding.columns)
    numbers = [x if block.has_super_blocks else x * np.float16(0.37) for x in groups.numbers]
    factors = [x * np.float16(0.37) for x in groups.factors]
    groups, tokens = Groups(block, groups.codes, numbers, factors), np.array([7, 299, 0, -1, 300])
    table = packed(groups).view(np.int8)
    text = partial(embedding_text, embedding=embedding, shape=table.shape)
    got = on(chip).run(embedding.name, text, [tokens, table], "random")
    np.testing.assert_array_equal(got, groups.dequantized()[tokens.clip(0, 299)])
