"""Executor: turns the chunks of a step into calls of the model."""

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
    """The calls of one runner. page_size: tokens of a KV page."""

    def __init__(self, runner: ModelRunner, page_size: int) -> None:
        self._runner, self._page_size = runner, page_size

    def rows(self, chunks: Sequence[Chunk]) -> list[Row]:
        """Chunks with the pages that hold them and what comes before: attention reads no more."""
        return [self._row(chunk) for chunk in chunks]

    def _row(self, chunk: Chunk) -> Row:
        request = chunk.request
        pages = request.pages[: -(-chunk.end // self._page_size)]
        return Row(request.tokens(chunk.start, chunk.end), chunk.start, pages, chunk.spans)

    async def prefill(
        self,
        chunks: Sequence[Chunk],
        rows: Sequence[Row],
        spec: OutputSpec,
        take_logits: TakeLogits,
    ) -> ModelOutput:
        """What follows each chunk; chunks that want all their logits [n, V] get them as well."""
        if not any(chunk.wants_all_logits for chunk in chunks):
            return await self._runner.prefill(rows, spec)
        logits = await self._runner.prefill_all(rows, spec)
        for chunk, values in zip(chunks, logits, strict=True):
            if chunk.wants_all_logits:
                take_logits(chunk, values)
        return summarize(
            np.stack([values[-1] for values in logits]), spec.inv_temperatures_of(len(rows))
        )

    async def encode(self, tiles: dict[Tile, NDArray[np.uint8]]) -> dict[Tile, NDArray[np.float32]]:
        """Embeddings [tokens, H] of the first tiles, as many as one call takes."""
        batch = dict(islice(tiles.items(), self._runner.max_tiles))
        return dict(zip(batch, await self._runner.encode(list(batch.values())), strict=True))


def unencoded(chunks: Sequence[Chunk]) -> dict[Tile, NDArray[np.uint8]]:
    """Tiles of which chunks show something, and which have yet to be encoded.

    Another replica may be at one of them as well, and lets go of its pixels at the end.
    """
    tiles = (span.tile for chunk in chunks for span in chunk.spans)
    return {tile: pixels for tile in tiles if (pixels := tile.pixels) is not None}
