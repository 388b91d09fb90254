"""DeviceInfo: the devices of this machine, by the names that users give them.

Works without shortfin: GPUs are found through the HIP library, the same one that IREE loads.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sf_local.device import host_memory
from sf_local.errors import DeviceError, TargetError

ALLOWED = '"cpu", "hip", "hip:N" for the N-th AMD GPU, "hip:GPU-<uuid>" or "auto"'
_ROOT_HELP = (
    "install ROCm, point IREE_HIP_DYLIB_PATH at the folder of libamdhip64.so, or use device='cpu'"
)
# Offsets of memory size and chip in a GPU's properties: ROCm 6's layout, and the one before.
_PROPERTIES = (("hipGetDevicePropertiesR0600", 288, 1160), ("hipGetDeviceProperties", 256, 396))

_HOST_TO_DEVICE = 1  # hipMemcpyHostToDevice


@dataclass(frozen=True)
class DeviceInfo:
    """A device of this machine.

    name: "cpu" or "hip:N". chip: the target that code must be compiled for, "cpu" or such as
    "gfx942". description: its product name. total_bytes: its memory. id: "GPU-<uuid>", or "".
    """

    name: str
    chip: str
    description: str
    total_bytes: int
    id: str = ""

    @property
    def kind(self) -> str:
        """The part of the name that is "cpu" or "hip"."""
        return self.name.partition(":")[0]

    @property
    def index(self) -> int:
        """The N of "hip:N"; 0 for a CPU."""
        return int(self.name.partition(":")[2] or 0)

    def free_bytes(self) -> int | None:
        """Bytes that can be allocated now; None if the driver does not say. Of the host's memory
        some is left to the program."""
        if self.kind == "cpu":
            return host_memory.free_bytes()
        hip, free, total = _hip(), ctypes.c_size_t(), ctypes.c_size_t()
        failed = hip.hipSetDevice(self.index) or hip.hipMemGetInfo(
            ctypes.byref(free), ctypes.byref(total)
        )
        return None if failed else free.value

    def try_out(self, num_bytes: int) -> str | None:
        """Allocate `num_bytes` on a GPU and copy to them; which call failed and why, or None."""
        hip, device, host = _hip(), ctypes.c_void_p(), ctypes.c_void_p()
        size = ctypes.c_size_t(min(num_bytes, 4096))
        calls = (
            (hip.hipSetDevice, self.index),
            (hip.hipMalloc, ctypes.byref(device), ctypes.c_size_t(num_bytes)),
            (hip.hipHostMalloc, ctypes.byref(host), size, 0),
            (hip.hipMemcpyAsync, device, host, size, _HOST_TO_DEVICE, None),
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


def devices() -> list[DeviceInfo]:
    """The CPU, then all usable GPUs."""
    try:
        return [_cpu(), *_gpus()]
    except DeviceError:
        return [_cpu()]


def find_device(spec: str, targets: Sequence[str] = ()) -> DeviceInfo:
    """The device of a name, as ALLOWED lists them; raises DeviceError if there is none.

    "auto" is the first GPU, else the CPU, that runs one of `targets`, for which a model was
    compiled, or any device without `targets`. Raises TargetError if no device does.
    """
    match = _parse(spec)
    if spec == "auto":
        return _best(targets)
    if spec == "cpu":
        return _cpu()
    gpus = _gpus()
    if match["id"]:
        for gpu in gpus:
            if gpu.id.lower() == match["id"].lower():
                return gpu
        raise DeviceError(f"device={spec!r}: there are {_listed(gpus)}; use one of them")
    index = int(match["index"] or 0)
    if index >= len(gpus):
        raise DeviceError(
            f"device={spec!r}: there are {_listed(gpus)}; use a smaller index, or device='cpu'"
        )
    return gpus[index]


def device_names(device: str | Sequence[str]) -> list[str]:
    """The names in a name or a list of them; raises DeviceError for one that no device can have."""
    names = [device] if isinstance(device, str) else device
    if not isinstance(names, Sequence) or not names:
        raise DeviceError(f"device={device!r} must be a name, or a list of them; use {ALLOWED}")
    for name in names:
        _parse(name)
    return list(names)


def _parse(spec: str) -> re.Match[str]:
    pattern = r"auto|cpu|hip(:(?P<index>\d{1,3})|:(?P<id>GPU-[\w-]+))?"
    match = re.fullmatch(pattern, spec) if isinstance(spec, str) else None
    if not match:
        raise DeviceError(f"device={spec!r} is unknown; use {ALLOWED}")
    return match


def _best(targets: Sequence[str]) -> DeviceInfo:
    found = devices()
    for device in [*found[1:], found[0]]:
        if device.chip in targets or not targets:
            return device
    raise TargetError(
        f"the artifact was compiled for {', '.join(targets)}, and no device here is that: "
        f"{_listed(found)}; compile it with sf-compile --target {found[-1].chip}"
    )


def _listed(found: Sequence[DeviceInfo]) -> str:
    return ", ".join(f"{d.name} ({' '.join(filter(None, [d.chip, d.id]))})" for d in found)


def _cpu() -> DeviceInfo:
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name = model[1] if model else "CPU"
    return DeviceInfo("cpu", "cpu", name, host_memory.total_bytes())


def _gpus() -> list[DeviceInfo]:
    """All GPUs; raises DeviceError if there is none."""
    hip, count = _hip(), ctypes.c_int()
    error = hip.hipInit(0) or hip.hipGetDeviceCount(ctypes.byref(count))
    if error or count.value < 1:
        reason = _error_name(hip, error) if error else "it has no device"
        raise DeviceError(
            f"device='hip': {hip_library()} finds no AMD GPU ({reason}); check rocminfo and your "
            "rights to /dev/kfd, or use device='cpu'"
        )
    return [_gpu(hip, index) for index in range(count.value)]


def _error_name(hip: ctypes.CDLL, error: int) -> str:
    hip.hipGetErrorName.restype = ctypes.c_char_p
    return str(hip.hipGetErrorName(error).decode())


def _gpu(hip: ctypes.CDLL, index: int) -> DeviceInfo:
    uuid = ctypes.create_string_buffer(16)
    hip.hipDeviceGetUuid(uuid, index)
    digits = uuid.raw.hex()
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    for function, memory_at, chip_at in _PROPERTIES:
        buffer = ctypes.create_string_buffer(4096)
        if hasattr(hip, function) and not getattr(hip, function)(buffer, index):
            chip = _text(buffer.raw[chip_at:]).partition(":")[0]  # without features, ":xnack-"
            total = int.from_bytes(buffer.raw[memory_at : memory_at + 8], "little")
            name, id_ = _text(buffer.raw), f"GPU-{'-'.join(parts)}"
            return DeviceInfo(f"hip:{index}", chip, name, total, id_)
    raise DeviceError(f"device='hip:{index}': {hip_library()} does not tell its chip; update ROCm")


def _text(data: bytes) -> str:
    return data[:256].partition(b"\0")[0].decode(errors="replace")


def _hip() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(hip_library())
    except OSError as error:
        raise DeviceError(
            f"device='hip': {hip_library()} cannot be loaded ({error}); {_ROOT_HELP}"
        ) from error


def hip_library() -> str:
    """The path or name of the HIP library that IREE loads.

    IREE_HIP_DYLIB_PATH may be a folder, or "file:" and the library's path.
    """
    place = os.environ.get("IREE_HIP_DYLIB_PATH", "")
    if place.startswith("file:"):
        return place.removeprefix("file:")
    return os.path.join(place, "libamdhip64.so")
