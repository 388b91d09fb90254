"""Matrices whose rows are of several types, as fused ones of a file that has values in more bits
than queries and keys.

Each part lies by itself, in a binding of its own. A workgroup has a tile of rows of one part, and
branches to the code for its type: all of its threads do so alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

from compile.mlir.executable import ExecutableBuilder
from compile.mlir.values import Scalar

M = TypeVar("M")  # a part's matrix, as a kernel reads it


@dataclass(frozen=True)
class Part:
    """Rows of a matrix that are of one type: a name of BLOCK_TYPES, "f16" or "bf16"."""

    kind: str
    rows: int


Parts = tuple[Part, ...]


def total_rows(parts: Parts) -> int:
    """Of the whole matrix."""
    return sum(part.rows for part in parts)


def num_tiles(parts: Parts, size: int) -> int:
    """How many tiles of `size` rows cover the parts; none has rows of two."""
    return sum(-(-part.rows // size) for part in parts)


def first_rows(parts: Parts) -> list[int]:
    """Where each part begins in the whole matrix."""
    return [*accumulate((part.rows for part in parts[:-1]), initial=0)]


def name_of(parts: Parts) -> str:
    """Types and rows, such as q4_k_5120_q6_k_1024."""
    return "_".join(f"{part.kind}_{part.rows}" for part in parts)


class PartTile(Generic[M]):
    """A workgroup's tile of `size` rows, by its number.

    row: its first row in its part. last: the last row of the part. place: its first row in the
    whole matrix. end: the row there after the part's last one.
    """

    def __init__(
        self, k: ExecutableBuilder, parts: Parts, matrices: Sequence[M], size: int, number: Scalar
    ) -> None:
        self._k, self._matrices = k, matrices
        firsts = first_rows(parts)
        tiles = [num_tiles(parts[:i], size) for i in range(len(parts))]
        self._is_after = [k.scalar(tile - 1, "index").less(number) for tile in tiles[1:]]
        self.row = (number - self._of_part(tiles)) * size
        self.place = self.row + self._of_part(firsts)
        self.last = self._of_part([part.rows - 1 for part in parts])
        self.end = self._of_part([n + part.rows for n, part in zip(firsts, parts, strict=True)])

    def _of_part(self, numbers: Sequence[int]) -> Scalar:
        """That of the tile's part."""
        first, *others = (self._k.scalar(number, "index") for number in numbers)
        for is_after, number in zip(self._is_after, others, strict=True):
            first = is_after.select(number, first)
        return first

    def choose(
        self, body: Callable[[M], Sequence[Scalar]], dtypes: Sequence[str]
    ) -> Sequence[Scalar]:
        """What `body` gives, of these types, for the matrix of the tile's part."""

        def of_first(count: int) -> Sequence[Scalar]:
            matrix = self._matrices[count - 1]
            if count == 1:
                return body(matrix)
            is_after = self._is_after[count - 2]
            return self._k.choose(
                is_after, lambda: body(matrix), lambda: of_first(count - 1), dtypes
            )

        return of_first(len(self._matrices))
