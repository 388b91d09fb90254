"""The reference of vision models itself, judged by transformers on random ones.

It takes the environment `torch` of `examples/install_peers.sh FOLDER`, named by
SF_LOCAL_PEERS=FOLDER.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compile.models.spec import LlamaConfig, VisionConfig
from tests.support.tiny import TINY, peer
from tests.support.vision_reference import (
    IDEFICS3,
    IMAGE_TOKEN,
    LLAVA,
    ask_transformers,
    encode,
    forward_images,
    random_model,
    write_vision_folder,
)

UNTIED = replace(TINY, tied_embeddings=False)
SCALE_1 = replace(IDEFICS3, scale_factor=1, num_layers=1)


def prompt(config: VisionConfig, tiles: list[int]) -> list[int]:
    words = [[7 + i, 30 + i] for i in range(len(tiles) + 1)]
    images = [[IMAGE_TOKEN] * (config.tokens_per_tile * count) for count in tiles]
    return [1, *words[0], *(x for i, w in zip(images, words[1:], strict=True) for x in i + w)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "text", "layout", "tiles"),
    [
        (IDEFICS3, TINY, "idefics3", [1]),
        (IDEFICS3, TINY, "idefics3", [1, 1]),
        (IDEFICS3, UNTIED, "idefics3", [5, 1, 3]),
        (SCALE_1, TINY, "idefics3", [2]),
        (LLAVA, TINY, "llava", [1]),
        (LLAVA, UNTIED, "llava", [1, 1, 1]),
        (LLAVA, UNTIED, "llava5", [1]),
        (LLAVA, UNTIED, "llava_in_memory", [1]),
    ],
)
def test_agrees_with_transformers(
    tmp_path: Path, config: VisionConfig, text: LlamaConfig, layout: str, tiles: list[int]
) -> None:
    """Prompts of images between words, each of so many tiles."""
    python = peer("torch")
    weights = random_model(text, config, seed=7)
    folder = write_vision_folder(tmp_path / "model", text, config, weights, layout=layout)
    shape = (sum(tiles), 3, config.image_size, config.image_size)
    pixels = np.random.default_rng(0).uniform(-2, 2, shape).astype(np.float32)
    tokens = prompt(config, tiles)
    [theirs] = ask_transformers(python, folder, [{"pixels": pixels, "tokens": tokens}])
    for name, ours in (
        ("embeddings", encode(config, weights, pixels)),
        ("logits", forward_images(text, config, weights, tokens, pixels)),
    ):
        assert theirs[name].shape == ours.shape
        assert np.abs(theirs[name] - ours).max() < 1e-5 * np.abs(ours).max(), name
