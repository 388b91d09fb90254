"""Random pictures, and the settings of known image processors."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from sf_local.artifact.manifest import ImageSettings


def picture(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    return PIL.Image.fromarray(pixels.astype(np.uint8)).resize((width, height))


def png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]


CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


SMOLVLM = ImageSettings(
    family="idefics3", tile_size=512, tokens_per_tile=64, image_token="<image>",
    image_token_id=49190, resize_to=2048, splits=True, resample=1, rescale=1 / 255,
    mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5],
)  # fmt: skip


LLAVA = ImageSettings(
    family="llava", tile_size=336, tokens_per_tile=576, image_token="<image>",
    image_token_id=32000, resize_to=336, splits=False, resample=3, rescale=0.00392156862745098,
    mean=CLIP_MEAN, std=CLIP_STD,
)  # fmt: skip


SMALL_SMOLVLM = replace(SMOLVLM, tile_size=16, resize_to=64)


SMALL_LLAVA = replace(LLAVA, tile_size=16, resize_to=16)


def noise(height: int, width: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(height * 10_000 + width)
    return random.integers(0, 256, (height, width, 3), np.uint8)
