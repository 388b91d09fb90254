"""TODO."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING

from sf_local.engine.generation import Generation
from sf_local.request.output import Delivery, Output

if TYPE_CHECKING:
    from sf_local.engine.engine import Engine


class Handle:
    """A generation under way. Iterate over text deltas, or wait for the whole `result()`.

    Dropping the handle, or leaving an iteration early, cancels the generation.
    """

    def __init__(self, engine: Engine, generation: Generation) -> None:
        self._engine = engine  # which lives as long as its generations
        self._generation, self._placement = generation, engine._placement
        self._deliveries: SimpleQueue[Delivery] = SimpleQueue()
        self._output: Output | None = None
        generation.deliver = self._deliveries.put
        self._placement.submit(generation)

    def __iter__(self) -> Iterator[str]:
        """Text deltas that concatenate to the result's text."""
        return (text for text, _ in self.deltas() if text)

    def deltas(self) -> Iterator[tuple[str, Output | None]]:
        """Text deltas; the last one, which may be empty, comes with the output."""
        self._placement.check_process()
        try:
            while self._output is None:
                item = self._deliveries.get()
                if isinstance(item, BaseException):
                    self._deliveries.put(item)  # for whoever asks again
                    raise item
                text, output = item
                if output is not None:
                    self._output = output
                    self._deliveries.put(("", output))  # for another thread that waits
                yield text, output
        finally:
            if self._output is None:
                self.cancel()

    def result(self) -> Output:
        """Wait for the end. Raises what ended the generation, if it failed."""
        self._generation.is_streamed = False
        for _ in self:
            pass
        assert self._output is not None
        return self._output

    def cancel(self) -> None:
        """End the generation after the current step, with reason "abort"."""
        self._placement.cancel(self._generation)

    def __del__(self) -> None:
        if getattr(self, "_output", self) is None:
            self.cancel()
