"""Without the extra `compile`, whatever needs it says in one sentence how to install it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

from compile.toolchain import EXTRA
from sf_local import from_source
from tests.support.tiny import TinyModel

INSTALL = 'pip install "sf-local[compile]"'
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {EXTRA!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + textwrap.dedent(program), *arguments],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
    )  # fmt: skip


COMMAND = """
from compile.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_help_is_shown() -> None:
    done = run(COMMAND, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: sf-compile") and not done.stderr


@pytest.mark.parametrize("source", ["demo", "org/name", "nothing.gguf"])
def test_a_build_says_what_to_install(source: str, tmp_path: Path) -> None:
    done = run(COMMAND, source, "-o", str(tmp_path / "out"))
    assert done.returncode == 1 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("sf-compile: ") and line.endswith(INSTALL)
    assert not list(tmp_path.iterdir())


def test_the_python_api_raises() -> None:
    done = run("""
        from compile import build
        from sf_local.errors import CompileError

        try:
            build("demo", "out")
        except CompileError as error:
            print(error)
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(INSTALL) and done.stdout.count("\n") == 1


OPEN = """
from sf_local import from_source
from sf_local.errors import CompileError

for source in sys.argv[1:]:
    try:
        print(from_source(source, weight_dtype="f32", decode_batch_sizes=[1], cpu="generic"))
    except CompileError as error:
        print(error)
"""


def test_what_was_compiled_before_is_opened(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not is refused with the command that compiles it elsewhere."""
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path))
    monkeypatch.setattr(
        import_module("compile.build"), "iree_compile", lambda mlir, vmfb, target: vmfb.touch()
    )
    options = {"weight_dtype": "f32", "decode_batch_sizes": (1,), "cpu": "generic"}
    folder = from_source(tiny.source, **options)
    done = run(OPEN, str(tiny.source), "demo", "org/name")
    assert done.returncode == 0, done.stderr
    opened, *refused = done.stdout.splitlines()
    assert opened == str(folder)
    for line, source in zip(refused, ("demo", "org/name"), strict=True):
        assert line.startswith(f"source={source!r} was not compiled for cpu before, and ")
        assert INSTALL in line
        assert f"sf-compile {source} --cpu generic --weights f32 --decode-batch-sizes 1; " in line


def test_help_imports_none_of_it() -> None:
    program = f"import sys, compile.__main__; print([n for n in {EXTRA!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
