"""Attention of a CPU kernel: what the kernels call, and how queries, keys and values are stored.

Two implementations attend: `attention_vector` with vectors, `attention_amx` with tile registers.
Both read queries and the KV cache, compute scores of SLICE positions at a time and turn them into
softmax weights (`softmax`), and add the weighted values. Shapes: M rows; G query heads per KV head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from compile.cpu.activations import Activations
from compile.cpu.amx import TileRegisters
from compile.cpu.kernel import KernelBuilder
from compile.cpu.kv_layout import KVLayout
from compile.cpu.softmax import Splits
from compile.mlir.executable import Memory, Views
from compile.mlir.values import Scalar
from compile.mlir.vectors import lanes_of, vector_type
from compile.target import Vectors


@dataclass(frozen=True)
class ContextSlice:
    """SLICE positions from `start` on, to which rows of a sequence from `row` on attend."""

    row: Scalar
    head: Scalar  # of keys and values
    layer: Scalar
    start: Scalar


@dataclass(frozen=True)
class AttentionMemory:
    """What attention reads and writes, in all types needed.

    qkv: queries, keys and values [M, qkv_width]. rope: where the angles [positions, 2, head_dim/2]
    begin in `floats`. q: scaled queries [M, q_width]. act: the result [M, heads, head_dim].
    splits: in decode. amx: where the CPU has it.
    """

    qkv: Memory
    qkv_width: int
    floats: Memory
    rope: Scalar
    cache: Views
    q: Views
    q_width: int
    act: Activations
    splits: Splits | None = None
    amx: TileRegisters | None = None


class Attention(ABC):
    """Writes the phases between a layer's QKV projection and its output projection.

    position(row): the last position that a row attends to. page(row, position): the page that
    holds a position of the row's sequence.
    """

    rows_per_task: int  # rows of a sequence that one task attends with, at most
    takes_any_count: bool  # whether it may be fewer; else a task has one row or rows_per_task

    def __init__(
        self, k: KernelBuilder, layout: KVLayout, vectors: Vectors, memory: AttentionMemory,
        position: Callable[[Scalar], Scalar], page: Callable[[Scalar, Scalar], Scalar],
    ) -> None:  # fmt: skip
        self.k, self.layout, self.config = k, layout, layout.config
        self.vectors, self.memory = vectors, memory
        self.position, self.page = position, page
        self.groups = self.config.num_heads // self.config.num_kv_heads

    @abstractmethod
    def num_tasks(self, num_groups: Scalar, num_splits: Scalar) -> Scalar:
        """Tasks of groups of up to rows_per_task rows, for all heads and splits of the context."""

    @abstractmethod
    def task(
        self, number: Scalar, num_groups: Scalar, num_splits: Scalar
    ) -> tuple[Scalar, Scalar, Scalar | None]:
        """The group of rows, the head and the split of a task, as `attend` takes them."""

    @abstractmethod
    def attend(
        self, row: Scalar, num_rows: Scalar | int, head: Scalar, layer: Scalar,
        split: Scalar | None = None,
    ) -> None:  # fmt: skip
        """Attention of `num_rows` rows of a sequence, from `row` on, to a split of their context.

        num_rows: an int, 1 or rows_per_task; if `takes_any_count`, an index up to rows_per_task.
        split: None for the whole context.
        """

    # Queries, keys and values

    def rotate_and_store(self, row: Scalar, head: Scalar, layer: Scalar) -> None:
        """Rotary embedding (Su et al. 2021, rotate-half form) of a KV head's queries and key.

        Queries are scaled and stored in `q`; key and value go to their page.
        """
        c, d = self.config, self.config.head_dim
        half = d // 2
        lanes = math.gcd(half, self.vectors.lanes)
        start = row * self.memory.qkv_width
        position = self.position(row)
        angles = self.memory.rope + position * d
        key, value = self._slots(row, position, layer, head)
        for g in range(self.groups):
            query = head * self.groups + g
            for i in range(0, half, lanes):
                rotated = self._rotated(start + query * d, angles, i, lanes)
                for feature, x in zip((i, i + half), rotated, strict=True):
                    at = row * self.memory.q_width + query * d + feature
                    self.memory.q[self.layout.operand.other].store_as(x * (1 / math.sqrt(d)), at)
        key_row = start + (head + c.num_heads) * d
        for i in range(0, half, lanes):
            rotated = self._rotated(key_row, angles, i, lanes)
            for feature, x in zip((i, i + half), rotated, strict=True):
                self._scatter(x, feature, key)
        value_row = start + (head + c.num_heads + c.num_kv_heads) * d
        for i in range(0, d, lanes):
            self._scatter(self.memory.qkv.load_vector(value_row + i, lanes), i, value)

    def store(self, start: Scalar, first: Scalar, count: Scalar, size: int, head: Scalar) -> None:
        """Store keys and values as they are, of positions first .. first + count - 1 of layer 0.

        start: the row of the sequence's position 0. Values behind them, up to first + size - 1,
        become zero: their softmax weights are zero, but zero times NaN would be NaN.
        """
        with self.k.loop(0, count) as i:
            self._store_key_value(start + first + i, first + i, head)
        with self.k.loop(count, size) as i:
            self._store_zero_value(start, first + i, head)

    def _store_key_value(self, row: Scalar, position: Scalar, head: Scalar) -> None:
        c, d, lanes = self.config, self.config.head_dim, self.layout.head_lanes
        key, value = self._slots(row, position, self.k.scalar(0, "index"), head)
        for first, at in ((c.num_heads, key), (c.num_heads + c.num_kv_heads, value)):
            start = row * self.memory.qkv_width + (head + first) * d
            for i in range(0, d, lanes):
                x = self.memory.qkv.load_vector(start + i, lanes)
                self._scatter(x.to(vector_type(lanes, "f32")), i, at)

    def _store_zero_value(self, row: Scalar, position: Scalar, head: Scalar) -> None:
        _, value = self._slots(row, position, self.k.scalar(0, "index"), head)
        lanes = self.layout.head_lanes
        for i in range(0, self.config.head_dim, lanes):
            self._scatter(self.k.scalar(0.0, vector_type(lanes, "f32")), i, value)

    def _rotated(self, row: Scalar, angles: Scalar, i: int, lanes: int) -> tuple[Scalar, Scalar]:
        """Features from i and from i + head_dim / 2 on of a head, rotated."""
        half = self.config.head_dim // 2
        x0, x1 = (self.memory.qkv.load_vector(row + i + h, lanes) for h in (0, half))
        cos, sin = (self.memory.floats.load_vector(angles + i + h, lanes) for h in (0, half))
        return x0 * cos - x1 * sin, x1 * cos + x0 * sin

    def _slots(
        self, row: Scalar, position: Scalar, layer: Scalar, head: Scalar
    ) -> tuple[Callable[[int], Scalar], Callable[[int], Scalar]]:
        """Where each feature of a position's key, and of its value, goes."""
        layout = self.layout
        slot = position % layout.page_size
        keys, values = layout.starts(self.page(row, position), layer, head)
        return (
            lambda feature: layout.key_at(keys, slot, feature),
            lambda feature: layout.value_at(values, slot, feature),
        )

    def _scatter(self, x: Scalar, first: int, at: Callable[[int], Scalar]) -> None:
        """Store the elements of a vector, features `first` and on, one by one."""
        cache, lanes = self.memory.cache[self.layout.operand.dtype], lanes_of(x)
        x = self.k.convert(x, cache.dtype)
        for lane in range(lanes):
            cache.store(self.k.element(x, lane), at(first + lane))

    def starts(self, context: ContextSlice, position: Scalar) -> tuple[Scalar, Scalar]:
        """Where a head's keys and values begin in the page that holds a position, in elements."""
        page = self.page(context.row, position)
        return self.layout.starts(page, context.layer, context.head)
