"""Row-major parameters, products with them, and RMS norm, as tensor operations for GPUs.

Shapes: T rows, K features of an input (the depth of a product), N features of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from compile.formats.blocks import BLOCK_TYPES, GROUP
from compile.formats.layout import Parameter
from compile.gpu import matmul, rows_product
from compile.gpu.embedding import Embedding
from compile.gpu.floats import DTYPES
from compile.gpu.kernel import Kernels
from compile.gpu.matmul import Product
from compile.gpu.matrix_rows import MAX_ROWS, MatrixRows
from compile.gpu.matvec import FewRows
from compile.gpu.parts import Part, Parts
from compile.gpu.quantized import ROWS, column_bytes
from compile.gpu.row import MAX_DEPTH, OneRow
from compile.gpu.rows_product import RowsProduct
from compile.gpu.tiles import Instruction, Tile
from compile.mlir.builder import Builder, Dim, Tensor, tensor_type
from compile.mlir.values import Scalar
from compile.models.tensors import ModelTensor
from sf_local.errors import UnsupportedError

SUBGROUP = 64  # threads that reduce together; sizes they do not divide, a single thread reduces
WORKGROUPS = 256  # as many keep a large chip busy
COLUMNS = 64  # that a workgroup computes of a product of not many rows
MIN_DEPTH = 256  # of a part of a split product; with 512, a gfx1100 runs out of registers
FEW = 4  # up to so many rows IREE uses no matrix instructions
MANY = 128  # with more rows a product needs no splitting
MATRIX = 16  # rows of a matrix instruction
ALIGNED = 8  # K must be a multiple; else gfx11 runs matrix instructions with lanes masked off


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix: its parts, the parameters that have them, and how many columns it has; rows and
    columns without the padding of blocks."""

    parts: Parts
    names: Sequence[str]
    columns: int


def whole_subgroups(size: int) -> int:
    """A size, rounded up to a multiple of SUBGROUP."""
    return -(-size // SUBGROUP) * SUBGROUP


class Weights:
    """The parameters of the module that `b` writes, and products with them.

    dtype: of activations, and of matrices that are not quantized; all else is f32. kernels: with
    which those are multiplied that are.
    """

    def __init__(self, b: Builder, dtype: str, kernels: Kernels | None = None) -> None:
        self.b, self.dtype, self._kernels = b, dtype, kernels
        self.parameters: dict[str, Parameter] = {}
        self._quantized: dict[str, StoredMatrix] = {}  # by the names of whole matrices

    def add(
        self, tensors: Iterable[ModelTensor], dtype_of: Callable[[str], str] | None = None
    ) -> None:
        """Add parameters as the model's table has them: row by row, or quantized.

        dtype_of: what matrices of the source become, by canonical name; else they are of `dtype`.
        """
        for tensor in tensors:
            dtype = self.dtype if tensor.is_matrix else "f32"
            if tensor.is_matrix and dtype_of:
                dtype = dtype_of(next(iter(tensor.sources)))
                if dtype in BLOCK_TYPES:
                    self._add_quantized(tensor, dtype_of)
                    continue
            self.parameters[tensor.name] = Parameter(tensor.name, tensor.shape, dtype)

    def _add_quantized(self, tensor: ModelTensor, dtype_of: Callable[[str], str]) -> None:
        """Add a matrix in blocks, in parts where its rows are of several types; of an interleaved
        one, which is of one type, each source has half of every block."""
        parts, names = [], []
        for run in tensor.runs(dtype_of):
            dtype, (rows, columns) = dtype_of(next(iter(run.sources))), run.shape
            if tensor.is_interleaved:
                rows = 2 * (-(-rows // ROWS) * (ROWS // 2))
            kind = BLOCK_TYPES[dtype]
            shape = -(-rows // ROWS), -(-columns // kind.columns), column_bytes(kind)
            self.parameters[run.name] = Parameter(
                run.name, shape, dtype, block=ROWS, is_for_gpu=True
            )
            parts.append(Part(dtype, rows))
            names.append(run.name)
        self._quantized[tensor.name] = StoredMatrix(tuple(parts), names, tensor.shape[1])

    def is_quantized(self, name: str) -> bool:
        """Whether a matrix is in blocks."""
        return name in self._quantized

    def declare(self) -> None:
        """Emit all parameters as globals."""
        for name, parameter in self.parameters.items():
            self.b.emit(
                f'util.global private @"{name}" = #flow.parameter.named<"model"::"{name}"> : '
                f"{tensor_type(parameter.shape, _element(parameter))}"
            )

    def load(self, name: str) -> Tensor:
        """A parameter, inside a function."""
        parameter = self.parameters[name]
        dtype = _element(parameter)
        kind = tensor_type(parameter.shape, dtype)
        return self.b.tensor(f'util.global.load @"{name}" : {kind}', parameter.shape, dtype)

    def rows_of(self, name: str, tokens: Tensor) -> Tensor:
        """Rows of the quantized table `name` for tokens [T] i64: [T, H] f32."""
        assert self._kernels
        [part], columns = self._quantized[name].parts, self._quantized[name].columns
        kernel = Embedding(part.kind, part.rows, columns)
        result = Tensor("", (tokens.shape[0], columns), "f32")
        [found] = self._kernels.call(
            kernel, (tokens.shape[0], 1, 1), [tokens.shape[0]], [tokens, self.load(name)],
            outputs=[result],
        )  # fmt: skip
        return found

    def norm_linear(
        self, x: Tensor, norm: str, name: str, epsilon: float, *, is_gated: bool = False
    ) -> Tensor:
        """The RMS norm of x [T, H] f32 times the matrix `name` [N, H]: [T, N] f32.

        is_gated: of a matrix of gates and ups, silu(gate) * up instead: [T, N / 2], if
        `multiplies_gates`.
        """
        _check_depth(name, int(x.shape[1]))
        kind = self._kernel_of(x, name)
        if kind and (kind is MatrixRows or x.shape[0] == 1):  # the norm is part of the kernel
            return self._few_rows(kind, [x, self.load(norm)], name, None, epsilon, is_gated)
        return self.linear(rms_norm(self, x, norm, epsilon), name, is_gated=is_gated)

    def multiplies_gates(self, x: Tensor, name: str) -> bool:
        """Whether the product of x with a matrix of gates and ups can be silu(gate) * up."""
        return self.is_quantized(name) or self._kernel_of(x, name) is not None

    def _kernel_of(self, x: Tensor, name: str) -> type[RowsProduct] | None:
        """What multiplies x [T, K] with the matrix `name` if there are few rows; None where
        `Product` does, or IREE."""
        count, depth = x.shape
        if not self._kernels or isinstance(count, str) or count > MAX_ROWS:
            return None
        matrix = self._matrix(name)
        dtype, chip = matrix.parts[0].kind, self._kernels.target.name
        if dtype in BLOCK_TYPES:
            # On gfx11 a matrix instruction takes as long as dot products of 8 rows
            return FewRows if count <= (4 if chip.startswith("gfx11") else 1) else MatrixRows
        if dtype not in DTYPES or matrix.columns != depth:
            return None
        if count == 1:
            return OneRow if depth <= MAX_DEPTH else None
        return MatrixRows if Instruction.takes(dtype, chip) else None

    def _matrix(self, name: str) -> StoredMatrix:
        """The matrix of a name; of floats it has one part."""
        if name in self._quantized:
            return self._quantized[name]
        rows, columns = self.parameters[name].shape
        return StoredMatrix((Part(self.parameters[name].dtype, rows),), [name], columns)

    def _few_rows(
        self, kind: type[RowsProduct], activations: list[Tensor], name: str,
        residual: Tensor | None, epsilon: float | None, is_gated: bool,
    ) -> Tensor:  # fmt: skip
        """A product of few rows. activations: and the norm's weight, with epsilon."""
        assert self._kernels
        (count, depth), matrix = activations[0].shape, self._matrix(name)
        epilogue = "silu" if is_gated else "add" if residual else ""
        kernel = kind(matrix.parts, int(depth), int(count), epsilon, epilogue)
        parts = [self.load(part) for part in matrix.names]
        return rows_product.multiply(self._kernels, kernel, activations, parts, residual)

    def _many_rows(self, lhs: Tensor, name: str, residual: Tensor | None, is_gated: bool) -> Tensor:
        """A product with a quantized matrix by matrix instructions."""
        assert self._kernels
        ending = "gate" if is_gated else "add" if residual else ""
        depth = -(-int(lhs.shape[1]) // GROUP) * GROUP
        matrix = self._quantized[name]
        product = Product(Tile.of(self._kernels.target), matrix.parts, depth, ending)
        lhs = self.b.pad(lhs, 1, product.width, 0)
        parts = [self.load(part) for part in matrix.names]
        return matmul.multiply(self._kernels, product, lhs, parts, residual)

    def linear(
        self, lhs: Tensor, name: str, residual: Tensor | None = None, *,
        num_rows: int | None = None, is_gated: bool = False,
    ) -> Tensor:  # fmt: skip
        """lhs [T, K] times the matrix `name` [N, K], plus `residual` [T, N] f32: [T, N] f32.

        num_rows: about how many rows there are, if there are few and T is hidden from IREE. The
        matrix may have fewer columns than lhs; those missing are zero. is_gated: as `norm_linear`.
        Raises UnsupportedError.
        """
        b, rows, depth = self.b, lhs.shape[0], int(lhs.shape[1])
        _check_depth(name, depth)
        if kind := self._kernel_of(lhs, name):
            return self._few_rows(kind, [lhs], name, residual, None, is_gated)
        if self.is_quantized(name):
            return self._many_rows(lhs, name, residual, is_gated)
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
        # As the initial value of the sums, it would cost IREE's kernels registers.
        return b.generic("tn,tn->tn", [product, residual], product.shape, "f32", Scalar.__add__)


def _element(parameter: Parameter) -> str:
    """The dtype of a parameter's elements: bytes of quantized ones."""
    return "i8" if parameter.is_quantized else parameter.dtype


def _check_depth(name: str, depth: int) -> None:
    if depth % ALIGNED:
        raise UnsupportedError(
            f"{name}: has {depth} columns, but GPU code needs a multiple of {ALIGNED}; "
            "compile this model for the CPU"
        )


def rms_norm(weights: Weights, x: Tensor, name: str, epsilon: float) -> Tensor:
    """RMS norm of x [T, H] f32 with the weight `name` [H], as the left operand of a product."""
    b, count = weights.b, int(x.shape[1])
    squares = b.generic("th->t", [x], x.shape[:1], "f32", lambda v, acc: acc + v * v, init=0.0)

    def scale(v: Scalar, total: Scalar, w: Scalar) -> Scalar:
        mean = total * (1 / count) + epsilon
        return (v * mean.math("rsqrt") * w).to(weights.dtype)

    operands = [x, squares, weights.load(name)]
    return b.generic("th,t,h->th", operands, x.shape, weights.dtype, scale)


def _num_parts(rows: Dim, depth: int, columns: int, has_residual: bool) -> int:
    """Into how many sums a product of not many rows is split, so that it keeps a whole chip busy.

    At least two where rows are padded and a residual is added: IREE would fuse the addition, and
    spill all registers. Up to FEW rows IREE makes other kernels, with a few columns a workgroup.
    """
    if isinstance(rows, str) or not FEW < rows <= MANY:
        return 1
    parts = 1
    if has_residual and rows % MATRIX:
        parts = next((p for p in range(2, 9) if depth % (p * SUBGROUP) == 0), 1)
    while parts * columns < WORKGROUPS * COLUMNS and depth % (2 * parts * MIN_DEPTH) == 0:
        parts *= 2
    return parts
