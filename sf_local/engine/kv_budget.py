"""How large the KV cache gets: kv_pages, kv_memory or the default, checked against the memory that
the weights leave free."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import cast

from sf_local.artifact.manifest import ModelConfig
from sf_local.device.host_memory import ROOM
from sf_local.device.info import DeviceInfo
from sf_local.errors import DeviceError, RequestError
from sf_local.request.checks import check_int, plain_number

GIB = 1 << 30
BINARY = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
DECIMAL = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS = BINARY | DECIMAL
SMALLER = {
    unit: smaller for units in (BINARY, DECIMAL)
    for unit, smaller in zip([*units][1:], units, strict=False)
}  # fmt: skip
MAX_DEFAULT_BYTES = 1 << 30  # on the CPU, and where the driver does not say what is free
GPU_SHARE = 0.8  # of what the weights leave free; activations need some of the rest


def num_kv_pages(
    config: ModelConfig,
    device: str,
    available: int | None,
    pages: int | None,
    memory: int | str | None,
    weight_bytes: int = 0,
) -> int:
    """How many pages the cache gets, besides page 0; raises RequestError if they do not fit.

    Args:
        device: "cpu" or "hip".
        available: bytes that stay free once the weights are loaded; None if unknown.
        pages, memory: Engine's `kv_pages` and `kv_memory`, of which at most one is given.
        weight_bytes: for the error message.
    """
    if pages is not None and memory is not None:
        raise RequestError(f"kv_pages={pages} and kv_memory={memory!r}: give one of them")
    memory = cast("int | str | None", plain_number(memory))
    if pages is None and memory is None:
        return max(1, _default_pages(config, device, available))
    if pages is None:
        pages = memory_bytes("kv_memory", memory, available) // config.page_bytes
        name = f"kv_memory={memory!r}"
        if pages < 1:
            raise RequestError(f"{name} must be at least one page of {config.page_bytes} bytes")
    else:
        pages = check_int("kv_pages", pages, 1)
        name = f"kv_pages={pages}"
    if available is not None and pages * config.page_bytes > available:
        beside = f"weights of {size_text(weight_bytes, 'GiB')}"
        if device == "cpu":
            beside = f"{size_text(ROOM, 'MiB')} that are left to the program"
        unit = _unit(memory)
        num_bytes = pages * config.page_bytes
        raise RequestError(
            f"{name}: {size_text(num_bytes, unit)} of KV pages, but "
            f"{size_text(available, unit)} are free beside {beside}; "
            f"{_remedy(config.page_bytes, available, memory)}"
        )
    return pages


def _remedy(page_bytes: int, available: int, memory: int | str | None) -> str:
    """What to ask for, in the unit in which was asked, where more was asked for than is free."""
    if available < page_bytes:
        return f"not one page of {page_bytes} bytes has room; free some memory"
    less = "free some memory, or use at most"
    if memory is None:
        return f"{less} {available // page_bytes} pages"
    if isinstance(memory, int):
        return f"{less} {available}"
    return f"{less} {'100%' if '%' in memory else size_text(available, _unit(memory))}"


def _unit(memory: int | str | None) -> str:
    """The unit of a size that `memory_bytes` can read; GiB where it has none."""
    if isinstance(memory, int):
        return "B"
    return next((unit for unit in SMALLER if unit in (memory or "")), "GiB")


def size_text(num_bytes: int, unit: str) -> str:
    """A size as `memory_bytes` reads it, never more than it is, in `unit` or the largest smaller
    one in which it is not below 1."""
    while unit != "B" and num_bytes < UNITS[unit]:
        unit = SMALLER[unit]
    tenths = num_bytes * 10 // UNITS[unit]
    fraction = f".{tenths % 10}" if unit != "B" and tenths % 10 else ""
    return f"{tenths // 10}{fraction} {unit}"


def _default_pages(config: ModelConfig, device: str, available: int | None) -> int:
    if device != "cpu" and available is not None:
        return int(available * GPU_SHARE) // config.page_bytes
    contexts = -(-config.max_seq_len // config.page_size) * config.decode_batch_sizes[-1]
    most = MAX_DEFAULT_BYTES if available is None else min(MAX_DEFAULT_BYTES, available)
    return min(contexts, most // config.page_bytes)


def memory_bytes(name: str, memory: int | str | None, available: int | None) -> int:
    """Bytes of a size such as 1073741824, "1GiB" (2^30 bytes), "1GB" (10^9), or "50%" of what is
    available; raises RequestError, which calls the size `name`."""
    memory = cast("int | str | None", plain_number(memory))
    if isinstance(memory, int) and not isinstance(memory, bool) and memory >= 0:
        return memory
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*(%|[KMGT]iB|[kMGT]?B)", str(memory).strip())
    if not match:
        raise RequestError(f'{name}={memory!r} must be bytes, "2GiB", "2GB", "512MiB" or "50%"')
    number, unit = Fraction(match[1]), match[2]
    if unit == "%":
        if available is None:
            raise RequestError(f"{name}={memory!r}: give bytes; it is not known what is free")
        return int(available * number / 100)
    return int(number * UNITS[unit])


def memory_left(device: DeviceInfo, weight_bytes: int, num_sharing: int = 1) -> int | None:
    """Bytes that stay free once the weights are loaded; None where the driver does not say.

    num_sharing: replicas on this device, of which each gets an equal share. On the CPU the weights
    are mapped files, which the kernel can drop and read again; HugeWeights copies them only where
    there is room. Raises DeviceError for a GPU that has no room for them, or does not work: there
    IREE itself would wait for ever.
    """
    free = device.free_bytes()
    free = None if free is None else free // num_sharing
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
