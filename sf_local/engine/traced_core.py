"""TracedCore: an EngineCore that tells a trace what it does.

Its parts tell it, so that a core without a trace has nothing to ask or to skip.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sf_local.engine.core import EngineCore, Parts
from sf_local.engine.executor import Executor, unencoded
from sf_local.engine.generation import Generation
from sf_local.engine.output_processor import OutputProcessor
from sf_local.engine.scheduler import Scheduler
from sf_local.engine.tracing import Trace
from sf_local.errors import SfLocalError
from sf_local.grammar.mask import Mask
from sf_local.model.outputs import OutputSpec
from sf_local.request.batch import Chunk, Row, Step
from sf_local.request.prompt import Tile
from sf_local.request.request import Request
from sf_local.sampling.logits import ModelOutput

if TYPE_CHECKING:
    from sf_local.grammar.matcher import Grammar


class TracedCore(EngineCore):
    """The same core with a trace; the other arguments are those of EngineCore."""

    def __init__(self, trace: Trace, *arguments: Any, **options: Any) -> None:
        self._trace = trace
        parts = Parts(
            partial(TracedScheduler, trace), partial(TracedOutputs, trace),
            partial(TracedExecutor, trace), partial(TracedMask, trace),
        )  # fmt: skip
        super().__init__(*arguments, parts=parts, **options)

    async def step(self, started_at: float) -> bool:
        """One step, with its slices."""
        self._trace.begin_step(started_at)
        is_kept = True  # also of a step that fails
        try:
            is_kept = await super().step(started_at)
        finally:
            scheduler = self.scheduler
            self._trace.end_step(is_kept, len(scheduler.running), len(scheduler.waiting))
        return is_kept


class TracedScheduler(Scheduler):
    """Its work is a step's "queue"."""

    def __init__(self, trace: Trace, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._trace = trace

    def next_step(self) -> Step:
        """The next piece of work; what follows is "other"."""
        step = super().next_step()
        self._trace.becomes("other")
        return step

    def commit(self, chunks: Sequence[Chunk]) -> None:
        """The same, as "queue"."""
        with self._trace.part("queue"):
            super().commit(chunks)


class TracedExecutor(Executor):
    """What lies between a call and the next one is "sampling", then "other"."""

    def __init__(self, trace: Trace, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._trace = trace
        self._shown: list[Chunk] = []  # those that wait for the next tiles

    def rows(self, chunks: Sequence[Chunk]) -> list[Row]:
        """The same; a call is prepared from here on."""
        self._trace.becomes("other")
        return super().rows(chunks)

    async def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """The same, as "copies"."""
        with self._trace.part("copies", pages=len(copies)):
            await super().copy_pages(copies)

    async def decode(
        self, chunks: Sequence[Chunk], rows: Sequence[Row], spec: OutputSpec
    ) -> ModelOutput:
        """The same, as "decode"."""
        with self._trace.call("decode", chunks):
            output = await super().decode(chunks, rows, spec)
        self._trace.becomes("sampling")
        return output

    async def prefill(
        self, chunks: Sequence[Chunk], rows: Sequence[Row], spec: OutputSpec
    ) -> ModelOutput:
        """The same, as "prefill"."""
        with self._trace.call("prefill", chunks, tokens=sum(len(row.tokens) for row in rows)):
            output = await super().prefill(chunks, rows, spec)
        self._trace.becomes("sampling")
        return output

    def next_tiles(self, chunks: Sequence[Chunk]) -> dict[Tile, NDArray[np.uint8]]:
        """The same; remembers the chunks that show these tiles."""
        tiles = super().next_tiles(chunks)
        self._shown = [chunk for chunk in chunks if tiles.keys() & unencoded([chunk]).keys()]
        return tiles

    async def encode(self, tiles: dict[Tile, NDArray[np.uint8]]) -> dict[Tile, NDArray[np.float32]]:
        """The same, as "images"."""
        with self._trace.call("images", self._shown, tiles=len(tiles)):
            return await super().encode(tiles)


class TracedOutputs(OutputProcessor):
    """Its work is "text"; it knows when requests come and end."""

    def __init__(self, trace: Trace, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._trace = trace

    def add(self, generation: Generation) -> None:
        """The same; its track begins."""
        super().add(generation)
        self._trace.add(generation)

    def deliver(self) -> None:
        """The same, as "text"."""
        with self._trace.part("text"):
            super().deliver()

    def end(self, request: Request, reason: str, error: SfLocalError | None = None) -> None:
        """The same, as "text"; the request's track ends."""
        if request not in self.generations:
            return
        with self._trace.part("text", request=request.sequence):
            super().end(request, reason, error)
        self._trace.end(request, reason if error is None else "error")


class TracedMask(Mask):
    """Its computation is "masks"."""

    def __init__(self, trace: Trace, grammar: Grammar) -> None:
        super().__init__(grammar)
        self._trace = trace

    def compute(self) -> NDArray[np.int32]:
        """The same, as "masks"."""
        with self._trace.part("masks"):
            return super().compute()
