"""Prompts to tokens, keeping the tokens of generated texts with which a prompt begins.

A chat's next prompt contains the model's earlier answers as text, and the tokenizer may split such
a text into other tokens than the model wrote. Encoded afresh, the prompt would miss the prefix
cache from the first different token on.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import accumulate

from sf_local.text.tokenizer import Tokenizer

MAX_TEXTS = 512  # remembered
MAX_CHARACTERS = 4 << 20  # of all remembered texts together


class PromptEncoder:
    """Encodes prompts; one that begins with a remembered text begins with its tokens.

    The remembered tokens are used up to the last place at which a token of the prompt's own
    encoding ends as well; from there on it is the tokenizer's. Usable from any thread.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: OrderedDict[str, list[int]] = OrderedDict()  # text -> tokens, oldest first
        self._lengths: Counter[int] = Counter()
        self._num_characters = 0
        self._lock = threading.Lock()

    def __call__(self, text: str, end: int | None = None) -> list[int]:
        """The tokens of `text`.

        Only its first `end` characters are compared with remembered texts; by default all are.

        Raises:
            RequestError: as `Tokenizer.encode` does.
        """
        return self.joined(text[:end], self._tokenizer.encode(text))

    def joined(self, text: str, ids: list[int]) -> list[int]:
        """`ids`, with the tokens of the longest remembered text with which `text` begins; `ids` are
        those of a text that begins with `text`."""
        known = self._longest_known(text)
        return ids if known is None else self._join(known, ids)

    def remember(self, prompt: str, prompt_ids: list[int], ids: Sequence[int], text: str) -> None:
        """Remember that `ids`, whose text is `text`, were generated after a prompt.

        `prompt_ids` are the tokens of `prompt`. The oldest texts are dropped if there are too many.
        """
        with self._lock:
            self._forget(prompt + text)
            self._texts[prompt + text] = [*prompt_ids, *ids]
            self._lengths[len(prompt + text)] += 1
            self._num_characters += len(prompt + text)
            while len(self._texts) > MAX_TEXTS or self._num_characters > MAX_CHARACTERS:
                self._forget(next(iter(self._texts)))

    def _forget(self, text: str) -> None:
        if self._texts.pop(text, None) is not None:
            self._num_characters -= len(text)
            self._lengths[len(text)] -= 1
            if not self._lengths[len(text)]:
                del self._lengths[len(text)]

    def _longest_known(self, text: str) -> list[int] | None:
        with self._lock:
            for length in sorted(self._lengths, reverse=True):
                if length <= len(text) and (ids := self._texts.get(text[:length])) is not None:
                    return ids
        return None

    def _join(self, known: Sequence[int], ids: list[int]) -> list[int]:
        """`known` up to the last end of a token that both share, then the rest of `ids`."""
        known_ends, known_bytes = self._ends(known)
        ends, text = self._ends(ids)
        same = _common_len(known_bytes, text)
        for index in range(bisect_right(known_ends, same), 0, -1):
            at = bisect_right(ends, known_ends[index - 1])
            if at and ends[at - 1] == known_ends[index - 1]:
                return [*known[:index], *ids[at:]]
        return ids

    def _ends(self, ids: Sequence[int]) -> tuple[list[int], bytes]:
        """Where each token ends in the bytes of all tokens, and these bytes."""
        pieces = [self._tokenizer.written_bytes(i) for i in ids]
        return list(accumulate(map(len, pieces))), b"".join(pieces)


def _common_len(a: bytes, b: bytes) -> int:
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
