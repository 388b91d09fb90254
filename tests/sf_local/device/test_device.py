"""The worker thread of a CPU device."""

import threading
from queue import SimpleQueue

from sf_local.device.device import Device


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
