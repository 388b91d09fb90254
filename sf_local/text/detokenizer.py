"""Token ids to text while a sequence grows, and where the text reaches a stop string."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence

from sf_local.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one generated sequence, token by token.

    The texts that `push` and `flush` return concatenate to `tokenizer.decode` of the ids, except
    that after a prompt the first token keeps its leading space. None ends inside a character.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), visible: Iterable[str] = ()
    ) -> None:
        """visible: special tokens that are text nevertheless."""
        self._token_bytes = tokenizer.token_bytes
        self._visible = {tokenizer.token_id(text): text.encode() for text in visible}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_space = tokenizer.strips_first_space and not any(
            map(tokenizer.token_bytes, prompt_ids)
        )

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes: empty while a character lacks bytes."""
        new = self._visible.get(token_id) or self._token_bytes(token_id)
        return self._without_first_space(self._utf8.decode(new))

    def flush(self) -> str:
        """The rest: U+FFFD if the sequence ended inside a character."""
        return self._without_first_space(self._utf8.decode(b"", final=True))

    def _without_first_space(self, text: str) -> str:
        if not (text and self._strips_space):
            return text
        self._strips_space = False
        return text.removeprefix(" ")


class StopChecker:
    """Cuts a streamed text at its earliest stop string, which may span several deltas.

    Special tokens are no text, but a stop string may hold some, such as "<|im_end|>\\n". Then every
    special token is pushed as a mark, a lone surrogate, which no decoded text has. First the text
    with marks is searched for the stop strings with marks, then what remains of it without them for
    all stop strings as they were given.

    Attributes:
        marks: by token id, the mark to push for a special token; empty if no stop string has any.
    """

    def __init__(self, stops: Sequence[str], special_tokens: Mapping[str, int]) -> None:
        """`special_tokens` are the model's: their texts and ids."""
        self._has_stops = any(stops)
        looked_at = special_tokens if self._has_stops else ()  # of which some models have thousands
        within = [text for text in looked_at if any(text in stop for stop in stops)]
        within.sort(key=len, reverse=True)  # of two that begin alike the longer one is meant
        marks = {text: chr(0xD800 + number) for number, text in enumerate(within)}
        pattern = re.compile("|".join(map(re.escape, within)) or "(?!)")
        marked = {pattern.sub(lambda found: marks[found[0]], stop): stop for stop in stops}
        self._unmarked = {text: stop for text, stop in marked.items() if text != stop}
        other = chr(0xD800 + len(within))  # for all that are in no stop string
        self.marks = {i: marks.get(text, other) for text, i in special_tokens.items() if within}
        self._remove_marks = dict.fromkeys(map(ord, self.marks.values()))
        self._with_marks, self._plain = _TextCutter(self._unmarked), _TextCutter(stops)

    @property
    def matched(self) -> str | None:
        """The stop string at which the text was cut; the shortest, if several begin there."""
        return self._plain.matched or self._unmarked.get(self._with_marks.matched or "")

    def push(self, delta: str) -> str:
        """Add `delta`, and return the text that is now certain.

        Text that may be the beginning of a stop string is held back.
        """
        if not self._has_stops:
            return delta
        if self.matched is not None:
            return ""
        text = self._plain.push(self._with_marks.push(delta).translate(self._remove_marks))
        return text if self._with_marks.matched is None else text + self._plain.flush()

    def flush(self) -> str:
        """End the text: what was held back, up to a stop string in it."""
        if self.matched is not None:
            return ""
        text = self._plain.push(self._with_marks.flush().translate(self._remove_marks))
        return text + self._plain.flush()


class _TextCutter:
    """Cuts a text at the earliest of some strings, `matched` from then on."""

    matched: str | None

    def __init__(self, stops: Iterable[str]) -> None:
        self.matched = None
        self._stops = sorted({stop for stop in stops if stop}, key=len)
        self._held = ""

    def push(self, delta: str) -> str:
        if not self._stops:
            return delta
        text = self._held + delta
        match, unfinished = self._find(text), self._find_unfinished(text)
        if match < len(text) and match <= unfinished:
            self._cut(text, match)
            return text[:match]
        self._held = text[unfinished:]
        return text[:unfinished]

    def flush(self) -> str:
        text, self._held = self._held, ""
        match = self._find(text)
        if match < len(text):
            self._cut(text, match)
        return text[:match]

    def _find(self, text: str) -> int:
        """Where the earliest stop string begins, or the length of `text`."""
        return min((i for i in map(text.find, self._stops) if i >= 0), default=len(text))

    def _find_unfinished(self, text: str) -> int:
        """Where the earliest stop string begins of which `text` ends with a part, or its length."""
        first = max(0, len(text) - len(self._stops[-1]) + 1)
        for start in range(first, len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)

    def _cut(self, text: str, match: int) -> None:
        self.matched = next(stop for stop in self._stops if text.startswith(stop, match))
        self._held = ""
