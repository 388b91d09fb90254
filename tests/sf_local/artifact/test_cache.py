"""The cache of artifacts: its place and key, its locks, and what is known of files."""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from compile import BuildOptions
from sf_local.artifact.cache import (
    as_artifact,
    cache_dir,
    cache_key,
    code_folders,
    known_sha256,
    locked,
    recall,
    remember,
)
from sf_local.artifact.manifest import file_sha256
from sf_local.errors import OutputError
from tests.support.tiny import TINY_OPTIONS, TinyModel


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_its_place(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    assert cache_dir() == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SF_LOCAL_CACHE", "~/x")
    assert cache_dir() == tmp_path / "x"
    monkeypatch.setenv("SF_LOCAL_CACHE", "relative")
    assert cache_dir() == Path.cwd() / "relative"
    monkeypatch.delenv("SF_LOCAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "sf-local"


@pytest.mark.parametrize("place", [None, "~/x", "~nobody-of-this-name/x"])
def test_nobody_has_a_home(monkeypatch: pytest.MonkeyPatch, place: str | None) -> None:
    """As in a container whose user is a number: no folder called "~" appears."""

    def unknown(*_: Any) -> Any:
        raise KeyError("no such user")

    for name in ("getpwuid", "getpwnam"):
        monkeypatch.setattr(pwd, name, unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "SF_LOCAL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if place:
        monkeypatch.setenv("SF_LOCAL_CACHE", place)
    with pytest.raises(OutputError, match=r"no home folder.*set SF_LOCAL_CACHE"):
        cache_dir()
    remember("anything", 1)
    assert recall("anything") is None


def test_the_key_covers_all_code(tmp_path: Path) -> None:
    """A byte more in any module, of whatever package, is another key."""
    ignore = shutil.ignore_patterns("__pycache__")
    names = "compile", "artifact"
    copies = [
        shutil.copytree(folder, tmp_path / name, ignore=ignore)
        for folder, name in zip(code_folders(), names, strict=True)
    ]

    def key() -> str:
        return cache_key("0" * 64, TINY_OPTIONS, copies)

    unchanged, paths = key(), sorted(tmp_path.rglob("*.py"))
    assert tmp_path / "compile/gpu/linear.py" in paths and tmp_path / "artifact/irpa.py" in paths
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content + b"#")
        assert key() != unchanged, path
        path.write_bytes(content)
    assert key() == unchanged


def test_the_key_covers_source_options_and_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    host, other = BuildOptions(), BuildOptions(cpu="generic")

    def keys() -> set[str]:
        return {cache_key("0" * 64, host, ()), cache_key("0" * 64, other, ())}

    before = keys()
    assert len(before) == 2
    assert cache_key("1" * 64, host, ()) not in before
    assert cache_key("0" * 64, replace(host, page_size=32), ()) not in before
    target = import_module("compile.target")
    monkeypatch.setattr(target, "host_cpu_features", lambda: frozenset({"avx2"}))
    assert len(keys() & before) == 1, "code for any CPU is as good as before"


def test_what_is_an_artifact(tiny: TinyModel, tmp_path: Path) -> None:
    vmfb = tiny.artifact / "model.vmfb"
    assert as_artifact(tiny.artifact) == tiny.artifact and as_artifact(str(vmfb)) == vmfb
    several = tmp_path / "several"
    shutil.copytree(tiny.artifact, several / "gfx942")
    assert as_artifact(several) == several
    shutil.copytree(tiny.artifact, tmp_path / "models" / "mine")
    for source in (tiny.source, tmp_path / "models", tmp_path, "demo", "org/name", None, 7):
        assert as_artifact(source) is None  # type: ignore[arg-type]


def settled(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, as if it had been written long ago."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 10)
    return path


def test_a_file_is_hashed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, read = tmp_path / "file", list[str]()
    path.write_bytes(b"one")
    expected = file_sha256(path)
    assert known_sha256(path, read.append) == known_sha256(path, read.append) == expected
    assert len(read) == 2, "it may change once more within this tick of the clock"
    settled(path, monkeypatch)
    for _ in range(2):
        assert known_sha256(path, read.append) == expected
    link = tmp_path / "link"
    link.symlink_to(path)
    assert known_sha256(link, read.append) == expected and len(read) == 3


@pytest.mark.parametrize("how", ["in place", "renamed"])
def test_a_changed_file_is_hashed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    """Of the same size, and with the old time of change set."""
    path = settled(tmp_path / "file", monkeypatch)
    path.write_bytes(b"one")
    before, stat = known_sha256(path), path.stat()
    new = path if how == "in place" else tmp_path / "new"
    new.write_bytes(b"two")
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new.replace(path)
    while path.stat().st_ctime_ns == stat.st_ctime_ns:  # the clock of a file system is coarse
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert known_sha256(path) == file_sha256(path) != before


@pytest.mark.parametrize("found", ["", "[]", '{"subject": 1}', "{", "\0"])
def test_a_damaged_note_is_none(folder: Path, found: str) -> None:
    remember("subject", {"a": 1})
    assert recall("subject") == {"a": 1} and recall("other") is None
    [path] = (folder / "known").iterdir()
    path.write_text(found)
    assert recall("subject") is None


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = settled(tmp_path / "file", monkeypatch)
    path.write_bytes(b"one")
    for place in (path, Path("/proc/nothing")):
        monkeypatch.setenv("SF_LOCAL_CACHE", str(place))
        assert known_sha256(path) == file_sha256(path)


HOLD = """
import sys, pathlib
from sf_local.artifact.cache import locked
with locked(pathlib.Path(sys.argv[1]), print):
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, None])
def test_one_at_a_time(tmp_path: Path, ending: int | None) -> None:
    """Until the other is done or has died; then no lock is left."""
    held = tmp_path / "new" / "held"
    command = [sys.executable, "-c", HOLD, str(held)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "in\n"
        told, entered = threading.Event(), threading.Event()

        def enter() -> None:
            with locked(held, lambda message: told.set()):
                entered.set()

        waiter = threading.Thread(target=enter)
        waiter.start()
        assert told.wait(60) and not entered.is_set()
        holder.communicate() if ending is None else holder.send_signal(ending)
        waiter.join(60)
        assert entered.is_set()
    assert list(held.parent.iterdir()) == []


def test_threads_take_turns(tmp_path: Path) -> None:
    inside, most = list[int](), list[int]()

    def work() -> None:
        for _ in range(20):
            with locked(tmp_path / "x", lambda message: None):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80 and list(tmp_path.iterdir()) == []


def test_no_locks_on_this_file_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(file: Any, operation: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "x", lambda message: None):
        pass
    assert list(tmp_path.iterdir()) == []
