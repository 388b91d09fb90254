"""Default sizes, sizes asked for, and what an unknown amount of free memory changes."""

from typing import Any

import numpy as np
import pytest

from sf_local.artifact.manifest import ModelConfig, PagedKVCache
from sf_local.device.info import DeviceInfo, find_device
from sf_local.engine.kv_budget import (
    GPU_SHARE,
    MAX_DEFAULT_BYTES,
    memory_bytes,
    memory_left,
    num_kv_pages,
)
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


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("2GB", 2 * 10**9), ("2GiB", 2 << 30), ("1.5 MB", 1_500_000), ("512kB", 512_000),
        ("512KiB", 512 << 10), ("1TB", 10**12), ("7B", 7), (7, 7), (np.int64(7), 7),
    ],
)  # fmt: skip
def test_units(size: Any, num_bytes: int) -> None:
    assert memory_bytes("kv_memory", size, None) == num_bytes


@pytest.mark.parametrize("size", ["2gb", "2 G", "2Gb", "GB", "-1GB", 1.5, True, None])
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(RequestError, match='must be bytes, "2GiB", "2GB", "512MiB" or "50%"'):
        memory_bytes("kv_memory", size, None)


def test_a_remedy_in_the_unit_that_was_asked_in() -> None:
    with pytest.raises(RequestError, match=r"39.9 GB of KV pages, but 3 GB .*use at most 3 GB"):
        num_kv_pages(CONFIG, "cpu", 3 * 10**9, None, "40GB")


def test_more_than_there_is() -> None:
    for device in "cpu", "hip":
        with pytest.raises(RequestError, match="use at most 3 pages"):
            num_kv_pages(CONFIG, device, 3 * PAGE, 4, None)
    assert num_kv_pages(CONFIG, "hip", None, 4, None) == 4


def test_more_than_the_weights_leave() -> None:
    """With both numbers."""
    with pytest.raises(RequestError, match=r"are free beside weights of 2 GiB; free .*use at most"):
        num_kv_pages(CONFIG, "hip", 1 << 20, 1 << 30, None, 2 << 30)


@pytest.mark.parametrize("device", ["cpu", "hip"])
@pytest.mark.parametrize("available", [3 * PAGE, (1 << 30) - 1, 5 << 30, 12_345_678_901])
@pytest.mark.parametrize(
    ("memory", "unit"),
    [("500GiB", "GiB"), ("1.5TiB", "TiB"), ("300000MiB", "MiB"), ("999999999 KiB", "KiB"),
     ("999999999999B", "B"), (1 << 50, ""), ("99999999%", "%"), ("9" * 20 + "TiB", "TiB")],
)  # fmt: skip
def test_the_answer_is_in_the_unit_of_the_question(
    device: str, available: int, memory: int | str, unit: str
) -> None:
    """What is free and what to ask for, which is then granted and is nearly all that there is."""
    with pytest.raises(RequestError) as caught:
        num_kv_pages(CONFIG, device, available, None, memory)
    text, asked = str(caught.value).split("; free some memory, or use at most ")
    assert text.startswith(f"kv_memory={memory!r}: ")
    if available > 1 << 30 and unit != "TiB":  # else it is a smaller one
        assert asked.endswith(unit) and (unit or asked.isdigit())
    assert unit == "%" or f" {asked}{'' if unit else ' B'} are free beside" in text
    pages = num_kv_pages(CONFIG, device, available, None, asked if unit else int(asked))
    assert 0.9 * available // PAGE <= pages <= available // PAGE


def test_what_is_said_of_500_gib() -> None:
    text = "500 GiB of KV pages, but 12.3 GiB are free beside weights of 2.5 GiB; "
    text = f"kv_memory='500GiB': {text}free some memory, or use at most 12.3 GiB"
    with pytest.raises(RequestError, match=f"^{text}$"):
        num_kv_pages(CONFIG, "hip", 123 * (1 << 30) // 10 + 99, None, "500GiB", 5 << 29)


@pytest.mark.parametrize("memory", ["500GiB", 1 << 40, None])
def test_no_room_for_a_page(memory: int | str | None) -> None:
    pages = None if memory else 4
    with pytest.raises(RequestError, match="not one page of 16384 bytes has room; free some"):
        num_kv_pages(CONFIG, "hip", PAGE - 1, pages, memory)


@pytest.mark.parametrize("memory", ["9" * 400 + "GiB", "1e9GiB", "-1GiB", -1, True, 1.5, "GiB"])
def test_sizes_that_are_none(memory: Any) -> None:
    with pytest.raises(RequestError, match='must be bytes, "2GiB"'):
        num_kv_pages(CONFIG, "cpu", 1 << 40, None, memory)


def test_pages_without_number() -> None:
    with pytest.raises(RequestError, match="use at most 3 pages"):
        num_kv_pages(CONFIG, "cpu", 3 * PAGE, 10**400, None)


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
