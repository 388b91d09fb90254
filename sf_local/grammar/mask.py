"""Which tokens the grammars of one model call's rows allow next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sf_local.errors import GrammarError

if TYPE_CHECKING:
    from sf_local.grammar.matcher import Grammar


class Mask:
    """Which tokens one grammar allows next; the whole mask is computed on first use.

    `has` alone does not need it: a greedy row asks first whether the likeliest token is allowed.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._words: NDArray[np.int32] | None = None  # as Grammar.fill_mask has it

    def fill(self) -> NDArray[np.int32]:
        """The mask as int32 words, one bit a token, `[ceil(vocab / 32)]`.

        Raises:
            GrammarError: the grammar is too complex to follow, or no token may follow.
        """
        if self._words is None:
            self._words = self.compute()
        return self._words

    def compute(self) -> NDArray[np.int32]:
        """The same, without keeping it."""
        words = np.empty(self._grammar.num_words, np.int32)
        self._grammar.fill_mask(words)
        if not words.any():
            raise GrammarError("the grammar came to a point where nothing may follow")
        return words

    def has(self, token: int) -> bool:
        """Whether `token` is allowed."""
        if self._words is None:
            return self._grammar.allows(token)
        return bool(self._words[token // 32] >> token % 32 & 1)

    def tokens(self) -> NDArray[np.intp]:
        """All allowed token ids, in ascending order."""
        bits = np.unpackbits(self.fill().view(np.uint8), bitorder="little")
        return np.flatnonzero(bits.view(np.bool_))


class Masks:
    """The masks of all rows of one call.

    Attributes:
        rows: a mask for each row; None for rows without a grammar.
        errors: by row, the exception with which its grammar failed; other rows go on.
        seconds: CPU time that `fill` took.
    """

    def __init__(
        self, grammars: Sequence[Grammar | None], needed: Sequence[bool],
        make_mask: Callable[[Grammar], Mask] = Mask,
    ) -> None:  # fmt: skip
        """`needed[i]`: compute the whole mask of row i in `fill`, rather than on first use."""
        self.rows = [None if grammar is None else make_mask(grammar) for grammar in grammars]
        self._needed = needed
        self.errors: dict[int, BaseException] = {}
        self.seconds = 0.0

    def fill(self) -> None:
        """Compute the masks that are needed for certain, while the device runs the call."""
        if not any(self.rows):
            return
        started_at = time.thread_time()
        for i, mask in enumerate(self.rows):
            if mask is not None and self._needed[i]:
                try:
                    mask.fill()
                except BaseException as error:  # Rust's panics are no Exception
                    self.errors[i] = error
        self.seconds = time.thread_time() - started_at
