"""Grammars: which tokens may follow in a text that must match a regex, a schema or a grammar.

Knows tokens, never logits or requests. The matching is llguidance's. What reaches it is read and
checked first, by grammar_regex, grammar_schema and grammar_lark: it is native code, and some inputs
crash it or run for minutes.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sf_local.errors import EngineError, GrammarError
from sf_local.grammar.lark import ebnf_grammar
from sf_local.grammar.regex import regex_grammar
from sf_local.grammar.json_schema import schema_grammar, schema_text
from sf_local.grammar.limits import Refused, shown
from sf_local.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_TEXT = {"regex": 64 << 10, "json_schema": 128 << 10, "ebnf": 32 << 10}  # characters
LIMITS: dict[str, Any] = {
    "verbose_errors": False,
    "max_items_in_row": 5_000,
    # Lexer states are shared by all generations of one grammar and kept: this bounds its memory
    # (about 1 KiB each) and how long one step can take.
    "max_lexer_states": 50_000,
}
EBNF_LIMITS = {**LIMITS, "initial_lexer_fuel": 50_000}  # its regexes are not read here

CACHE_BYTES = 64 << 20
MATCHER_BYTES = 64 << 10  # parser, first lexer states
BYTES_PER_CHARACTER = 128  # what compiling makes of a text; enums and schemas of 100 kB measured


class GrammarCompiler:
    """Compiles and caches the grammars of one tokenizer; usable from any thread.

    Each method returns the state of one new generation. The first call builds llguidance's view of
    the vocabulary (0.1 s for 49,152 tokens, during which no other Python code runs).
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        """`vocab_size` is the width of the model's logits; tokens from there on never appear.

        `eos_ids` end a text, and only a whole one. Without any, `Grammar.is_complete` alone says
        where a text ends.
        """
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, eos_ids)
        self._cache = _Cache(CACHE_BYTES)

    def regex(self, text: str) -> Grammar:
        r"""Texts that Python's `re.fullmatch(text, ...)` matches.

        `\d`, `\w` and `\s` stand for ASCII characters, negated ones for all others that Python
        counts in. Greedy and lazy are the same here. Leading `^` and trailing `$` are ignored.

        Raises:
            GrammarError: not a regex, look-around, backreference, word boundary or another
                construct that is not regular, or too complex.
        """
        return self._compile("regex", text, regex_grammar)

    def json_schema(self, schema: str | bool | Mapping[str, Any] | type) -> Grammar:
        """JSON that is valid under `schema`: JSON text, a dict, or a pydantic model class.

        Written as json.dumps does by default, `{"a": 1, "b": [2, 3]}`: no other whitespace, which
        a model might never end, and nothing to choose between a value and the next key. Keys come
        in the order of the schema; where it lists properties there are no others, unless it has
        additionalProperties or combines schemas. Unknown keywords are ignored, as JSON Schema asks.

        Raises:
            GrammarError: not a schema, a keyword or format that is not supported, or a schema that
                nothing satisfies; the message has the path.
        """
        return self._compile("json_schema", schema_text(schema), schema_grammar)

    def ebnf(self, text: str) -> Grammar:
        """Texts of a grammar, in llguidance's Lark dialect or llama.cpp's GBNF (`root ::= ...`).

        Schemas in `%json {...}` are treated as those of `json_schema`, and exclude `%ignore`.
        Special tokens and the attributes stop, max_tokens and temperature are refused.

        Raises:
            GrammarError: not a grammar, or too complex.
        """
        return self._compile("ebnf", text, ebnf_grammar)

    def _compile(self, kind: str, text: str, translate: Callable[[str], str]) -> Grammar:
        _check_text(kind, text)
        key = (kind, text)
        matcher = self._cache.get(key)
        if matcher is None:
            try:
                limits = EBNF_LIMITS if kind == "ebnf" else LIMITS
                matcher = self._vocabulary.matcher(translate(text), limits)
            except Refused as error:
                raise GrammarError(f"{kind}={shown(text)} {error}") from None
            except RecursionError:
                raise GrammarError(
                    f"{kind}={shown(text)} is nested too deeply. Flatten it."
                ) from None
            self._cache.put(key, matcher)
        return Grammar(matcher.deep_copy(), self._vocabulary, lambda: self._cache.drop(key))


class Grammar:
    """What one generation may still write. Used by one thread at a time.

    Every method may raise GrammarError, where the grammar turns out to be too complex to follow.

    num_words: length of a mask, ceil(vocab_size / 32).
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: _Vocabulary, forget: Callable[[], None]
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocabulary.vocab_size
        self.num_words = (vocabulary.vocab_size + 31) // 32
        self._forget = forget
        self._native: NDArray[np.int32] | None = None  # a mask with the tokens the model lacks
        if vocabulary.native_size != vocabulary.vocab_size:
            self._native = np.zeros((vocabulary.native_size + 31) // 32, np.int32)
        matcher.consume_tokens([])  # notices that nothing may follow at all

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow; True after an accepted end token."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Set the bits of all tokens that may follow in `mask` [num_words], C order.

        Token t is bit t % 32 of word t // 32. The model's end tokens are among them where the text
        may end. Other special tokens and the padding are never set.
        """
        assert mask.dtype == np.int32 and mask.shape == (self.num_words,), mask.shape
        assert mask.flags.c_contiguous
        row = mask if self._native is None else self._native
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()
        if row is not mask:
            mask[:] = row[: self.num_words]
            if self._vocab_size % 32:
                mask[-1] &= (1 << self._vocab_size % 32) - 1

    def allows(self, token: int) -> bool:
        """Whether the mask has this token, without computing it."""
        allowed = self._matcher.validate_tokens([token]) == 1
        self._check()
        return allowed

    def accept(self, token: int) -> None:
        """Add a sampled token to the text.

        Raises:
            EngineError: it was not in the mask.
        """
        if not self._matcher.consume_token(token):
            self._check(token)

    def forced(self) -> list[int]:
        """Tokens that must follow now, already added to the text; never an end token.

        They are those the tokenizer would split the text into; what follows may still decide how
        the last characters are split, so these are left to the mask.
        """
        if self._matcher.is_stopped():
            self._check()
            return []
        tokens = self._matcher.compute_ff_tokens()
        if tokens and not self._matcher.consume_tokens(tokens):
            self._check()
        return tokens

    def _check(self, token: int | None = None) -> None:
        """Raise what ended the matcher, if anything did."""
        if not self._matcher.is_error():
            return
        self._forget()  # its lexer, shared with the cached one, may be used up
        why = _cleaned(self._matcher.get_error())
        if token is not None and "doesn't satisfy the grammar" in why:
            raise EngineError(f"Token {token} does not fit the grammar: {why}")
        raise GrammarError(f"The grammar is too complex to follow further: {why}. Simplify it.")


class _Vocabulary:
    """The tokenizer as llguidance wants it, built on first use.

    From our bytes and our encoder instead of tokenizer.json: so both sides agree on every token,
    and a text that spells a special token is never encoded as one.
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
        """The initial state of `grammar`, a list of llguidance's grammars as JSON."""
        from llguidance import LLMatcher, LLParserLimits

        native_limits = LLParserLimits(**limits)
        try:
            matcher = LLMatcher(self._build(), grammar, log_level=0, limits=native_limits)
        except BaseException as error:  # a Rust panic is not an Exception
            if type(error).__name__ != "PanicException":
                raise
            raise Refused(f"cannot be compiled: {_cleaned(str(error))}") from None
        self._try(matcher)
        return matcher

    def _build(self) -> LLTokenizer:
        with self._lock:
            if self._llguidance is None:
                self._llguidance = self._new_tokenizer()
            return self._llguidance

    def _new_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        eos_ids = self._eos_ids or [self.vocab_size]
        encoder = _Encoder(self._tokenizer, self.vocab_size, self.native_size, eos_ids)
        wrapper = TokenizerWrapper(encoder)
        native = LLTokenizer(wrapper, eos_token=eos_ids)
        assert native.is_canonical and native.vocab_size == self.native_size
        wrapper.tokens = encoder.tokens = ()  # llguidance has its own copy
        encoder.greedy = native.greedy_tokenize
        return native

    def _try(self, matcher: LLMatcher) -> None:
        """Compute the first masks: much of the work, and most failures, come only then."""
        if matcher.is_error():
            _refuse(matcher.get_error())
        trial = matcher.deep_copy()
        mask = np.zeros((self.native_size + 31) // 32, np.int32)
        for _ in range(2):
            trial.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            trial.consume_tokens(trial.compute_ff_tokens())
        if not trial.is_error():
            return
        why = _cleaned(trial.get_error())
        if "NoExtensionBias" in why:
            raise Refused("matches no text at all. Look for a rule that can never end.")
        raise Refused(f"is too complex: {why}. Simplify it, or lower its counts.")


class _Encoder:
    """What llguidance asks of a tokenizer: the bytes of all tokens, and how a text is split."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, native_size: int, eos_ids: list[int]
    ) -> None:
        num_tokens = min(tokenizer.vocab_size, vocab_size)
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.special_ids | set(eos_ids))
        self.tokens: Sequence[bytes] = [tokenizer.written_bytes(i) for i in range(num_tokens)]
        self.tokens += [b""] * (native_size - num_tokens)
        self.greedy: Callable[[str], list[int]] | None = None
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        # SentencePiece puts a space before every text: encode after a character that never merges
        self._before = "\x02" if self._bytes(self._encode("a")) != b"a" else ""
        self._before_ids = self._encode(self._before)

    def __call__(self, text: str) -> list[int]:
        """The tokens of `text` as the middle of a longer one, none of them special."""
        ids = self._encode(self._before + text)[len(self._before_ids) :]
        if self._bytes(ids) == text.encode():
            return ids
        assert self.greedy is not None
        return self.greedy(text)

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        return ids[1:] if ids[:1] == [self.bos_token_id] else ids

    def _bytes(self, ids: list[int]) -> bytes | None:
        """The text of `ids`; None if one is not the model's."""
        if any(i >= self._num_tokens for i in ids):
            return None
        return b"".join(map(self._tokenizer.token_bytes, ids))


class _Cache:
    """Compiled grammars, the longest unused dropped first; usable from any thread.

    llguidance does not tell what a grammar takes, so sizes are estimates: a constant, and a
    multiple of the text's length, since a grammar is as large as its text.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._matchers: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> LLMatcher | None:
        with self._lock:
            if key in self._matchers:
                self._matchers.move_to_end(key)
            return self._matchers.get(key)

    def put(self, key: tuple[str, str], matcher: LLMatcher) -> None:
        with self._lock:
            if key not in self._matchers:
                self.num_bytes += _estimated_bytes(key)
            self._matchers[key] = matcher
            while self.num_bytes > self.max_bytes:
                oldest, _ = self._matchers.popitem(last=False)
                self.num_bytes -= _estimated_bytes(oldest)

    def drop(self, key: tuple[str, str]) -> None:
        with self._lock:
            if self._matchers.pop(key, None) is not None:
                self.num_bytes -= _estimated_bytes(key)


def _estimated_bytes(key: tuple[str, str]) -> int:
    return MATCHER_BYTES + BYTES_PER_CHARACTER * len(key[1])


def _check_text(kind: str, text: object) -> None:
    if not isinstance(text, str):
        raise GrammarError(f"{kind} must be a str, not {type(text).__name__}.")
    if len(text) > MAX_TEXT[kind]:
        raise GrammarError(
            f"{kind} has {len(text):,} characters; at most {MAX_TEXT[kind]:,} are allowed. "
            "Shorten it."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GrammarError(
            f"{kind} holds the lone surrogate {text[error.start]!r} at character {error.start}, "
            "which no text can contain. Remove it."
        ) from None


def _cleaned(message: str) -> str:
    """llguidance's message, shortened, without the marks of its own verbosity."""
    message = re.split("<non-verbose/>|<backtrace>", message)[0].strip().rstrip(".")
    return message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"


def _refuse(message: str) -> NoReturn:
    """Raise what llguidance said; in our words where its own speak of other things."""
    if "recursion limit exceeded" in message:
        raise RecursionError
    if "oneOf constraints are not supported" in message:
        raise Refused(
            "has a oneOf whose alternatives may overlap, which is not supported. Use anyOf, or "
            "give each one a required property with a constant of its own."
        )
    raise Refused(f"cannot be compiled: {_cleaned(message)}.")
