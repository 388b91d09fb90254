"""Weights of a model emitted as tensor operations: row-major parameters, and products with them."""

from __future__ import annotations

from compile.formats.layout import Parameter
from compile.mlir.builder import Builder, Dim, Tensor, tensor_type
from compile.mlir.values import Scalar
from sf_local.errors import UnsupportedError

SUBGROUP = 64  # threads that reduce together: what they do not divide, a single one reduces
WORKGROUPS = 256  # that keep a large chip busy
COLUMNS = 64  # of a product that one of them computes, if there are not many rows
MIN_DEPTH = 256  # of a part of a split product; of 512, a gfx1100 runs out of registers
FEW = 4  # rows up to which a product is no matter for matrix instructions
MANY = 128  # rows from which on it needs no splitting
MATRIX = 16  # rows of one
ALIGNED = 8  # columns: of others, lanes of a matrix instruction are off on gfx11


def whole_subgroups(size: int) -> int:
    """A size, rounded up to what subgroups read together."""
    return -(-size // SUBGROUP) * SUBGROUP


class Weights:
    """Parameters of a module that is written with `b`; matrices are of `dtype`, the rest f32."""

    def __init__(self, b: Builder, dtype: str) -> None:
        self.b, self.dtype = b, dtype
        self.parameters: dict[str, Parameter] = {}

    def matrix(self, name: str, rows: int, cols: int) -> None:
        self.parameters[name] = Parameter(name, (rows, cols), self.dtype)

    def vector(self, name: str, *shape: int) -> None:
        self.parameters[name] = Parameter(name, shape, "f32")

    def declare(self) -> None:
        """Emit all of them as globals."""
        for name, parameter in self.parameters.items():
            self.b.emit(
                f'util.global private @"{name}" = #flow.parameter.named<"model"::"{name}"> : '
                f"{tensor_type(parameter.shape, parameter.dtype)}"
            )

    def load(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        kind = tensor_type(parameter.shape, parameter.dtype)
        return self.b.tensor(
            f'util.global.load @"{name}" : {kind}', parameter.shape, parameter.dtype
        )

    def linear(
        self, lhs: Tensor, name: str, residual: Tensor | None = None, *, num_rows: int | None = None
    ) -> Tensor:
        """lhs [T, K] times a matrix [N, K], plus `residual`: [T, N] f32.

        num_rows: about how many rows there are, if T is hidden and there are few. The matrix may
        have fewer columns; the others are zero. The residual is no initial value, which would cost
        IREE's kernels registers.
        """
        b, rows, depth = self.b, lhs.shape[0], int(lhs.shape[1])
        if depth % ALIGNED:
            raise UnsupportedError(
                f"{name}: has {depth} columns, but GPU code needs a multiple of {ALIGNED}; "
                "compile this model for the CPU"
            )
        # iree-compile 3.9.0 makes wrong code of other depths, such as NaN from bf16 on gfx90a.
        depth = whole_subgroups(depth)
        lhs, weight = (b.pad(x, 1, depth, 0) for x in (lhs, self.load(name)))
        columns = int(weight.shape[0])
        parts = _num_parts(num_rows or rows, depth, columns, residual is not None)
        if parts > 1:
            lhs, weight = (b.expand(x, 1, parts, depth // parts) for x in (lhs, weight))
            products = b.contract("tpk,npk->ptn", lhs, weight, (parts, rows, columns))
            return b.generic(
                "ptn->tn", [products], (rows, columns), "f32", lambda v, acc: acc + v,
                0.0 if residual is None else residual,
            )  # fmt: skip
        product = b.contract("tk,nk->tn", lhs, weight, (rows, columns))
        if residual is None:
            return product
        return b.generic("tn,tn->tn", [product, residual], product.shape, "f32", Scalar.__add__)


def _num_parts(rows: Dim, depth: int, columns: int, has_residual: bool) -> int:
    """Into how many sums a product of not many rows is split, so that it occupies a whole chip.

    At least two where rows are padded and a residual follows: IREE would fuse it, and spill all
    registers. Kernels for few rows are others, which take a few columns each.
    """
    if isinstance(rows, str) or not FEW < rows <= MANY:
        return 1
    parts = 1
    if has_residual and rows % MATRIX:
        parts = next((p for p in range(2, 9) if depth % (p * SUBGROUP) == 0), 1)
    while parts * columns < WORKGROUPS * COLUMNS and depth % (2 * parts * MIN_DEPTH) == 0:
        parts *= 2
    return parts
