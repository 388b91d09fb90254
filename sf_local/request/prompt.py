"""Prompt: token ids with image tiles in the place of some of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(eq=False)
class Tile:
    """A tile of an image, shared by all requests that show it.

    pixels: uint8 [size, size, 3]; None once the tile is encoded. embeds: its embeddings, f32
    [tokens, H]; empty before.
    """

    pixels: NDArray[np.uint8] | None
    embeds: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @property
    def num_bytes(self) -> int:
        """Memory that the tile takes now."""
        pixels = self.pixels  # once, as another thread may set it to None
        return self.embeds.nbytes + (0 if pixels is None else pixels.nbytes)


@dataclass(frozen=True)
class Span:
    """Positions [start, end) of a prompt, whose embeddings are those of an image's tile."""

    start: int
    end: int
    tile: Tile
    image: CutImage  # so that the image stays in memory, and is not cut again for other prompts


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is computed.

    ids: token ids, with image tokens where tiles are. keys: what the prefix cache compares: token
    ids, but for image tokens negative numbers that only the same pixels have. spans: where tiles
    are. unexpanded: token ids with one marker an image; empty if there are no images. text: what
    was encoded; None for a prompt of token ids.
    """

    ids: list[int]
    keys: list[int]
    spans: list[Span] = field(default_factory=list)
    unexpanded: list[int] = field(default_factory=list)
    text: str | None = None

    @property
    def plain(self) -> list[int]:
        """Token ids with one marker an image."""
        return self.unexpanded or self.ids


@dataclass(frozen=True, eq=False)
class CutImage:
    """An image, cut into tiles.

    rows, columns: the grid of all tiles but the last, which shows the whole image; 0, 0 if it is
    the only one. number: identifies the image's content.
    """

    rows: int
    columns: int
    tiles: tuple[Tile, ...]
    number: int

    @property
    def num_bytes(self) -> int:
        """Memory that its tiles take now."""
        return sum(tile.num_bytes for tile in self.tiles)
