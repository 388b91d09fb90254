"""Tiles and marker texts, compared to the last bit with transformers' own processors."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import asdict, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from sf_local.artifact.manifest import ImageSettings
from sf_local.vision.processor import ImageProcessor
from tests.support.pictures import LLAVA, SMALL_LLAVA, SMALL_SMOLVLM, SMOLVLM, noise

SIZES = [(1, 1), (1, 500), (500, 1), (64, 64), (16, 16), (17, 63), (333, 101), (2, 3), (128, 32)]
REAL_SIZES = [(1, 1), (1, 500), (768, 1023), (1536, 512), (2049, 700)]


@cache
def oracle(family: type, size: int, tile: int, splits: bool = True) -> Any:
    if family in (CLIPImageProcessorPil, LlavaImageProcessorPil):
        side = {"height": tile, "width": tile}
        return family(size={"shortest_edge": size}, crop_size=side, rescale_factor=LLAVA.rescale)
    return family(
        size={"longest_edge": size}, max_image_size={"longest_edge": tile},
        image_mean=SMOLVLM.mean, image_std=SMOLVLM.std, do_image_splitting=splits,
        return_row_col_info=True,
    )  # fmt: skip


def check_idefics3(wanted: ImageSettings, height: int, width: int, family: type) -> None:
    pixels = noise(height, width)
    theirs = oracle(family, wanted.resize_to, wanted.tile_size, wanted.splits)(
        Image.fromarray(pixels)
    )
    processor = ImageProcessor(wanted)
    tiles = processor.tiles(pixels)
    assert tiles.pixels.dtype == np.uint8
    assert (tiles.rows, tiles.columns) == processor.grid(height, width)
    assert [[tiles.rows]] == theirs["rows"] and [[tiles.columns]] == theirs["cols"]
    check_values(processor.normalized(tiles.pixels), theirs["pixel_values"][0])
    assert theirs["pixel_attention_mask"].all()  # no tile is padded


def check_llava(wanted: ImageSettings, height: int, width: int, family: type) -> None:
    pixels = noise(height, width)
    theirs = oracle(family, wanted.resize_to, wanted.tile_size)(Image.fromarray(pixels))
    processor = ImageProcessor(wanted)
    tiles = processor.tiles(pixels)
    assert (tiles.rows, tiles.columns) == processor.grid(height, width) == (0, 0)
    check_values(processor.normalized(tiles.pixels), np.stack(theirs["pixel_values"]))


def check_values(values: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert values.dtype == expected.dtype == np.float32 and values.flags.c_contiguous
    assert np.array_equal(values, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
@pytest.mark.parametrize("splits", [True, False])
def test_idefics3(size: tuple[int, int], family: type, splits: bool) -> None:
    check_idefics3(replace(SMALL_SMOLVLM, splits=splits), *size, family)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", [CLIPImageProcessorPil, LlavaImageProcessorPil])
@pytest.mark.parametrize("resize_to", [16, 19])
def test_llava(size: tuple[int, int], family: type, resize_to: int) -> None:
    check_llava(replace(SMALL_LLAVA, resize_to=resize_to), *size, family)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([16, 40, 64, 100]))
@settings(max_examples=40)
def test_any_size(height: int, width: int, resize_to: int) -> None:
    wanted = replace(SMALL_SMOLVLM, resize_to=resize_to)
    check_idefics3(wanted, height, width, Idefics3ImageProcessorPil)
    check_llava(replace(SMALL_LLAVA, resize_to=resize_to), height, width, CLIPImageProcessorPil)


@pytest.mark.parametrize("size", REAL_SIZES, ids=str)
def test_the_settings_of_real_models(size: tuple[int, int]) -> None:
    check_idefics3(SMOLVLM, *size, SmolVLMImageProcessorPil)
    check_llava(LLAVA, *size, CLIPImageProcessorPil)


def test_grids() -> None:
    grid = ImageProcessor(SMOLVLM).grid
    assert grid(1000, 1000) == grid(512, 512) == grid(1, 1) == (4, 4)
    assert grid(512, 1024) == (2, 4) and grid(1024, 512) == (4, 2)
    assert grid(1, 500) == (1, 4) and grid(500, 1) == (4, 1)
    assert ImageProcessor(replace(SMOLVLM, resize_to=512)).grid(512, 512) == (0, 0)
    assert ImageProcessor(replace(SMOLVLM, splits=False)).grid(512, 512) == (0, 0)


def test_an_image_of_16_megapixels_stays_in_bytes() -> None:
    pixels = np.zeros((4096, 4096, 3), np.uint8)
    tracemalloc.start()
    ImageProcessor(SMOLVLM).tiles(pixels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < pixels.nbytes


@pytest.mark.parametrize("grid", [(0, 0), (1, 2), (3, 1), (4, 4)])
def test_marker_text_of_idefics3(grid: tuple[int, int]) -> None:
    rows, columns = grid
    tokens = SimpleNamespace(
        fake_image_token="<fake_token_around_image>", image_token="<image>",
        global_image_tag="<global-img>", image_seq_len=64,
    )  # fmt: skip
    expected = Idefics3Processor.replace_image_token(
        tokens, {"rows": [[rows]], "cols": [[columns]]}, 0
    )
    text = ImageProcessor(SMOLVLM).marker_text(rows, columns)
    assert text == expected
    assert text == get_image_prompt_string(
        rows, columns, 64, tokens.fake_image_token, "<image>", tokens.global_image_tag
    )
    assert text.count("<image>") == 64 * (rows * columns + 1)


def test_marker_text_as_published() -> None:
    processor = ImageProcessor(replace(SMOLVLM, tokens_per_tile=2))
    fence = "<fake_token_around_image>"
    assert processor.marker_text(0, 0) == f"{fence}<global-img><image><image>{fence}"
    assert processor.marker_text(2, 1) == (
        f"{fence}<row_1_col_1><image><image>\n{fence}<row_2_col_1><image><image>\n\n"
        f"{fence}<global-img><image><image>{fence}"
    )


def test_marker_text_of_llava() -> None:
    llava = SimpleNamespace(
        patch_size=14, num_additional_image_tokens=1, vision_feature_select_strategy="default",
        image_token="<image>",
    )  # fmt: skip
    pixels = {"pixel_values": np.zeros((1, 3, 336, 336), np.float32)}
    assert ImageProcessor(LLAVA).marker_text(0, 0) == LlavaProcessor.replace_image_token(
        llava, pixels, 0
    )


def test_settings_are_json() -> None:
    for wanted in (SMOLVLM, LLAVA):
        assert ImageSettings(**json.loads(json.dumps(asdict(wanted)))) == wanted


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("family", ["qwen", None, ["llava"]]),
        ("tile_size", [0, -1, 16.0, True, "16"]),
        ("tokens_per_tile", [0, None]),
        ("image_token", ["", 3]),
        ("image_token_id", [-1, 1.0]),
        ("resize_to", [0, "2048", 4097]),
        ("splits", [1, None]),
        ("resample", [-1, 6, "bicubic"]),
        ("rescale", [0, float("nan"), "1/255"]),
        ("mean", [0.5, [0.5], [0.5, 0.5, None], [0.5, 0.5, float("inf")], (0.5, 0.5, 0.5)]),
        ("std", [[0.5, 0.5, 0], [0.5, 0.5, "x"], [1, 1]]),
    ],
)
def test_wrong_settings(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}=.* must be "):
            ImageProcessor(replace(SMOLVLM, **{name: value}))


def test_settings_that_llava_cannot_have() -> None:
    with pytest.raises(ValueError, match="splits=True must be False"):
        replace(LLAVA, splits=True).check()
    with pytest.raises(ValueError, match="resize_to=224 must be at least tile_size=336"):
        replace(LLAVA, resize_to=224).check()
