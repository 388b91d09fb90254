"""Grammars in llguidance's dialect of Lark or in llama.cpp's GBNF, checked for llguidance."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator

from sf_local.grammar.gbnf import gbnf_to_lark
from sf_local.grammar.json_schema import checked_schema
from sf_local.grammar.limits import (
    MAX_OPTIONAL,
    MAX_PATTERNS,
    Refused,
    as_json,
    lark_grammar,
    place,
    shown,
)

MAX_RULE_LEVELS = 1_024  # each takes about 4 KiB of llguidance's stack
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
# llguidance's tokens, as far as they matter here: counted ones, and all that could hide one
_LARK = re.compile(
    r"""(?P<comment>(?:\#|//)[^\n]*)
    |(?P<string>"(?:\\(?:["\\/bfnrt]|u[a-fA-F0-9]{4}|x[a-fA-F0-9]{2})|[^"\\\x00-\x1F\x7F])*"i?)
    |(?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    |(?P<special><[^<>\s]+>)
    |%(?P<json>json|regex|llguidance)
    |%(?P<directive>ignore|lark)
    |(?P<attribute>\b(?:stop|max_tokens|temperature)\b)(?=\s*=)
    |(?P<name>[!?_]*[A-Za-z][\w-]*)
    |(?P<open>[(\[{])
    |(?P<close>[)\]}])
    |(?P<colon>:)
    |(?P<optional>[*?])
    |(?P<and>&)""",
    re.VERBOSE,
)
# llguidance looks for text that must follow, and never ends where a terminal takes all that its
# rule then asks for: with WS: /[ ]*/ and start: "x" WS " y" blanks must follow for ever. Meanwhile
# it holds the GIL. So it does not look for such text in grammars that users write.
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
_OPTIONAL = re.compile(r"\\.|(?P<optional>[*?]|\{0?,)", re.DOTALL)


def ebnf_grammar(text: str) -> str:
    """A text in Lark or GBNF (told by `::=`) as llguidance's grammar.

    Raises:
        Refused: it is not GBNF, has what is not supported, or is too large.
    """
    if _GBNF_RULE.search(text):
        text = gbnf_to_lark(text)
    return lark_grammar("".join(_LarkCheck(text).pieces()) + _NO_FORCING)


class _LarkCheck:
    """Refuses in a Lark text what is not about text alone, and what would crash llguidance.

    A definition is a rule or a terminal with its right-hand side.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._depth = self._deepest = self._num_levels = self._num_ands = 0
        self._names: list[str] = []  # in the current definition
        self._num_optional = Counter[str]()  # in each definition
        self._parts: dict[str, list[str]] = {"": self._names}  # names in each definition
        self._definition = ""
        self._directives: set[str] = set()

    def pieces(self) -> Iterator[str]:
        """The text piece by piece, with the JSON schemas in it checked and rewritten.

        Raises:
            Refused: something is not supported, or there is too much of it.
        """
        done = 0
        while (found := _LARK.search(self._text, done)) is not None:
            yield self._text[done : found.end()]
            done = found.end()
            self._directives.add(found["json"] or found["directive"])
            if found["json"]:
                piece, done = self._json(found["json"], done)
                yield piece
            else:
                self._count(found)
        yield self._text[done:]
        self._check_counts()

    def _count(self, found: re.Match[str]) -> None:
        kind = found.lastgroup
        if kind in ("special", "attribute"):
            raise Refused(
                f"has the {'special token' if kind == 'special' else kind} {shown(found[0])} at "
                f"{place(self._text, found.start())}, which is not supported. Remove it."
            )
        if kind == "open":
            self._depth += 1
            self._deepest = max(self._deepest, self._depth)
        elif kind == "close":
            self._depth -= 1
        elif kind == "and":
            self._num_ands += 1
        elif kind == "optional":
            self._num_optional[self._definition] += 1
        elif kind == "regex":
            optional = [part for part in _OPTIONAL.finditer(found[0]) if part["optional"]]
            self._num_optional[self._definition] += len(optional)
        elif kind == "name":
            self._names.append(found[0])
        elif kind == "colon":
            self._begin_definition()

    def _begin_definition(self) -> None:
        self._num_levels += 1 + self._deepest
        self._deepest = 0
        self._definition = self._names.pop() if self._names else ""
        self._names = self._parts.setdefault(self._definition, [])

    def _check_counts(self) -> None:
        if "ignore" in self._directives and self._directives & {"json", "lark"}:
            raise Refused(  # llguidance fails if both may come next
                "has %ignore beside %json or %lark, which is not supported. Write out where spaces "
                "may be."
            )
        # llguidance follows each rule once, depth first, on the native stack.
        if self._num_levels + self._deepest > MAX_RULE_LEVELS:
            raise Refused(f"has too many rules and brackets (over {MAX_RULE_LEVELS:,}). Split it.")
        if self._num_ands >= MAX_PATTERNS:
            raise Refused(f"has more than {MAX_PATTERNS - 1} intersections (&). Simplify it.")
        # llguidance expands terminals inside those that name them; time grows with the square.
        sizes: dict[str, int] = {}
        if sum(self._size(name, sizes) ** 2 for name in self._parts) > MAX_OPTIONAL**2:
            raise Refused(f"has more than {MAX_OPTIONAL:,} optional parts. Simplify it.")

    def _size(self, name: str, sizes: dict[str, int]) -> int:
        """How many optional parts `name` has, for a terminal with those of terminals in it.

        llguidance refuses terminals that name themselves; here they end the recursion.
        """
        if name not in sizes:
            sizes[name] = 0
            parts = [part for part in self._parts.get(name, []) if part.strip("_")[:1].isupper()]
            is_terminal = name.strip("_")[:1].isupper()
            inner = sum(self._size(part, sizes) for part in parts) if is_terminal else 0
            sizes[name] = self._num_optional[name] + inner
        return sizes[name]

    def _json(self, directive: str, start: int) -> tuple[str, int]:
        """The JSON after `%directive` as llguidance gets it, and where it ends."""
        text = self._text
        start += len(text[start:]) - len(text[start:].lstrip())
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError as error:
            where = place(text, error.pos)
            raise Refused(f"has no JSON after %{directive}: {error.msg} at {where}.") from None
        if directive == "llguidance" and value != {}:
            where = place(text, start)
            raise Refused(f"has options in %llguidance at {where}; only {{}} is supported.")
        return f" {as_json(checked_schema(value) if directive == 'json' else value)}", end
