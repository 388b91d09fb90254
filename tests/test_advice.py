"""Errors and pages advise only what there is: an option is one of the command before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from compile.__main__ import main as sf_compile
from sf_local.cli import main as sf_local
from tests.support.pages import PAGES

ROOT = Path(__file__).parents[1]
OPTION = r"(?<![\w-])--[a-z][a-z-]*"
# Ours, and those of others, whose options are not known here
COMMAND = r"sf-compile|sf-local \w+|pip install|hf download|llama-[\w-]+|exported"


def texts() -> Iterator[tuple[str, str]]:
    """Every text of the packages in which options are named beside words, and where it is."""
    paths = [
        path for name in ("sf_local", "compile") for path in sorted((ROOT / name).rglob("*.py"))
    ]
    trees = {path: ast.parse(path.read_text()) for path in paths}
    constants = {
        name.id: node.value for tree in trees.values() for node in tree.body
        if isinstance(node, ast.Assign) for name in node.targets if isinstance(name, ast.Name)
    }  # fmt: skip
    for path, tree in trees.items():
        skipped = {id(part) for node in ast.walk(tree) for part in _parts(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in skipped:
                text = _text(node, constants)
                if re.search(OPTION, text) and " " in text:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def _parts(node: ast.AST) -> list[ast.expr]:
    """Those of a text, which are not read alone; and docstrings, which are no errors."""
    match node:
        case ast.JoinedStr(values=parts):
            return parts
        case ast.Expr(value=docstring):
            return [docstring]
    return []


def _text(node: ast.AST, constants: Mapping[str, ast.expr]) -> str:
    """A text of the code, with constants in it, such as REPAIR; {} stands for other values."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, constants) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) if name in constants:
            return _text(constants[name], constants)
    return "{}"


@pytest.fixture
def options(capsys: pytest.CaptureFixture[str]) -> Callable[[str], set[str]]:
    """The options of one of our commands."""

    def read(command: str) -> set[str]:
        main = sf_compile if command == "sf-compile" else sf_local
        with pytest.raises(SystemExit):
            main([*command.split()[1:], "--help"])
        return set(re.findall(OPTION, capsys.readouterr().out))

    return read


def test_options_that_errors_name(options: Callable[[str], set[str]]) -> None:
    known: dict[str, set[str]] = {}
    found = 0
    for place, text in texts():
        is_more = text.startswith(" --")  # appended to REPAIR
        command = "sf-compile" if is_more or place.startswith("compile/__main__") else None
        text = text.replace("--force does not remove", "")  # of whoever has given it
        for word in re.findall(f"{COMMAND}|{OPTION}", text):
            if not word.startswith("--"):
                command = word
                continue
            assert command, f"{place}: of which command is {word}? {text}"
            if command.startswith("sf-"):
                found += 1
                assert word in known.setdefault(command, options(command)), f"{place}: {text}"
    assert found > 15


def test_options_that_pages_name(options: Callable[[str], set[str]]) -> None:
    known: dict[str, set[str]] = {}
    found = 0
    for page in PAGES:
        text = page.read_text()
        for command, rest in re.findall(r"(sf-compile|sf-local [a-z]+)\b([^`\n]*)", text):
            for option in re.findall(OPTION, rest):
                found += 1
                assert option in known.setdefault(command, options(command)), f"{page}: {option}"
    assert found > 15
