"""Default sizes, sizes asked for, and what an unknown amount of free memory changes."""

import pytest

from sf_local.artifact.manifest import ModelConfig, PagedKVCache
from sf_local.device.info import DeviceInfo, find_device
from sf_local.engine.kv_budget import GPU_SHARE, MAX_DEFAULT_BYTES, memory_left, num_kv_pages
from sf_local.errors import DeviceError, RequestError

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


# What weights leave free, of devices that say how much they have.

GPU = DeviceInfo("hip:0", "gfx942", "Card", 8 << 30)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceInfo, "free_bytes", lambda _: 5 << 30)
    monkeypatch.setattr(DeviceInfo, "try_out", lambda _, num_bytes: None)


@pytest.mark.usefixtures("card")
def test_a_gpu_has_what_the_weights_leave() -> None:
    assert memory_left(GPU, 1 << 30) == 4 << 30
    assert memory_left(GPU, 5 << 30) == 0


@pytest.mark.usefixtures("card")
def test_weights_that_a_gpu_has_no_room_for() -> None:
    with pytest.raises(DeviceError, match=r"hip:0' has 5.00 GiB free.*take 9.00 GiB"):
        memory_left(GPU, 9 << 30)


@pytest.mark.usefixtures("card")
def test_a_driver_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceInfo, "free_bytes", lambda _: None)
    assert memory_left(GPU, 1 << 50) is None


@pytest.mark.usefixtures("card")
def test_a_gpu_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceInfo, "try_out", lambda *_: "hipMalloc failed with hipErrorUnknown")
    with pytest.raises(DeviceError, match=r"hip:0' does not work: hipMalloc failed with .*; start"):
        memory_left(GPU, 1 << 30)


def test_weights_on_the_cpu_are_mapped_files() -> None:
    assert (memory_left(find_device("cpu"), 1 << 50) or 0) > 1 << 20
