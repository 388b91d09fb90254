"""A progress line on the terminal while something is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Display

from compile.options import Progress


@contextmanager
def progress_display() -> Iterator[Progress]:
    """Yields the function that shows a stage on standard error."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Display(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task("starting", total=None)

        def show(stage: str, share: float | None) -> None:
            if share is None:
                display.reset(task, description=stage, total=None)
            else:
                display.update(task, description=stage, total=1.0, completed=share)

        yield show
