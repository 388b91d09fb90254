"""Stands in for iree-compile in a test run: what was compiled before is copied, not compiled again.

`install` makes an executable of that name, which iree.compiler finds through IREE_TOOL_PATH, in
child processes as well. What it keeps depends only on the flags and the text of the module, so
tests share it whatever their paths, and processes that want the same wait for the first of them.
The compiler checks what we emit as always, but not its own work between two passes, which took a
quarter of the time and changes nothing in what it makes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

UNCHECKED = "--verify=false"
DUMP = re.compile(
    r"(--(?:iree-hal-dump-executable-\w+|dump-compilation-phases)-to=)(.+)"
)  # a folder


def install(cache: Path) -> None:
    """Let this process and its children compile through `cache`."""
    from iree.compiler.tools.binaries import find_tool

    os.environ.pop("IREE_TOOL_PATH", None)
    folder = cache / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-SE", __file__, str(cache), find_tool("iree-compile")]
    with locked(folder):
        script = folder / "iree-compile"
        script.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
        script.chmod(0o755)
    os.environ["IREE_TOOL_PATH"] = str(folder)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Other processes that lock the same path wait until the block is done."""
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_once(cache: Path, tool: str, arguments: Sequence[str]) -> int:
    """Run `tool`, or copy what it made of the same module; its exit code. Failures are not kept."""
    if "-o" not in arguments:  # the Python API compiles its standard input
        return subprocess.run([tool, *arguments]).returncode
    at = arguments.index("-o") + 1
    output, dumps = Path(arguments[at]), {m[2] for a in arguments if (m := DUMP.fullmatch(a))}
    assert len(dumps) <= 1, "dumps go to one folder"
    entry = cache / _key(arguments, output)
    with locked(entry):
        if not entry.exists():
            with tempfile.TemporaryDirectory(dir=cache) as temporary:
                new = Path(temporary) / "new"
                (new / "dump").mkdir(parents=True)
                command = [DUMP.sub(rf"\g<1>{new / 'dump'}", argument) for argument in arguments]
                command[at] = str(new / "output")
                code = subprocess.run([tool, *command, UNCHECKED]).returncode
                if code:
                    return code
                new.rename(entry)
    shutil.copy(entry / "output", output)
    for dump in dumps:
        shutil.copytree(entry / "dump", dump, dirs_exist_ok=True)
    return 0


def _key(arguments: Sequence[str], output: Path) -> str:
    """A hash of all arguments but the names of outputs, with the contents of input files."""
    digest = hashlib.sha256()
    for argument in arguments:
        if argument == str(output):
            continue
        argument = DUMP.sub(r"\1", argument)
        path = Path(argument)
        is_file = not argument.startswith("-") and path.is_file()
        digest.update(path.read_bytes() if is_file else argument.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


if __name__ == "__main__":
    sys.exit(compile_once(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
