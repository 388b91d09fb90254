"""Free memory: of this machine, and of an AMD GPU, which shortfin has no query for."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

from sf_local.errors import DeviceError

GIB = 1 << 30


def memory_left(device: str, index: int, weight_bytes: int) -> int | None:
    """Bytes that stay free once the weights are loaded; None where the driver does not say.

    On the CPU the weights are mapped files, which the kernel can drop and read again. Weights that
    a GPU has no room for raise DeviceError here: IREE would wait for them for ever.
    """
    if device == "cpu":
        return _available_memory()
    free = _hip_memory(index)
    if free is not None and free < weight_bytes:
        raise DeviceError(
            f"device='hip:{index}' has {free / GIB:.2f} GiB free, and the weights take "
            f"{weight_bytes / GIB:.2f} GiB; free some of its memory, or use a smaller model"
        )
    return None if free is None else free - weight_bytes


def _available_memory() -> int:
    """Bytes that can be allocated without swapping, as the kernel estimates it."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match[1]) * 1024 if match else sys.maxsize


def _hip_memory(index: int) -> int | None:
    """Free bytes of the `index`-th GPU, from the library that IREE loads as well."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        hip = ctypes.CDLL(_hip_library())
        failed = hip.hipSetDevice(index) or hip.hipMemGetInfo(
            ctypes.byref(free), ctypes.byref(total)
        )
    except (OSError, AttributeError):
        return None
    return None if failed else free.value


def _hip_library() -> str:
    """Where IREE looks first: IREE_HIP_DYLIB_PATH is a folder, or file:/a/library.so."""
    place = os.environ.get("IREE_HIP_DYLIB_PATH", "")
    if place.startswith("file:"):
        return place.removeprefix("file:")
    return os.path.join(place, "libamdhip64.so")
