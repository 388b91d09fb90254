"""OutputProcessor: the generations of one engine core: their text, their deadlines, their ends."""

from __future__ import annotations

import contextlib
import heapq
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sf_local.engine.failures import Failures
from sf_local.engine.finish_callback import FinishCallback
from sf_local.engine.generation import Generation
from sf_local.engine.log import log
from sf_local.engine.metrics import RequestMetrics
from sf_local.engine.scheduler import Scheduler
from sf_local.errors import SfLocalError
from sf_local.request.batch import Chunk
from sf_local.request.output import Delta, Output
from sf_local.request.prompt import Tile
from sf_local.request.request import Request


class OutputProcessor:
    """Delivers text and ends generations, each exactly once; an error of one harms no other.

    on_finish: told of each that ends.
    """

    def __init__(
        self, scheduler: Scheduler, failures: Failures, on_finish: FinishCallback | None
    ) -> None:
        self._scheduler, self._failures, self._on_finish = scheduler, failures, on_finish
        self.request_metrics = RequestMetrics()
        self.generations: dict[Request, Generation] = {}  # of all requests that have not ended
        self._with_news: list[Generation] = []  # have tokens whose text is not delivered
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._cut_short: list[Generation] = []  # ended before their time; to be logged

    def add(self, generation: Generation) -> None:
        """Take a new generation in, and hand its request to the scheduler."""
        request = generation.request
        self.generations[request] = generation
        self._scheduler.add(request)
        if generation.deadline is not None:
            self._remember_deadline(generation.deadline, request)

    def take_logits(self, chunk: Chunk, logits: NDArray[np.float32]) -> None:
        """Logits [tokens, vocab] of a chunk, for the log probabilities of its prompt."""
        request = chunk.request
        generation = self.generations.get(request)
        if generation is None:
            return
        with self.guard(request):
            generation.take_logits(chunk.start, logits)
        if chunk.end >= len(request.prompt_ids):
            request.first_logits = None

    def has_news(self, generation: Generation, reason: str | None) -> None:
        """It took tokens. Their text is delivered with the next `deliver`, or now, if it ends."""
        if reason:
            self.end(generation.request, reason)
        else:
            self._with_news.append(generation)

    def deliver(self) -> None:
        """Deliver the text of all tokens that were taken since the last time."""
        for generation in self._with_news:
            try:
                generation.write()
            except BaseException as error:
                self.fail(generation.request, error)
        self._with_news.clear()

    def end(self, request: Request, reason: str, error: SfLocalError | None = None) -> None:
        """End a generation with its output, or an error; nothing if it has ended already.

        Raises nothing: whoever waits for the generation is told of the first error there is.
        """
        generation = self.generations.pop(request, None)
        if generation is None:
            return
        try:
            self._scheduler.finish(request, reason)
            request.spans = ()  # the heap of deadlines may keep the request, but not its tiles
            if error is not None:
                generation.write()
            last: tuple[str | Delta, Output] | SfLocalError = error or generation.finish(reason)
        except BaseException as failure:  # Rust's panics are no Exception
            last = error or self._failures.of_request(failure)
        result = last if isinstance(last, SfLocalError) else last[1]
        with contextlib.suppress(BaseException):  # whoever waits is told in any case
            self.request_metrics.observe(result)
            if self._on_finish is not None:
                self._on_finish(result, request.params)
        generation.end(last)
        if reason in ("abort", "timeout"):
            self._cut_short.append(generation)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a generation because of an error that concerns it alone."""
        self.end(request, "abort", self._failures.of_request(error))

    def fail_all(self, make_error: Callable[[], SfLocalError]) -> None:
        """End every generation with an error of its own."""
        for request in list(self.generations):
            self.end(request, "abort", make_error())

    def fail_tile(self, tile: Tile, error: BaseException) -> None:
        """End all generations whose prompts show this tile of an image."""
        for request in list(self.generations):
            if any(span.tile is tile for span in request.spans):
                self.fail(request, error)

    @contextlib.contextmanager
    def guard(self, request: Request) -> Iterator[None]:
        """Run a block for one request: whatever it raises ends this request and no other."""
        try:
            yield
        except BaseException as error:
            self.fail(request, error)

    def expire(self) -> None:
        """End the generations whose timeout has passed. At the start of a step no lock is held, so
        those that ended before their time since the last one are logged here."""
        while self._deadlines and self._deadlines[0][0] <= time.perf_counter():
            self.end(heapq.heappop(self._deadlines)[2], "timeout")

        if self._cut_short:
            for generation in self._cut_short:
                _log_cut_short(generation)
            self._cut_short.clear()

    def _remember_deadline(self, deadline: float, request: Request) -> None:
        heapq.heappush(self._deadlines, (deadline, request.sequence, request))
        if len(self._deadlines) > 2 * len(self.generations) + 64:  # most of them have ended
            self._deadlines = [d for d in self._deadlines if d[2] in self.generations]
            heapq.heapify(self._deadlines)


def _log_cut_short(generation: Generation) -> None:
    """Log why a generation ended, and how far it had come."""
    result, request = generation.result, generation.request
    log(
        logging.DEBUG, "request %d ended after %d tokens: %s", request.sequence,
        len(request.output_ids), result.finish_reason if isinstance(result, Output) else result,
    )  # fmt: skip
