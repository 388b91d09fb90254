"""ModelRunner: the compiled program, its KV pages on the device, padding, and the calls.

Everything that is async runs on the device's worker thread,
one call at a time. Page ids and lengths are checked here before every call: inside a VMFB a wrong
one is memory corruption.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import shortfin.array as sfnp
from numpy.typing import NDArray

from sf_local.artifact.manifest import REPAIR, ImageSettings
from sf_local.artifact.open import Artifact, check_target
from sf_local.device.device import Device, allow_tiles
from sf_local.errors import (
    EngineError,
    MismatchError,
    TargetError,
)
from sf_local.model.arrays import (
    NUMPY_DTYPES,
    Argument,
    Array,
    Download,
    Upload,
    buffer_bytes,
    read,
)
from sf_local.model.inputs import MIN_WIDTH, VECTOR, fitting_batch, prefill_name
from sf_local.model.kv_pages import MAX_PENDING
from sf_local.model.outputs import DEFAULT_OUTPUTS, OutputSpec, as_float32, fetched_results
from sf_local.model.program import load_program
from sf_local.request.batch import Row
from sf_local.sampling.logits import BLOCK, Floats, ModelOutput, spread, summarize, unpack
from sf_local.vision.processor import ImageProcessor

MAX_VOCAB = 1 << 24  # tokens; what is beyond cannot be one


T = TypeVar("T")


class ModelRunner:
    """A loaded model. `close()` frees all that lies on the device, before the device closes."""

    def __init__(
        self, artifact: Artifact, device: Device, num_pages: int, max_prefill_tokens: int
    ) -> None:
        if artifact.manifest:
            check_target(artifact.manifest, device.chip)
            if "amx_tile" in artifact.manifest.cpu_features and not allow_tiles():
                raise TargetError(
                    f"{artifact.vmfb}: compiled for AMX, which this system forbids; compile it "
                    "with sf-compile --cpu x86-64-v4"
                )
        self.artifact, self.config, self.num_pages = artifact, artifact.config, num_pages
        self._device, self._max_prefill_tokens = device, max_prefill_tokens
        manifest = artifact.manifest
        self._image_batch_sizes = manifest.image_batch_sizes if manifest else []
        if manifest and manifest.images:
            self._processor = ImageProcessor(ImageSettings(**manifest.images))
        self.is_broken = False  # a call failed: `recover` before the next one
        self.has_ever_failed = False  # then the device can no longer be freed
        self.call_seconds = 0.0  # spent in compiled functions, and waiting for them
        self._program = load_program(artifact, device)
        self._functions = self._look_up_functions()
        self._arguments: dict[tuple[str, tuple[int, ...]], Argument] = {}
        self._upload: Upload | None = None
        self._download: Download | None = None
        if not device.shares_memory:
            self._upload = Upload(device, self._upload_bytes())
            self._download = Download(device, self._download_bytes())
        self._allocate_cache()

    async def start(self) -> None:
        """Zero the cache: attention multiplies what it masks by zero, and NaN survives that."""
        await self._use_device(self._zero_cache())

    async def _zero_cache(self) -> None:
        self._cache.fill(self._zero)
        await self._device.scoped

    async def _use_device(self, work: Coroutine[Any, Any, T]) -> T:
        """What comes of work on the device, which is broken if it fails."""
        try:
            return await self._device.finish(work)
        except Exception:
            self.is_broken = self.has_ever_failed = True
            raise

    async def recover(self) -> None:
        """Make the model usable after a failed call; all that the cache held is lost."""
        self._arguments.clear()
        del self._cache  # before the new one: there may be no room for two
        self._device.renew()
        self._allocate_cache()
        await self.start()
        self.is_broken = False

    def close(self) -> None:
        self._arguments.clear()
        self._functions.clear()
        self._upload = self._download = None
        del self._cache, self._program

    async def prefill(self, rows: Sequence[Row], spec: OutputSpec = DEFAULT_OUTPUTS) -> ModelOutput:
        """Compute rows of tokens; what follows each row's last one."""
        self._check(rows)
        size = fitting_batch(self.config.prefill_batch_sizes, len(rows))
        inputs = self._prefill_inputs(rows, size)
        if (name := f"{prefill_name(inputs)}_next_bs{size}") in self._functions:
            return await self._call_next(name, size, inputs, len(rows), spec)
        results = await self._call_prefill(size, inputs, len(rows), spec)
        ends = [len(row.tokens) - 1 for row in rows]
        last = [values[np.arange(len(rows)), ends] for values in results]
        return self._following(last, spec)

    async def prefill_all(
        self, rows: Sequence[Row], spec: OutputSpec = DEFAULT_OUTPUTS
    ) -> list[Floats]:
        """Compute rows of tokens; the logits [len(row), V] after every token of each row."""
        self._check(rows)
        size = fitting_batch(self.config.prefill_batch_sizes, len(rows))
        inputs = self._prefill_inputs(rows, size)
        [values] = await self._call_prefill(size, inputs, len(rows), spec)
        logits = self._logits(values)
        return [logits[i, : len(row.tokens)] for i, row in enumerate(rows)]

    async def encode(self, tiles: Sequence[NDArray[np.uint8]]) -> list[Floats]:
        """Embeddings [tokens, H] of at most `max_tiles` tiles [size, size, 3]."""
        size = fitting_batch(self._image_batch_sizes, len(tiles))
        pixels = self._processor.normalized(np.stack(tiles))
        inputs = {"pixels": self._fill("pixels", (size, *pixels.shape[1:]), pixels, 0, np.float32)}
        [embeds] = await self._call(f"encode_image_bs{size}", inputs, len(tiles), DEFAULT_OUTPUTS)
        return [values.copy() for values in embeds]  # each is let go of on its own

    @property
    def max_tiles(self) -> int:
        """Of images, that are encoded in one call."""
        return self._image_batch_sizes[-1]

    async def clear_pages(self, pages: Sequence[int]) -> None:
        """Zero whole pages, as `start` does with all of them."""
        await self._use_device(self._clear_pages(pages))

    async def _clear_pages(self, pages: Sequence[int]) -> None:
        for start in range(0, len(pages), MAX_PENDING):
            for page in pages[start : start + MAX_PENDING]:
                self._cache.view(page).fill(self._zero)
            await self._device.scoped

    async def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages on the device, in order: (source, destination)."""
        await self._use_device(self._copy_pages(copies))

    async def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        for start in range(0, len(copies), MAX_PENDING):
            for source, destination in copies[start : start + MAX_PENDING]:
                self._cache.view(destination).copy_from(self._cache.view(source))
            await self._device.scoped

    async def decode(self, rows: Sequence[Row], spec: OutputSpec = DEFAULT_OUTPUTS) -> ModelOutput:
        """Compute one token a row; what follows it."""
        assert all(len(row.tokens) == 1 for row in rows)
        self._check(rows)
        size = fitting_batch(self.config.decode_batch_sizes, len(rows))
        width = self._width(max(len(row.page_ids) for row in rows))
        inputs = {
            "tokens": self._fill("tokens", (size, 1), [row.tokens for row in rows]),
            "seq_lens": self._fill("seq_lens", (size,), [row.end for row in rows], self._unused),
            "start_positions": self._fill("start_positions", (size,), [r.start for r in rows]),
            "page_ids": self._fill_pages((size, width), rows),
        }
        if (name := f"decode_next_bs{size}") in self._functions:
            return await self._call_next(name, size, inputs, len(rows), spec)
        results = await self._call(f"decode_bs{size}", inputs, len(rows), spec)
        return self._following([values[:, 0] for values in results], spec)

    def _prefill_inputs(self, rows: Sequence[Row], size: int) -> dict[str, Argument]:
        page = self.config.page_size
        num_pages = self._num_padded(-(-max(len(row.tokens) for row in rows) // page))
        if self.config.has_prefill_position:
            last = max(max(row.start for row in rows) // page + num_pages,
                       *(len(row.page_ids) for row in rows))  # fmt: skip
            width = self._width(last)
        else:  # the page table must have exactly the pages of `tokens`
            width = num_pages = max(MIN_WIDTH, num_pages)
        tokens = self._argument("tokens", (size, num_pages * page))
        for values, row in zip(tokens.values, rows, strict=False):
            values[: len(row.tokens)] = row.tokens
            values[len(row.tokens) :] = 0
        inputs = {"tokens": tokens}
        if any(row.spans for row in rows):
            inputs["embeds"] = self._fill_embeds(tokens, rows)
        if self.config.has_prefill_position:
            starts = [row.start for row in rows]
            inputs["start_positions"] = self._fill("start_positions", (size,), starts)
        elif any(row.start for row in rows):
            raise MismatchError(f"{self.artifact.vmfb}: compiled without has_prefill_position")
        ends = [row.end for row in rows]
        inputs["seq_lens"] = self._fill("seq_lens", (size,), ends, self._unused)
        inputs["page_ids"] = self._fill_pages((size, width), rows)
        return inputs

    async def _call_prefill(
        self, size: int, inputs: dict[str, Argument], num_rows: int, spec: OutputSpec
    ) -> list[Array]:
        """Results [num_rows, S, ...]: the logits, or the likeliest tokens' and their ids."""
        results = await self._call(f"{prefill_name(inputs)}_bs{size}", inputs, num_rows, spec)
        if results[0].shape[1] != inputs["tokens"].values.shape[1]:
            raise MismatchError(
                f"{self.artifact.vmfb}: exported with --prefill-final-logits, which config.json "
                "does not tell and which is wrong behind a cached prefix; export it without"
            )
        return results

    def _following(self, results: Sequence[Array], spec: OutputSpec) -> ModelOutput:
        """From logits [n, V]; or from the likeliest tokens' [n, k], and their ids."""
        logits = self._logits(results[0])
        if self.config.top_k is None:
            return summarize(logits, spec.inv_temperatures_of(len(logits)))
        ids = results[1]
        are_tokens = (ids >= 0) & (ids < MAX_VOCAB)
        logits = spread(logits, np.where(are_tokens, ids, 0))
        following = summarize(logits, spec.inv_temperatures_of(len(logits)))
        for i in np.flatnonzero(~are_tokens.all(axis=1)):
            following.best[i] = ids[i, ~are_tokens[i]][0]  # which is judged
        return following

    def _logits(self, values: Array) -> Floats:
        """Logits up to a constant a row, of what the model made of them."""
        if self.config.logits_normalization != "softmax":
            return values
        with np.errstate(divide="ignore", invalid="ignore"):  # what was rounded to 0 is impossible
            return np.log(values)

    async def _call_next(
        self, name: str, size: int, inputs: dict[str, Argument], num_rows: int, spec: OutputSpec
    ) -> ModelOutput:
        """A function that sums the logits up."""
        scales = spec.inv_temperatures_of(num_rows)
        inputs["scales"] = self._fill("scales", (size,), scales, 1, np.float32)
        logits, *sums = await self._call(name, inputs, num_rows, spec)
        logits = logits[:, 0] if len(logits) else logits
        return unpack(logits, *sums) if len(sums) == 1 else ModelOutput(logits, *sums)

    async def _call(
        self, name: str, inputs: dict[str, Argument], num_rows: int, spec: OutputSpec
    ) -> list[Array]:
        """What is needed of the results; the others are empty."""
        started_at = time.perf_counter()
        values = await self._use_device(self._invoke(name, inputs, num_rows, spec))
        self.call_seconds += time.perf_counter() - started_at
        return [as_float32(array, spec.copy) for array in values]

    async def _invoke(
        self, name: str, inputs: dict[str, Argument], num_rows: int, spec: OutputSpec
    ) -> list[Array]:
        arguments = self._send(inputs.values())
        if not name.startswith("encode_image"):
            arguments.append(self._cache)
        results = await self._functions[name](*arguments, fiber=self._device.fiber)
        results = fetched_results(results, num_rows, spec, "_next_" in name)
        fetched = self._download and self._download.fetch(results)
        spec.meanwhile()
        await self._device.scoped
        return fetched or [read(result) for result in results]

    def _send(self, arguments: Iterable[Argument]) -> list[Any]:
        """The arrays that hold them once the call begins."""
        if self._upload is None:
            return [argument.array for argument in arguments]
        return self._upload.send(arguments)

    @property
    def _unused(self) -> int:
        """The length of rows that only pad a batch: our own code skips those that are empty."""
        return 0 if self.artifact.manifest else 1

    def _num_padded(self, num_pages: int) -> int:
        """Pages that a call computes instead of `num_pages`: on a GPU a power of two.

        There memory that a call has let go of is kept for another call of the same shapes. Only our
        own code takes positions behind the context.
        """
        if self._device.shares_memory or not self.artifact.manifest:
            return num_pages
        return 1 << (num_pages - 1).bit_length()

    def _width(self, num_pages: int) -> int:
        """Columns of the page table for `num_pages`.

        Attention sums whole vectors of positions, so a row comes out the same in any company.
        """
        unit = -(-VECTOR // self.config.page_size)
        return max(MIN_WIDTH, self._num_padded(-(-num_pages // unit)) * unit)

    def _upload_bytes(self) -> int:
        """For the arguments of the largest call.

        Nothing is allocated later: where that fails, freeing what was there ends the process.
        """
        config, embeds, pixels = self.config, 0, 0
        if (manifest := self.artifact.manifest) and manifest.images:
            pixels = self.max_tiles * 3 * manifest.images["tile_size"] ** 2
            chunk_pages = self._num_padded(-(-self._max_prefill_tokens // config.page_size))
            num_embeds = config.prefill_batch_sizes[-1] * chunk_pages * config.page_size
            embeds = num_embeds * manifest.hidden_size
        num_pages = self._num_padded(-(-config.max_seq_len // config.page_size))
        num_rows = max(*config.prefill_batch_sizes, *config.decode_batch_sizes)
        num_tokens = config.prefill_batch_sizes[-1] * num_pages * config.page_size
        table = num_rows * self._width(2 * num_pages)  # of a prefill that ends with the context
        return buffer_bytes(max(pixels, num_tokens + embeds), table, *[num_rows] * 4)

    def _download_bytes(self) -> int:
        """For the results of the largest call that sums up logits."""
        manifest, config = self.artifact.manifest, self.config
        vocab_size = manifest.vocab_size if manifest else 1
        num_rows = max(*config.prefill_batch_sizes, *config.decode_batch_sizes)
        row = vocab_size + 1 + 2 * -(-vocab_size // BLOCK)
        embeds = 0
        if manifest and manifest.images:
            embeds = self.max_tiles * manifest.images["tokens_per_tile"] * manifest.hidden_size
        return buffer_bytes(max(num_rows * row, embeds))

    def _argument(self, name: str, shape: tuple[int, ...], dtype: type = np.int64) -> Argument:
        """An argument of the next call; those of one shape are the same, with their values."""
        key = (name, shape)
        if key not in self._arguments:
            self._arguments[key] = Argument(self._device, shape, dtype)
        return self._arguments[key]

    def _fill(
        self,
        name: str,
        shape: tuple[int, ...],
        values: Any,
        padding: int = 0,
        dtype: type = np.int64,
    ) -> Argument:
        """An argument with values for the first rows, and `padding` in the others."""
        argument = self._argument(name, shape, dtype)
        argument.values[: len(values)] = values
        argument.values[len(values) :] = padding
        return argument

    def _fill_embeds(self, tokens: Argument, rows: Sequence[Row]) -> Argument:
        """Embeddings [N, S, H] where rows show images; their tokens are negative there."""
        assert self.artifact.manifest
        hidden_size = self.artifact.manifest.hidden_size
        embeds = self._argument("embeds", (*tokens.values.shape, hidden_size), np.float32)
        for i, row in enumerate(rows):
            for span in row.spans:
                first, last = max(span.start, row.start), min(span.end, row.end)
                to = slice(first - row.start, last - row.start)
                tokens.values[i, to] = -1
                embeds.values[i, to] = span.tile.embeds[first - span.start : last - span.start]
        return embeds

    def _fill_pages(self, shape: tuple[int, int], rows: Sequence[Row]) -> Argument:
        """The page table; rows that have not changed since the last call are there already."""
        table = self._argument("page_ids", shape)
        for i in range(shape[0]):
            page_ids = rows[i].page_ids if i < len(rows) else ()
            if table.rows.get(i, ()) == page_ids:
                continue
            if not all(0 < page < self.num_pages for page in page_ids):
                raise EngineError(f"pages {page_ids} do not hold {rows[i].end} tokens")
            table.values[i, : len(page_ids)] = page_ids
            table.values[i, len(page_ids) :] = 0
            table.rows[i] = page_ids
        return table

    def _check(self, rows: Sequence[Row]) -> None:
        """All but the range of page ids, which `_fill_pages` checks."""
        page_size, longest = self.config.page_size, self.artifact.max_tokens
        for row in rows:
            end = row.end
            if not (row.tokens and row.start >= 0 and end <= longest):
                raise EngineError(f"positions {row.start} to {end} lie outside the context")
            if len(row.page_ids) * page_size < end:
                raise EngineError(f"pages {row.page_ids} do not hold {end} tokens")

    def _allocate_cache(self) -> None:
        self._cache = sfnp.device_array.for_device(
            self._device.scoped,
            [self.num_pages, self.config.page_elements],
            getattr(sfnp, self._cache_dtype),
        )

    @property
    def _cache_dtype(self) -> str:
        return self.config.paged_kv_cache.kv_cache_dtype

    @property
    def _zero(self) -> bytes:
        return np.zeros(1, NUMPY_DTYPES[self._cache_dtype]).tobytes()

    def _look_up_functions(self) -> dict[str, Any]:
        """All functions that config.json names, and those that sum up logits, where they are."""
        config = self.config
        wanted = [f"prefill_bs{n}" for n in config.prefill_batch_sizes]
        wanted += [f"decode_bs{n}" for n in config.decode_batch_sizes]
        wanted += [f"encode_image_bs{n}" for n in self._image_batch_sizes]
        if self._image_batch_sizes:
            wanted += [f"prefill_embeds_bs{n}" for n in config.prefill_batch_sizes]
        optional = [name.replace("_bs", "_next_bs") for name in wanted]
        found = {name: self._look_up(name) for name in [*wanted, *optional]}
        missing = [name for name in wanted if found[name] is None]
        if missing:
            raise MismatchError(
                f"{self.artifact.vmfb} lacks {', '.join(missing)}, which config.json names; "
                f"{REPAIR}"
            )
        for name in wanted:
            if name.startswith(("prefill_bs", "decode_bs")):
                self._check_signature(name, found[name].calling_convention)
        return {name: function for name, function in found.items() if function is not None}

    def _check_signature(self, name: str, convention: str) -> None:
        """Raise MismatchError unless config.json tells how to call a function.

        The convention is like "0rrrrrrr_r": arguments, of which two may be fences, and results.
        """
        config = self.config
        arguments, results = (len(part) for part in convention.removeprefix("0").split("_"))
        expected = 5 if config.has_prefill_position or name.startswith("decode") else 4
        if arguments not in (expected, expected + 2) or results != 1 + (config.top_k is not None):
            raise MismatchError(
                f"{self.artifact.vmfb}: {name} is not what config.json says, which has "
                f"has_prefill_position={config.has_prefill_position} and top_k={config.top_k}; "
                "use the config.json that was exported with it"
            )

    def _look_up(self, name: str) -> Any:
        try:
            return self._program.lookup_function(f"{self.config.module_name}.{name}")
        except ValueError:  # "Function ... not found in program"
            return None
