"""A call of a kernel, and what is known of those that read and write pages of a KV cache.

Their tensors do not tell how much of them they read, nor their arguments how long loops are: that
depends on how many tokens a row has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from compile.formats.layout import ITEM_BYTES
from compile.models.spec import LlamaConfig
from compile.tools.gpu_registers import ARGUMENTS

STORING, ATTENDING = "store_tokens_", "attend_"  # how names of such kernels begin
START_BINDING = 2  # of these: the positions of first tokens; after it, those behind the last
STARTS = 1 << 20  # where these lie for `compile.tools.gpu_walk`, behind the arguments' address


@dataclass(frozen=True)
class Dispatch:
    """One call of a kernel. share: of what the first workgroup does, what all do on average."""

    name: str
    workgroups: int
    num_bytes: int
    operations: int
    weights: int = 0  # numbers in the matrix that a product reads
    arguments: dict[int, int] = field(default_factory=dict, compare=False)  # offset -> 32 bits
    share: float = 1.0


def is_paged(name: str) -> bool:
    """Whether a kernel reads or writes pages."""
    return name.startswith((STORING, ATTENDING))


@dataclass(frozen=True)
class PagedCall:
    """A call for `rows` rows of `length` tokens, the last of which sees `context` tokens."""

    config: LlamaConfig
    kv_dtype: str
    rows: int
    length: int
    context: int

    def told(self, dispatch: Dispatch) -> Dispatch:
        """A kernel's call; `dispatch` knows the bytes of its result, if that is no cache."""
        c, tokens = self.config, self.rows * self.length
        numbers, queries = 2 * c.num_kv_heads * c.head_dim, c.num_heads * c.head_dim
        arguments = dispatch.arguments | self._positions()
        item, cached = ITEM_BYTES["f32"], ITEM_BYTES[self.kv_dtype]
        if dispatch.name.startswith(STORING):
            num_bytes = tokens * numbers * (item + cached)
            return replace(dispatch, num_bytes=num_bytes, arguments=arguments)
        new = queries if self.length > 1 else queries + numbers  # which decode stores as well
        read = tokens * new * item + self.rows * self.context * numbers * cached
        seen = self.context - (self.length - 1) / 2  # tokens, on average
        return replace(
            dispatch, num_bytes=dispatch.num_bytes + read, arguments=arguments,
            operations=round(4 * tokens * queries * seen), share=seen / self.context,
        )  # fmt: skip

    def _positions(self) -> dict[int, int]:
        """Where a row begins and ends, as arguments."""
        given: dict[int, int] = {}
        positions = self.context - self.length, self.context
        for i, position in enumerate(positions):
            place, at = ARGUMENTS + STARTS + 8 * i, 8 * (START_BINDING + i)
            given |= {at: place & 0xFFFFFFFF, at + 4: place >> 32}
            given |= {STARTS + 8 * i: position, STARTS + 8 * i + 4: 0}
        return given
