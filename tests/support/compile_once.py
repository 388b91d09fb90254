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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

UNCHECKED = "--verify=false"
# Flags that name a folder for further outputs
DUMP = re.compile(r"(--(?:iree-hal-dump-executable-\w+|dump-compilation-phases)-to=)(.+)")


def install(cache: Path) -> None:
    """Let this process and its children compile through `cache`."""
    from iree.compiler.tools.binaries import find_tool

    os.environ.pop("IREE_TOOL_PATH", None)
    folder = cache / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-SEP", __file__, str(cache), find_tool("iree-compile")]
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


def made_once(parent: Path, key: bytes, make: Callable[[Path], object]) -> Path:
    """A folder in `parent` that depends on `key` alone, and that `make` fills if it is not there.

    It appears whole or not at all; processes that want the same wait for the first of them.
    """
    folder = parent / hashlib.sha256(key).hexdigest()[:16]
    parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=parent) as temporary:
                new = Path(temporary) / "new"
                new.mkdir()
                make(new)
                new.rename(folder)
    return folder


def compile_once(cache: Path, tool: str, arguments: Sequence[str]) -> int:
    """Run `tool`, or copy what it made of the same module; its exit code. Failures are not kept."""
    if "-o" not in arguments:  # the Python API compiles its standard input
        return subprocess.run([tool, *arguments]).returncode
    at = arguments.index("-o") + 1
    output, dumps = Path(arguments[at]), {m[2] for a in arguments if (m := DUMP.fullmatch(a))}
    assert len(dumps) <= 1, "dumps go to one folder"

    def make(folder: Path) -> None:
        (folder / "dump").mkdir()
        command = [DUMP.sub(rf"\g<1>{folder / 'dump'}", argument) for argument in arguments]
        command[at] = str(folder / "output")
        subprocess.run([tool, *command, UNCHECKED], check=True)

    try:
        entry = made_once(cache, _key(tool, arguments, output), make)
    except subprocess.CalledProcessError as error:
        return error.returncode
    shutil.copy(entry / "output", output)
    for dump in dumps:
        shutil.copytree(entry / "dump", dump, dirs_exist_ok=True)
    return 0


def _key(tool: str, arguments: Sequence[str], output: Path) -> bytes:
    """The compiler, all arguments but the names of outputs, and the contents of input files."""
    parts = [str(os.path.getsize(tool)).encode()]  # another version has another size
    for argument in arguments:
        if argument == str(output):
            continue
        argument = DUMP.sub(r"\1", argument)
        path = Path(argument)
        is_file = not argument.startswith("-") and path.is_file()
        parts.append(path.read_bytes() if is_file else argument.encode())
    return b"\0".join(parts)


if __name__ == "__main__":
    sys.exit(compile_once(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
