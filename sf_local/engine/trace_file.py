"""TraceFile: a file of Chrome's trace event format, for ui.perfetto.dev and chrome://tracing.

It is the format's JSON array with one event a line. Its closing bracket may be missing, so the file
can be read at any moment, also after the process was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import stat
import threading
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sf_local.engine.log import log
from sf_local.errors import RequestError
from sf_local.request.checks import shown

Event = dict[str, Any]


class TraceFile:
    """Takes events from any thread until `close`, and writes them with each `flush`.

    path: a new file, or an earlier trace, which is overwritten. opened_at: `time.perf_counter()`
    from which the events' times count.

    Raises RequestError for a path that cannot be written, for a file that is no trace, and for one
    that another engine writes, in this process or another.
    """

    def __init__(self, path: str | Path) -> None:
        self._name = f"trace={shown(str(path) if isinstance(path, Path) else path)}"
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._num_bytes = 0  # of events that were written whole
        self._file = _open(path, self._name)
        _written.add(self)
        self.opened_at = time.perf_counter()
        opened = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        self.add({"name": "trace opened", "ph": "i", "s": "g", "pid": 1, "tid": 1, "ts": 0,
                  "args": opened})  # fmt: skip
        try:
            self._write()
        except OSError as error:
            self._file.close()
            raise _unusable(self._name, error) from error

    def add(self, event: Event) -> None:
        """Keep an event for the next `flush`; nothing once the file is closed."""
        if not self._file.closed:
            self._events.append(event)

    def flush(self) -> None:
        """Write the events that were added. If that fails, the file ends with the events before
        them, one line is logged, and nothing more is written. Call it without holding a lock."""
        with self._lock:
            try:
                self._write()
                return
            except OSError as failure:
                error = failure
                self._file.close()
                self._events.clear()
        log(
            logging.WARNING, "%s: %s; the trace ends here, and what was written before can be "
            "opened", self._name, error,
        )  # fmt: skip

    def close(self) -> None:
        """Write what is left and the closing bracket. Nothing in a forked child."""
        with self._lock:
            if not self._file.closed:
                with contextlib.suppress(OSError):  # the bracket may be missing
                    self._write()
                    self._file.write(b"\n]\n")
                self._file.close()

    def abandon(self) -> None:
        """Leave the file to the process that opened it, in a forked child."""
        self._lock = threading.Lock()  # another thread of the parent may hold the other one
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _write(self) -> None:
        """Append the events that were added, or none of them; raises OSError."""
        if self._file.closed or not self._events:
            return
        events, self._events = self._events, []
        lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
        left = memoryview(((",\n" if self._num_bytes else "[\n") + lines).encode())
        size = self._num_bytes + len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._num_bytes)
            raise
        self._num_bytes = size


def _open(path: object, name: str) -> Any:
    """The empty file, locked; raises RequestError."""
    if not isinstance(path, str | Path):
        raise RequestError(f"{name} must be the path of a file, or None")
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unusable(name, error) from error
    try:
        _check(file, name)
        file.truncate(0)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            raise _unusable(name, error) from error
        raise
    return file


def _check(file: Any, name: str) -> None:
    """Lock a file, if it is empty or a trace; raises RequestError, and OSError."""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise RequestError(f"{name} is no regular file; give the path of one")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RequestError(
            f"{name} is written by another engine; give each engine a file of its own"
        ) from None
    file.seek(0)
    if file.read(1) not in (b"", b"["):
        raise RequestError(
            f"{name} exists and is no trace, so it is not overwritten; delete it, or give another "
            "path"
        )


def _unusable(name: str, error: Exception) -> RequestError:
    return RequestError(
        f"{name} cannot be written: {error}; give a file in a folder that exists and has room"
    )


_written: weakref.WeakSet[TraceFile] = weakref.WeakSet()


def close_all() -> None:
    """Close the traces of all engines, at the end of the program."""
    for file in list(_written):
        file.close()


def _abandon_all() -> None:
    for file in list(_written):
        file.abandon()


os.register_at_fork(after_in_child=_abandon_all)
