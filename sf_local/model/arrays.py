"""Arguments and results of calls: numpy arrays on the host, and their arrays on the device.

A CPU shares its memory with the host. For a GPU, the arguments of a call are packed into one buffer
and sent in one copy; its results come back in one copy each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import shortfin.array as sfnp
from numpy.typing import NDArray

from sf_local.device.device import Device
from sf_local.errors import EngineError

ALIGNMENT = 256  # bytes, of the arrays inside a buffer
NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
}  # fmt: skip

Array = NDArray[Any]


class Argument:
    """An argument of a compiled function, of one shape and dtype, used for many calls.

    values: what to send. array: a device array that shares their memory; None for a GPU. rows: of a
    page table, the page ids that each row of `values` holds, by index.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: type) -> None:
        self.array: Any = None
        self.values: Array = np.zeros(shape, dtype)
        self.rows: dict[int, Sequence[int]] = {}
        if device.shares_memory:
            kind = getattr(sfnp, np.dtype(dtype).name)
            self.array = sfnp.device_array.for_device(device.scoped, list(shape), kind)
            self.values = mapped(self.array).view(dtype).reshape(shape)
            self.values[:] = 0


class Upload:
    """A buffer that carries arguments to a GPU, for one call at a time."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        scoped = device.scoped
        self._array = sfnp.device_array.for_device(scoped, [num_bytes], sfnp.uint8)
        self._staging = sfnp.device_array.for_host(scoped, [num_bytes], sfnp.uint8)
        self._bytes = mapped(self._staging)

    def send(self, arguments: Iterable[Argument]) -> list[Any]:
        """Queue one copy of all arguments; returns the device arrays that it fills.

        Raises EngineError if they do not fit into the buffer.
        """
        every = [argument.values for argument in arguments]
        needed = sum(ALIGNMENT + values.nbytes for values in every)
        if needed > len(self._bytes):
            raise EngineError(f"{needed} bytes of arguments do not fit into {len(self._bytes)}")
        arrays, end = [], 0
        for values in every:
            begin, end = _place_behind(end, values.nbytes)
            self._bytes[begin:end] = values.reshape(-1).view(np.uint8)
            kind = getattr(sfnp, values.dtype.name)
            arrays.append(_typed(self._array, begin, end, values.shape, kind))
        used = slice(0, end)
        self._array.view(used).copy_from(self._staging.view(used))
        return arrays


class Download:
    """A buffer that carries results from a GPU, for one call at a time."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self._device = device
        self._reserve(num_bytes)

    def fetch(self, results: Sequence[Any]) -> list[Array]:
        """Queue copies of device arrays; returns arrays that hold their values once the device is
        done, until the next call. Empty ones for None.
        """
        sizes = [0 if result is None else _num_bytes(result) for result in results]
        needed = sum(ALIGNMENT + size for size in sizes)
        if needed > len(self._bytes):  # logits of all tokens, or of a model without summaries
            self._reserve(needed)
        values, end = [], 0
        for result, size in zip(results, sizes, strict=True):
            begin, end = _place_behind(end, size)
            if result is None:
                values.append(nothing())
                continue
            _typed(self._array, begin, end, result.shape, result.dtype).copy_from(result)
            values.append(_shaped(self._bytes[begin:end], result))
        return values

    def _reserve(self, num_bytes: int) -> None:
        self._array = sfnp.device_array.for_host(self._device.scoped, [num_bytes], sfnp.uint8)
        self._bytes = mapped(self._array)


def read(result: Any) -> Array:
    """The values of a result in shared memory, which they keep alive; empty for None."""
    if result is None:
        return nothing()
    mapping, dtype = result.map(write=True, read=True), NUMPY_DTYPES[result.dtype.name]
    return np.frombuffer(mapping, dtype).reshape(result.shape)


def mapped(array: Any) -> NDArray[np.uint8]:
    """The bytes of an array in host memory, which they keep alive."""
    return np.frombuffer(array.map(write=True, read=True), np.uint8)


def nothing() -> Array:
    """The place of a result that is not fetched."""
    return np.empty(0, np.float32)


def buffer_bytes(*num_elements: int) -> int:
    """The size of a buffer for arrays of these numbers of elements, of up to 8 bytes each."""
    return sum(ALIGNMENT + 8 * count for count in num_elements)


def _shaped(values: NDArray[np.uint8], like: Any) -> Array:
    """Bytes with the dtype and shape of a device array."""
    typed: Array = values.view(NUMPY_DTYPES[like.dtype.name])
    return typed.reshape(like.shape)


def _typed(buffer: Any, begin: int, end: int, shape: Sequence[int], dtype: Any) -> Any:
    """Bytes [begin, end) of a buffer as a device array."""
    return sfnp.device_array(buffer.view(slice(begin, end)).storage, list(shape), dtype)


def _place_behind(end: int, num_bytes: int) -> tuple[int, int]:
    """Begin and end of the next array in a buffer that is filled up to `end`."""
    begin = -(-end // ALIGNMENT) * ALIGNMENT
    return begin, begin + num_bytes


def _num_bytes(array: Any) -> int:
    return int(math.prod(array.shape) * np.dtype(NUMPY_DTYPES[array.dtype.name]).itemsize)
