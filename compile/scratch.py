"""Temporary folders that a process which is killed does not leave behind for ever.

The process that uses such a folder holds a lock on it, which the kernel drops when the process
ends, however it ends. So the next one can tell what is left over from what is in use.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent`, which is made if need be; it is removed at the end.

    Folders of the same `name` whose processes have ended are removed first. Raises OSError.
    """
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".sf-compile.{name}."
    with ExitStack() as stack:
        with _locked(parent):  # else another process could take a new folder for one left over
            for folder in parent.glob(f"{glob.escape(prefix)}*"):
                _remove_if_unused(folder)
            new = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=parent)))
            stack.enter_context(_locked(new))
        yield new


@contextmanager
def _locked(folder: Path, operation: int = fcntl.LOCK_EX) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


def _remove_if_unused(folder: Path) -> None:
    with suppress(OSError), _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        shutil.rmtree(folder, ignore_errors=True)
