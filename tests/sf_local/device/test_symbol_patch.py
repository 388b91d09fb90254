"""Patches of libshortfin; what they do on a GPU that fails is tested in hip/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sf_local.device.symbol_patch import find_slot

PROGRAM = """
import ctypes
import shortfin
from sf_local.device.device import libshortfin
from sf_local.device.symbol_patch import call_slot, keep_joined_statuses

path = libshortfin()
library = ctypes.CDLL(str(path))
keep_joined_statuses(library, path)
keep_joined_statuses(library, path)
address = call_slot(library, path, "iree_status_join").value
join = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(address)
print(join(None, None), join(None, 7), join(7, None), join(7, 7), join(7, 8))
"""


def test_joined_statuses_are_kept() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.split() == ["None", "7", "7", "7", "7"], done.stderr


def test_another_library_is_refused() -> None:
    python = Path(sys.executable).resolve()
    with python.open("rb") as file, pytest.raises(LookupError, match="does not call"):
        find_slot(file.read(), b"no_such_function")
