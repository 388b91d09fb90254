"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(eq=False)
class Tile:
    """A tile of an image, shared by all requests that show it.

    pixels uint8 [size, size, 3], until it is encoded: embeds f32 [tokens, H].
    """

    pixels: NDArray[np.uint8] | None
    embeds: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @property
    def num_bytes(self) -> int:
        pixels = self.pixels  # which another thread may let go of
        return self.embeds.nbytes + (0 if pixels is None else pixels.nbytes)


@dataclass(frozen=True)
class Span:
    """Positions start .. end - 1 of a prompt, which the embeddings of an image's tile take."""

    start: int
    end: int
    tile: Tile
    image: CutImage  # kept as long as a prompt shows it, and so not cut again


@dataclass(frozen=True)
class Prompt:
    """Token ids; where images are, their `keys` are numbers that only the same pixels have."""

    ids: list[int]
    keys: list[int]
    spans: list[Span] = field(default_factory=list)
    unexpanded: list[int] = field(default_factory=list)

    @property
    def plain(self) -> list[int]:
        """Token ids with a marker for each image."""
        return self.unexpanded or self.ids


@dataclass(frozen=True, eq=False)
class CutImage:
    """The grid of an image's tiles, all of them, and a number for what they show."""

    rows: int
    columns: int
    tiles: tuple[Tile, ...]
    number: int

    @property
    def num_bytes(self) -> int:
        return sum(tile.num_bytes for tile in self.tiles)
