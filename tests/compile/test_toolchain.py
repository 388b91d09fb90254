"""iree-compile: that it cannot be run, or fails, is told with its reason, not as a full disk."""

from __future__ import annotations

import shlex
from pathlib import Path

import iree.compiler
import pytest
from iree.compiler.tools import binaries

from compile import build
from compile.target import resolve_target
from compile.toolchain import iree_compile
from sf_local.errors import CompileError, OutputError
from tests.support.tiny import TINY_OPTIONS, TinyModel


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that is run for iree-compile, which does nothing."""
    path = tmp_path / "its folder" / "iree-compile"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setattr(binaries, "find_tool", lambda name: str(path))
    return path


def error_of_a_build(tiny: TinyModel, folder: Path) -> str:
    with pytest.raises(CompileError) as caught:
        build(tiny.source, folder / "out", TINY_OPTIONS)
    assert type(caught.value) is CompileError and not isinstance(caught.value, OutputError)
    assert not [path for path in folder.iterdir() if path.name.startswith((".sf", "out"))]
    text = str(caught.value)
    assert "free some space" not in text and "cannot be written" not in text
    return text


def find_nothing(name: str) -> str:
    raise ValueError(f"IREE compiler tool '{name}' is not installed")


@pytest.mark.parametrize("is_found", [True, False])  # on a mount with noexec; without a bit
def test_without_permission(
    tiny: TinyModel, tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch, is_found: bool
) -> None:
    compiler.chmod(0o644)
    if not is_found:
        monkeypatch.setattr(binaries, "find_tool", find_nothing)
        monkeypatch.setenv("IREE_TOOL_PATH", str(compiler.parent))
    text = error_of_a_build(tiny, tmp_path)
    assert text.startswith(f"{compiler} cannot be executed (Permission denied); ")
    assert shlex.join(["chmod", "+x", str(compiler)]) in text
    assert "pip install --force-reinstall iree-base-compiler==" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "Exec format error"), (b"\x7fELF\x02\x01" + bytes(99), "Exec format error"),
     (b"#!/no/such\n", "No such file"), (None, "No such file")],
)  # fmt: skip
def test_a_broken_install(
    tiny: TinyModel, tmp_path: Path, compiler: Path, content: bytes | None, reason: str
) -> None:
    if content is None:
        compiler.unlink()
    else:
        compiler.write_bytes(content)
    text = error_of_a_build(tiny, tmp_path)
    assert f"cannot be executed ({reason}" in text and "install it again: pip" in text
    assert "chmod" not in text


def test_a_tool_that_is_not_there(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binaries, "find_tool", find_nothing)
    monkeypatch.setattr(iree.compiler, "__path__", [str(tmp_path)])
    monkeypatch.delenv("IREE_TOOL_PATH")
    assert "is missing; install it again" in error_of_a_build(tiny, tmp_path)


def test_killed(tiny: TinyModel, tmp_path: Path, compiler: Path) -> None:
    compiler.write_text("#!/bin/sh\nkill -9 $$\n")
    text = error_of_a_build(tiny, tmp_path)
    assert "was killed while it compiled for cpu" in text and "memory" in text


def test_what_it_says(tmp_path: Path) -> None:
    """Of a module that it does not understand, without the path of a temporary file."""
    (tmp_path / "model.mlir").write_text("nonsense")
    with pytest.raises(CompileError, match=r"for gfx942 \(exit 1\): model\.mlir:1:1: error: "):
        iree_compile(tmp_path / "model.mlir", tmp_path / "out.vmfb", resolve_target("gfx942"))
