"""Trees of context-free grammars over characters, and rules written into those that name them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_INLINED = (2_000, 200, 20, 0)  # nodes of a rule that is written into others: first that fits
MAX_NODES = 20_000  # of all trees after that
MAX_INLINED_DEPTH = 30  # of its tree: functions that walk trees are recursive


@dataclass(frozen=True, eq=False)
class Chars:
    """One character of a class: ranges of code points, sorted, apart, ends included."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Reference:
    """A text of the rule `name`; `index` is where the user's text names it."""

    name: str
    index: int


@dataclass(frozen=True, eq=False)
class Sequence:
    """The parts one after another; without any, the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """One of the parts."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Repeat:
    """The part `low` to `high` times; None stands for no limit."""

    part: Node
    low: int
    high: int | None


@dataclass(frozen=True, eq=False)
class Lexeme:
    """A regular part without references, of which the lexer takes the longest text."""

    part: Node


Node = Chars | Reference | Sequence | Choice | Repeat | Lexeme
Rules = dict[str, Node]


def sequence(parts: Iterable[Node]) -> Node:
    """The parts one after another."""
    kept = tuple(part for part in parts if not is_empty(part))
    return kept[0] if len(kept) == 1 else Sequence(kept)


def choice(parts: Iterable[Node]) -> Node:
    """One of the parts; the empty text is not a part of a Choice, but makes it optional."""
    parts = tuple(parts)
    kept = tuple(part for part in parts if not is_empty(part))
    if not kept:
        return Sequence(())
    node = kept[0] if len(kept) == 1 else Choice(kept)
    return node if len(kept) == len(parts) else repeat(node, 0, 1)


def repeat(part: Node, low: int, high: int | None) -> Node:
    """`part` repeated; repeats of what is optional or repeated without limit become one."""
    if high == 0 or is_empty(part):
        return Sequence(())
    if (low, high) == (1, 1):
        return part
    if isinstance(part, Repeat) and part.low == 0:
        if part.high is None or high is None:
            return Repeat(part.part, 0, None)
        if part.high == 1:
            return Repeat(part.part, 0, high)
    return Repeat(part, low, high)


def is_empty(node: Node) -> bool:
    """Whether `node` is the empty text."""
    return isinstance(node, Sequence) and not node.parts


def children(node: Node) -> tuple[Node, ...]:
    """The nodes directly inside `node`."""
    if isinstance(node, (Sequence, Choice)):
        return node.parts
    return (node.part,) if isinstance(node, (Repeat, Lexeme)) else ()


def references(node: Node) -> Iterator[Reference]:
    """All references in `node`, from left to right."""
    todo = [node]
    while todo:
        node = todo.pop()
        if isinstance(node, Reference):
            yield node
        todo += reversed(children(node))


def inlined(rules: Rules, root: str) -> Rules:
    """The rules that `root` needs, with regular ones written out where they are named.

    Each tree has nodes of its own. Rules that are large or recursive stay as they are.
    """
    rules = {name: _as_loop(name, node) for name, node in rules.items()}
    for limit in MAX_INLINED:
        sizes = _sizes(rules, limit)
        needed, total = [root], 0
        for name in needed:  # it grows
            total += _measure(rules[name], sizes)[0]
            named = dict.fromkeys(part.name for part in references(rules[name]))
            needed += [other for other in named if other not in sizes and other not in needed]
        if total <= MAX_NODES:
            break
    return {name: _written_out(rules[name], rules, sizes) for name in needed}


def _as_loop(name: str, node: Node) -> Node:
    """x ::= "a" x | "b" as x ::= "a"* "b", which is regular; other rules as they are."""
    is_optional = isinstance(node, Repeat) and (node.low, node.high) == (0, 1)
    inner = children(node)[0] if is_optional else node
    again: list[Node] = []
    others: list[Node] = [Sequence(())] if is_optional else []
    for part in inner.parts if isinstance(inner, Choice) else (inner,):
        last = part.parts[-1] if isinstance(part, Sequence) and part.parts else part
        is_again = isinstance(part, Sequence) and isinstance(last, Reference) and last.name == name
        if is_again:
            again.append(sequence(children(part)[:-1]))
        else:
            others.append(part)
    named = {part.name for tree in (*again, *others) for part in references(tree)}
    if not again or name in named:
        return node
    return sequence([repeat(choice(again), 0, None), choice(others)])


def _sizes(rules: Rules, limit: int) -> dict[str, tuple[int, int]]:
    """Size and depth of the rules that are written out: with what they name, in this order."""
    users: dict[str, list[str]] = {}
    missing = {name: {part.name for part in references(node)} for name, node in rules.items()}
    for name, others in missing.items():
        for other in others:
            users.setdefault(other, []).append(name)
    sizes: dict[str, tuple[int, int]] = {}
    todo = [name for name, others in missing.items() if not others]
    for name in todo:  # it grows
        size, depth = _measure(rules[name], sizes)
        if size > limit or depth > MAX_INLINED_DEPTH:
            continue
        sizes[name] = size, depth
        for user in users.get(name, ()):
            missing[user].discard(name)
            if not missing[user]:
                todo.append(user)
    return sizes


def _measure(node: Node, sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """How many nodes `node` has and how deep they are nested."""
    if isinstance(node, Reference):
        return sizes.get(node.name, (1, 1))
    measures = [_measure(part, sizes) for part in children(node)]
    return (
        1 + sum(size for size, _ in measures),
        1 + max((depth for _, depth in measures), default=0),
    )


def _written_out(node: Node, rules: Rules, sizes: dict[str, tuple[int, int]]) -> Node:
    if isinstance(node, Reference) and node.name in sizes:
        return _written_out(rules[node.name], rules, sizes)
    if isinstance(node, Chars):
        return Chars(node.ranges)
    if isinstance(node, Repeat):
        return repeat(_written_out(node.part, rules, sizes), node.low, node.high)
    if isinstance(node, (Sequence, Choice)):
        parts = [_written_out(part, rules, sizes) for part in node.parts]
        return sequence(parts) if isinstance(node, Sequence) else choice(parts)
    return node
