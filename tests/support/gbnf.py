"""Random grammars as trees, written as GBNF and as regexes, with a matcher of their own."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import strategies as st

ALPHABET = "ab -é"


@dataclass(frozen=True)
class Tree:
    """A part of a grammar: kind is text, class, not, any, row, choice, repeat or rule."""

    kind: str
    text: str = ""
    parts: tuple[Tree, ...] = ()
    low: int = 0
    high: int | None = None


def gbnf(tree: Tree) -> str:
    if tree.kind == "text":
        return f'"{tree.text}"'.replace("é", r"\u00e9")
    if tree.kind in ("class", "not"):
        return f"[{'^' if tree.kind == 'not' else ''}{tree.text}]"
    if tree.kind in ("any", "rule"):
        return tree.text or "."
    if tree.kind == "repeat":
        return f"{gbnf(tree.parts[0])}{_count(tree)}"
    return f"({(' | ' if tree.kind == 'choice' else ' ').join(map(gbnf, tree.parts))})"


def regex(tree: Tree) -> str:
    if tree.kind == "text":
        return f"(?:{re.escape(tree.text)})"
    if tree.kind in ("class", "not"):
        return f"[{'^' if tree.kind == 'not' else ''}{tree.text}]"
    if tree.kind == "any":
        return "(?s:.)"
    if tree.kind == "repeat":
        return f"(?:{regex(tree.parts[0])}){_count(tree)}"
    return f"(?:{('|' if tree.kind == 'choice' else '').join(map(regex, tree.parts))})"


def _count(tree: Tree) -> str:
    if (tree.low, tree.high) in ((0, None), (1, None), (0, 1)):
        return {(0, None): "*", (1, None): "+", (0, 1): "?"}[tree.low, tree.high]
    return f"{{{tree.low},{'' if tree.high is None else tree.high}}}"


def matches(rules: dict[str, Tree], text: str) -> bool:
    """Whether `text` is one of `rules["root"]`, by trying all ways to read it."""

    @functools.cache
    def ends(tree: Tree, start: int) -> frozenset[int]:
        return frozenset(_ends(tree, start))

    def _ends(tree: Tree, start: int) -> Iterator[int]:
        if tree.kind == "text":
            yield from [start + len(tree.text)] if text.startswith(tree.text, start) else []
        elif tree.kind in ("class", "not", "any"):
            is_in = tree.kind == "any" or (tree.kind == "class") == (
                text[start : start + 1] in tree.text
            )
            yield from [start + 1] if start < len(text) and is_in else []
        elif tree.kind == "rule":
            yield from ends(rules[tree.text], start)
        elif tree.kind == "choice":
            yield from (end for part in tree.parts for end in ends(part, start))
        else:
            yield from _rows(tree, start)

    def _rows(tree: Tree, start: int) -> set[int]:
        if tree.kind == "row":
            at = {start}
            for part in tree.parts:
                at = {end for place in at for end in ends(part, place)}
            return at
        at, found = {start}, {start} if tree.low == 0 else set()
        for i in range(1, (len(text) + tree.low if tree.high is None else tree.high) + 1):
            at = {end for place in at for end in ends(tree.parts[0], place)}
            found |= at if i >= tree.low else set()
        return found

    return len(text) in ends(rules["root"], 0)


COUNTS = st.sampled_from([(0, None), (1, None), (0, 1), (2, 2), (0, 2), (1, 3), (2, None)])
LEAVES = st.one_of(
    st.text(ALPHABET, max_size=3).map(lambda text: Tree("text", text)),
    st.sets(st.sampled_from("ab é"), min_size=1, max_size=3).flatmap(
        lambda chars: st.sampled_from(["class", "class", "not"]).map(
            lambda kind: Tree(kind, "".join(sorted(chars)))
        )
    ),
    st.just(Tree("any")),
)


def _compounds(parts: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    rows = st.lists(parts, min_size=1, max_size=4).map(
        lambda found: Tree("row", parts=tuple(found))
    )
    choices = st.lists(parts, min_size=1, max_size=3).map(
        lambda found: Tree("choice", parts=tuple(found))
    )
    repeats = st.tuples(parts, COUNTS).map(lambda p: Tree("repeat", "", (p[0],), *p[1]))
    return st.one_of(rows, choices, repeats)


REGULAR = st.recursive(LEAVES, _compounds, max_leaves=8)
_RULES = st.sampled_from([Tree("rule", name) for name in ("root", "0-a", "start")])
# A rule that is named stands behind a character, so that none begins with itself.
_NAMED = st.tuples(st.sampled_from([" ", "a", "b", "-"]), _RULES).map(
    lambda pair: Tree("row", parts=(Tree("text", pair[0]), pair[1]))
)
RECURSIVE = st.fixed_dictionaries(
    {
        name: st.recursive(st.one_of(LEAVES, LEAVES, _NAMED), _compounds, max_leaves=6)
        for name in ("root", "0-a", "start")
    }
)
TEXTS = st.lists(st.text(ALPHABET + "c", max_size=8), min_size=20, max_size=20)
