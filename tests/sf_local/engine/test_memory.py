"""What weights leave free, of devices that say how much they have."""

from __future__ import annotations

import pytest

from sf_local.device.info import DeviceInfo, find_device
from sf_local.engine.memory import memory_left
from sf_local.errors import DeviceError

GPU = DeviceInfo("hip:0", "gfx942", "Card", 8 << 30)


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceInfo, "free_bytes", lambda _: 5 << 30)
    monkeypatch.setattr(DeviceInfo, "try_out", lambda _, num_bytes: None)


def test_a_gpu_has_what_the_weights_leave() -> None:
    assert memory_left(GPU, 1 << 30) == 4 << 30
    assert memory_left(GPU, 5 << 30) == 0


def test_weights_that_a_gpu_has_no_room_for() -> None:
    with pytest.raises(DeviceError, match=r"hip:0' has 5.00 GiB free.*take 9.00 GiB"):
        memory_left(GPU, 9 << 30)


def test_a_driver_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceInfo, "free_bytes", lambda _: None)
    assert memory_left(GPU, 1 << 50) is None


def test_a_gpu_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceInfo, "try_out", lambda *_: "hipMalloc failed with hipErrorUnknown")
    with pytest.raises(DeviceError, match=r"hip:0' does not work: hipMalloc failed with .*; start"):
        memory_left(GPU, 1 << 30)


def test_weights_on_the_cpu_are_mapped_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert (memory_left(find_device("cpu"), 1 << 50) or 0) > 1 << 20
