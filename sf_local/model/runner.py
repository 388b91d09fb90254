"""ModelRunner: the calls of a compiled model, on one device.

Everything that is awaited here runs on the device's worker thread, one call at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sf_local.artifact.open import Artifact
from sf_local.device.device import Device
from sf_local.errors import MismatchError
from sf_local.model.arrays import Array
from sf_local.model.inputs import InputBuilder, Inputs
from sf_local.model.kv_pages import KVPages
from sf_local.model.outputs import (
    DEFAULT_OUTPUTS,
    OutputReader,
    OutputSpec,
    summed_up,
)
from sf_local.model.program import Program
from sf_local.request.batch import Row
from sf_local.sampling.logits import Floats, ModelOutput

SECONDS_BEFORE_COPY = 1.0  # of calls: a short script gains less than copying the weights costs

T = TypeVar("T")


class ModelRunner:
    """A loaded model with its KV pages. `close` it before its device.

    num_pages: KV pages, page 0 included, which only padding writes to. max_prefill_tokens: the
    longest row of a prefill that shows images.

    is_broken: a call failed, so `recover` before the next one. has_ever_failed: the device can no
    longer be freed. call_seconds: time spent in compiled functions, waiting for them included.
    """

    def __init__(
        self, artifact: Artifact, device: Device, num_pages: int, max_prefill_tokens: int
    ) -> None:
        self.artifact, self.config, self.num_pages = artifact, artifact.config, num_pages
        self.max_tiles = artifact.manifest.max_tiles if artifact.manifest else 0  # of one `encode`
        self.is_broken = self.has_ever_failed = False
        self.call_seconds = 0.0
        self._device = device
        self._program = Program(artifact, device)
        self._inputs = InputBuilder(artifact, device, num_pages, max_prefill_tokens)
        self._outputs = OutputReader(artifact, device)
        self._pages = KVPages(artifact.config, device, num_pages)

    async def start(self) -> None:
        """Zero page 0, to which rows write that only pad a batch; others are zeroed when rows
        begin them."""
        await self.clear_pages([0])

    async def recover(self) -> None:
        """Make the model usable after a failed call; the pages lose what they held."""
        self._inputs.clear()
        self._pages.free()  # before the new ones: there may be no room for both
        self._device.renew()
        self._pages.allocate()
        await self.start()
        self.is_broken = False

    def close(self) -> None:
        """Free all that lies on the device."""
        self._inputs.close()
        self._outputs.close()
        self._pages.free()
        self._program.close()

    async def decode(self, rows: Sequence[Row], spec: OutputSpec = DEFAULT_OUTPUTS) -> ModelOutput:
        """Compute one token a row, and write its keys and values to the row's pages.

        Pages that rows begin are zeroed before, whatever they held: attention multiplies what it
        masks by zero, and NaN survives that.

        This and all other calls raise EngineError for rows that do not fit, what `spec.meanwhile`
        raised, once the call is done, and what the device raises; only then the model is broken.
        """
        size, inputs = self._inputs.decode(rows)
        await self._clear_begun(rows)
        return await self._compute("decode", size, inputs, rows, spec)

    async def prefill(self, rows: Sequence[Row], spec: OutputSpec = DEFAULT_OUTPUTS) -> ModelOutput:
        """Compute rows of any length; the output is that of each row's last token."""
        size, inputs = self._inputs.prefill(rows)
        await self._clear_begun(rows)
        return await self._compute(_prefill_name(inputs), size, inputs, rows, spec)

    async def prefill_all(
        self, rows: Sequence[Row], spec: OutputSpec = DEFAULT_OUTPUTS
    ) -> list[Floats]:
        """Compute rows of any length; the logits [len(row.tokens), V] after every token of each."""
        size, inputs = self._inputs.prefill(rows)
        await self._clear_begun(rows)

        def every(results: list[Array]) -> list[Floats]:
            self._check_length(results, inputs)
            logits = self._outputs.logits(results[0])
            return [logits[i, : len(row.tokens)] for i, row in enumerate(rows)]

        name = f"{_prefill_name(inputs)}_bs{size}"
        return await self._call(name, inputs, len(rows), spec, every)

    async def encode(self, tiles: Sequence[NDArray[np.uint8]]) -> list[Floats]:
        """Embeddings [tokens, H] of 1 to `max_tiles` tiles uint8 [tile_size, tile_size, 3]."""
        size, inputs = self._inputs.pixels(tiles)
        return await self._call(
            f"encode_image_bs{size}", inputs, len(tiles), DEFAULT_OUTPUTS,
            lambda results: [values.copy() for values in results[0]],  # each is freed on its own
        )  # fmt: skip

    async def clear_pages(self, pages: Sequence[int]) -> None:
        """Zero some pages."""
        await self._use_device(self._pages.clear(pages))

    def give_back(self, pages: Sequence[int]) -> None:
        """Free the host's memory of pages that nobody uses, between two calls."""
        self._pages.give_back(pages)

    def ask_ahead(self, free: Iterable[int]) -> bool:
        """Have the host's memory for some of the `free` pages, which are begun in this order,
        between two calls; False if there is enough."""
        return self._pages.ask_ahead(free)

    async def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages on the device, in order: (source, destination)."""
        await self._use_device(self._pages.copy(copies))

    async def _clear_begun(self, rows: Sequence[Row]) -> None:
        """Zero the pages that begin with a token of these rows, or behind it."""
        size = self.config.page_size
        begun = [page for row in rows for page in row.page_ids[-(-row.start // size) :]]
        if begun:
            await self.clear_pages(begun)

    def _compute(
        self, function: str, size: int, inputs: Inputs, rows: Sequence[Row], spec: OutputSpec
    ) -> Coroutine[Any, Any, ModelOutput]:
        """Call a function; the one that sums its logits up, if there is one."""
        if (name := f"{function}_next_bs{size}") in self._program.functions:
            self._inputs.add_inv_temperatures(inputs, size, spec.inv_temperatures or ())
            return self._call(name, inputs, len(rows), spec, summed_up, spec.num_logits)

        def following(results: list[Array]) -> ModelOutput:
            self._check_length(results, inputs)
            return self._outputs.following(results, rows, spec)

        return self._call(f"{function}_bs{size}", inputs, len(rows), spec, following)

    def _check_length(self, results: list[Array], inputs: Inputs) -> None:
        """Raise MismatchError unless the results have every token."""
        if results[0].shape[1] != inputs["tokens"].values.shape[1]:
            raise MismatchError(
                f"{self.artifact.vmfb}: exported with --prefill-final-logits, which config.json "
                "does not tell and which is wrong behind a cached prefix; export it without"
            )

    async def _call(
        self, name: str, inputs: Inputs, num_rows: int, spec: OutputSpec,
        convert: Callable[[list[Array]], T], num_logits: int | None = None,
    ) -> T:  # fmt: skip
        """What `convert` makes of the results' first rows; see `OutputReader.fetch`.

        The call is awaited whatever `spec.meanwhile` does, for it writes to the pages.
        """
        started_at = time.perf_counter()
        fetched, host_error = await self._use_device(
            self._invoke(name, inputs, num_rows, num_logits, spec.meanwhile)
        )
        self.call_seconds += time.perf_counter() - started_at
        if self.call_seconds >= SECONDS_BEFORE_COPY and self._device.shares_memory:
            self._program.huge_weights.start()
        output = convert(self._outputs.read(fetched, spec.copy))
        if host_error is not None:
            raise host_error
        return output

    async def _invoke(
        self, name: str, inputs: Inputs, num_rows: int, num_logits: int | None,
        meanwhile: Callable[[], None],
    ) -> tuple[list[Any], BaseException | None]:  # fmt: skip
        """Fetched results of a function, and what `meanwhile` raised."""
        arguments, host_error = self._inputs.send(inputs), None
        if "pixels" not in inputs:
            arguments.append(self._pages.array)
        results = await self._program.functions[name](*arguments, fiber=self._device.fiber)
        fetched = self._outputs.fetch(results, num_rows, num_logits)
        try:
            meanwhile()
        except BaseException as error:  # what Rust's panics raise is no Exception
            host_error = error
        await self._device.scoped
        return fetched, host_error

    async def _use_device(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work on the device, which is broken if it fails."""
        try:
            return await self._device.finish(work)
        except Exception:
            self.is_broken = self.has_ever_failed = True
            raise


def _prefill_name(inputs: Inputs) -> str:
    return "prefill_embeds" if "embeds" in inputs else "prefill"
