"""Default sizes, sizes asked for, and what an unknown amount of free memory changes."""

import pytest

from sf_local.artifact.manifest import ModelConfig, PagedKVCache
from sf_local.engine.kv_budget import GPU_SHARE, MAX_DEFAULT_BYTES, num_kv_pages
from sf_local.errors import RequestError

CACHE = PagedKVCache(2, 16, 64, "float16")
CONFIG = ModelConfig(1024, 4, 32, [1], [1, 8], CACHE)  # 16 KiB a page, 512 pages by default
PAGE = CONFIG.page_bytes
LARGE = ModelConfig(1 << 20, 4, 32, [1], [1, 8], CACHE)


def test_by_default_the_cpu_holds_the_largest_batch() -> None:
    assert num_kv_pages(CONFIG, "cpu", 1 << 40, None, None) == 1024 // 16 * 8
    assert num_kv_pages(CONFIG, "cpu", 10 * PAGE, None, None) == 10
    assert num_kv_pages(LARGE, "cpu", 1 << 40, None, None) == MAX_DEFAULT_BYTES // PAGE


def test_by_default_a_gpu_gives_a_share_of_its_memory() -> None:
    assert num_kv_pages(CONFIG, "hip", 1000 * PAGE, None, None) == int(1000 * GPU_SHARE)
    assert num_kv_pages(LARGE, "hip", None, None, None) == MAX_DEFAULT_BYTES // PAGE
    assert num_kv_pages(CONFIG, "hip", 0, None, None) == 1


def test_a_share_of_the_memory() -> None:
    assert num_kv_pages(CONFIG, "hip", 1000 * PAGE, None, "25%") == 250
    with pytest.raises(RequestError, match="kv_memory='25%': give bytes"):
        num_kv_pages(CONFIG, "hip", None, None, "25%")


def test_more_than_there_is() -> None:
    for device in "cpu", "hip":
        with pytest.raises(RequestError, match="use at most 3 pages"):
            num_kv_pages(CONFIG, device, 3 * PAGE, 4, None)
    assert num_kv_pages(CONFIG, "hip", None, 4, None) == 4


def test_more_than_the_weights_leave() -> None:
    """With both numbers."""
    with pytest.raises(RequestError, match=r"are free beside weights of 2.0 GiB; use at most"):
        num_kv_pages(CONFIG, "hip", 1 << 20, 1 << 30, None, 2 << 30)
