"""Scheduler: which request computes which tokens next. Pure Python; knows nothing of devices.

For now one request after the other, each with its pages from start to end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sf_local.page_pool import PagePool
from sf_local.request import Request, RequestStatus

MAX_CHUNK = 512  # prompt tokens a step; attention scores take chunk * context * heads floats


@dataclass(frozen=True)
class Step:
    """Tokens [start, end) of one request, to be computed in one call."""

    request: Request
    start: int
    end: int

    @property
    def is_decode(self) -> bool:
        return self.start >= len(self.request.prompt_ids)

    @property
    def samples(self) -> bool:
        """Whether the call reaches the last token, so that its logits give the next."""
        return self.end == self.request.num_tokens


class Scheduler:
    """First come, first served. A request owns its pages from its first step to `finish`."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool, self.page_size = pool, page_size
        self.waiting: deque[Request] = deque()
        self.running: Request | None = None

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def next_step(self) -> Step | None:
        """The next piece of work, with pages for all its tokens; None when there is none."""
        if self.running is None and self.waiting:
            self.running = self.waiting.popleft()
            self.running.status = RequestStatus.RUNNING
        if self.running is None:
            return None
        start = self.running.num_computed
        end = min(self.running.num_tokens, start + MAX_CHUNK)
        self._reserve(self.running, end)
        return Step(self.running, start, end)

    def finish(self, request: Request, reason: str) -> None:
        """Take a request out, wherever it is, and free its pages."""
        if request.status is RequestStatus.FINISHED:
            return
        if request is self.running:
            self.running = None
        else:
            self.waiting.remove(request)
        self.pool.release(request.pages)
        request.pages = []
        request.status, request.finish_reason = RequestStatus.FINISHED, reason

    def _reserve(self, request: Request, num_tokens: int) -> None:
        needed = -(-num_tokens // self.page_size) - len(request.pages)
        request.pages += self.pool.allocate(max(needed, 0))
