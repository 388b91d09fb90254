"""Token ids to text while a sequence grows, and where the text reaches a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from sf_local.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one generated sequence, token by token.

    The texts that `push` and `flush` return concatenate to `tokenizer.decode` of the ids, except
    that after a prompt the first token keeps its leading space. None ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_space = tokenizer.strips_first_space and not any(
            map(tokenizer.token_bytes, prompt_ids)
        )

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes: empty while a character lacks bytes."""
        return self._without_first_space(self._utf8.decode(self._token_bytes(token_id)))

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

    Attributes:
        matched: the stop string at which the text was cut; the shortest, if several begin there.
    """

    matched: str | None

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched = None
        self._stops = sorted({stop for stop in stops if stop}, key=len)
        self._held = ""

    def push(self, delta: str) -> tuple[str, bool]:
        """Add `delta`: the text that is now certain, and whether a stop string was reached.

        Text that may be the beginning of a stop string is held back.
        """
        if not self._stops:
            return delta, False
        if self.matched is not None:
            return "", True
        text = self._held + delta
        match, unfinished = self._find(text), self._find_unfinished(text)
        if match < len(text) and match <= unfinished:
            self._cut(text, match)
            return text[:match], True
        self._held = text[unfinished:]
        return text[:unfinished], False

    def flush(self) -> str:
        """End the text: what was held back, up to a stop string in it."""
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
