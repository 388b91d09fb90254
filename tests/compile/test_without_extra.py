"""Without the extra `compile`, whatever needs it says in one sentence how to install it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from compile.toolchain import EXTRA

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
        from compile import BuildOptions, build, build_once, demo
        from sf_local.errors import CompileError

        for call in demo, lambda: build("demo", "out"), lambda: build_once("demo", BuildOptions()):
            try:
                call()
            except CompileError as error:
                print(error)
    """)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.endswith(INSTALL) for line in lines)


def test_help_imports_none_of_it() -> None:
    program = f"import sys, compile.__main__; print([n for n in {EXTRA!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
