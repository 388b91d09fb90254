"""What attention reads and writes on GPUs: heads of new tokens, and the pages of a KV cache.

Shapes: N rows of S tokens each (decode: one), B pages a row, P tokens a page, L layers, H query
heads, KH KV heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compile.mlir.executable import ExecutableBuilder
from compile.mlir.values import Scalar
from compile.models.spec import LlamaConfig
from compile.options import ModelOptions

MAX_QUERIES = 8  # heads of a workgroup, as many as registers hold


@dataclass(frozen=True)
class Heads:
    """Sizes of attention, and of the cache [pages, L, P, 2, KH, D]."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    page_size: int
    max_seq_len: int
    kv_dtype: str
    shares: int = 1  # workgroups among which a KV head's queries are shared, if they can be

    @classmethod
    def of(cls, config: LlamaConfig, options: ModelOptions) -> Heads:
        """Those of a model."""
        return cls(
            config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers,
            options.page_size, options.max_seq_len, options.kv_dtype,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Of what differs between models."""
        shares = f"_{self.shares}_shares" if self.shares > 1 else ""
        return f"{self.kv_dtype}_{self.num_heads}x{self.num_kv_heads}x{self.head_dim}{shares}"

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def token(self) -> int:
        """Numbers of a token in the cache, of one layer."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def features(self) -> int:
        """Of a row of queries, keys and values."""
        return self.num_heads * self.head_dim + self.token

    @property
    def queries(self) -> int:
        """Query heads of a workgroup: all of a KV head, or a part of them."""
        most = min(-(-self.group // self.shares), MAX_QUERIES)
        return next(n for n in range(most, 0, -1) if self.group % n == 0)

    @property
    def scale(self) -> float:
        """Of scores: the usual one, and that of powers of two."""
        return math.log2(math.e) / math.sqrt(self.head_dim)

    @property
    def summed(self) -> int:
        """Numbers that a split of a row leaves: of each head D sums, its maximum and its sum."""
        return self.num_heads * (self.head_dim + 2)


class Pages:
    """Bindings and constants of a kernel that attends to pages, as `DecodeAttention` has them.

    dtype: of its last binding, the result; None if it has none. is_prefill: the last constant is S,
    and not how many splits a row has.
    """

    def __init__(
        self, k: ExecutableBuilder, heads: Heads, dtype: str | None, *, is_prefill: bool = False
    ) -> None:
        self.k, self.heads = k, heads
        self.qkv, self.rope = (k.view(k.binding(read_only=True), "f32") for _ in range(2))
        self.starts, self.ends, self._ids = (
            k.view(k.binding(read_only=True), "i64") for _ in range(3)
        )
        self._cache = k.view(k.binding(), heads.kv_dtype)
        self._out = k.view(k.binding(), dtype) if dtype else None
        self.num_rows, self.num_pages, layer, count = (k.constant() for _ in range(4))
        self._layer = layer.to("i32")
        self.num_tokens = count if is_prefill else None
        self.splits = k.scalar(1, "i32") if is_prefill else count.to("i32")

    # The cache

    def page_of(self, row: Scalar, position: Scalar) -> Scalar:
        """The page of a position, both i32."""
        column = (position // self.heads.page_size).to_unsigned("index")
        return self._ids.load(row * self.num_pages + column).to("i32")

    def at(self, page: Scalar, position: Scalar, head: Scalar, start: Scalar) -> Scalar:
        """Where numbers of a position's key are in the cache, which has fewer than 2^31 tokens."""
        heads, size = self.heads, self.heads.page_size
        token = (page * heads.num_layers + self._layer) * size + position % size
        return token.to_unsigned("index") * heads.token + head * heads.head_dim + start

    def value_at(self, key: Scalar) -> Scalar:
        """Where numbers of a value are, of those of its key."""
        return key + self.heads.token // 2

    def load(self, at: Scalar, piece: int) -> Scalar:
        """Numbers of a key or value."""
        return self._cache.load_vector(at, piece)

    def store(self, numbers: Scalar, at: Scalar) -> None:
        """Store numbers of a key or value, which have been rounded to `kv_dtype`."""
        self._cache.store_vector(numbers, at)

    # Results

    def finish(self, head: Scalar, place: Scalar, total: Scalar) -> None:
        """Store f32 numbers from `place` on of what a head attends to, one of all tokens' heads."""
        out = self._out
        assert out
        at = head * self.heads.head_dim + place
        if total.dtype.startswith("vector"):
            out.store_as(total, at)
        else:
            out.store(total.to(out.dtype), at)

    def leave(
        self, row: Scalar, head: Scalar, split: Scalar, place: Scalar, total: Scalar, top: Scalar,
        weight: Scalar,
    ) -> None:  # fmt: skip
        """Store number `place` of what a split leaves of a head's sum, largest score and sum of
        exponentials."""
        heads, out, zero = self.heads, self._out, self.k.scalar(0.0, "f32")
        assert out
        start = (split * self.num_rows + row) * heads.summed
        out.store(total, start + head * heads.head_dim + place)
        with self.k.when(place.equals(0)):
            at = start + heads.num_heads * heads.head_dim + head * 2
            out.store(zero.is_below(weight).select(top, zero), at)
            out.store(weight, at + 1)


class Token:
    """A new token of a row, at `position` (i32).

    number: which of the row's S tokens; None in decode. row: of the batch; out_row: of queries,
    keys and values, and of the result. is_valid: whether it is stored; what pads a batch or a row
    is not. num_before: tokens before it that it attends to; in prefill none if it is not valid.
    """

    def __init__(self, pages: Pages, row: Scalar, number: Scalar | None = None) -> None:
        k, heads = pages.k, pages.heads
        self.pages, self.row, self.out_row = pages, row, row
        start = pages.starts.load(row)
        if number:
            assert pages.num_tokens
            self.out_row = row * pages.num_tokens + number
            start = start + number.to("i64")
        self.is_valid = start.less(pages.ends.load(row))
        end = (pages.num_pages * heads.page_size).to("i32")
        position = start.to("i32").minimum(end - 1)
        self.position = position.clamp(0, k.scalar(heads.max_seq_len - 1, "i32"))
        self.num_before = self.position
        if number:
            self.num_before = self.is_valid.select(self.position, k.scalar(0, "i32"))

    def chunks_before(self, size: int) -> Scalar:
        """How many chunks of `size` tokens these are."""
        return (self.num_before + (size - 1)) // size

    def numbers(self, head: Scalar, start: Scalar, piece: int) -> Scalar:
        """`piece` numbers from `start` on of a head: of a query, a key or a value."""
        heads = self.pages.heads
        at = self.out_row * heads.features + head * heads.head_dim + start
        return self.pages.qkv.load_vector(at, piece)

    def rotated(self, head: Scalar, start: Scalar, piece: int) -> Scalar:
        """The same of a query or key, rotated (Su et al. 2021, rotate-half form)."""
        k, half = self.pages.k, self.pages.heads.head_dim // 2
        is_low = start.less(k.scalar(half, "index"))
        within = is_low.select(start, start - half)
        angles = self.position.to_unsigned("index") * (2 * half) + within
        cosine, sine = (self.pages.rope.load_vector(angles + i, piece) for i in (0, half))
        other = self.numbers(head, is_low.select(start + half, within), piece)
        sign = is_low.select(k.scalar(-1.0, "f32"), k.scalar(1.0, "f32"))
        return self.numbers(head, start, piece) * cosine + other * (sine * k.broadcast(sign, piece))

    def place(self, head: Scalar, start: Scalar) -> Scalar:
        """Where numbers of its key belong in the cache."""
        page = self.pages.page_of(self.row, self.position)
        return self.pages.at(page, self.position, head, start)
