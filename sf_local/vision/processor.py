"""From pixels to the tiles that a vision model reads, and the text that stands for them.

Does what transformers' processors of Idefics3 (and SmolVLM) and LLaVA do on Pillow, to the last
bit. Knows nothing of files, tokenizers or engines. Pillow is imported with the first image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

_MAX_IDEFICS3_SIDE = 4096  # transformers scales larger images down once more


@dataclass(frozen=True)
class ImageSettings:
    """How a model wants its images; all of it can be written as JSON.

    family: "idefics3" scales an image until its longer side is resize_to, then to a grid of whole
    tiles (if it splits), and adds a tile of the whole; "llava" scales the shorter side to resize_to
    and crops one tile from the middle.

    tile_size: pixels along a tile's side. tokens_per_tile: image tokens that stand for it.
    image_token, image_token_id: such a token. resample: number of a Pillow filter. rescale, mean,
    std: of red, green and blue, what the model reads is (level * rescale - mean) / std.
    """

    family: str
    tile_size: int
    tokens_per_tile: int
    image_token: str
    image_token_id: int
    resize_to: int
    splits: bool
    resample: int
    rescale: float
    mean: list[float]
    std: list[float]

    def check(self) -> None:
        """Raise ValueError that says which setting is wrong."""
        for name, (rule, holds) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name}={value!r} must be {rule}")
        if self.family == "llava" and self.splits:
            raise ValueError("splits=True must be False: LLaVA reads one tile of an image")
        if self.family == "llava" and self.resize_to < self.tile_size:
            raise ValueError(
                f"resize_to={self.resize_to} must be at least tile_size={self.tile_size}"
            )
        if self.family == "idefics3" and self.resize_to > _MAX_IDEFICS3_SIDE:
            raise ValueError(f"resize_to={self.resize_to} must be at most {_MAX_IDEFICS3_SIDE}")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return _is_int(value, 0) or (isinstance(value, float) and math.isfinite(value))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))


_Rule = tuple[str, Callable[[Any], bool]]
_SIZE: _Rule = ("an int of at least 1", lambda value: _is_int(value, 1))
_RULES: dict[str, _Rule] = {
    "family": ('"idefics3" or "llava"', lambda value: value in ("idefics3", "llava")),
    "tile_size": _SIZE,
    "tokens_per_tile": _SIZE,
    "image_token": ("a str, not empty", lambda value: isinstance(value, str) and value != ""),
    "image_token_id": ("an int of at least 0", lambda value: _is_int(value, 0)),
    "resize_to": _SIZE,
    "splits": ("a bool", lambda value: isinstance(value, bool)),
    "resample": ("an int from 0 to 5", lambda value: _is_int(value, 0) and value <= 5),
    "rescale": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "mean": ("a list of 3 numbers", _are_numbers),
    "std": ("a list of 3 numbers above 0", lambda value: _are_numbers(value) and min(value) > 0),
}


@dataclass(frozen=True, eq=False)
class Tiles:
    """What a model reads of one image.

    pixels: uint8 [T, tile, tile, 3]. rows, columns: of the grid that the tiles but the last form,
    row by row; the last is the whole image. 0, 0: it is the only one.
    """

    pixels: Pixels
    rows: int
    columns: int


class ImageProcessor:
    """Cuts images for one model; usable from any thread. Raises ValueError for wrong settings."""

    def __init__(self, settings: ImageSettings) -> None:
        settings.check()
        self._settings = settings
        # float32 [3, 1, 1]
        self._mean, self._std = np.array([settings.mean, settings.std], np.float32)[..., None, None]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles that an image of this size is cut to; 0, 0 if it is not."""
        if not self._settings.splits:
            return 0, 0
        tile = self._settings.tile_size
        height, width = self._resized(height, width)
        ratio = width / height
        # the longer side first, rounded up; the shorter one follows, in this arithmetic
        if width >= height:
            columns = math.ceil(width / tile)
            rows = math.ceil(int(columns * tile / ratio) / tile)
        else:
            rows = math.ceil(height / tile)
            columns = math.ceil(int(rows * tile * ratio) / tile)
        return (rows, columns) if rows * columns > 1 else (0, 0)

    def tiles(self, pixels: Pixels) -> Tiles:
        """The tiles of an image, uint8 [height, width, 3]."""
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
        """float32 [T, 3, tile, tile], what the model reads, of uint8 [T, tile, tile, 3]."""
        levels = tiles.transpose(0, 3, 1, 2)
        values = np.empty(levels.shape, np.float32)
        # in double precision and rounded once, as transformers does
        np.multiply(levels, self._settings.rescale, values, dtype=np.float64, casting="unsafe")
        values -= self._mean
        values /= self._std
        return values

    def marker_text(self, rows: int, columns: int) -> str:
        """What replaces an image's marker in a prompt, for a grid of tiles as `grid` returns it."""
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
        """The height and width to which an image is scaled first."""
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
    """The next even number, but 1 for 0: as Idefics3 rounds the shorter side."""
    return max(side + side % 2, 1)
