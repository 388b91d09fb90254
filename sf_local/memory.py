"""Free memory: of this machine, and of an AMD GPU, which shortfin has no query for."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

from sf_local.errors import DeviceError

GIB = 1 << 30
HOST_TO_DEVICE = 1  # hipMemcpyHostToDevice


def memory_left(device: str, index: int, weight_bytes: int) -> int | None:
    """Bytes that stay free once the weights are loaded; None where the driver does not say.

    On the CPU the weights are mapped files, which the kernel can drop and read again. A GPU that
    has no room for them, or does not work, raises DeviceError here: IREE would wait for ever.
    """
    if device == "cpu":
        return _available_memory()
    try:
        hip = ctypes.CDLL(_hip_library())
        if hip.hipSetDevice(index):
            return None  # there is no such device; `Device` says so
        free = _hip_memory(hip)
    except (OSError, AttributeError):
        return None
    if free is not None and free < weight_bytes:
        raise DeviceError(
            f"device='hip:{index}' has {free / GIB:.2f} GiB free, and the weights take "
            f"{weight_bytes / GIB:.2f} GiB; free some of its memory, or use a smaller model"
        )
    if failed := _try_out(hip, weight_bytes):
        raise DeviceError(
            f"device='hip:{index}' does not work: {failed}; start the program again, look at "
            "rocm-smi and dmesg, or use device='cpu'"
        )
    return None if free is None else free - weight_bytes


def _available_memory() -> int:
    """Bytes that can be allocated without swapping, as the kernel estimates it."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match[1]) * 1024 if match else sys.maxsize


def _hip_memory(hip: ctypes.CDLL) -> int | None:
    """Free bytes of the current GPU."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    failed = hip.hipMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return None if failed else free.value


def _try_out(hip: ctypes.CDLL, num_bytes: int) -> str | None:
    """Allocate so many bytes on the current GPU and copy to them; which of it failed, and how."""
    device, host, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t(min(num_bytes, 4096))
    calls = (
        (hip.hipMalloc, ctypes.byref(device), ctypes.c_size_t(num_bytes)),
        (hip.hipHostMalloc, ctypes.byref(host), size, 0),
        (hip.hipMemcpyAsync, device, host, size, HOST_TO_DEVICE, None),
        (hip.hipStreamSynchronize, None),
    )
    failed = None
    for function, *arguments in calls:
        if error := function(*arguments):
            failed = f"{function.__name__} failed with {_error_name(hip, error)}"
            break
    hip.hipHostFree(host)
    hip.hipFree(device)
    return failed


def _error_name(hip: ctypes.CDLL, error: int) -> str:
    hip.hipGetErrorName.restype = ctypes.c_char_p
    return str(hip.hipGetErrorName(error).decode())


def _hip_library() -> str:
    """Where IREE looks first: IREE_HIP_DYLIB_PATH is a folder, or file:/a/library.so."""
    place = os.environ.get("IREE_HIP_DYLIB_PATH", "")
    if place.startswith("file:"):
        return place.removeprefix("file:")
    return os.path.join(place, "libamdhip64.so")
