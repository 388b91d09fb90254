"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sf_local.errors import EngineError
from sf_local.model.arrays import Argument

MIN_WIDTH = 2  # columns of a page table that amdsharktank's code needs


VECTOR = 16  # positions that one step of a CPU's attention adds up


def prefill_name(inputs: Mapping[str, Argument]) -> str:
    return "prefill_embeds" if "embeds" in inputs else "prefill"


def fitting_batch(sizes: Sequence[int], count: int) -> int:
    """The smallest compiled batch that holds `count` rows."""
    for size in sizes:
        if size >= count:
            return size
    raise EngineError(f"{count} rows do not fit the largest compiled batch, {sizes[-1]}")
