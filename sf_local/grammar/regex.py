"""Python's regexes in llguidance's syntax, in which many of the same texts mean something else."""

from __future__ import annotations

import importlib
import re
import unicodedata
from typing import Any

from sf_local.grammar.limits import MAX_OPTIONAL, Refused, lark_grammar

MAX_SETS = 2_000  # of Unicode, such as \w: each takes 0.8 ms to compile
MAX_FORCED = 10_000  # characters that a repeat such as x{5000} may demand
_parser: Any = importlib.import_module("re._parser")  # the only way to Python's regex trees
# What Python's \d, \w and \s match, in the Unicode version of the running Python.
_AGE = rf"\p{{Age={'.'.join(unicodedata.unidata_version.split('.')[:2])}}}"
_PYTHON_SPACE = r"\x09-\x0D\x1C-\x20\x85\xA0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000"
_PYTHON_SETS = {
    "DIGIT": rf"[\p{{Nd}}&&{_AGE}]",
    "WORD": rf"[\p{{L}}\p{{N}}_&&{_AGE}]",
    "SPACE": _PYTHON_SPACE,
}
_ASCII_SETS = {"DIGIT": "0-9", "WORD": "0-9A-Za-z_", "SPACE": r"\x09-\x0D\x20"}
# What they match in JavaScript, Python or Rust, in any Unicode version: validators of JSON schemas
# use all of these, so what \D, \W and \S allow in a schema's pattern is none of this.
_LARGEST_SETS = {
    "DIGIT": r"\p{Nd}",
    "WORD": r"\p{L}\p{M}\p{N}\p{Pc}\p{Alphabetic}\p{Join_Control}",
    "SPACE": _PYTHON_SPACE + r"\uFEFF",
}
# llguidance compares the patterns of keys, and gives up where they are as large as \w.
_LARGER_SETS = {**_LARGEST_SETS, "WORD": r"0-9A-Za-z_\x{80}-\x{10FFFF}"}
_LINE_ENDS = r"\x0A\x0D\u2028\u2029"  # which JavaScript's dot does not match
# Characters that JSON writes as \u00XX. llguidance allows \" and \\ wherever a class has all
# control characters, so no class of a schema's pattern has these.
_CONTROLS = r"\x00-\x07\x0B\x0E-\x1F"
_CONTROL_CODES = frozenset(range(0x20)) - set(b"\b\t\n\f\r")
# Characters that JSON can write in several ways, or that decide where `.` and `$` match. Keys that
# patterns match have none of them.
NOT_IN_KEYS = r"\x00-\x1F\x7F\u2028\u2029"
_INSIDE, _AT_EDGE, _ANCHORED = range(3)  # places in a regex; anchored is an edge with ^ or $
_NOT_REGULAR = {
    "ASSERT": "look-ahead or look-behind",
    "ASSERT_NOT": "negative look-ahead or look-behind",
    "FAILURE": "negative look-ahead or look-behind",
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a conditional group (?(...)...)",
    "ATOMIC_GROUP": "an atomic group (?>...)",
    "POSSESSIVE_REPEAT": "a possessive repeat such as *+",
}


def regex_grammar(text: str) -> str:
    """A Python regex as llguidance's grammar of the texts that it matches as a whole.

    Raises:
        Refused: it is not a regex, not regular, or too large.
    """
    pattern = RegexWriter().write(text)
    return lark_grammar(f"start: /{pattern}/" if pattern else 'start: ""')


class RegexWriter:
    """Writes Python's regexes in llguidance's syntax.

    All regexes of one grammar go through one writer, because their costs are limited together.
    """

    def __init__(self) -> None:
        self._num_optional = self._num_sets = 0
        self._is_search = self._is_found = self._is_key = self._is_largest = self._is_ascii = False
        self._folds_ascii = False  # upper and lower case of A to Z are the same here

    def write(self, text: str, is_search: bool = False) -> str:
        """A regex for the texts that `text` matches as a whole, or anywhere with `is_search`.

        As a whole, sets and case are those of re.ASCII, unless it has the flag u.

        Raises:
            Refused: `text` is not a regex, not regular, or too large.
        """
        return self._written(text, is_search=is_search)

    def write_key(self, text: str, is_largest: bool) -> str:
        """A regex for the keys of JSON objects that `text` matches anywhere, without those that
        have characters of NOT_IN_KEYS.

        Args:
            is_largest: take keys that it matches in JavaScript, Python or Rust, not in all of them.

        Raises:
            Refused: as in `write`.
        """
        return self._written(text, True, True, True, is_largest)

    def write_searched(self, text: str) -> str:
        """A regex for the texts in which Python finds `text`; raises Refused as `write`."""
        return self._written(text, is_found=True)

    def _written(
        self, text: str, is_search: bool = False, is_found: bool = False, is_key: bool = False,
        is_largest: bool = False,
    ) -> str:  # fmt: skip
        """
        Args:
            is_search: with what all readers of a JSON schema understand, not what Python does.
            is_found: for the whole of a text in which `text` is found.
        """
        self._is_search, self._is_found = is_search, is_found
        self._is_key, self._is_largest = is_key, is_largest
        try:
            tree = _parser.parse(text)
        except re.error as error:
            raise Refused(f"is not a regex: {error}.") from None
        except OverflowError as error:
            raise Refused(f"is not a regex: {error}. Lower its counts.") from None
        flags = tree.state.flags
        is_whole = not (is_search or is_found)
        self._is_ascii = bool(flags & re.ASCII) or (is_whole and not _is_unicode(text))
        ignores_case = bool(flags & re.IGNORECASE)
        self._folds_ascii = self._is_ascii and ignores_case
        pattern = self._sequence(tree, bool(flags & re.DOTALL), _AT_EDGE, _AT_EDGE)
        return f"(?i:{pattern})" if ignores_case and not self._is_ascii else pattern

    def _sequence(self, tree: Any, dotall: bool, first: int, last: int) -> str:
        """`first`, `last`: where the beginning and the end of `tree` are in the regex."""
        anchors = {str(value)[:6] for op, value in tree if str(op) == "AT"}
        first = _ANCHORED if first and "AT_BEG" in anchors else first
        last = _ANCHORED if last and "AT_END" in anchors else last
        solid = [i for i, (op, _) in enumerate(tree) if str(op) != "AT"]
        start, end = (solid[0], solid[-1]) if solid else (len(tree), -1)
        # A sequence of n parts that may be empty takes time and space with the square of n.
        self._num_optional += sum(tree[i : i + 1].getwidth()[0] == 0 for i in solid)
        if self._num_optional > MAX_OPTIONAL:
            raise Refused(f"has more than {MAX_OPTIONAL:,} optional parts. Simplify it.")
        parts = [
            self._item(str(op), value, dotall, first * (i <= start), last * (i >= end))
            for i, (op, value) in enumerate(tree)
        ]
        if self._is_found:  # what it may be found between; groups have that themselves
            around = f"[^{NOT_IN_KEYS}]*" if self._is_key else "(?s:.*)"
            if first == _AT_EDGE and not _is_group(tree[start : start + 1]):
                parts.insert(0, around)
            if last == _AT_EDGE and not _is_group(tree[end : end + 1]):
                parts.append(around)
        return "".join(parts)

    def _item(self, op: str, value: Any, dotall: bool, first: int, last: int) -> str:
        if op == "LITERAL":
            is_class = self._is_key and bool(re.match(f"[{NOT_IN_KEYS}]", chr(value)))
            is_class = is_class or (self._folds_ascii and bool(_other_case(value, value)))
            return self._class([(op, value)]) if is_class else _escaped(value)
        if op == "NOT_LITERAL":
            return self._class([("NEGATE", None), ("LITERAL", value)])
        if op == "ANY":
            return self._dot(dotall)
        if op == "IN":
            return self._class(value)
        if op == "AT":
            return self._anchor(str(value), first, last)
        if op == "BRANCH":
            branches = [self._sequence(tree, dotall, first, last) for tree in value[1]]
            return f"(?:{'|'.join(branches)})"
        if op == "SUBPATTERN":
            return self._group(value, dotall, first, last)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(value, dotall)
        raise Refused(f"contains {_NOT_REGULAR.get(op, op)}, which is not supported. Rewrite it.")

    def _anchor(self, name: str, first: int, last: int) -> str:
        if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            is_edge, written = first, "^"
        elif name in ("AT_END", "AT_END_STRING"):
            is_edge, written = last, "$"
        else:
            raise Refused("contains a word boundary (\\b, \\B), which is not supported. Remove it.")
        if not is_edge:
            raise Refused(f"has {written} in the middle, which is not supported. Remove it.")
        if self._is_found:
            return r"\x0A?" if name == "AT_END" and not self._is_key else ""
        return written if self._is_search else ""

    def _group(self, value: Any, dotall: bool, first: int, last: int) -> str:
        _, add, remove, tree = value
        if (add | remove) & (re.ASCII | re.UNICODE):
            raise Refused("changes the flags a or u for a part, which is not supported.")
        dotall = bool((dotall or add & re.DOTALL) and not remove & re.DOTALL)
        flag = "i" if add & re.IGNORECASE else "-i" if remove & re.IGNORECASE else ""
        outside = self._folds_ascii
        if self._is_ascii and flag:
            self._folds_ascii, flag = flag == "i", ""
        inner = self._sequence(tree, dotall, first, last)
        self._folds_ascii = outside
        return f"(?{flag}:{inner})"

    def _repeat(self, value: Any, dotall: bool) -> str:
        low, high, tree = value
        if low * tree.getwidth()[0] > MAX_FORCED:
            raise Refused(f"demands more than {MAX_FORCED:,} characters. Lower its counts.")
        inner = self._sequence(tree, dotall, _INSIDE, _INSIDE)
        most = "" if high == _parser.MAXREPEAT else int(high)
        return f"(?:{inner}){{{int(low)},{most}}}"

    def _dot(self, dotall: bool) -> str:
        if self._is_key:
            return f"[^{NOT_IN_KEYS}]"
        if self._is_search:
            return f"[^{_CONTROLS}{'' if dotall else _LINE_ENDS}]"
        return "(?s:.)" if dotall else r"[^\x0A]"

    def _class(self, items: Any) -> str:
        is_negated = str(items[0][0]) == "NEGATE"
        items = [(str(op), value) for op, value in items[is_negated:]]
        sets = [self._set(value, is_negated) for op, value in items if op == "CATEGORY"]
        chars = [_characters(op, value) for op, value in items if op != "CATEGORY"]
        if self._folds_ascii:
            chars += [_other_case(*_ends(op, value)) for op, value in items if op != "CATEGORY"]
        if self._is_search:
            return self._without_controls("".join(sets + chars), items, is_negated)
        written = f"[{'^' * is_negated}{''.join(sets + chars)}]"
        # Python's sets do not change with the case, but llguidance would add to them: U+0345 to \w,
        # since its upper case is that of a letter.
        if sets and not any(_has_case(op, value) for op, value in items):
            return f"(?-i:{written})"
        if sets and not is_negated:
            return f"(?:(?-i:[{''.join(sets)}])|[{''.join(chars)}])"
        return written

    def _set(self, category: object, is_negated: bool) -> str:
        """A category, such as that of digits, as a part of a class."""
        name = str(category).removeprefix("CATEGORY_")
        is_opposite = name.startswith("NOT_")
        if self._is_ascii:
            sets = _ASCII_SETS
        elif not self._is_search:
            sets = _PYTHON_SETS
        else:
            largest = _LARGER_SETS if self._is_largest else _LARGEST_SETS
            sets = largest if self._is_largest == (is_opposite == is_negated) else _ASCII_SETS
        self._num_sets += sets is not _ASCII_SETS
        if self._num_sets > MAX_SETS:
            raise Refused(f"has more than {MAX_SETS:,} classes such as \\w or \\S. Use {{n}}.")
        chars = sets[name.removeprefix("NOT_")]
        return f"[^{chars}]" if is_opposite else chars

    def _without_controls(self, chars: str, items: list[tuple[str, Any]], is_negated: bool) -> str:
        """A class without control characters, unless it asks for nothing else."""
        controls = NOT_IN_KEYS if self._is_key else _CONTROLS
        if is_negated:
            return f"[^{chars}{controls}]"
        if not self._is_key and all(op == "LITERAL" and v in _CONTROL_CODES for op, v in items):
            return f"[{chars}]"
        return f"[[{chars}]--[{controls}]]"


def _is_unicode(text: str) -> bool:
    """Whether a regex has the flag u, which a parsed one does not tell: it is the default."""
    try:
        _parser.parse(text, re.ASCII)
    except ValueError:  # of re: ASCII and UNICODE flags are incompatible
        return True
    return False


def _is_group(part: Any) -> bool:
    return any(str(op) in ("BRANCH", "SUBPATTERN") for op, _ in part)


def _has_case(op: str, value: Any) -> bool:
    """Whether a part of a class may hold characters that differ from their upper or lower case."""
    if op == "LITERAL":
        return chr(value).lower() != chr(value).upper()
    return op == "RANGE" and bool(value[1] >= ord("A"))


def _ends(op: str, value: Any) -> tuple[int, int]:
    return (value, value) if op == "LITERAL" else value


def _other_case(low: int, high: int) -> str:
    """The letters A to Z of a range in the other case, as a part of a class; may be empty."""
    found = ""
    for first, last, step in ((ord("a"), ord("z"), -32), (ord("A"), ord("Z"), 32)):
        start, end = max(low, first), min(high, last)
        if start <= end:
            found += f"{chr(start + step)}-{chr(end + step)}"
    return found


def _characters(op: str, value: Any) -> str:
    """A character or a range as a part of a class."""
    if op == "LITERAL":
        return _escaped(value)
    low = 0xE000 if 0xD800 <= value[0] < 0xE000 else value[0]
    high = 0xD7FF if 0xD800 <= value[1] < 0xE000 else value[1]
    return f"{_escaped(low)}-{_escaped(high)}"


def _escaped(code: int) -> str:
    char = chr(code)
    if char.isascii() and char.isalnum():
        return char
    if 0xD800 <= code < 0xE000:
        raise Refused(f"asks for the surrogate \\u{code:x}, which no text can contain. Remove it.")
    return f"\\x{{{code:X}}}"
