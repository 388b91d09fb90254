"""KVPages: the KV cache on the device, one row of an array a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import shortfin.array as sfnp

from sf_local.artifact.manifest import ModelConfig
from sf_local.device.device import Device
from sf_local.model.arrays import NUMPY_DTYPES, mapped
from sf_local.model.shared_pages import SharedPages

MAX_PENDING = 16  # operations to wait for at a time; IREE's poller aborts at about 64


class KVPages:
    """Keys and values of all pages, in `array` [num_pages, page_elements] of the KV dtype.

    A page holds anything until it is cleared or copied to.

    What is awaited here runs on the device's worker thread.
    """

    array: Any

    def __init__(self, config: ModelConfig, device: Device, num_pages: int) -> None:
        self._device, self._dtype = device, config.paged_kv_cache.kv_cache_dtype
        self._shape = [num_pages, config.page_elements]
        self._zero = np.zeros(1, NUMPY_DTYPES[self._dtype]).tobytes()
        self._shared: SharedPages | None = None
        self.allocate()

    def allocate(self) -> None:
        """Make `array`, with any content; free the previous one before."""
        scoped, dtype = self._device.scoped, getattr(sfnp, self._dtype)
        self.array = sfnp.device_array.for_device(scoped, self._shape, dtype)
        if self._device.shares_memory:
            self._shared = SharedPages(mapped(self.array).reshape(self._shape[0], -1))

    def free(self) -> None:
        """Free the device's memory."""
        del self.array
        self._shared = None

    def give_back(self, pages: Sequence[int]) -> None:
        """Let others have the host's memory of some pages, which hold anything then. A GPU's stays
        allocated."""
        if self._shared is not None:
            self._shared.give_back(pages)

    def ask_ahead(self, free: Iterable[int]) -> bool:
        """See `SharedPages.ask_ahead`; False on a GPU, whose memory is there."""
        return self._shared is not None and self._shared.ask_ahead(free)

    async def clear(self, pages: Sequence[int]) -> None:
        """Zero some pages."""
        if self._shared is not None:
            self._shared.clear(pages)
            return
        for start in range(0, len(pages), MAX_PENDING):
            for page in pages[start : start + MAX_PENDING]:
                self.array.view(page).fill(self._zero)
            await self._device.scoped

    async def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages on the device, in order: (source, destination)."""
        if self._shared is not None:
            self._shared.use([destination for _, destination in copies])
        for start in range(0, len(copies), MAX_PENDING):
            for source, destination in copies[start : start + MAX_PENDING]:
                self.array.view(destination).copy_from(self.array.view(source))
            await self._device.scoped
