"""The stand-in for AMD's driver, from inside the process that it is loaded into.

Errors of the driver raise HipError, named as HIP names them.
"""

from __future__ import annotations

import ctypes
import os
import re
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

_hip = ctypes.CDLL(str(Path(os.environ["IREE_HIP_DYLIB_PATH"]) / "libamdhip64.so"))
_hip.hipGetErrorName.restype = c_char_p
_ANY_DIRECTION = 4  # hipMemcpyDefault


class HipError(Exception):
    """A call of the driver failed."""


def call(function: str, *arguments: Any) -> None:
    if error := getattr(_hip, function)(*arguments):
        raise HipError(_hip.hipGetErrorName(error).decode())


def handle(function: str, *arguments: Any) -> c_void_p:
    """What a function gives out, for example an event."""
    result = c_void_p()
    call(function, byref(result), *arguments)
    return result


def malloc(size: int, function: str = "hipMalloc", *flags: int) -> c_void_p:
    return handle(function, c_size_t(size), *flags)


def host_malloc(size: int) -> c_void_p:
    return malloc(size, "hipHostMalloc", 0)


def copy(to: c_void_p, source: c_void_p, size: int, stream: c_void_p | None = None) -> None:
    """Queue a copy."""
    call("hipMemcpyAsync", to, source, c_size_t(size), _ANY_DIRECTION, stream)


def read(address: c_void_p, size: int) -> bytes:
    """Wait, and copy device memory into a `bytes`."""
    buffer = ctypes.create_string_buffer(size)
    call("hipMemcpy", buffer, address, c_size_t(size), _ANY_DIRECTION)
    return buffer.raw


def attribute(which: int, device: int = 0) -> int:
    value = c_int()
    call("hipDeviceGetAttribute", byref(value), which, device)
    return value.value


def memory() -> tuple[int, int]:
    """Free and total bytes of the current device."""
    free, total = c_size_t(), c_size_t()
    call("hipMemGetInfo", byref(free), byref(total))
    return free.value, total.value


def resident() -> float:
    """MiB of this process that are in memory, mapped files excluded."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


def fail(faults: str) -> None:
    """Faults from now on, in place of earlier ones: "hipMalloc:1:hipErrorOutOfMemory"."""
    assert _hip.sf_hip_fail(faults.encode()) == 0, faults


def delay(microseconds: int) -> None:
    """How long streams wait before each piece of work."""
    _hip.sf_hip_delay(microseconds)


def mark(name: str) -> None:
    """A line in the log, for `Outcome.after`."""
    _hip.sf_hip_mark(name.encode())
