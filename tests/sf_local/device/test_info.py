"""Names of devices, and what there is, with a library in the place of the AMD driver's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sf_local
from sf_local.device.info import device_names, devices, find_device
from sf_local.engine.engine import Engine
from sf_local.errors import DeviceError, TargetError

UNKNOWN = [
    "gpu", "cuda", "cpu:1", "cpu:0", "", " ", " cpu", "cpu\n", "CPU", "HIP", "hip:", "hip:-1",
    "hip:x", "hip:1.5", "hip:1000", "hip:0:1", "cpu,hip", "hip:GPU", "hip:GPU-", "auto:1", 3, None,
    True, ["cpu"], b"cpu",
]  # fmt: skip


class FakeHip:
    """Two GPUs; of the second the memory cannot be asked for."""

    count = 2
    chips = (b"gfx942:sramecc+:xnack-", b"gfx1100")
    broken = ""  # the function that fails
    in_use = 0

    def __init__(self, path: str) -> None:
        if not path.endswith("libamdhip64.so") or path.startswith("/nowhere"):
            raise OSError(path)
        self.hipGetErrorName = lambda error: b"hipErrorOutOfMemory"
        for name in ("hipMalloc", "hipHostMalloc", "hipMemcpyAsync", "hipStreamSynchronize"):
            setattr(self, name, self._function(name))

    def _function(self, name: str) -> Callable[..., int]:
        def call(*_: Any) -> int:
            FakeHip.in_use += name.endswith("Malloc")
            return 2 if name == self.broken else 0

        call.__name__ = name
        return call

    def hipFree(self, _: Any) -> None:
        FakeHip.in_use -= 1

    def hipHostFree(self, _: Any) -> None:
        FakeHip.in_use -= 1

    def hipInit(self, flags: int) -> int:
        return 0

    def hipGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def hipDeviceGetUuid(self, uuid: Any, index: int) -> int:
        uuid.raw = bytes(range(15)) + bytes([index])
        return 0

    def hipGetDevicePropertiesR0600(self, properties: Any, index: int) -> int:
        data = bytearray(4096)
        data[:4] = b"Card"
        data[288:296] = (8 << 30).to_bytes(8, "little")
        data[1160 : 1160 + len(self.chips[index])] = self.chips[index]
        properties.raw = bytes(data)
        return 0

    def hipSetDevice(self, index: int) -> int:
        return 0 if index == 0 else 101

    def hipMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 5 << 30, 8 << 30
        return 0


@pytest.fixture
def hip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", FakeHip)
    monkeypatch.delenv("IREE_HIP_DYLIB_PATH", raising=False)


@pytest.mark.parametrize("spec", UNKNOWN, ids=repr)
def test_unknown_names(spec: Any) -> None:
    with pytest.raises(DeviceError) as caught:
        device_names([spec])
    message = str(caught.value)
    assert message.startswith(f"device={spec!r} is unknown")
    for allowed in ('"cpu"', '"hip"', '"hip:N"', '"hip:GPU-<uuid>"', '"auto"'):
        assert allowed in message


def test_the_engine_checks_the_name_first() -> None:
    with pytest.raises(DeviceError, match=r"device='gpu' is unknown"):
        Engine("/no/such/artifact", "gpu")


@pytest.mark.usefixtures("hip")
def test_what_there_is() -> None:
    cpu, first, second = sf_local.devices()
    assert (cpu.name, cpu.kind, cpu.chip) == ("cpu", "cpu", "cpu")
    assert (first.name, first.kind, first.index, first.chip) == ("hip:0", "hip", 0, "gfx942")
    assert (first.description, first.total_bytes, first.free_bytes()) == ("Card", 8 << 30, 5 << 30)
    assert second.id == "GPU-00010203-0405-0607-0809-0a0b0c0d0e01"
    assert (second.chip, second.free_bytes()) == ("gfx1100", None)


@pytest.mark.usefixtures("hip")
def test_names() -> None:
    assert find_device("cpu").name == "cpu"
    assert find_device("hip").name == find_device("hip:0").name == "hip:0"
    assert find_device("hip:GPU-00010203-0405-0607-0809-0A0B0C0D0E01").name == "hip:1"
    with pytest.raises(
        DeviceError, match=r"hip:2.*hip:0 \(gfx942 .*hip:1 \(gfx1100.*smaller index"
    ):
        find_device("hip:2")
    with pytest.raises(DeviceError, match=r"GPU-42.*GPU-0001.*use one of them"):
        find_device("hip:GPU-42")


@pytest.mark.usefixtures("hip")
@pytest.mark.parametrize(
    ("targets", "name"),
    [(["cpu"], "cpu"), (["gfx1100"], "hip:1"), (["cpu", "gfx942"], "hip:0"), ([], "hip:0")],
)
def test_auto(targets: list[str], name: str) -> None:
    assert find_device("auto", targets).name == name


@pytest.mark.usefixtures("hip")
def test_auto_without_a_device_for_it() -> None:
    with pytest.raises(TargetError, match=r"compiled for gfx90a, and no .*: cpu.*--target gfx1100"):
        find_device("auto", ["gfx90a"])


def test_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", FakeHip)
    monkeypatch.setenv("IREE_HIP_DYLIB_PATH", "/nowhere")
    with pytest.raises(DeviceError) as caught:
        find_device("hip:3")
    for part in ("device='hip'", "install ROCm", "IREE_HIP_DYLIB_PATH", "device='cpu'"):
        assert part in str(caught.value)
    assert [device.name for device in devices()] == ["cpu"]
    monkeypatch.setenv("IREE_HIP_DYLIB_PATH", "file:/opt/libamdhip64.so")
    assert len(devices()) == 3


@pytest.mark.usefixtures("hip")
def test_a_library_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeHip, "count", 0)
    with pytest.raises(DeviceError, match=r"no AMD GPU \(it has no device\).*rocminfo"):
        find_device("hip")


@pytest.mark.skipif(Path("/dev/kfd").exists(), reason="this machine has an AMD driver")
def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    from sf_local.cli import main

    assert main(["devices"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("cpu ") and "install ROCm" in output and "shortfin 3.9.0" in output


@pytest.mark.usefixtures("hip")
def test_what_is_tried_out_is_freed() -> None:
    assert find_device("hip:0").try_out(1 << 30) is None
    assert FakeHip.in_use == 0


@pytest.mark.usefixtures("hip")
@pytest.mark.parametrize("name", ["hipMalloc", "hipMemcpyAsync", "hipStreamSynchronize"])
def test_a_gpu_that_does_not_work(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(FakeHip, "broken", name)
    failed = find_device("hip:0").try_out(1 << 30)
    assert failed == f"{name} failed with hipErrorOutOfMemory"
