"""InsertedText: keeps special tokens in what users wrote from becoming tokens.

A chat template writes special tokens, such as the one that ends a message, between contents that
anybody may have written. Whoever could write such a token could pretend to be the system.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

# Marks within the texts of a conversation while it is rendered: around a special token in a text,
# and where a part of one begins or ends a text. Lone surrogates, which no other text has.
_OPEN, _CLOSE, _BREAK = "\ud800", "\ud801", "\ud802"
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}{_BREAK}]")


class MarkedText(str):
    """A prompt with marks, which `InsertedText.parts` takes apart."""


class InsertedText:
    """Marks what users wrote, and tells which special tokens of a prompt are theirs."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        """special_tokens: the texts of the model's special tokens."""
        tokens = sorted(filter(None, special_tokens), key=len, reverse=True)  # longest first
        self._token = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._beginnings = {token[:end] for token in tokens for end in range(1, len(token))}
        self._endings = {token[start:] for token in tokens for start in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def marked(self, value: Any) -> Any:
        """Plain data with marks in all its texts that hold a special token, or part of one."""
        match value:
            case str():
                return self._marked_text(value)
            case dict():
                return {self.marked(key): self.marked(item) for key, item in value.items()}
            case list() | tuple():
                return [self.marked(item) for item in value]
        return value

    def marked_within(
        self, text: str, spans: Iterable[tuple[int, int]], keep: str | None = None
    ) -> str:
        """A prompt with marks where users wrote what lies in these ranges; the same text if nothing
        in them is to be marked. keep: a special token that stays one."""
        parts, end = [], 0
        for begin, stop in spans:
            parts += [text[end:begin], self._marked_text(text[begin:stop])]
            end = stop
        marked = "".join([*parts, text[end:]])
        if keep:
            marked = marked.replace(f"{_OPEN}{keep}{_CLOSE}", keep)
        return text if marked == text else MarkedText(marked)

    def _marked_text(self, text: str) -> str:
        marked = self._token.sub(f"{_OPEN}\\g<0>{_CLOSE}", text)
        sizes = range(1, min(self._longest, len(text) + 1))
        if any(text[:size] in self._endings for size in sizes):  # behind blanks: templates trim
            start = len(marked) - len(marked.lstrip())
            marked = marked[:start] + _BREAK + marked[start:]
        if any(text[-size:] in self._beginnings for size in sizes):
            end = len(marked.rstrip())
            marked = marked[:end] + _BREAK + marked[end:]
        return marked

    def parts(self, marked: str) -> list[tuple[str, bool]]:
        """A rendered prompt in parts, without marks, each with whether special tokens in it are
        plain text; one part if there are none of users."""
        text, breaks, inserted = _unmarked(marked)
        parts: list[tuple[str, bool]] = []
        begin = end = 0  # of the text between two of the template's tokens
        is_plain = False
        for token in self._token.finditer(text):
            if _is_inserted(token, breaks, inserted):
                is_plain = True
                continue
            if is_plain:
                parts += [(text[begin:end], False), (text[end : token.start()], True)]
                begin, is_plain = token.start(), False
            end = token.end()
        if is_plain:
            parts += [(text[begin:end], False), (text[end:], True)]
        else:
            parts.append((text[begin:], False))
        return [part for part in parts if part[0]]


def _unmarked(marked: str) -> tuple[str, list[int], set[int]]:
    """The text without marks; where there were any; and the positions between a pair of them."""
    text, breaks, inserted, opened = "", [], set(), None
    for piece in re.split(f"({_MARKS.pattern})", marked):
        if not _MARKS.fullmatch(piece):
            text += piece
            continue
        breaks.append(len(text))
        if piece == _CLOSE and opened is not None:
            inserted |= set(range(opened, len(text)))
        opened = len(text) if piece == _OPEN else None
    return text, breaks, inserted


def _is_inserted(token: re.Match[str], breaks: list[int], inserted: set[int]) -> bool:
    """Whether a token was written by a user, or joined from a text of theirs."""
    is_broken = bisect_right(breaks, token.end() - 1) > bisect_right(breaks, token.start())
    return is_broken or token.start() in inserted
