"""ImageProcessor: cuts pixels into the tiles that a vision model reads, and writes their text.

Gives the same bits as transformers' processors of Idefics3 (and SmolVLM) and LLaVA with Pillow,
which is imported with the first image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sf_local.artifact.manifest import ImageSettings

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of one image.

    pixels: uint8 [T, tile_size, tile_size, 3]. rows, columns: the grid of all tiles but the last,
    which shows the whole image; 0, 0 if it is the only one.
    """

    pixels: Pixels
    rows: int
    columns: int


class ImageProcessor:
    """Cuts images for one model, in any thread. Raises ValueError for settings out of range."""

    def __init__(self, settings: ImageSettings) -> None:
        settings.check()
        self._settings = settings
        # float32 [3, 1, 1]
        self._mean, self._std = np.array([settings.mean, settings.std], np.float32)[..., None, None]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the grid for an image of this size; 0, 0 if it becomes one tile."""
        if not self._settings.splits:
            return 0, 0
        tile = self._settings.tile_size
        height, width = self._resized(height, width)
        ratio = width / height
        # The longer side is rounded up to whole tiles, and the shorter one then follows from it.
        if width >= height:
            columns = math.ceil(width / tile)
            rows = math.ceil(int(columns * tile / ratio) / tile)
        else:
            rows = math.ceil(height / tile)
            columns = math.ceil(int(rows * tile * ratio) / tile)
        return (rows, columns) if rows * columns > 1 else (0, 0)

    def tiles(self, pixels: Pixels) -> Tiles:
        """Cut an image, uint8 [height, width, 3]."""
        height, width, _ = pixels.shape
        tile = self._settings.tile_size
        image = self._scale(pixels, *self._resized(height, width))
        if self._settings.family == "llava":
            top, left = (image.shape[0] - tile) // 2, (image.shape[1] - tile) // 2
            return Tiles(image[None, top : top + tile, left : left + tile].copy(), 0, 0)
        rows, columns = self.grid(height, width)
        if not rows:
            return Tiles(self._scale(image, tile, tile)[None], 0, 0)
        image = self._scale(image, rows * tile, columns * tile)
        grid = image.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
        parts, whole = grid.reshape(-1, tile, tile, 3), self._scale(image, tile, tile)
        return Tiles(np.concatenate([parts, whole[None]]), rows, columns)

    def normalized(self, tiles: Pixels) -> NDArray[np.float32]:
        """The model's input f32 [T, 3, tile_size, tile_size] for tiles uint8 [T, tile_size,
        tile_size, 3]."""
        levels = tiles.transpose(0, 3, 1, 2)
        values = np.empty(levels.shape, np.float32)
        # In double precision, and rounded once, as transformers does.
        np.multiply(levels, self._settings.rescale, values, dtype=np.float64, casting="unsafe")
        values -= self._mean
        values /= self._std
        return values

    def marker_text(self, rows: int, columns: int) -> str:
        """The text that replaces an image's marker in a prompt, for a grid as `grid` returns it."""
        tokens = self._settings.image_token * self._settings.tokens_per_tile
        if self._settings.family == "llava":
            return tokens
        fence = "<fake_token_around_image>"
        whole = f"{fence}<global-img>{tokens}{fence}"
        if not rows:
            return whole
        lines = [
            "".join(f"{fence}<row_{row}_col_{column}>{tokens}" for column in range(1, columns + 1))
            for row in range(1, rows + 1)
        ]
        return "\n".join([*lines, "", whole])

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image is scaled first."""
        size = self._settings.resize_to
        if self._settings.family == "llava":  # the shorter side
            if width <= height:
                return int(size * height / width), size
            return size, int(size * width / height)
        ratio = width / height
        if width >= height:
            return _even(int(size / ratio)), size
        return size, _even(int(size * ratio))

    def _scale(self, pixels: Pixels, height: int, width: int) -> Pixels:
        from PIL import Image

        resample = Image.Resampling(self._settings.resample)
        return np.asarray(Image.fromarray(pixels).resize((width, height), resample))


def _even(side: int) -> int:
    """The side rounded up to an even number, but 1 for 0, as Idefics3 does."""
    return max(side + side % 2, 1)
