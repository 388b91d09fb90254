"""The rows of one call on GPUs, and how many of their tokens are computed together.

Shapes: N rows of a batch, S tokens a row, T = N*S, B pages a row, H hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compile.mlir import abi
from compile.mlir.builder import Builder, Dim, Tensor


@dataclass(frozen=True)
class Batch:
    """The rows of one call."""

    layers: Sequence[str]  # the number of each, as an index
    tokens: Tensor  # [N, S] i64
    start: Tensor  # [N] i64, the first position of each row
    seq_lens: Tensor  # [N] i64, the position after each row's last token
    page_ids: Tensor  # [N, B] i64
    embeds: Tensor | None  # [N, S, H] f32, which stand in where tokens are negative

    @property
    def num_rows(self) -> int:
        """N"""
        return int(self.tokens.shape[0])

    @property
    def seq_len(self) -> Dim:
        """S, padding included"""
        return self.tokens.shape[1]


def tokens_of_row(tile: int, n: int) -> int:
    """Tokens of each of n rows that are computed together: T is a multiple of one tile.

    Of more, IREE would make tiles that local memory has no room for.
    """
    return max(1, tile // n)


def whole_tiles(b: Builder, size: Dim, unit: int) -> Dim:
    """A size, rounded up to a multiple of `unit`."""
    whole = (b.index(size) + (unit - 1)) // unit * unit
    return b.multiple(whole, unit, abi.MAX_ARGUMENT_SIZE).name
