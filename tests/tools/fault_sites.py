"""Places in Python sources where a fault can be seeded, found through `ast`, and the draw of some.

Only statements inside functions: what runs at import belongs to no test. Left out are `__repr__`,
`raise`, `assert`, the construction of errors, f-strings, annotations and TYPE_CHECKING blocks.
"""

from __future__ import annotations

import ast
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

COMPARISON, NUMBER, DROPPED, SWAPPED = KINDS = (
    "a comparison turned", "a number off by one", "a statement dropped", "arguments swapped",
)  # fmt: skip
AREAS = {  # globs in the layout of packages, and in the flat one before it
    "scheduler": ("sf_local/engine/scheduler.py", "sf_local/scheduler.py"),
    "cache": ("sf_local/kv_cache/radix_cache.py", "sf_local/radix_cache.py"),
    "pool": ("sf_local/kv_cache/page_pool.py", "sf_local/page_pool.py"),
    "sampler": ("sf_local/sampling/*.py", "sf_local/sampler.py", "sf_local/summary.py",
                "sf_local/logprobs.py"),
    "grammar": ("sf_local/grammar/*.py", "sf_local/grammar*.py", "sf_local/masks.py"),
    "emitters": ("compile/cpu/*.py", "compile/gpu/*.py", "compile/mlir/*.py", "compile/cpu_*.py",
                 *(f"compile/{name}.py" for name in ("abi", "kernel", "llama", "matmul", "mlir",
                   "row_major", "tiled_attention", "tiles", "vision"))),
    "device": ("sf_local/device/*.py", "sf_local/device*.py", "sf_local/cpu_threads.py",
               "sf_local/linkage.py"),
    "artifact": ("sf_local/artifact/*.py", "sf_local/artifact.py", "sf_local/irpa.py"),
}  # fmt: skip
TURNED: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
}  # fmt: skip
SYMMETRIC = {"min", "max", "gcd"}  # swapping their arguments changes nothing
BLOCKS = "body", "orelse", "finalbody", "handlers", "cases"  # fields of statements in a statement


@dataclass(frozen=True)
class Fault:
    """A fault as it is known in every tree, wherever its function lies."""

    kind: str
    function: str
    statement: str  # the first line of what `ast.unparse` makes of it
    before: str
    after: str
    nth: int = 0  # among faults that are equal but for this


@dataclass(frozen=True)
class Site:
    """Where a fault lies in one tree: bytes [start, end) become `text`."""

    path: str
    lines: range  # of the statement, or of its header
    start: int
    end: int
    text: bytes

    def apply(self, tree: Path) -> None:
        source = (tree / self.path).read_bytes()
        (tree / self.path).write_bytes(source[: self.start] + self.text + source[self.end :])


def find_sites(tree: Path) -> dict[Fault, Site]:
    """All sites in a tree's packages but `tests`."""
    sites: dict[Fault, Site] = {}
    seen: Counter[Fault] = Counter()
    packages = [p.parent for p in tree.glob("*/__init__.py") if p.parent.name != "tests"]
    for path in sorted(itertools.chain(*(package.rglob("*.py") for package in packages))):
        for fault, site in _Source(path.read_bytes(), str(path.relative_to(tree))).sites():
            sites[replace(fault, nth=seen[fault])] = site
            seen[fault] += 1
    return sites


def locate(fault: Fault, sites: dict[Fault, Site]) -> Site | None:
    """The site of another tree's fault: equal, or the only one with its statement or function."""
    if fault in sites:
        return sites[fault]
    for name in ("statement", "function"):
        names = "kind", "before", "after", name
        alike = [f for f in sites if all(getattr(f, n) == getattr(fault, n) for n in names)]
        if len(alike) == 1:
            return sites[alike[0]]
    return None


def by_area(sites: dict[Fault, Site]) -> dict[str, list[Fault]]:
    """The faults of the areas; what lies elsewhere is left out."""
    found: dict[str, list[Fault]] = {area: [] for area in AREAS}
    for fault, site in sites.items():
        for area, globs in AREAS.items():
            if any(Path(site.path).match(glob) for glob in globs):
                found[area].append(fault)
    return found


def draw(
    faults: dict[str, list[Fault]], number: int, per_area: int, seed: int,
    try_one: Callable[[str, Fault], bool],
) -> None:  # fmt: skip
    """Draw until `try_one` took `number` of the faults, and at least `per_area` of each area."""
    rng = random.Random(seed)
    faults = {area: found for area, found in faults.items() if found}
    quotas = Counter(dict.fromkeys(faults, per_area))
    quotas.update(rng.choices(list(faults), k=max(0, number - quotas.total())))
    for area, quota in quotas.items():
        for fault in _shuffled(faults[area], rng):
            if quota == 0:
                break
            quota -= try_one(area, fault)


def _shuffled(faults: list[Fault], rng: random.Random) -> Iterator[Fault]:
    """One of each kind in turn, else most would be numbers."""
    kinds = [[fault for fault in faults if fault.kind == kind] for kind in KINDS]
    for kind in kinds:
        rng.shuffle(kind)
    return (fault for turn in itertools.zip_longest(*kinds) for fault in turn if fault is not None)


class _Source:
    """One file. `ast` counts columns in bytes, so the source is kept as bytes."""

    def __init__(self, source: bytes, path: str) -> None:
        self._source, self._path = source, path
        self._starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]

    def sites(self) -> Iterator[tuple[Fault, Site]]:
        for function, statement in _statements(ast.parse(self._source).body):
            header = ast.unparse(statement).split("\n")[0].removesuffix(":")
            for kind, start, end, text, before, after in self._changes(statement):
                fault = Fault(kind, function, header, before, after)
                yield fault, Site(self._path, _lines(statement), start, end, text)

    def _changes(self, statement: ast.stmt) -> Iterator[tuple[str, int, int, bytes, str, str]]:
        """(kind, start, end, text, before, after) of every change of a statement."""
        if _can_be_dropped(statement):
            start, end = self._span(statement)
            yield DROPPED, start, end, b"pass", ast.unparse(statement), "pass"
        for node in _expressions(statement):
            before = ast.unparse(node)
            if isinstance(node, ast.Compare) and len(node.ops) == 1:
                start, end = self._span(node.left)[1], self._span(node.comparators[0])[0]
                old, new = TURNED[type(node.ops[0])]
                text = self._source[start:end].replace(old.encode(), new.encode(), 1)
                yield COMPARISON, start, end, text, before, new
            elif isinstance(node, ast.Constant) and type(node.value) is int:
                number = str(node.value + 1)
                yield NUMBER, *self._span(node), number.encode(), before, number
            elif isinstance(node, ast.Call) and _name(node) not in SYMMETRIC:
                for first, second in itertools.pairwise(node.args):
                    yield from self._swap(first, second, before)

    def _swap(
        self, first: ast.expr, second: ast.expr, before: str
    ) -> Iterator[tuple[str, int, int, bytes, str, str]]:
        after = f"{ast.unparse(second)}, {ast.unparse(first)}"
        if isinstance(first, ast.Starred) or isinstance(second, ast.Starred):
            return
        if ast.unparse(first) != ast.unparse(second):
            (start, middle), (second_start, end) = self._span(first), self._span(second)
            parts = (second_start, end), (middle, second_start), (start, middle)
            text = b"".join(self._source[a:b] for a, b in parts)
            yield SWAPPED, start, end, text, before, after

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self._starts[node.lineno - 1] + node.col_offset
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset


def _statements(body: list[ast.stmt], function: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Statements inside functions, each with the name of its function."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name != "__repr__":
                yield from _statements(node.body, node.name)
        elif isinstance(node, ast.ClassDef):
            yield from _statements(node.body)
        elif not isinstance(node, ast.Raise | ast.Assert) and not _is_type_checking(node):
            if function:
                yield function, node
            yield from _nested(node, function)


def _nested(node: ast.AST, function: str) -> Iterator[tuple[str, ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        yield from _statements(getattr(node, name, []), function)
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield from _nested(part, function)


def _expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """Of a statement itself, not of the statements in it."""
    todo: list[ast.AST] = []
    for name, value in ast.iter_fields(statement):
        if name not in (*BLOCKS, "annotation"):
            todo += [v for v in (value if isinstance(value, list) else [value]) if _is_node(v)]
    while todo:
        node = todo.pop(0)
        is_error = isinstance(node, ast.Call) and _name(node).endswith("Error")
        if not isinstance(node, ast.JoinedStr) and not is_error:
            if isinstance(node, ast.expr):
                yield node
            todo += ast.iter_child_nodes(node)


def _can_be_dropped(node: ast.stmt) -> bool:
    """Not the assignment to a name, without which most functions fail at once."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call | ast.Await)
    if isinstance(node, ast.Assign):
        return not any(isinstance(n, ast.Name | ast.Tuple) for n in node.targets)
    return isinstance(node, ast.AugAssign)


def _lines(node: ast.stmt) -> range:
    """Of a statement, or of its header, where other statements follow in it."""
    assert node.end_lineno is not None
    inner = [child.lineno - 1 for child in ast.iter_child_nodes(node)
             if isinstance(child, ast.stmt | ast.ExceptHandler)]  # fmt: skip
    return range(node.lineno, max(node.lineno, min(inner, default=node.end_lineno)) + 1)


def _is_node(value: object) -> bool:
    return isinstance(value, ast.AST)


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _name(call: ast.Call) -> str:
    """What is called, without what it is an attribute of."""
    return ast.unparse(call.func).rpartition(".")[2]
