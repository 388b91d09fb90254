"""Writes trees of grammars, divided into lexemes, in llguidance's dialect of Lark."""

from __future__ import annotations

from sf_local.grammar.grammar_tree import (
    Chars,
    Choice,
    Lexeme,
    Node,
    Reference,
    Repeat,
    Rules,
    children,
)

MAX_LARK_DEPTH = 20  # of parentheses in a rule; llguidance reads about 25


def lark_text(rules: Rules, root: str) -> str:
    """`rules` in Lark, where `root` is called start."""
    writer = _LarkWriter({name: f"r{i}" for i, name in enumerate(rules)} | {root: "start"})
    for name, node in rules.items():
        writer.write(name, node)
    return "\n".join(writer.lines)


class _LarkWriter:
    """Writes rules, with deep parts of them as rules of their own.

    Attributes:
        lines: the rules written so far.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names
        self.lines: list[str] = []

    def write(self, name: str, node: Node) -> None:
        self.lines.append(f"{self._names[name]}: {self._text(node, 0)}")

    def _text(self, node: Node, depth: int) -> str:
        if isinstance(node, Lexeme):
            return f"/{_regex(node.part)}/"
        if isinstance(node, Reference):
            return self._names[node.name]
        if depth >= MAX_LARK_DEPTH:
            return self._apart(node)
        if isinstance(node, Repeat):
            part = self._text(node.part, depth + 1)
            is_one = isinstance(node.part, (Lexeme, Reference))
            return f"{part if is_one else f'({part})'}{_counts(node)}"
        parts = [self._text(part, depth + 1) for part in children(node)]
        return f"({' | '.join(parts)})" if isinstance(node, Choice) else " ".join(parts) or '""'

    def _apart(self, node: Node) -> str:
        text = self._text(node, 0)
        name = f"p{len(self.lines)}"
        self.lines.append(f"{name}: {text}")
        return name


def _regex(node: Node) -> str:
    if isinstance(node, Chars):
        return _class(node)
    if isinstance(node, Repeat):
        part = _regex(node.part)
        is_one = isinstance(node.part, (Chars, Choice))
        return f"{part if is_one else f'(?:{part})'}{_counts(node)}"
    if isinstance(node, Choice):
        return f"(?:{'|'.join(map(_regex, node.parts))})"
    return "".join(map(_regex, children(node)))


def _counts(node: Repeat) -> str:
    signs: dict[tuple[int, int | None], str] = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    if (sign := signs.get((node.low, node.high))) is not None:
        return sign
    if node.low == node.high:
        return f"{{{node.low}}}"
    return f"{{{node.low},{'' if node.high is None else node.high}}}"


def _class(chars: Chars) -> str:
    ranges = [
        _escaped(low) if low == high else f"{_escaped(low)}-{_escaped(high)}"
        for low, high in chars.ranges
    ]
    is_one = len(ranges) == 1 and "-" not in ranges[0]
    return ranges[0] if is_one else f"[{''.join(ranges)}]"


def _escaped(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:X}}}"
