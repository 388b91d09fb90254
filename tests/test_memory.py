"""Free memory, with a library in the place of the AMD driver's."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from sf_local import memory
from sf_local.errors import DeviceError


class FakeHip:
    """The functions that are called; device 1 is none, and `broken` names what fails."""

    broken = ""

    def __init__(self, path: str) -> None:
        if not path.endswith("libamdhip64.so") or path.startswith("/nowhere"):
            raise OSError(path)
        self.in_use = 0
        self.hipGetErrorName = lambda error: b"hipErrorOutOfMemory"
        for name in ("hipMalloc", "hipHostMalloc", "hipMemcpyAsync", "hipStreamSynchronize"):
            setattr(self, name, self._function(name))
        opened.append(self)

    def _function(self, name: str) -> Callable[..., int]:
        def call(*_: Any) -> int:
            self.in_use += name.endswith("Malloc")
            return 2 if name == self.broken else 0

        call.__name__ = name
        return call

    def hipFree(self, _: Any) -> None:
        self.in_use -= 1

    def hipHostFree(self, _: Any) -> None:
        self.in_use -= 1

    def hipSetDevice(self, index: int) -> int:
        return 0 if index == 0 else 101

    def hipMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 5 << 30, 8 << 30
        return 0


opened: list[FakeHip] = []


@pytest.fixture(autouse=True)
def hip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", FakeHip)
    monkeypatch.delenv("IREE_HIP_DYLIB_PATH", raising=False)


def test_a_gpu_has_what_the_weights_leave() -> None:
    assert memory.memory_left("hip", 0, 1 << 30) == 4 << 30
    assert memory.memory_left("hip", 0, 5 << 30) == 0


def test_weights_that_a_gpu_has_no_room_for() -> None:
    with pytest.raises(DeviceError, match=r"hip:0' has 5.00 GiB free.*take 9.00 GiB"):
        memory.memory_left("hip", 0, 9 << 30)


def test_a_driver_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.memory_left("hip", 1, 0) is None
    monkeypatch.setenv("IREE_HIP_DYLIB_PATH", "/nowhere")
    assert memory.memory_left("hip", 0, 0) is None
    monkeypatch.setenv("IREE_HIP_DYLIB_PATH", "file:/opt/libamdhip64.so")
    assert memory.memory_left("hip", 0, 0) == 5 << 30


def test_what_was_tried_out_is_freed() -> None:
    assert memory.memory_left("hip", 0, 1 << 30) == 4 << 30
    assert opened[-1].in_use == 0


@pytest.mark.parametrize("name", ["hipMalloc", "hipMemcpyAsync", "hipStreamSynchronize"])
def test_a_gpu_that_does_not_work(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(FakeHip, "broken", name)
    with pytest.raises(DeviceError, match=f"{name} failed with hipErrorOutOfMemory"):
        memory.memory_left("hip", 0, 1 << 30)


def test_weights_on_the_cpu_are_mapped_files() -> None:
    assert (memory.memory_left("cpu", 0, 1 << 50) or 0) > 1 << 20
