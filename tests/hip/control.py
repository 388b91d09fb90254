"""The stand-in for AMD's driver, from inside the process that it is loaded into."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

hip = ctypes.CDLL(str(Path(os.environ["IREE_HIP_DYLIB_PATH"]) / "libamdhip64.so"))


def fail(faults: str) -> None:
    """Faults from now on, in place of earlier ones: "hipMalloc:1:hipErrorOutOfMemory"."""
    assert hip.sf_hip_fail(faults.encode()) == 0, faults


def delay(microseconds: int) -> None:
    """How long streams wait before each piece of work."""
    hip.sf_hip_delay(microseconds)


def mark(name: str) -> None:
    """A line in the log, for `Outcome.after`."""
    hip.sf_hip_mark(name.encode())


def use_twins(folder: str) -> None:
    """Where the twins of modules lie that are loaded from now on."""
    hip.sf_hip_twins(folder.encode())
