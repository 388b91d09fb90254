"""How a build tells what it is doing: a callback, and the line that `sf-compile` shows."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Is called with what is being done, and its share that is done, if that is known."""

    def __call__(self, stage: str, share: float | None) -> None:
        """stage: in words. share: from 0 to 1; None if it is not known."""


def silent(stage: str, share: float | None) -> None:
    """The Progress that shows nothing."""


@contextmanager
def progress_display() -> Iterator[Progress]:
    """A progress line on standard error, and what is logged, for as long as the context lasts.

    Where no line can change, as in a file or in CI, each stage has a line of its own.
    """
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Display

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    if not (console.is_interactive or console.is_jupyter):
        with _printed_log():
            yield _Lines()
        return
    shown = Display(*columns, console=console, transient=True)
    with _printed_log(), shown as display:
        task = display.add_task("starting", total=None)

        def show(stage: str, share: float | None) -> None:
            if share is None:
                display.reset(task, description=stage, total=None)
            else:
                display.update(task, description=stage, total=1.0, completed=share)

        yield show


class _Lines:
    """The Progress that prints a line for each stage, as it begins."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, stage: str, share: float | None) -> None:
        if stage != self._stage:
            self._stage = stage
            print(f"{stage} ...", file=sys.stderr, flush=True)


class _Printed(logging.Handler):
    """Prints to what standard error is then, above a progress line."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextmanager
def _printed_log() -> Iterator[None]:
    log, handler = logging.getLogger("sf_local.compile"), _Printed()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
