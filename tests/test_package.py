"""What pip installs: types that mypy finds in an editable install, and a wheel that is whole."""

from __future__ import annotations

import inspect
import os
import pkgutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import compile
import sf_local
from sf_local.engine.engine import Engine, EngineOptions
from tests.support.tiny import TinyModel
from tests.tools.newest_sglang import readme_commands

CHECKOUT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
# The installed package is to be found, not this checkout
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

USER_SCRIPT = """
import sf_local
from compile import BuildOptions, build

folder = build("hf-folder", "artifact", BuildOptions(weight_dtype="int8"))
with sf_local.Engine(folder) as engine:
    handle: sf_local.Handle = engine.submit("abc", sf_local.SamplingParams(max_new_tokens=4))
    for text in handle:
        print(text.upper())
    reveal_type(handle.result().text)
    reveal_type(engine.score("abc", ["d", "e"])[0].mean)
reveal_type(sf_local.ShortfinLocal(vmfb=folder).engine.max_tokens)
reveal_type([device.total_bytes for device in sf_local.devices()])
engine.generate(prompts="abc")
"""
REVEALED = ["str", "float", "int", "list[int]"]


def make_environment(folder: Path) -> Path:
    """The Python of a new environment whose packages are this one's; `sf_local` is not among them.

    A .pth file is read only where it is installed, so an editable install here has no effect there.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(paths)))
    missing = run([python, "-c", "import sf_local"], folder)
    assert "No module named 'sf_local'" in missing.stderr
    return python


def run(command: list[Path | str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow  # pip fetches the build backend
def test_types_of_an_editable_install(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    install = [*PIP, "--python", str(python), "install", "--no-deps", "-e", CHECKOUT]
    subprocess.run(install, check=True, timeout=300)
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    found = run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "script.py"],
        tmp_path,
    )
    notes = [line for line in found.stdout.splitlines() if "Revealed type" in line]
    types = [line.split('"')[1].replace("builtins.", "") for line in notes]
    assert types == REVEALED, found.stdout
    errors = [line for line in found.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1 and '"prompts"' in errors[0], found.stdout


def test_the_readme_installs_all_but_sglang() -> None:
    """Its two lines for an environment with a newer sglang name the dependencies again."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [text.partition(";")[0] for text in project["dependencies"]]
    _, named = readme_commands()
    assert named == [text for text in wanted if not text.startswith("sglang")]


@pytest.mark.slow
def test_wheel(tmp_path: Path, tiny: TinyModel) -> None:
    subprocess.run([*PIP, "wheel", "--no-deps", "-w", tmp_path, CHECKOUT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("sf_local-*.whl")
    python = make_environment(tmp_path / "venv")
    install = [*PIP, "--python", str(python), "install", "--no-deps", wheel]
    subprocess.run(install, check=True, timeout=300)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for package in (sf_local, compile):
        folder = site / package.__name__
        assert (folder / "py.typed").is_file()
        assert modules_in(folder) == modules_in(Path(str(package.__file__)).parent)
    assert not (site / "tests").exists() and not (site / "examples").exists()
    program = (
        "import sf_local; print(sf_local.__file__); "
        f"params = sf_local.SamplingParams(max_new_tokens=1); "
        f"print(sf_local.Engine({str(tiny.artifact)!r}).generate('abc', params).completion_tokens)"
    )
    done = run([python, "-c", program], tmp_path)
    assert done.stdout == f"{site / 'sf_local' / '__init__.py'}\n1\n", done.stderr
    version = run([python.parent / "sf-local", "--version"], tmp_path)
    assert version.stdout == f"sf-local {sf_local.__version__}\n", version.stderr
    assert "Compile Llama weights" in run([python.parent / "sf-compile", "--help"], tmp_path).stdout


def modules_in(folder: Path) -> set[str]:
    """The names of all modules of a package and its subpackages."""
    names = set()
    for module in pkgutil.iter_modules([str(folder)]):
        names.add(module.name)
        if module.ispkg:
            names |= {f"{module.name}.{name}" for name in modules_in(folder / module.name)}
    return names


def test_engine_options_are_those_of_the_engine() -> None:
    parameters = inspect.signature(Engine).parameters.values()
    options = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    del options["_make_runner"]
    assert {
        name: ref.__forward_arg__ for name, ref in EngineOptions.__annotations__.items()
    } == options
