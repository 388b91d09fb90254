"""Where one generation stands in its grammar: which tokens may follow, and which must."""

from __future__ import annotations

import mmap
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sf_local.errors import EngineError, GrammarError
from sf_local.grammar.limits import cleaned
from sf_local.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_SECONDS = 0.25  # of CPU time for one call of llguidance: all other requests wait for it


class Compiled(Protocol):
    """What a generation tells the cached grammar that it is a copy of."""

    def grow(self, num_bytes: int) -> None:
        """Its lexer, which all copies share, took more memory."""

    def drop(self) -> None:
        """It should not be used again."""


def new_memory() -> int:
    """Bytes that the calling thread has made part of the process's memory so far.

    Counted by page faults, so that memory which was freed before and is used again costs nothing.
    """
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt * mmap.PAGESIZE


class Grammar:
    """What one generation may still write. Used by one thread at a time.

    Every method may raise GrammarError, if the grammar turns out to be too complex to follow.

    Attributes:
        num_words: the length of a mask, ceil(vocab_size / 32).
        seconds: CPU time that its calls took since it was last in a step, which was at `stepped_at`
            by `time.perf_counter()`; kept by whoever makes the steps.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, compiled: Compiled) -> None:
        self._matcher, self._compiled = matcher, compiled
        self._vocabulary = vocabulary  # which the matcher calls
        self._vocab_size = vocabulary.vocab_size
        self.num_words = (vocabulary.vocab_size + 31) // 32
        self._native: NDArray[np.int32] | None = None  # llguidance's mask, if that is wider
        if vocabulary.native_size != vocabulary.vocab_size:
            self._native = np.zeros((vocabulary.native_size + 31) // 32, np.int32)
        self.seconds = self.stepped_at = 0.0
        matcher.consume_tokens([])  # notices that nothing may follow at all

    @property
    def is_complete(self) -> bool:
        """Whether only the end may follow, or an end token has been accepted."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Write which tokens may follow to `mask`: contiguous int32, `[num_words]`.

        Token t is bit t % 32 of word t // 32. The model's end tokens are set if the text may end
        here. Of other special tokens only the markers of tool calls are ever set, and no bits
        beyond the vocabulary.
        """
        assert mask.dtype == np.int32 and mask.shape == (self.num_words,), mask.shape
        assert mask.flags.c_contiguous
        row = mask if self._native is None else self._native
        with self._native_call():
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if row is not mask:
            mask[:] = row[: self.num_words]
            if self._vocab_size % 32:
                mask[-1] &= (1 << self._vocab_size % 32) - 1

    def allows(self, token: int) -> bool:
        """Whether `token` may follow, without computing the whole mask."""
        with self._native_call():
            return bool(self._matcher.validate_tokens([token]) == 1)

    def accept(self, token: int) -> None:
        """Add a sampled token to the text.

        Raises:
            EngineError: it was not in the mask.
        """
        with self._native_call(token):
            self._matcher.consume_token(token)

    def forced(self) -> list[int]:
        """Add the tokens that must follow to the text and return them; never an end token.

        They are the tokens into which the tokenizer splits the forced text. Its last characters
        are left out while what follows them may still change how they are split.
        """
        with self._native_call():
            if self._matcher.is_stopped():
                return []
            tokens = self._matcher.compute_ff_tokens()
            if tokens:
                self._matcher.consume_tokens(tokens)
            return tokens

    @contextmanager
    def _native_call(self, token: int | None = None) -> Iterator[None]:
        """Around calls of llguidance: count the memory and the time that they take.

        Raises:
            EngineError: it did not allow `token`.
            GrammarError: it gave up, or took too long.
        """
        memory, started_at = new_memory(), time.thread_time()
        yield
        self._check(token)
        if (grown := new_memory() - memory) > 0:
            self._compiled.grow(grown)
        seconds = time.thread_time() - started_at
        self.seconds += seconds
        if seconds > MAX_SECONDS:
            self._compiled.drop()
            raise GrammarError(
                "The grammar is too complex to follow further: finding out what may come next took "
                f"more than {1e3 * MAX_SECONDS:.0f} ms. Simplify it."
            )

    def _check(self, token: int | None = None) -> None:
        """Raise what ended the matcher, if anything did."""
        if not self._matcher.is_error():
            return
        self._compiled.drop()  # it shares this one's lexer, whose limits may be used up
        why = cleaned(self._matcher.get_error())
        if token is not None and "doesn't satisfy the grammar" in why:
            raise EngineError(f"Token {token} does not fit the grammar: {why}")
        raise GrammarError(f"The grammar is too complex to follow further: {why}. Simplify it.")
