"""How much memory a model's weights leave free."""

from __future__ import annotations

from sf_local.device.info import DeviceInfo
from sf_local.errors import DeviceError

GIB = 1 << 30


def memory_left(device: DeviceInfo, weight_bytes: int) -> int | None:
    """Bytes that stay free once the weights are loaded; None where the driver does not say.

    On the CPU the weights are mapped files, which the kernel can drop and read again. A GPU that
    has no room for them, or does not work, raises DeviceError here: IREE would wait for ever.
    """
    free = device.free_bytes()
    if device.kind == "cpu":
        return free
    if free is not None and free < weight_bytes:
        raise DeviceError(
            f"device={device.name!r} has {free / GIB:.2f} GiB free, and the weights take "
            f"{weight_bytes / GIB:.2f} GiB; free some of its memory, or use a smaller model"
        )
    if failed := device.try_out(weight_bytes):
        raise DeviceError(
            f"device={device.name!r} does not work: {failed}; start the program again, look at "
            "rocm-smi and dmesg, or use device='cpu'"
        )
    return None if free is None else free - weight_bytes
