"""The sources keep a size that can be read in one sitting, and say what they are for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
CLASS_LINES, MODULE_LINES = 250, 350
# At most six, whose parts belong together: "file.py" may have 450 lines, "file.py:Class" 350.
EXCEPTIONS: dict[str, str] = {}


def sources() -> Iterator[tuple[str, str]]:
    """Path, from the checkout on, and text of all modules that are installed."""
    for package in ("sf_local", "compile"):
        for path in sorted((CHECKOUT / package).rglob("*.py")):
            yield str(path.relative_to(CHECKOUT)), path.read_text()


def sizes() -> Iterator[tuple[str, int]]:
    """Name and number of lines of all modules and classes, named as in EXCEPTIONS."""
    for path, text in sources():
        yield path, len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                yield f"{path}:{node.name}", lines_of(node)


def lines_of(node: ast.ClassDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def limit(name: str) -> int:
    usual = CLASS_LINES if ":" in name else MODULE_LINES
    return usual + 100 * (name in EXCEPTIONS)


def public(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """All functions and classes that others may use, and the methods of these classes."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_overload = any(ast.unparse(by) == "overload" for by in node.decorator_list)
        if not (node.name.startswith("_") or is_overload):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


def test_sizes() -> None:
    found = [f"{name}: {lines} lines" for name, lines in sizes() if lines > limit(name)]
    assert not found, "cut these:\n" + "\n".join(found)


def test_exceptions_are_few_and_needed() -> None:
    assert len(EXCEPTIONS) <= 6
    long = {name for name, n in sizes() if n > (CLASS_LINES if ":" in name else MODULE_LINES)}
    assert set(EXCEPTIONS) <= long, "these are short by now, or gone"
    assert all(EXCEPTIONS.values()), "each has a reason"


def test_docstrings() -> None:
    """Methods that override one with a docstring need none of their own."""
    missing: list[tuple[str, str]] = []
    documented: set[str] = set()
    bases: dict[str, set[str]] = {}
    for path, text in sources():
        tree = ast.parse(text)
        doc = ast.get_docstring(tree)
        if tree.body and (not doc or doc.strip(" .").upper() == "TODO"):
            missing.append((path, "the module"))
        for name, node in public(tree, ""):
            if isinstance(node, ast.ClassDef):
                bases.setdefault(name, set()).update(ast.unparse(base) for base in node.bases)
            if ast.get_docstring(node):  # type: ignore[arg-type]
                documented.add(name)
            else:
                missing.append((path, name))

    def is_inherited(name: str) -> bool:
        owner, _, method = name.partition(".")
        names = [f"{base}.{method}" for base in bases.get(owner, ())]
        return any(name in documented or is_inherited(name) for name in names)

    found = [f"{path}: {name}" for path, name in missing if not is_inherited(name)]
    assert not found, "no docstring:\n" + "\n".join(found)
