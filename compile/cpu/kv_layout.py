"""TODO."""

from __future__ import annotations

import math

from compile.cpu.matmul import operand
from compile.mlir.builder import Scalar
from compile.models.spec import Heads
from compile.target import Vectors


class KVLayout:
    """Where keys and values of a token lie in the cache; `operand`: how they are multiplied."""

    def __init__(self, config: Heads, page_size: int, kv_dtype: str, vectors: Vectors) -> None:
        self.config, self.page_size = config, page_size
        self.position_lanes = math.gcd(page_size, vectors.lanes)
        self.head_lanes = math.gcd(config.head_dim, vectors.lanes)
        # Pairs of features and pairs of positions.
        lanes = self.position_lanes, self.head_lanes
        self.operand = operand(kv_dtype, vectors, *lanes)
        self.page_elements = (
            config.num_layers * 2 * config.num_kv_heads * page_size * config.head_dim
        )

    def starts(self, page: Scalar, layer: Scalar, head: Scalar) -> tuple[Scalar, Scalar]:
        """Of the keys and of the values of a KV head in a page, in elements."""
        c = self.config
        size = self.page_size * c.head_dim  # of one head
        start = page * self.page_elements + layer * (2 * c.num_kv_heads * size)
        return start + head * size, start + (head + c.num_kv_heads) * size

    def key_at(self, start: Scalar, slot: Scalar, feature: int) -> Scalar:
        p, u = self.position_lanes, self.operand.unit
        tile = start + slot // p * (self.config.head_dim * p)
        return tile + feature // u * (p * u) + slot % p * u + feature % u

    def value_at(self, start: Scalar, slot: Scalar, feature: int) -> Scalar:
        u = self.operand.unit
        return start + slot // u * (self.config.head_dim * u) + feature * u + slot % u
