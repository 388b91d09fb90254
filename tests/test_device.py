"""Device names, a missing AMD driver, and the worker thread of a CPU device."""

import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from sf_local.device import Device, parse_device
from sf_local.engine import Engine
from sf_local.errors import DeviceError

UNKNOWN = [
    "gpu", "cuda", "cpu:1", "cpu:0", "", " ", " cpu", "cpu\n", "CPU", "HIP", "hip:", "hip:-1",
    "hip:x", "hip:1.5", "hip:1000", "hip:0:1", "cpu,hip", 3, None, True, ["cpu"], b"cpu",
]  # fmt: skip


@pytest.mark.parametrize("spec", UNKNOWN, ids=repr)
def test_unknown_names(spec: Any) -> None:
    with pytest.raises(DeviceError) as caught:
        Device(spec)
    message = str(caught.value)
    assert message.startswith(f"device={spec!r} is unknown")
    for allowed in ('"cpu"', '"hip"', '"hip:N"'):
        assert allowed in message


def test_the_engine_checks_the_name_first() -> None:
    with pytest.raises(DeviceError, match=r"device='gpu' is unknown"):
        Engine("/no/such/artifact", "gpu")


@pytest.mark.parametrize(
    ("spec", "kind", "index"),
    [("cpu", "cpu", 0), ("hip", "hip", 0), ("hip:0", "hip", 0), ("hip:12", "hip", 12)],
)
def test_known_names(spec: str, kind: str, index: int) -> None:
    assert parse_device(spec) == (kind, index)


@pytest.mark.skipif(Path("/dev/kfd").exists(), reason="this machine has an AMD driver")
@pytest.mark.parametrize("spec", ["hip", "hip:3"])
def test_hip_without_a_driver(spec: str) -> None:
    with pytest.raises(DeviceError) as caught:
        Device(spec)
    for part in ("device='hip", "install ROCm", "IREE_HIP_DYLIB_PATH", "device='cpu'"):
        assert part in str(caught.value)


def test_coroutines_run_on_the_worker_thread() -> None:
    device, seen = Device("cpu"), SimpleQueue[int]()

    async def work() -> None:
        seen.put(threading.get_ident())

    try:
        for _ in range(3):
            device.run(work())
        threads = {seen.get(timeout=30) for _ in range(3)}
    finally:
        device.close()
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_devices_open_and_close_again_and_side_by_side() -> None:
    for _ in range(3):
        devices = [Device("cpu"), Device("cpu")]
        for device in devices:
            assert (device.kind, device.index) == ("cpu", 0)
            device.close()
