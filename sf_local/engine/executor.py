"""Executor: turns the chunks of a step into calls of the model, and what they return into data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from sf_local.model.outputs import OutputSpec
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Chunk, Row
from sf_local.request.prompt import Tile
from sf_local.sampling.logits import ModelOutput, summarize

TakeLogits = Callable[[Chunk, NDArray[np.float32]], None]


class Executor:
    """The calls of one runner.

    Args:
        page_size: tokens of a KV page.
        take_logits: called with a chunk that wants all its logits, and these [tokens, vocab].
    """

    def __init__(self, runner: ModelRunner, page_size: int, take_logits: TakeLogits) -> None:
        self._runner, self._page_size, self._take_logits = runner, page_size, take_logits

    def rows(self, chunks: Sequence[Chunk]) -> list[Row]:
        """Chunks with the pages up to their ends: attention reads no others."""
        size = self._page_size
        return [
            Row(
                chunk.request.tokens(chunk.start, chunk.end), chunk.start,
                chunk.request.pages[: -(-chunk.end // size)], chunk.spans,
            )
            for chunk in chunks
        ]  # fmt: skip

    async def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole KV pages, in order: (source, destination)."""
        await self._runner.copy_pages(copies)

    async def decode(
        self, chunks: Sequence[Chunk], rows: Sequence[Row], spec: OutputSpec
    ) -> ModelOutput:
        """One call with one token of each row; what follows it."""
        return await self._runner.decode(rows, spec)

    async def prefill(
        self, chunks: Sequence[Chunk], rows: Sequence[Row], spec: OutputSpec
    ) -> ModelOutput:
        """One call with all tokens of the rows; what follows the last one of each."""
        if not any(chunk.wants_all_logits for chunk in chunks):
            return await self._runner.prefill(rows, spec)
        logits = await self._runner.prefill_all(rows, spec)
        for chunk, values in zip(chunks, logits, strict=True):
            if chunk.wants_all_logits:
                self._take_logits(chunk, values)
        last = np.stack([values[-1] for values in logits])
        return summarize(last, spec.inv_temperatures_of(len(rows)))

    def next_tiles(self, chunks: Sequence[Chunk]) -> dict[Tile, NDArray[np.uint8]]:
        """The first tiles of chunks that have yet to be encoded, as many as one call takes."""
        return dict(islice(unencoded(chunks).items(), self._runner.max_tiles))

    async def encode(self, tiles: dict[Tile, NDArray[np.uint8]]) -> dict[Tile, NDArray[np.float32]]:
        """Embeddings [tokens, hidden] of tiles, in one call."""
        return dict(zip(tiles, await self._runner.encode(list(tiles.values())), strict=True))

    def written_pages(self, rows: Sequence[Row]) -> list[int]:
        """KV pages that the computation of rows writes to."""
        return [page for row in rows for page in row.page_ids[row.start // self._page_size :]]


def unencoded(chunks: Sequence[Chunk]) -> dict[Tile, NDArray[np.uint8]]:
    """Tiles that chunks show and that have yet to be encoded, with their pixels [size, size, 3].

    A replica on another device may be encoding one of them at the same time; it sets the pixels to
    None at the end, so they are read once.
    """
    tiles = (span.tile for chunk in chunks for span in chunk.spans)
    return {tile: pixels for tile in tiles if (pixels := tile.pixels) is not None}
