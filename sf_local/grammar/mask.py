"""Masks: what the grammars of one call's rows allow next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sf_local.errors import GrammarError

if TYPE_CHECKING:
    from sf_local.grammar.matcher import Grammar


class Mask:
    """What one grammar allows next. All of it is computed only where it is needed."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._words: NDArray[np.int32] | None = None  # bit i % 32 of word i // 32 allows token i

    def fill(self) -> NDArray[np.int32]:
        """The words; raises GrammarError where the grammar gives up."""
        if self._words is None:
            self._words = np.empty(self._grammar.num_words, np.int32)
            self._grammar.fill_mask(self._words)
            if not self._words.any():
                raise GrammarError("the grammar came to a point where nothing may follow")
        return self._words

    def has(self, token: int) -> bool:
        if self._words is None:
            return self._grammar.allows(token)
        return bool(self._words[token // 32] >> token % 32 & 1)

    def tokens(self) -> NDArray[np.intp]:
        bits = np.unpackbits(self.fill().view(np.uint8), bitorder="little")
        return np.flatnonzero(bits.view(np.bool_))


class Masks:
    """One for each row of the call; None where there is no grammar.

    errors: what a grammar gave up with, by row; the other rows are not concerned.
    """

    def __init__(self, grammars: Sequence[Grammar | None], needed: Sequence[bool]) -> None:
        self.rows = [None if grammar is None else Mask(grammar) for grammar in grammars]
        self._needed = needed
        self.errors: dict[int, Exception] = {}
        self.seconds = 0.0

    def fill(self) -> None:
        """Compute those that will be needed, while the device runs."""
        if not any(self.rows):
            return
        started_at = time.thread_time()
        for i, mask in enumerate(self.rows):
            if mask is not None and self._needed[i]:
                try:
                    mask.fill()
                except Exception as error:
                    self.errors[i] = error
        self.seconds = time.thread_time() - started_at
