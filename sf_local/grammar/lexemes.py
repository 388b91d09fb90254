"""Divides context-free grammars over characters into lexemes, without changing their texts.

llguidance reads a text in lexemes, each the longest that a terminal matches. One character a
lexeme would do for every grammar, but the parser is slow. So a regular part becomes one lexeme
where taking the longest never differs from trying all ways.

That is decided on a finite automaton over the characters of all rules, in which a rule may return
to any place that names it. It has all texts of the grammar, and others, so what holds for it holds
for the grammar. Two ways through it that read the same characters must leave their lexemes after
the same ones: if one may leave and the other go on, the step by which it goes on must end its
lexeme too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

from sf_local.grammar.grammar_tree import (
    Chars,
    Choice,
    Lexeme,
    Node,
    Reference,
    Repeat,
    Rules,
    Sequence,
    children,
    choice,
    is_empty,
    repeat,
    sequence,
)

MAX_LEXEME = 4_000  # characters and classes in one
MAX_DEPTH = 100  # of its tree; llguidance reads regexes of about 120 groups inside each other
MAX_STEPS = 300_000  # of the decision, of about a microsecond; beyond, lexemes are characters

Steps = dict[Chars, set[Chars]]


def with_lexemes(rules: Rules, root: str) -> Rules:
    """The rules with their characters in lexemes, as few as can be."""
    ends: Steps = defaultdict(set)
    num_steps = 0
    while True:
        cutter = _Cutter(ends if num_steps < MAX_STEPS else None)
        trees = {name: cutter.cut(node, name == root) for name, node in rules.items()}
        if num_steps >= MAX_STEPS or isinstance(trees[root], Lexeme):
            return trees
        automaton = _Automaton(trees, root, MAX_STEPS - num_steps)
        new = automaton.conflicts()
        num_steps += automaton.num_steps
        if not new and num_steps < MAX_STEPS:
            return trees
        for char, followers in new.items():
            ends[char] |= followers


@dataclass
class _Part:
    """A regular part that may be in one lexeme: the characters that it begins and ends with."""

    node: Node
    first: set[Chars]
    last: set[Chars]
    is_nullable: bool
    size: int = 1
    depth: int = 1


class _Run:
    """Parts in a row that go into one lexeme."""

    def __init__(self) -> None:
        self.last: set[Chars] = set()
        self.size = self._depth = 0
        self._nodes: list[Node] = []
        self._first: set[Chars] = set()
        self._is_nullable = True

    def add(self, part: _Part) -> None:
        if self._is_nullable:
            self._first |= part.first
        self.last = self.last | part.last if part.is_nullable else part.last
        self._is_nullable &= part.is_nullable
        self.size += part.size
        self._depth = max(self._depth, part.depth + 1)
        self._nodes.append(part.node)

    def part(self) -> _Part:
        return _Part(
            sequence(self._nodes), self._first, self.last, self._is_nullable, self.size, self._depth
        )


class _Cutter:
    """Puts parts into lexemes, as large as `ends` allows: steps from one character to the next
    between which a lexeme must end. None is for all steps."""

    def __init__(self, ends: Steps | None) -> None:
        self._ends = ends

    def cut(self, node: Node, is_root: bool = False) -> Node:
        """`node` with all its characters in lexemes. That of a whole text may be empty."""
        found = self._visit(node)
        if not isinstance(found, _Part):
            return found
        return Lexeme(node) if is_root and not is_empty(node) else self._lexeme(found)

    def _visit(self, node: Node) -> _Part | Node:
        """`node` as a part of a lexeme, or cut if it cannot be one."""
        if isinstance(node, Chars):
            return _Part(node, {node}, {node}, False)
        if isinstance(node, Repeat):
            return self._repeat(node)
        if isinstance(node, Choice):
            return self._choice([self._visit(part) for part in node.parts])
        if isinstance(node, Sequence):
            return self._sequence([self._visit(part) for part in node.parts])
        return node

    def _repeat(self, node: Repeat) -> _Part | Node:
        part = self._visit(node.part)
        if not isinstance(part, _Part):
            return repeat(part, node.low, node.high)
        is_cut = node.high != 1 and self._must_end(part.last, part.first)
        if is_cut or part.depth >= MAX_DEPTH:
            return repeat(self._lexeme(part), node.low, node.high)
        is_nullable = part.is_nullable or node.low == 0
        return _Part(node, part.first, part.last, is_nullable, part.size, part.depth + 1)

    def _choice(self, found: list[_Part | Node]) -> _Part | Node:
        parts = [part for part in found if isinstance(part, _Part)]
        others = [part for part in found if not isinstance(part, _Part)]
        size, depth = sum(part.size for part in parts), max([0, *(part.depth for part in parts)])
        if not parts or size > MAX_LEXEME or depth >= MAX_DEPTH:
            return choice([*map(self._lexeme, parts), *others])
        joined = _Part(
            choice(part.node for part in parts),
            set().union(*(part.first for part in parts)),
            set().union(*(part.last for part in parts)),
            any(part.is_nullable for part in parts),
            size,
            depth + 1,
        )
        return choice([self._lexeme(joined), *others]) if others else joined

    def _sequence(self, found: list[_Part | Node]) -> _Part | Node:
        cut: list[Node] = []
        run = _Run()
        for part in found:
            if not isinstance(part, _Part):
                cut += [self._lexeme(run.part()), part]
                run = _Run()
                continue
            if not self._fits(run, part):
                cut.append(self._lexeme(run.part()))
                run = _Run()
            run.add(part)
        return sequence([*cut, self._lexeme(run.part())]) if cut else run.part()

    def _fits(self, run: _Run, part: _Part) -> bool:
        is_small = run.size + part.size <= MAX_LEXEME and part.depth < MAX_DEPTH
        return is_small and not self._must_end(run.last, part.first)

    def _must_end(self, last: set[Chars], first: set[Chars]) -> bool:
        if self._ends is None:
            return bool(last)
        return any(not self._ends[char].isdisjoint(first) for char in last & self._ends.keys())

    def _lexeme(self, part: _Part) -> Node:
        """A lexeme is never empty: what may be is made optional, or cut into its parts."""
        node = part.node
        if is_empty(node):
            return node
        if not part.is_nullable:
            return Lexeme(node)
        if isinstance(node, Repeat):
            inner = self._visit(node.part)
            assert isinstance(inner, _Part)
            if inner.is_nullable:
                return repeat(self._lexeme(inner), node.low, node.high)
            return repeat(Lexeme(repeat(node.part, 1, node.high)), 0, 1)
        cut = [self.cut(part) for part in children(node)]
        return choice(cut) if isinstance(node, Choice) else sequence(cut)


@dataclass(eq=False)
class _State:
    """A place between characters."""

    chars: list[Chars] = field(default_factory=list)  # that may come next
    inside: list[_State] = field(default_factory=list)  # other places where it may be as well
    leaving: list[_State] = field(default_factory=list)  # and that are behind the end of a lexeme


@dataclass
class _Next:
    """Characters that may come next, and the set of all their code points."""

    chars: list[Chars]
    mask: int


class _Automaton:
    """Finds where ways that read the same characters do not leave their lexemes together.

    Counted repeats are loops in it.

    Attributes:
        num_steps: what it took so far; it ends early above `max_steps`.
    """

    def __init__(self, trees: Rules, root: str, max_steps: int) -> None:
        self.num_steps = 0
        self._max_steps = max_steps
        self._after: dict[Chars, _State] = {}
        self._next: dict[_State, tuple[_Next, _Next]] = {}
        self._rules = {name: (_State(), _State()) for name in trees}
        for name, node in trees.items():
            self._add(node, *self._rules[name])
        self._begin = self._rules[root][0]
        self._masks = _masks(list(self._after))
        self._pairs: list[tuple[Chars, Chars]] = []
        self._known: set[tuple[Chars, Chars]] = set()
        self._met: set[tuple[int, int]] = set()

    def _add(self, node: Node, begin: _State, end: _State) -> None:
        """Add the ways from `begin` to `end` that read a text of `node`."""
        if isinstance(node, Chars):
            begin.chars.append(node)
            self._after[node] = end
        elif isinstance(node, Reference):
            first, last = self._rules[node.name]
            begin.inside.append(first)
            last.inside.append(end)
        elif isinstance(node, Lexeme):
            last = _State(leaving=[end])
            self._add(node.part, begin, last)
        elif isinstance(node, Repeat):
            first, last = _State(), _State(inside=[end])
            begin.inside += [first, end] if node.low == 0 else [first]
            if node.high != 1:
                last.inside.append(first)
            self._add(node.part, first, last)
        elif isinstance(node, Choice):
            for part in node.parts:
                self._add(part, begin, end)
        else:
            for part in node.parts:
                state = _State()
                self._add(part, begin, state)
                begin = state
            begin.inside.append(end)

    def conflicts(self) -> Steps:
        """Steps inside lexemes that another way, which read the same, takes by leaving its own."""
        found: Steps = defaultdict(set)
        first, _ = self._next_chars(self._begin)
        self._meet(first, first)
        for pair in self._pairs:  # it grows
            (inside, leaving), (other_inside, other_leaving) = (
                self._next_chars(self._after[char]) for char in pair
            )
            self._meet(inside, other_inside)
            self._meet(leaving, other_leaving)
            for char, steps, others in (
                (pair[0], inside, other_leaving),
                (pair[1], other_inside, leaving),
            ):
                if steps.mask & others.mask:
                    found[char].update(c for c in steps.chars if self._masks[c] & others.mask)
            if self.num_steps > self._max_steps:
                break
        return found

    def _meet(self, some: _Next, others: _Next) -> None:
        """Note that two ways may go on with a character of `some` and one of `others`."""
        if not some.mask & others.mask or (id(some), id(others)) in self._met:
            return
        self._met.add((id(some), id(others)))
        self.num_steps += len(some.chars) * len(others.chars)
        if self.num_steps > self._max_steps:
            return
        for char in some.chars:
            for other in others.chars:
                if self._masks[char] & self._masks[other] and (char, other) not in self._known:
                    self._known |= {(char, other), (other, char)}
                    self._pairs.append((char, other))

    def _next_chars(self, state: _State) -> tuple[_Next, _Next]:
        """What may come next in the same lexeme, and after its end."""
        if state not in self._next:
            inside = _reached([state])
            behind = _reached([outer for inner in inside for outer in inner.leaving])
            self.num_steps += len(inside) + len(behind)
            self._next[state] = self._next_of(inside), self._next_of(behind)
        return self._next[state]

    def _next_of(self, states: list[_State]) -> _Next:
        chars = [char for state in states for char in state.chars]
        mask = 0
        for char in chars:
            mask |= self._masks[char]
        return _Next(chars, mask)


def _reached(states: list[_State]) -> list[_State]:
    """`states` and all others where they are as well, without the end of a lexeme between."""
    found = dict.fromkeys(states)
    todo = list(found)
    for state in todo:  # it grows
        for other in state.inside:
            if other not in found:
                found[other] = None
                todo.append(other)
    return todo


def _masks(chars: list[Chars]) -> dict[Chars, int]:
    """Each one's code points as the bits of an int; a bit is a range that none divides."""
    ranges = {pair for char in chars for pair in char.ranges}
    bounds = sorted({low for low, _ in ranges} | {high + 1 for _, high in ranges})
    masks: dict[tuple[tuple[int, int], ...], int] = {}
    for char in chars:
        if char.ranges not in masks:
            mask = 0
            for low, high in char.ranges:
                mask |= (1 << bisect_left(bounds, high + 1)) - (1 << bisect_left(bounds, low))
            masks[char.ranges] = mask
    return {char: masks[char.ranges] for char in chars}
