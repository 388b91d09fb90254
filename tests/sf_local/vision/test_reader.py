"""Prompts with images in them: positions, the keys they are cached by, and the cache of images."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sf_local.artifact.manifest import ImageSettings
from sf_local.errors import MismatchError, RequestError
from sf_local.request.prompt import CutImage, Prompt, Tile
from sf_local.text.tokenizer import Tokenizer
from sf_local.vision.processor import ImageProcessor
from sf_local.vision.reader import ImageCache, ImageReader
from tests.support.pictures import SMALL_LLAVA, SMALL_SMOLVLM, noise
from tests.support.vision_reference import ADDED_TOKENS, IMAGE_TOKEN, write_tokenizer

IDEFICS3 = replace(SMALL_SMOLVLM, image_token_id=IMAGE_TOKEN, tokens_per_tile=3)
LLAVA = replace(SMALL_LLAVA, image_token_id=IMAGE_TOKEN, tokens_per_tile=5)
MOST = 10_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 300, ADDED_TOKENS, "")
    return Tokenizer(folder)


def reader(tokenizer: Tokenizer, settings: ImageSettings = IDEFICS3) -> ImageReader:
    return ImageReader(settings, tokenizer, 1 << 20, allow_urls=False)


def picture(seed: int, height: int = 30, width: int = 20) -> Image.Image:
    return Image.fromarray(noise(height, width) ^ np.uint8(seed))


def shown(prompt: Prompt) -> list[int]:
    """The positions that tiles take."""
    return [position for span in prompt.spans for position in range(span.start, span.end)]


@given(
    parts=st.lists(st.integers(3, 200) | st.tuples(st.integers(0, 3), st.booleans()), max_size=9)
)
@pytest.mark.parametrize("settings", [IDEFICS3, LLAVA], ids=["idefics3", "llava"])
def test_where_images_go(
    tokenizer: Tokenizer, settings: ImageSettings, parts: Sequence[int | tuple[int, bool]]
) -> None:
    """Their markers' text is written in the place of each marker, and tiles over it."""
    images = [picture(part[0], width=60 if part[1] else 20)
              for part in parts if not isinstance(part, int)]  # fmt: skip
    ids = [part if isinstance(part, int) else IMAGE_TOKEN for part in parts]
    prompt = reader(tokenizer, settings).expand(ids, images, MOST)
    processor, expected, left = ImageProcessor(settings), list[int](), iter(images)
    for part in ids:
        if part == IMAGE_TOKEN:
            tiles = processor.tiles(np.asarray(next(left)))
            expected += tokenizer.encode(processor.marker_text(tiles.rows, tiles.columns))
        else:
            expected.append(part)
    assert prompt.ids == expected and prompt.plain == ids
    assert shown(prompt) == [i for i, part in enumerate(expected) if part == IMAGE_TOKEN]
    assert all(span.end - span.start == settings.tokens_per_tile for span in prompt.spans)
    for i, (part, key) in enumerate(zip(prompt.ids, prompt.keys, strict=True)):
        assert key < 0 if i in shown(prompt) else key == part


def test_keys_are_of_pixels_and_place(tokenizer: Tokenizer) -> None:
    expand = reader(tokenizer).expand
    prompt = expand([5, IMAGE_TOKEN, 6, IMAGE_TOKEN], [picture(0), picture(1)], MOST)
    keys = [prompt.keys[position] for position in shown(prompt)]
    assert len(set(keys)) == len(keys)
    again = reader(tokenizer).expand([IMAGE_TOKEN], [picture(1)], MOST)  # of another engine
    assert [again.keys[position] for position in shown(again)] == keys[-len(shown(again)) :]


def test_the_same_pixels_share_tiles(tokenizer: Tokenizer) -> None:
    expand = reader(tokenizer).expand
    prompts = [expand([IMAGE_TOKEN], [picture(seed)], MOST) for seed in (0, 0, 1)]
    tiles = [[span.tile for span in prompt.spans] for prompt in prompts]
    assert tiles[0] == tiles[1] and tiles[0][0] is not tiles[2][0]


def test_text_alone_is_left_as_it_is(tokenizer: Tokenizer) -> None:
    assert reader(tokenizer).expand([5, 6], [], MOST) == Prompt([5, 6], [5, 6])


@pytest.mark.parametrize(
    ("ids", "num_images", "most", "message"),
    [
        ([5], 1, MOST, "there are 1, and 0 markers"),
        ([IMAGE_TOKEN], 0, MOST, "there are 0, and 1 markers"),
        ([IMAGE_TOKEN] * 2, 3, MOST, "there are 3, and 2 markers"),
        ([IMAGE_TOKEN] * 4, 4, 11, "4 of them take 12 tokens or more, and the context is 11"),
    ],
)
def test_refusals(
    tokenizer: Tokenizer, ids: list[int], num_images: int, most: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        reader(tokenizer).expand(ids, [picture(i) for i in range(num_images)], most)


def test_a_timeout_passes_while_others_are_decoded(tokenizer: Tokenizer) -> None:
    full, late = reader(tokenizer), pytest.raises(RequestError, match="timeout: it passed while")
    with full._permit(None), full._permit(None), late:
        full.expand([IMAGE_TOKEN], [picture(0)], MOST, deadline=time.perf_counter() - 1)
    assert shown(full.expand([IMAGE_TOKEN], [picture(0)], MOST, time.perf_counter() + 60))


def test_a_tokenizer_of_another_model(tokenizer: Tokenizer) -> None:
    with pytest.raises(MismatchError, match="tokenizer that came with the model"):
        reader(tokenizer, replace(IDEFICS3, image_token="<picture>"))


def cut(num_bytes: int) -> CutImage:
    return CutImage(0, 0, (Tile(np.zeros((num_bytes // 3, 1, 3), np.uint8)),), 0)


def test_images_used_long_ago_are_let_go_of() -> None:
    images = ImageCache(max_bytes=600)
    first = images.add(b"1", cut(300))
    images.add(b"2", cut(300))
    assert images.get(b"1") is first
    images.add(b"3", cut(300))
    assert images.get(b"1") is first and images.get(b"2") is None


def test_the_last_image_is_kept_at_any_size() -> None:
    images = ImageCache(max_bytes=0)
    image = images.add(b"1", cut(300))
    assert images.get(b"1") is image
    del image
    images.add(b"2", cut(300))
    assert images.get(b"1") is None


def test_images_that_prompts_show_are_not_cut_again(tokenizer: Tokenizer) -> None:
    """Whatever there is room for."""
    read = ImageReader(IDEFICS3, tokenizer, max_bytes=0, allow_urls=False)
    pictures = [picture(seed) for seed in range(3)]
    first = [read.expand([IMAGE_TOKEN], [each], MOST) for each in pictures]
    again = [read.expand([IMAGE_TOKEN], [each], MOST) for each in pictures]
    assert [p.spans[0].tile for p in first] == [p.spans[0].tile for p in again]
    tile = weakref.ref(first[0].spans[0].tile)
    del first, again
    assert tile() is None


def test_embeddings_count_in_the_place_of_pixels() -> None:
    images, image = ImageCache(max_bytes=1000), cut(300)
    images.add(b"1", image)
    images.add(b"2", cut(300))
    image.tiles[0].pixels, image.tiles[0].embeds = None, np.zeros((10, 20), np.float32)
    assert image.num_bytes == 800
    del image
    images.add(b"3", cut(300))
    assert images.get(b"1") is None and images.get(b"2") is not None


def test_threads_share_one_image(tokenizer: Tokenizer) -> None:
    read = reader(tokenizer)
    with ThreadPoolExecutor(8) as pool:
        prompts = list(
            pool.map(lambda _: read.expand([IMAGE_TOKEN], [picture(0)], MOST), range(64))
        )
    assert len({id(prompt.spans[0].tile) for prompt in prompts}) == 1
