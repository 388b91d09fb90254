"""The blocks of GGUF files that are carried over as they are: each weight stays what it was."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.formats.blocks import BLOCK_TYPES, ZERO, Groups

# By GGUF's type: ours, and the bytes of a block
GGUF_BLOCKS = {
    "Q8_0": ("int8", 34), "Q4_0": ("int4", 18), "Q4_1": ("int4", 20), "Q5_0": ("q5_0", 22),
    "Q5_1": ("q5_1", 24), "Q4_K": ("q4_k", 144), "Q5_K": ("q5_k", 176), "Q6_K": ("q6_k", 210),
}  # fmt: skip

Bytes = NDArray[np.uint8]
# By how much to shift bytes to the right for their halves, pairs of bits and bits
_NIBBLES, _PAIRS, _BITS = (
    np.array(shifts, np.uint8)[:, None] for shifts in ((0, 4), (0, 2, 4, 6), range(8))
)


def from_gguf(raw: Bytes, kind: str) -> Groups | None:
    """Rows [n, bytes] of GGUF blocks of a type of GGUF_BLOCKS; None for other types.

    Q4_0 is scale * (code - 8), so its minimum is -8 * scale, exact in f16.
    """
    if kind not in GGUF_BLOCKS:
        return None
    name, block_bytes = GGUF_BLOCKS[kind]
    blocks = np.ascontiguousarray(raw).reshape(len(raw), -1, block_bytes)
    read = {"Q4_K": _k_blocks, "Q5_K": _k_blocks, "Q6_K": _q6_k}.get(kind, _blocks_of_32)
    codes, numbers, factors = read(blocks, kind)
    return Groups(
        BLOCK_TYPES[name], codes.reshape(len(raw), -1),
        [values.reshape(len(raw), -1) for values in numbers],
        [values.reshape(len(raw), -1) for values in factors],
    )  # fmt: skip


_Parts = tuple[NDArray[Any], list[NDArray[Any]], list[NDArray[np.float16]]]


def _blocks_of_32(blocks: Bytes, kind: str) -> _Parts:
    """f16 scale, and f16 minimum of types _1; then codes, of 5 bits behind their fifth bits."""
    scales = _halves(blocks[..., :2])
    if kind == "Q8_0":
        return blocks[..., 2:] ^ np.uint8(ZERO), [scales], []  # two's complement to an offset
    codes = _nibbles(blocks[..., -16:])
    if kind.startswith("Q5"):
        codes = codes | np.unpackbits(blocks[..., -20:-16], axis=-1, bitorder="little") << 4
    if kind == "Q5_0":
        return codes, [scales], []
    if kind == "Q4_0":
        with np.errstate(over="ignore", invalid="ignore"):
            return codes, [scales, scales * np.float16(-8)], []
    return codes, [scales, _halves(blocks[..., 2:4])], []


def _k_blocks(blocks: Bytes, kind: str) -> _Parts:
    """Q4_K and Q5_K: d, dmin, eight scales and minima of 6 bits in 12 bytes, fifth bits, codes.

    The lower six bits of the first four bytes are scales 0 to 3, those of the next four minima 0 to
    3. The last four bytes have the lower halves of scales 4 to 7 and, above, of minima 4 to 7,
    whose upper two bits are those of the first eight bytes.
    """
    factors = [_halves(blocks[..., :2]), _halves(blocks[..., 2:4])]
    scales, minima, low = (blocks[..., at : at + 4] for at in (4, 8, 12))
    numbers = [
        np.concatenate([first & 63, low >> shift & 15 | first >> 6 << 4], axis=-1)
        for first, shift in ((scales, 0), (minima, 4))
    ]
    codes = _nibbles(blocks[..., -128:].reshape(*blocks.shape[:2], 4, 32))
    codes = codes.reshape(*blocks.shape[:2], 8, 32)
    if kind == "Q5_K":  # byte c has the bits of column c of all groups
        codes = codes | (blocks[..., None, 16:48] >> _BITS & 1) << 4
    return codes, numbers, factors


def _q6_k(blocks: Bytes, kind: str) -> _Parts:
    """Lower four bits of the codes, upper two, 16 scales, d; each half of the block by itself."""
    halves = (*blocks.shape[:2], 2)
    low = _nibbles(blocks[..., :128].reshape(*halves, 64)).reshape(*halves, 4, 32)
    high = blocks[..., 128:192].reshape(*halves, 1, 32) >> _PAIRS & 3
    return low | high << 4, [blocks[..., 192:208].view(np.int8)], [_halves(blocks[..., 208:])]


def _halves(raw: Bytes) -> NDArray[np.float16]:
    """Bytes [..., 2] as f16 [..., 1]."""
    return raw.copy().view(np.float16)


def _nibbles(raw: Bytes) -> NDArray[Any]:
    """Bytes [..., n] as all their lower halves and then all their upper ones [..., 2 n]."""
    return (raw[..., None, :] >> _NIBBLES & 15).reshape(*raw.shape[:-1], -1)
