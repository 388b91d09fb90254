"""Temporary folders that a process which is killed does not leave behind for ever.

The process that uses such a folder holds a lock on a file in it, which the kernel drops when the
process ends, however it ends. So the next one can tell what is left over from what is in use.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".sf-compile."
LOCK = "in-use.lock"


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, which is made if need be; it is removed at the end.

    Those in `parent` whose processes have ended are removed first. Raises OSError.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        _remove_if_unused(lock)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent) as name:
        folder = Path(name)
        new = folder / "new.lock"
        with new.open("w") as file:
            # Without a file called LOCK it is nobody's to remove: until the lock is held, and for
            # good on a file system that has no locks.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.replace(new, folder / LOCK)
            yield folder


def _remove_if_unused(lock: Path) -> None:
    # To write, for NFS locks exclusively what is open so; and not created, if another removes it.
    with suppress(OSError), lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.parent, ignore_errors=True)
