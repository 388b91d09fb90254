"""The model's tokenizer as llguidance needs it: the bytes of tokens, and how texts are split."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sf_local.grammar.limits import Refused, cleaned, refuse
from sf_local.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Vocabulary:
    """llguidance's view of a tokenizer, built on first use; usable from any thread.

    It is made from our token bytes and our encoder instead of tokenizer.json, so that both sides
    agree on every token and a text that spells a special token is never encoded as one.

    Attributes:
        vocab_size: the width of the model's logits.
        native_size: llguidance's number of tokens: one more for models without an end token.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._eos_ids = sorted(i for i in eos_ids if 0 <= i < vocab_size)
        # llguidance needs an end token: where the model has none, one beyond its logits.
        self.native_size = vocab_size + (not self._eos_ids)
        self._llguidance: LLTokenizer | None = None
        self._lock = threading.Lock()

    def matcher(self, grammar: str, limits: dict[str, Any]) -> LLMatcher:
        """The initial state of `grammar`, which is llguidance's list of grammars as JSON.

        Raises:
            Refused: it cannot be compiled, is too complex, or matches no text.
        """
        from llguidance import LLMatcher, LLParserLimits

        native_limits = LLParserLimits(**limits)
        try:
            matcher = LLMatcher(self.build(), grammar, log_level=0, limits=native_limits)
        except BaseException as error:  # a Rust panic is not an Exception
            if type(error).__name__ != "PanicException":
                raise
            raise Refused(f"cannot be compiled: {cleaned(str(error))}") from None
        self._try(matcher)
        return matcher

    def build(self) -> LLTokenizer:
        """llguidance's own tokenizer, made by the first call."""
        with self._lock:
            if self._llguidance is None:
                self._llguidance = self._new_tokenizer()
            return self._llguidance

    def _new_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        eos_ids = self._eos_ids or [self.vocab_size]
        encoder = _Encoder(self._tokenizer, self.vocab_size, self.native_size, eos_ids)
        wrapper = TokenizerWrapper(encoder)
        # Both calls hold the GIL to their ends, so other threads have a turn in between.
        native = LLTokenizer(wrapper, eos_token=eos_ids, slices=[])
        native = native.with_slices(LLTokenizer.general_slices())
        assert native.is_canonical and native.vocab_size == self.native_size
        wrapper.tokens = encoder.tokens = ()  # llguidance has its own copy
        # Not `native` itself, which holds the encoder: garbage collection does not see that.
        encoder.vocabulary = weakref.ref(self)
        return native

    def greedy(self, text: str) -> list[int]:
        """The tokens of a text that the tokenizer does not give back, the longest ones first."""
        assert self._llguidance is not None
        ids: list[int] = self._llguidance.greedy_tokenize(text)
        return ids

    def _try(self, matcher: LLMatcher) -> None:
        """Compute the first masks: much of llguidance's work, and most failures, come only then."""
        if matcher.is_error():
            refuse(matcher.get_error())
        trial = matcher.deep_copy()
        mask = np.zeros((self.native_size + 31) // 32, np.int32)
        for _ in range(2):
            trial.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            trial.consume_tokens(trial.compute_ff_tokens())
        if not trial.is_error():
            return
        why = cleaned(trial.get_error())
        if "NoExtensionBias" in why:
            raise Refused("matches no text at all. Look for a rule that can never end.")
        raise Refused(f"is too complex: {why}. Simplify it, or lower its counts.")


class _Encoder:
    """The interface that llguidance asks of a tokenizer: tokens' bytes, and how a text is split."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, native_size: int, eos_ids: list[int]
    ) -> None:
        num_tokens = min(tokenizer.vocab_size, vocab_size)
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.special_ids | set(eos_ids))
        self.tokens: Sequence[bytes] = [tokenizer.written_bytes(i) for i in range(num_tokens)]
        self.tokens += [b""] * (native_size - num_tokens)
        self.vocabulary: weakref.ref[Vocabulary] | None = None
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        # SentencePiece puts a space before every text, so texts are encoded after a character that
        # merges with nothing.
        self._before = "\x02" if self._bytes(self._encode("a")) != b"a" else ""
        self._before_ids = self._encode(self._before)

    def __call__(self, text: str) -> list[int]:
        """The tokens of `text` as the middle of a longer one, none of them special."""
        ids = self._encode(self._before + text)[len(self._before_ids) :]
        if self._bytes(ids) == text.encode():
            return ids
        vocabulary = None if self.vocabulary is None else self.vocabulary()
        assert vocabulary is not None
        return vocabulary.greedy(text)

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        return ids[1:] if ids[:1] == [self.bos_token_id] else ids

    def _bytes(self, ids: list[int]) -> bytes | None:
        """The bytes of `ids`; None if the model does not have one of them."""
        if any(i >= self._num_tokens for i in ids):
            return None
        return b"".join(map(self._tokenizer.token_bytes, ids))
