"""What SGLang keeps of a program that ran."""

from __future__ import annotations

from typing import Any


def error_of(state: Any) -> Exception | None:
    """What ended a program, once its thread has ended; None if it went well.

    SGLang's own `state.error()` can be None too early, and can wait for ever: for expressions that
    the program wrote after the failed one's thread had emptied their queue.
    """
    worker = state.stream_executor.worker
    worker.join(100)
    assert not worker.is_alive(), "the program's thread has not ended"
    error: Exception | None = state.stream_executor.error_
    return error
