"""Temporary folders: what is removed, and what is in use."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from io import IOBase
from pathlib import Path
from typing import Any

import pytest

from compile.scratch import scratch_folder

USE = """
import sys, pathlib
from compile.scratch import scratch_folder
with scratch_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "new").mkdir()
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def use(parent: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that uses a folder, and the name of that."""
    command = [sys.executable, "-c", USE, str(parent)]
    user = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout
    return user, user.stdout.readline().strip()


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    others = {".sf-compile.other", ".model.abc", "model"}
    for name in others:
        (tmp_path / name).mkdir()
    (dead, left), (living, used) = use(tmp_path), use(tmp_path)
    assert names(tmp_path) == {*others, left, used}
    dead.kill()
    dead.communicate()
    with scratch_folder(tmp_path) as mine:
        assert names(tmp_path) == {*others, used, mine.name}
    living.communicate()
    assert names(tmp_path) == others


@pytest.mark.parametrize("fault", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_such_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    """NFS locks exclusively only what is open to write (EBADF); others know no locks at all."""
    lock = fcntl.flock

    def limited(file: Any, operation: int) -> None:
        if fault != errno.EBADF or not isinstance(file, IOBase) or not file.writable():
            raise OSError(fault, "no lock")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", limited)
    with scratch_folder(tmp_path) as one, scratch_folder(tmp_path) as other:
        assert names(tmp_path) == {one.name, other.name}
    assert names(tmp_path) == set()
