"""Rows of a quantized table on GPUs: the embedding of tokens.

Shapes: T tokens; V rows of H columns in the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from compile.formats.blocks import BLOCK_TYPES, GROUP
from compile.gpu.kernel import Kernel, Kernels, ThreadBuilder
from compile.gpu.unpack import CHUNK, DTYPES, Groups
from compile.mlir.builder import Tensor
from compile.mlir.executable import ExecutableBuilder, Memory, Views
from compile.mlir.values import Scalar

THREADS = 64  # of a workgroup, each for 32 columns


@dataclass(frozen=True)
class Lookup(Kernel):
    """The rows of a table [V, H] of a type for tokens [T] i64: [T, H] f32, exact.

    Bindings: tokens, table, result. Constant: T. Workgroups: T, and as many as have a thread for
    every 32 columns. For a token below 0 the first row is read, for one beyond the last, the last.
    """

    kind: str  # a type of `compile.formats.blocks`
    rows: int  # V
    columns: int  # H, a multiple of 32

    @property
    def name(self) -> str:
        """By its type and sizes."""
        return f"look_up_{self.kind}_{self.rows}x{self.columns}"

    @property
    def threads(self) -> int:
        """Of a workgroup."""
        return THREADS

    @property
    def result(self) -> tuple[str, str]:
        """In f32 nothing is rounded but the sum with a minimum, which is so everywhere."""
        return "f32", ""

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does."""
        tokens, groups, result = self._views(k)
        k.constant()
        group = k.workgroup(1) * THREADS + k.thread()
        with k.when(group.less(k.scalar(self.columns // GROUP, "index"))):
            self._put(k, tokens, groups, result, k.workgroup(0), group)

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Each 32 columns of each token."""
        tokens, groups, result = self._views(k)
        with k.loop(0, k.constant()) as token, k.loop(0, self.columns // GROUP) as group:
            self._put(k, tokens, groups, result, token, group)

    def _views(self, k: ExecutableBuilder) -> tuple[Memory, Groups, Memory]:
        tokens = k.view(k.binding(read_only=True), "i64")
        table = Views(k, k.binding(read_only=True)).open(*DTYPES)
        groups = Groups(k, BLOCK_TYPES[self.kind], table, self.columns)
        return tokens, groups, k.view(k.binding(), "f32")

    def _put(
        self, k: ExecutableBuilder, tokens: Memory, groups: Groups, result: Memory, token: Scalar,
        group: Scalar,
    ) -> None:  # fmt: skip
        """Unpack 32 columns."""
        last = k.scalar(self.rows - 1, "index")
        row = tokens.load(token).to("index").clamp(0, last)
        weights = groups.unpack(groups.load(groups.start(row), row, group), "f32")
        for i, chunk in enumerate(weights):
            result.store_vector(chunk, token * self.columns + group * GROUP + i * CHUNK)


def look_up(kernels: Kernels, lookup: Lookup, tokens: Tensor, table: Tensor) -> Tensor:
    """Rows [T, H] f32 of a packed table, of any shape, for tokens [T] i64."""
    workgroups = tokens.shape[0], -(-lookup.columns // (GROUP * THREADS)), 1
    result = Tensor("", (tokens.shape[0], lookup.columns), "f32")
    constants = [tokens.shape[0]]
    return kernels.call(lookup, workgroups, constants, [tokens, table], outputs=[result])[0]
