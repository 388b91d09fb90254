"""What `import sf_local` offers and loads; all of it but the backend runs without sglang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sf_local
from tests.support.child import WITHOUT_SGLANG
from tests.support.tiny import TinyModel


def run(program: str, *arguments: object, stdin: str = "") -> str:
    """What a program in a process of its own prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exports() -> None:
    names = sf_local.__all__
    assert {"Engine", "Handle", "Output", "SamplingParams", "Score", "ShortfinLocal"} <= {*names}
    assert names == sorted(names) and {*names} <= {*dir(sf_local)}
    for name in names:
        assert getattr(sf_local, name).__doc__ and f"\n    {name} " in str(sf_local.__doc__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sf_local.nothing  # noqa: B018


def test_the_import_loads_nothing_heavy() -> None:
    heavy = ["numpy", "shortfin", "sglang", "tokenizers", "llguidance", "PIL", "jinja2"]
    found = run(f"import sys; import sf_local; print([m for m in {heavy} if m in sys.modules])")
    assert found == "[]\n"


@pytest.mark.parametrize("imports", ["sf_local", "sf_local, wrong", "sf_local, sglang.wrong"])
def test_sglang_gets_the_backend_once_it_is_imported(imports: str, tmp_path: Path) -> None:
    """Also after an import that failed, and without the backend having been asked for."""
    program = f"""
import sys
try:
    import {imports}
except ImportError:
    pass
assert ("sglang" in sys.modules) == ("sf_local.frontend.backend" in sys.modules)
import sglang
print(sglang.ShortfinLocal.__module__)
"""
    assert run(program).strip() == "sf_local.frontend.backend"


def test_exports_without_sglang() -> None:
    program = """
import sf_local
from sf_local import *
assert {*sf_local.__all__} <= {*dir(sf_local)} & {*globals()}
help(sf_local)
try:
    ShortfinLocal(vmfb="x")
except ImportError as error:
    print("refused:", error)
assert "sglang" not in sys.modules
"""
    shown = run(WITHOUT_SGLANG + program)
    for name in sf_local.__all__:
        assert name in shown
    assert "refused: ShortfinLocal cannot be imported: No module named 'sglang'" in shown


def test_engine_without_sglang(tiny: TinyModel) -> None:
    program = """
from sf_local import Engine, SamplingParams
with Engine(sys.argv[1]) as engine:
    print(engine.generate("abc", SamplingParams(max_new_tokens=4)).completion_tokens)
"""
    assert run(WITHOUT_SGLANG + program, tiny.artifact).strip() == "4"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chat", "ARTIFACT", "--max-new-tokens", "4"], "> "),
        (["generate", "ARTIFACT", "--max-new-tokens", "4", "--regex", "ab+c"], "ab"),
        (["inspect", "ARTIFACT", "--verify"], "every file has the hash"),
        (["devices"], "shortfin 3.9.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_without_sglang(tiny: TinyModel, arguments: list[str], expected: str) -> None:
    given = [tiny.artifact if text == "ARTIFACT" else text for text in arguments]
    program = "from sf_local.cli import main\nassert main(sys.argv[1:]) == 0"
    assert expected in run(WITHOUT_SGLANG + program, *given, stdin="hello\nagain\n")


def test_the_module_is_the_command() -> None:
    for option, expected in [("--version", f"sf-local {sf_local.__version__}"), ("--help", "chat")]:
        command = [sys.executable, "-m", "sf_local", option]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert expected in done.stdout
