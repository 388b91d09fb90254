"""InputBuilder: arguments of the compiled functions, from rows of tokens and tiles of images.

Every row is checked here: inside a compiled function a wrong page id or length corrupts memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sf_local.artifact.manifest import ImageSettings
from sf_local.artifact.open import Artifact
from sf_local.device.device import Device
from sf_local.errors import EngineError, MismatchError
from sf_local.model.arrays import Argument, Upload, buffer_bytes
from sf_local.request.batch import Row
from sf_local.vision.processor import ImageProcessor

MIN_WIDTH = 2  # columns of a page table that amdsharktank's code needs
MAX_SHAPES = 8  # of an argument, whose arrays are kept; page tables and chunks have ever new ones
VECTOR = 16  # positions that the attention of CPU code adds up in one step

Inputs = dict[str, Argument]  # by name, in the order in which functions take them


class InputBuilder:
    """Fills and sends the arguments of calls, one call at a time.

    Arrays are kept, and filled again by later calls of the same shapes, if there are not too many
    shapes in between.

    num_pages: KV pages that there are. max_prefill_tokens: the longest row of a prefill that shows
    images, for whose embeddings room is made at the start. All methods with rows raise EngineError
    for positions or pages that do not fit.
    """

    def __init__(
        self, artifact: Artifact, device: Device, num_pages: int, max_prefill_tokens: int
    ) -> None:
        self._vmfb, self._config, self._manifest = artifact.vmfb, artifact.config, artifact.manifest
        self._page_size, self._max_tokens = artifact.config.page_size, artifact.max_tokens
        self._num_pages = num_pages
        # Only code of our own compiler takes pages beyond the context, and skips empty rows.
        self._rounds_up = artifact.manifest is not None and not device.shares_memory
        self._unused_len = 0 if artifact.manifest else 1  # length of rows that pad a batch
        self._arguments: defaultdict[str, Callable[[tuple[int, ...], type], Argument]]
        self._arguments = defaultdict(lambda: lru_cache(MAX_SHAPES)(partial(Argument, device)))
        if artifact.manifest and artifact.manifest.images:
            self._processor = ImageProcessor(ImageSettings(**artifact.manifest.images))
        self._upload: Upload | None = None
        if not device.shares_memory:
            self._upload = Upload(device, self._upload_bytes(max_prefill_tokens))

    def clear(self) -> None:
        """Free the arguments, which the next calls make again."""
        self._arguments.clear()

    def close(self) -> None:
        """Free the device's memory."""
        self._arguments.clear()
        self._upload = None

    def decode(self, rows: Sequence[Row]) -> tuple[int, Inputs]:
        """The compiled batch size to call, and a decode's arguments for rows of one token each."""
        self._check(rows)
        size = _fitting_batch(self._config.decode_batch_sizes, len(rows))
        starts = [row.start for row in rows]
        width = self._width(max([len(row.page_ids) for row in rows]))
        return size, {
            "tokens": self._fill("tokens", (size, 1), [row.tokens for row in rows]),
            "seq_lens": self._fill(
                "seq_lens", (size,), [start + 1 for start in starts], self._unused_len
            ),
            "start_positions": self._fill("start_positions", (size,), starts),
            "page_ids": self._fill_pages((size, width), rows),
        }

    def prefill(self, rows: Sequence[Row]) -> tuple[int, Inputs]:
        """The compiled batch size to call, and a prefill's arguments for rows of any length.

        "embeds" is among them only if a row shows an image. Raises MismatchError for rows that do
        not begin at position 0, if the model was compiled without has_prefill_position.
        """
        self._check(rows)
        size = _fitting_batch(self._config.prefill_batch_sizes, len(rows))
        page_size = self._page_size
        num_pages = self._padded_pages(-(-max(len(row.tokens) for row in rows) // page_size))
        if self._config.has_prefill_position:
            width = self._width(
                max(max(row.start for row in rows) // page_size + num_pages,
                    *(len(row.page_ids) for row in rows))
            )  # fmt: skip
        else:  # the page table must have exactly the pages of `tokens`
            width = num_pages = max(MIN_WIDTH, num_pages)
        tokens = self._arguments["tokens"]((size, num_pages * page_size), np.int64)
        for values, row in zip(tokens.values, rows, strict=False):
            values[: len(row.tokens)] = row.tokens
            values[len(row.tokens) :] = 0
        tokens.values[len(rows) :] = 0  # else those of an earlier call, which may be anything
        inputs = {"tokens": tokens}
        if any(row.spans for row in rows):
            inputs["embeds"] = self._fill_embeds(tokens, rows)
        starts = [row.start for row in rows]
        if self._config.has_prefill_position:
            inputs["start_positions"] = self._fill("start_positions", (size,), starts)
        elif any(starts):
            raise MismatchError(f"{self._vmfb}: compiled without has_prefill_position")
        ends = [row.end for row in rows]
        inputs["seq_lens"] = self._fill("seq_lens", (size,), ends, self._unused_len)
        inputs["page_ids"] = self._fill_pages((size, width), rows)
        return size, inputs

    def add_inv_temperatures(self, inputs: Inputs, size: int, values: Sequence[float]) -> None:
        """Add the last argument of functions that sum their logits up [size]; ones by default."""
        inputs["scales"] = self._fill("scales", (size,), values, 1, np.float32)

    def pixels(self, tiles: Sequence[NDArray[np.uint8]]) -> tuple[int, Inputs]:
        """The compiled batch size to call, and an encoder's argument for tiles [size, size, 3]."""
        assert self._manifest
        size = _fitting_batch(self._manifest.image_batch_sizes, len(tiles))
        pixels = self._processor.normalized(np.stack(tiles))
        shape = (size, *pixels.shape[1:])
        return size, {"pixels": self._fill("pixels", shape, pixels, 0, np.float32)}

    def send(self, inputs: Inputs) -> list[Any]:
        """Device arrays of the arguments, which hold their values once the call begins."""
        if self._upload is None:
            return [argument.array for argument in inputs.values()]
        return self._upload.send(inputs.values())

    def _check(self, rows: Sequence[Row]) -> None:
        """Raise EngineError for wrong positions; `_fill_pages` checks the page ids."""
        page_size, longest = self._page_size, self._max_tokens
        for row in rows:
            end = row.start + len(row.tokens)
            if not (row.tokens and row.start >= 0 and end <= longest):
                raise EngineError(f"positions {row.start} to {end} lie outside the context")
            if len(row.page_ids) * page_size < end:
                raise EngineError(f"pages {row.page_ids} do not hold {end} tokens")

    def _fill(
        self, name: str, shape: tuple[int, ...], values: Any, padding: int = 0,
        dtype: type = np.int64,
    ) -> Argument:  # fmt: skip
        """An argument with values for the first rows, and `padding` in the others."""
        argument = self._arguments[name](shape, dtype)
        argument.values[: len(values)] = values
        argument.values[len(values) :] = padding
        return argument

    def _fill_embeds(self, tokens: Argument, rows: Sequence[Row]) -> Argument:
        """Embeddings [N, S, H] where rows show images; their tokens become -1 there."""
        assert self._manifest
        shape = (*tokens.values.shape, self._manifest.hidden_size)
        embeds = self._arguments["embeds"](shape, np.float32)
        for i, row in enumerate(rows):
            for span in row.spans:
                first, last = max(span.start, row.start), min(span.end, row.end)
                to = slice(first - row.start, last - row.start)
                tokens.values[i, to] = -1
                embeds.values[i, to] = span.tile.embeds[first - span.start : last - span.start]
        return embeds

    def _fill_pages(self, shape: tuple[int, int], rows: Sequence[Row]) -> Argument:
        """The page table; rows that are the same as in the last call are there already."""
        table = self._arguments["page_ids"](shape, np.int64)
        for i in range(shape[0]):
            page_ids = rows[i].page_ids if i < len(rows) else ()
            if table.rows.get(i, ()) == page_ids:
                continue
            if page_ids and not 0 < min(page_ids) <= max(page_ids) < self._num_pages:
                raise EngineError(f"pages {page_ids} do not hold {rows[i].end} tokens")
            table.values[i, : len(page_ids)] = page_ids
            table.values[i, len(page_ids) :] = 0
            table.rows[i] = page_ids
        return table

    def _width(self, num_pages: int) -> int:
        """Columns of the page table for `num_pages`.

        Attention adds whole vectors of positions up, so that a row's result does not depend on the
        other rows of its batch.
        """
        unit = -(-VECTOR // self._page_size)
        return max(MIN_WIDTH, self._padded_pages(-(-num_pages // unit)) * unit)

    def _padded_pages(self, num_pages: int) -> int:
        """Pages that a call computes instead of `num_pages`: on a GPU a power of two.

        IREE keeps memory that a call on a GPU has freed for later calls of the same shapes, so
        there should be few shapes.
        """
        return 1 << (num_pages - 1).bit_length() if self._rounds_up else num_pages

    def _upload_bytes(self, max_prefill_tokens: int) -> int:
        """Size of the arguments of the largest call.

        Nothing is allocated later: where that fails, freeing what was there ends the process.
        """
        config, page_size, embeds, pixels = self._config, self._page_size, 0, 0
        if (manifest := self._manifest) and manifest.images:
            pixels = manifest.max_tiles * 3 * manifest.images["tile_size"] ** 2
            longest = min(max_prefill_tokens, config.max_seq_len)
            chunk_pages = self._padded_pages(-(-longest // page_size))
            num_embeds = config.prefill_batch_sizes[-1] * chunk_pages * page_size
            embeds = num_embeds * manifest.hidden_size
        num_pages = self._padded_pages(-(-config.max_seq_len // page_size))
        num_rows = max(*config.prefill_batch_sizes, *config.decode_batch_sizes)
        num_tokens = config.prefill_batch_sizes[-1] * num_pages * page_size
        table = num_rows * self._width(2 * num_pages)  # of a prefill that ends with the context
        return buffer_bytes(max(pixels, num_tokens + embeds), table, *[num_rows] * 4)


def _fitting_batch(sizes: Sequence[int], count: int) -> int:
    """The smallest compiled batch that holds `count` rows; raises EngineError if none does."""
    for size in sizes:
        if size >= count:
            return size
    raise EngineError(f"{count} rows do not fit the largest compiled batch, {sizes[-1]}")
