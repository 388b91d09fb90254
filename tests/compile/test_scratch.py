"""Temporary folders: what is removed, and what is in use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from compile.scratch import scratch_folder

USE = """
import sys, pathlib
from compile.scratch import scratch_folder
with scratch_folder(pathlib.Path(sys.argv[1]), "model") as folder:
    (folder / "new").mkdir()
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    others = {".sf-compile.other.abc", ".model.abc", "model", ".sf-compile.models"}
    for name in others:
        (tmp_path / name).mkdir()
    users = [
        subprocess.Popen(
            [sys.executable, "-c", USE, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    dead, living = users
    used = [((user.stdout and user.stdout.readline()) or "").strip() for user in users]
    assert names(tmp_path) == {*others, *used}
    dead.kill()
    dead.communicate()
    with scratch_folder(tmp_path, "model") as mine:
        assert names(tmp_path) == {*others, used[1], mine.name}
    living.communicate()
    assert names(tmp_path) == others
