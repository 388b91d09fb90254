"""KVLayout: where the keys and values of a position lie in the KV cache of a CPU.

A layer of a page of P positions holds keys [kv_heads, P/p, head_dim/u, p, u], then values
[kv_heads, P/u, head_dim, u]. Keys are read as vectors of p positions and values as vectors of
features, both in units of u elements: pairs of bf16 where the CPU multiplies pairs, else single
ones.
"""

from __future__ import annotations

import math

from compile.cpu.operands import operand
from compile.mlir.values import Scalar
from compile.models.spec import Heads
from compile.target import Vectors


class KVLayout:
    """The cache's layout for a model; `operand` says how keys and values are multiplied."""

    def __init__(self, config: Heads, page_size: int, kv_dtype: str, vectors: Vectors) -> None:
        self.config, self.page_size = config, page_size
        self.position_lanes = math.gcd(page_size, vectors.lanes)
        self.head_lanes = math.gcd(config.head_dim, vectors.lanes)
        self.operand = operand(kv_dtype, vectors, self.position_lanes, self.head_lanes)
        self.page_elements = (
            config.num_layers * 2 * config.num_kv_heads * page_size * config.head_dim
        )

    def starts(self, page: Scalar, layer: Scalar, head: Scalar) -> tuple[Scalar, Scalar]:
        """The elements where the keys and the values of a KV head begin in a page."""
        c = self.config
        size = self.page_size * c.head_dim  # of one head
        start = page * self.page_elements + layer * (2 * c.num_kv_heads * size)
        return start + head * size, start + (head + c.num_kv_heads) * size

    def key_at(self, start: Scalar, slot: Scalar, feature: int) -> Scalar:
        """The element of one feature of a key; start: of the head's keys, slot: in the page."""
        p, u = self.position_lanes, self.operand.unit
        vectors = start + slot // p * (self.config.head_dim * p)  # of the same p positions
        return vectors + feature // u * (p * u) + slot % p * u + feature % u

    def value_at(self, start: Scalar, slot: Scalar, feature: int) -> Scalar:
        """The element of one feature of a value; start: of the head's values, slot: in the page."""
        u = self.operand.unit
        return start + slot // u * (self.config.head_dim * u) + feature * u + slot % u
