"""llama.cpp's GBNF, read by its own grammar and written in llguidance's dialect of Lark.

A grammar of GBNF is context-free over characters: it has no lexer, and no part of a text is taken
before another. What is read here is the text of the user, so that errors tell a place in it.
"""

from __future__ import annotations

import re
from typing import NoReturn

from sf_local.grammar.grammar_tree import (
    Chars,
    Choice,
    Node,
    Reference,
    Repeat,
    Rules,
    Sequence,
    children,
    choice,
    inlined,
    references,
    repeat,
    sequence,
)
from sf_local.grammar.lark_writer import lark_text
from sf_local.grammar.lexemes import with_lexemes
from sf_local.grammar.limits import Refused, place, shown

MAX_RULES = 1_000
MAX_GROUPS = 30  # inside each other
MAX_COUNT = 10_000  # of a repeat
_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NEWLINE = re.compile(r"\r\n?|\n|\Z")
_TOKEN = re.compile(r"!?<[^>\r\n]*>?")
_COUNT = re.compile(r"\{\s*([0-9]+)\s*(?:(,)\s*([0-9]+)?\s*)?\}")
_TO = re.compile(r"-(?!\])")
_COUNTS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_ESCAPE = re.compile(
    r"""\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([nrt"\\\[\]-]))"""
)
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t"}
_REMEDIES = {
    "|": "Write | at the end of the line before, or the alternatives in parentheses.",
    "'": 'Texts stand in double quotes: "text".',
    "/": "There are no regexes; write classes and repeats.",
    ")": "No ( opens it.",
    **dict.fromkeys("*+?{", "What it repeats must stand before it."),
}


def gbnf_to_lark(text: str) -> str:
    """The grammar `text` in Lark: the rule root becomes start, others have names of ours.

    As in llama.cpp, the last of several definitions of a rule counts.

    Raises:
        Refused: `text` is not GBNF, has what is not supported, or describes no text.
    """
    rules = _Reader(text).rules()
    _check_names(rules, text)
    _check_left_recursion(rules, text)
    _check_ends(rules)
    return lark_text(with_lexemes(inlined(rules, "root"), "root"), "root")


class _Reader:
    """Reads the rules of one text from its begin to its end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = self._depth = 0

    def rules(self) -> Rules:
        rules: Rules = {}
        self._skip(_LINES)
        while self._at < len(self._text):
            if (found := self._match(_NAME)) is None:
                self._fail('a rule, such as name ::= "text"')
            self._skip(_SPACE)
            if not self._take("::="):
                self._fail("::= after a rule's name")
            self._skip(_LINES)
            rules[found[0]] = self._choice(_SPACE)
            if self._match(_NEWLINE) is None:
                self._fail('"text", [a class], (a group), ., a rule\'s name or a new line')
            self._skip(_LINES)
        if len(rules) > MAX_RULES:
            raise Refused(f"has {len(rules):,} rules; at most {MAX_RULES:,} are supported.")
        return rules

    def _choice(self, space: re.Pattern[str]) -> Node:
        """`space` is what may stand between parts: new lines only inside parentheses."""
        parts = [self._sequence(space)]
        while self._take("|"):
            self._skip(_LINES)
            parts.append(self._sequence(space))
        return choice(parts)

    def _sequence(self, space: re.Pattern[str]) -> Node:
        parts = []
        while (part := self._item()) is not None:
            self._skip(space)
            while (counts := self._counts()) is not None:
                part = repeat(part, *counts)
                self._skip(space)
            parts.append(part)
        return sequence(parts)

    def _item(self) -> Node | None:
        """What a sequence goes on with, or None if it ends."""
        start = self._at
        if self._take('"'):
            return sequence(self._literal(start))
        if self._take("["):
            return self._class(start)
        if self._take("("):
            return self._group(start)
        if self._take("."):
            return Chars(_without_surrogates([(0, _LAST)]))
        if (found := self._match(_NAME)) is not None:
            return Reference(found[0], start)
        if (found := self._match(_TOKEN)) is not None:
            raise Refused(
                f"has the token {shown(found[0])} at {place(self._text, start)}, which is not "
                "supported in GBNF. Write its text in quotes."
            )
        return None

    def _group(self, start: int) -> Node:
        self._depth += 1
        if self._depth > MAX_GROUPS:
            raise Refused(
                f"has more than {MAX_GROUPS} parentheses inside each other at "
                f"{place(self._text, start)}. Make a rule of the inner ones."
            )
        self._skip(_LINES)
        node = self._choice(_LINES)
        if not self._take(")"):
            self._fail(f"a ) for the ( at {place(self._text, start)}")
        self._depth -= 1
        return node

    def _literal(self, start: int) -> list[Node]:
        chars: list[Node] = []
        while not self._take('"'):
            at, code = self._at, self._char('"', start)
            if _SURROGATES[0] <= code <= _SURROGATES[1]:
                raise Refused(
                    f"asks for the surrogate \\u{code:x} at {place(self._text, at)}, which no text "
                    "can contain. Write the character itself, or \\UNNNNNNNN."
                )
            chars.append(Chars(((code, code),)))
        return chars

    def _class(self, start: int) -> Node:
        is_negated, ranges = self._take("^"), []
        while not self._take("]"):
            at, low = self._at, self._char("]", start)
            high = low
            if (
                self._text.startswith("-", self._at)
                and self._text[self._at + 1 : self._at + 2] != "]"
            ):
                self._at += 1
                high = self._char("]", start)
            if high < low:
                self._refuse_part(at, "a range whose ends are in the wrong order. Exchange them.")
            ranges.append((low, high))
        if not ranges:
            self._refuse_part(start, "a class of no characters. Write . for any, or remove it.")
        kept = _without_surrogates(_complement(ranges) if is_negated else ranges)
        if not kept:
            self._refuse_part(start, "a class that no character is in. Remove it.")
        return Chars(kept)

    def _char(self, closing: str, start: int) -> int:
        """The code of the next character in what was opened at `start`."""
        if self._at == len(self._text):
            self._fail(f"a {closing} for the {self._text[start]} at {place(self._text, start)}")
        if not self._text.startswith("\\", self._at):
            self._at += 1
            return ord(self._text[self._at - 1])
        at = self._at
        if (found := self._match(_ESCAPE)) is None:
            self._fail(r"one of \n \r \t \\ \" \[ \] \- \xNN \uNNNN \UNNNNNNNN")
        if found[4] is not None:
            return ord(_CONTROLS.get(found[4], found[4]))
        code = int(found[1] or found[2] or found[3], 16)
        if code > _LAST:
            self._refuse_part(at, f"a code above \\U{_LAST:08X}, the last character. Lower it.")
        return code

    def _counts(self) -> tuple[int, int | None] | None:
        """How often what was read last is repeated; None if nothing says so."""
        at = self._at
        if (counts := _COUNTS.get(self._text[at : at + 1])) is not None:
            self._at += 1
            return counts
        if not self._text.startswith("{", at):
            return None
        if (found := self._match(_COUNT)) is None:
            self._fail("a count such as {2}, {2,} or {0,5}", at + 1)
        texts = [found[1], found[3] or ("" if found[2] else found[1])]
        if any(len(text) > 6 or (text and int(text) > MAX_COUNT) for text in texts):
            self._refuse_part(at, f"a count above {MAX_COUNT:,}. Lower it.")
        low, high = int(texts[0]), int(texts[1]) if texts[1] else None
        if high is not None and high < low:
            self._refuse_part(at, "counts in the wrong order. Exchange them.")
        return low, high

    def _refuse_part(self, start: int, what: str) -> NoReturn:
        text = shown(self._text[start : self._at])
        raise Refused(f"has {text} at {place(self._text, start)}: {what}")

    def _fail(self, expected: str, at: int | None = None) -> NoReturn:
        at = self._at if at is None else at
        char = self._text[at : at + 1]
        found = repr(char) if char else "the end"
        remedy = _REMEDIES.get(char, "")
        raise Refused(
            f"is not GBNF: expected {expected} at {place(self._text, at)}, not {found}. "
            f"{remedy}".rstrip()
        )

    def _skip(self, space: re.Pattern[str]) -> None:
        self._match(space)

    def _take(self, text: str) -> bool:
        is_next = self._text.startswith(text, self._at)
        self._at += len(text) * is_next
        return is_next

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return found


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """All code points that are in none of `ranges`."""
    kept, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            kept.append((start, low - 1))
        start = max(start, high + 1)
    return [*kept, (start, _LAST)] if start <= _LAST else kept


def _without_surrogates(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(_complement([*_complement(ranges), _SURROGATES]))


def _check_names(rules: Rules, text: str) -> None:
    if "root" not in rules:
        raise Refused("has no rule root, which is where GBNF begins. Name the first rule root.")
    for node in rules.values():
        for part in references(node):
            if part.name not in rules:
                raise Refused(
                    f"names the rule {shown(part.name)} at {place(text, part.index)}, which is not "
                    f"defined. Add {shown(part.name)[1:-1]} ::= ..., or quote it if it is a text."
                )


def _check_left_recursion(rules: Rules, text: str) -> None:
    """Refuse what llama.cpp refuses: a rule that may begin with itself."""
    nullable = _fixpoint(rules, is_nullable=True)
    begins = {name: _leftmost(node, nullable)[0] for name, node in rules.items()}
    done: set[str] = set()
    for name in rules:
        path, todo = [], [(name, iter(begins[name]))]
        while todo:
            path = [rule for rule, _ in todo]
            part = next(todo[-1][1], None)
            if part is None:
                done.add(todo.pop()[0])
            elif part.name in path:
                circle = " -> ".join([*path[path.index(part.name) :], part.name])
                raise Refused(
                    f"has a rule that begins with itself, by {shown(part.name)} at "
                    f"{place(text, part.index)}: {shown(circle)[1:]}. Write a repeat in its place, "
                    'such as term ("+" term)*.'
                )
            elif part.name not in done:
                todo.append((part.name, iter(begins[part.name])))


def _leftmost(node: Node, nullable: set[str]) -> tuple[list[Reference], bool]:
    """The references that a text of `node` may begin with, and whether it may be empty."""
    if isinstance(node, Reference):
        return [node], node.name in nullable
    if isinstance(node, Repeat):
        begins, may_be_empty = _leftmost(node.part, nullable)
        return begins, may_be_empty or node.low == 0
    if isinstance(node, Sequence):
        found: list[Reference] = []
        for part in node.parts:
            begins, may_be_empty = _leftmost(part, nullable)
            found += begins
            if not may_be_empty:
                return found, False
        return found, True
    alternatives = [_leftmost(part, nullable) for part in children(node)]
    return [part for begins, _ in alternatives for part in begins], any(e for _, e in alternatives)


def _check_ends(rules: Rules) -> None:
    """Refuse rules whose texts never end, such as x ::= "a" x."""
    endless = rules.keys() - _fixpoint(rules, is_nullable=False)
    if endless:
        name = next(name for name in rules if name in endless)
        raise Refused(
            f"has the rule {shown(name)}, which has no text that ends: it always needs a rule that "
            "needs it. Add an alternative without it."
        )


def _fixpoint(rules: Rules, is_nullable: bool) -> set[str]:
    """The rules that have an empty text, or else those that have a text at all."""

    def has(node: Node) -> bool:
        if isinstance(node, Reference):
            return node.name in found
        if isinstance(node, Repeat) and node.low == 0:
            return True
        if isinstance(node, Chars):
            return not is_nullable
        return (any if isinstance(node, Choice) else all)(map(has, children(node)))

    found: set[str] = set()
    while new := {name for name in reversed(rules) if name not in found and has(rules[name])}:
        found |= new
    return found
