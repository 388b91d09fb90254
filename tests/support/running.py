"""Running models in tests: a ModelRunner without the engine, failures, an engine at rest."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sf_local.artifact.open import open_artifact
from sf_local.device.device import Device
from sf_local.engine.engine import Engine
from sf_local.engine.scheduler import PREFILL_TOKENS
from sf_local.model.runner import ModelRunner
from sf_local.sampling.logits import Floats

T = TypeVar("T")


async def encode_all(runner: ModelRunner, tiles: Sequence[NDArray[np.uint8]]) -> list[Floats]:
    """Embeddings of any number of tiles."""
    starts = range(0, len(tiles), runner.max_tiles)
    groups = [await runner.encode(tiles[start : start + runner.max_tiles]) for start in starts]
    return [embeds for group in groups for embeds in group]


@contextmanager
def open_runner(
    artifact: Path, num_pages: int = 64, device: str = "cpu", patience: float = 300
) -> Iterator[Callable[[Callable[[ModelRunner], Awaitable[T]]], T]]:
    """Yields run(use): calls `await use(runner)` on the worker thread and returns its result.

    It raises TimeoutError after `patience` seconds.
    """
    opened = Device(device)
    runner = ModelRunner(open_artifact(artifact), opened, num_pages, PREFILL_TOKENS)

    def run(use: Callable[[ModelRunner], Awaitable[T]]) -> T:
        future: Future[T] = Future()

        async def main() -> None:
            try:
                future.set_result(await use(runner))
            except BaseException as error:
                future.set_exception(error)

        opened.run(main())
        return future.result(timeout=patience)

    run(lambda r: r.start())  # type: ignore[arg-type, return-value]
    try:
        yield run
    finally:
        runner.close()
        opened.close()


class Runners(list[ModelRunner]):
    """Makes the runners of an engine and keeps them, so that a test can replace their calls.

    `Engine(artifact, _make_runner=runners)`; then `runners[0]` is the runner of its first device.
    """

    def __call__(self, *arguments: Any) -> ModelRunner:
        self.append(ModelRunner(*arguments))
        return self[-1]


def lose(runner: ModelRunner, call: str, after: threading.Event) -> None:
    """Let `call` fail once `after` is set, and `recover` as well: the device is lost."""

    async def lost(*_: Any) -> Any:
        after.wait(60)
        runner.is_broken = True
        raise RuntimeError("the GPU fell off the bus")

    setattr(runner, call, lost)
    runner.recover = lost  # type: ignore[method-assign]


@contextmanager
def all_at_once(engine: Engine) -> Iterator[None]:
    """What is submitted to the engine's first device meanwhile begins with the same step."""
    go_on = threading.Event()
    engine._replicas.workers[0].ask(lambda: go_on.wait(60) and None)
    try:
        yield
    finally:
        go_on.set()


def assert_idle(engine: Engine) -> None:
    """No request owns a page."""
    stats = engine.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert stats["pages_used"] == 0
