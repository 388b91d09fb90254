"""Grammars: which tokens may follow in a text that must match a regex, a schema or a grammar.

Knows tokens, never logits or requests. The matching is llguidance's; what is here decides what
reaches it (it is native code, some inputs crash it or run for minutes) and says what it refuses.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from sf_local.errors import EngineError, GrammarError
from sf_local.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# What may reach llguidance, so that compiling ends within about two seconds, a step within about
# 100 ms, and its recursion within 4 MiB of stack. What it limits itself is in LIMITS.
MAX_TEXT = {"regex": 64 << 10, "json_schema": 128 << 10, "ebnf": 32 << 10}  # characters
MAX_FORCED = 10_000  # characters that a counted repeat may demand
MAX_OPTIONAL = 1_000  # parts of regexes that may be empty
MAX_PATTERNS = 6  # regexes that one text must match; time grows exponentially
MAX_PATTERN_PROPERTIES = 64  # of a schema; all pairs are compared
MAX_PROPERTIES = 1_000  # of one object; time grows with the square
MAX_MULTIPLE = 100_000  # remainders that a multipleOf distinguishes
MAX_SCHEMA_LEVELS = 512  # about 5 KiB of stack each
MAX_RULE_LEVELS = 1_024  # about 4 KiB of stack each
MAX_BOUND = 2**63 - 1024  # of a number; the largest float that fits in 64 bits
LIMITS: dict[str, Any] = {
    "verbose_errors": False,
    "max_items_in_row": 5_000,
    # Lexer states are shared by all generations of one grammar and kept: this bounds its memory
    # (about 1 KiB each) and how long one step can take.
    "max_lexer_states": 50_000,
}
EBNF_LIMITS = {**LIMITS, "initial_lexer_fuel": 50_000}  # its regexes are not read here
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

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
        return self._compile("regex", text, _regex_grammar)

    def json_schema(self, schema: str | bool | Mapping[str, Any] | type) -> Grammar:
        """JSON that is valid under `schema`: JSON text, a dict, or a pydantic model class.

        Written as json.dumps does by default, `{"a": 1, "b": [2, 3]}`: no other whitespace, which
        a model might never end, and nothing to choose between a value and the next key. Keys come
        in the order of the schema. Keywords that JSON Schema does not know are ignored, as it asks.

        Raises:
            GrammarError: not a schema, a keyword or format that is not supported, or a schema that
                nothing satisfies; the message has the path.
        """
        return self._compile("json_schema", _schema_text(schema), _schema_grammar)

    def ebnf(self, text: str) -> Grammar:
        """Texts of a grammar, in llguidance's Lark dialect or llama.cpp's GBNF (`root ::= ...`).

        Schemas in `%json {...}` are treated as those of `json_schema`, and exclude `%ignore`.
        Special tokens and the attributes stop, max_tokens and temperature are refused.

        Raises:
            GrammarError: not a grammar, or too complex.
        """
        return self._compile("ebnf", text, _ebnf_grammar)

    def _compile(self, kind: str, text: str, translate: Callable[[str], str]) -> Grammar:
        _check_text(kind, text)
        key = (kind, text)
        matcher = self._cache.get(key)
        if matcher is None:
            try:
                limits = EBNF_LIMITS if kind == "ebnf" else LIMITS
                matcher = self._vocabulary.matcher(translate(text), limits)
            except _Refused as error:
                raise GrammarError(f"{kind}={_shown(text)} {error}") from None
            except RecursionError:
                raise GrammarError(
                    f"{kind}={_shown(text)} is nested too deeply. Flatten it."
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


class _Refused(Exception):
    """Why a text cannot be compiled, to be completed with the parameter's name."""


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
            raise _Refused(f"cannot be compiled: {_cleaned(str(error))}") from None
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
            raise _Refused("matches no text at all. Look for a rule that can never end.")
        raise _Refused(f"is too complex: {why}. Simplify it, or lower its counts.")


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


def _shown(text: str, limit: int = 60) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def _cleaned(message: str) -> str:
    """llguidance's message, shortened, without the marks of its own verbosity."""
    message = re.split("<non-verbose/>|<backtrace>", message)[0].strip().rstrip(".")
    return message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"


def _lark_grammar(text: str) -> str:
    """`text` as a list of one grammar: a bare text that begins with { is read as JSON."""
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _refuse(message: str) -> NoReturn:
    """Raise what llguidance said; in our words where its own speak of other things."""
    if "recursion limit exceeded" in message:
        raise RecursionError
    if "oneOf constraints are not supported" in message:
        raise _Refused(
            "has a oneOf whose alternatives may overlap, which is not supported. Use anyOf, or "
            "give each one a required property with a constant of its own."
        )
    raise _Refused(f"cannot be compiled: {_cleaned(message)}.")


# --- Regexes

_parser: Any = importlib.import_module("re._parser")  # the only way to Python's regex trees
# Where Unicode versions could differ, the written regex allows less than Python's: ASCII for \d, \w
# and \s, and for their opposites all but at least what Python counts in. None of these uses \d, \w
# or \s, for which llguidance substitutes ASCII inside schemas.
_ASCII_SETS = {"DIGIT": "0-9", "WORD": "0-9A-Za-z_", "SPACE": r"\x09-\x0D\x20"}
_UNICODE_SETS = {
    "DIGIT": r"\p{Nd}",
    "WORD": r"\p{L}\p{N}_",
    "SPACE": r"\x09-\x0D\x1C-\x20\x85\xA0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000",
}
_NOT_REGULAR = {
    "ASSERT": "look-ahead or look-behind",
    "ASSERT_NOT": "negative look-ahead or look-behind",
    "FAILURE": "negative look-ahead or look-behind",
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a conditional group (?(...)...)",
    "ATOMIC_GROUP": "an atomic group (?>...)",
    "POSSESSIVE_REPEAT": "a possessive repeat such as *+",
}


def _regex_grammar(text: str) -> str:
    pattern = _RegexWriter().write(text)
    return _lark_grammar(f"start: /{pattern}/" if pattern else 'start: ""')


class _RegexWriter:
    """Writes Python's regexes in llguidance's syntax, which reads many of them otherwise.

    One for all regexes of a grammar: what they may cost is limited together.
    """

    def __init__(self) -> None:
        self._num_optional = 0
        self._is_search = self._is_ascii = False

    def write(self, text: str, is_search: bool = False) -> str:
        """A regex for texts that `text` matches as a whole, or with `is_search` in some part."""
        try:
            tree = _parser.parse(text)
        except re.error as error:
            raise _Refused(f"is not a regex: {error}.") from None
        except OverflowError as error:
            raise _Refused(f"is not a regex: {error}. Lower its counts.") from None
        flags = tree.state.flags
        self._is_search, self._is_ascii = is_search, bool(flags & re.ASCII)
        if self._is_ascii and flags & re.IGNORECASE:
            raise _Refused("combines the flags a and i, which is not supported. Remove one.")
        pattern = self._sequence(tree, bool(flags & re.DOTALL), True, True)
        return f"(?i:{pattern})" if flags & re.IGNORECASE else pattern

    def _sequence(self, tree: Any, dotall: bool, first: bool, last: bool) -> str:
        """`first`, `last`: nothing of the regex comes before or after `tree`."""
        solid = [i for i, (op, _) in enumerate(tree) if str(op) != "AT"]
        start, end = (solid[0], solid[-1]) if solid else (len(tree), -1)
        # A sequence of n parts that may be empty takes time and space with the square of n.
        self._num_optional += sum(tree[i : i + 1].getwidth()[0] == 0 for i in solid)
        if self._num_optional > MAX_OPTIONAL:
            raise _Refused(f"has more than {MAX_OPTIONAL:,} optional parts. Simplify it.")
        return "".join(
            self._item(str(op), value, dotall, first and i <= start, last and i >= end)
            for i, (op, value) in enumerate(tree)
        )

    def _item(self, op: str, value: Any, dotall: bool, first: bool, last: bool) -> str:
        if op == "LITERAL":
            return _escaped(value)
        if op == "NOT_LITERAL":
            return f"[^{_escaped(value)}]"
        if op == "ANY":
            return "(?s:.)" if dotall else r"[^\x0A]"
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
        raise _Refused(f"contains {_NOT_REGULAR.get(op, op)}, which is not supported. Rewrite it.")

    def _anchor(self, name: str, first: bool, last: bool) -> str:
        if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            is_edge, written = first, "^"
        elif name in ("AT_END", "AT_END_STRING"):
            is_edge, written = last, "$"
        else:
            raise _Refused(
                "contains a word boundary (\\b, \\B), which is not supported. Remove it."
            )
        if not is_edge:
            raise _Refused(f"has {written} in the middle, which is not supported. Remove it.")
        return written if self._is_search else ""

    def _group(self, value: Any, dotall: bool, first: bool, last: bool) -> str:
        _, add, remove, tree = value
        if (add | remove) & (re.ASCII | re.UNICODE):
            raise _Refused("changes the flags a or u for a part, which is not supported.")
        if self._is_ascii and add & re.IGNORECASE:
            raise _Refused("combines the flags a and i, which is not supported. Remove one.")
        dotall = bool((dotall or add & re.DOTALL) and not remove & re.DOTALL)
        flag = "i" if add & re.IGNORECASE else "-i" if remove & re.IGNORECASE else ""
        return f"(?{flag}:{self._sequence(tree, dotall, first, last)})"

    def _repeat(self, value: Any, dotall: bool) -> str:
        low, high, tree = value
        if low * tree.getwidth()[0] > MAX_FORCED:
            raise _Refused(f"demands more than {MAX_FORCED:,} characters. Lower its counts.")
        inner = self._sequence(tree, dotall, False, False)
        most = "" if high == _parser.MAXREPEAT else int(high)
        return f"(?:{inner}){{{int(low)},{most}}}"

    def _class(self, items: Any) -> str:
        is_negated = str(items[0][0]) == "NEGATE"
        parts = [self._class_item(str(op), value, is_negated) for op, value in items[is_negated:]]
        return f"[{'^' * is_negated}{''.join(parts)}]"

    def _class_item(self, op: str, value: Any, is_negated: bool) -> str:
        if op == "LITERAL":
            return _escaped(value)
        if op == "RANGE":
            low = 0xE000 if 0xD800 <= value[0] < 0xE000 else value[0]
            high = 0xD7FF if 0xD800 <= value[1] < 0xE000 else value[1]
            return f"{_escaped(low)}-{_escaped(high)}"
        name = str(value).removeprefix("CATEGORY_")
        is_opposite = name.startswith("NOT_")
        is_small = self._is_ascii or is_opposite == is_negated
        chars = (_ASCII_SETS if is_small else _UNICODE_SETS)[name.removeprefix("NOT_")]
        return f"[^{chars}]" if is_opposite else chars


def _escaped(code: int) -> str:
    char = chr(code)
    if char.isascii() and char.isalnum():
        return char
    if 0xD800 <= code < 0xE000:
        raise _Refused(f"asks for the surrogate \\u{code:x}, which no text can contain. Remove it.")
    return f"\\x{{{code:X}}}"


# --- JSON schemas

_REFUSED_KEYWORDS = {
    "not": "state what is allowed instead",
    "if": "use anyOf",
    "then": "use anyOf",
    "else": "use anyOf",
    "uniqueItems": "check the list afterwards",
    "contains": "check the list afterwards",
    "minContains": "check the list afterwards",
    "maxContains": "check the list afterwards",
    "dependentRequired": "use anyOf",
    "dependentSchemas": "use anyOf",
    "dependencies": "use anyOf",
    "propertyNames": "use patternProperties and additionalProperties=false",
    "unevaluatedProperties": "use additionalProperties",
    "unevaluatedItems": "use items",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
    "x-guidance": "the layout is fixed",
}
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
_BOUNDS = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))


def _schema_text(schema: object) -> str:
    if isinstance(schema, str):
        return schema
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        try:
            schema = schema.model_json_schema()
        except Exception as error:  # pydantic has several
            raise GrammarError(f"json_schema has no JSON form: {error}") from error
    if not isinstance(schema, (bool, Mapping)):
        raise GrammarError(
            "json_schema must be JSON text, a dict or a pydantic model class, not "
            f"{type(schema).__name__}."
        )
    try:
        return json.dumps(schema if isinstance(schema, bool) else dict(schema), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"json_schema cannot be written as JSON: {error}.") from None
    except RecursionError:
        raise GrammarError("json_schema is nested too deeply. Flatten it.") from None


def _schema_grammar(text: str) -> str:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _Refused(
            f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise _Refused(f"is not JSON: {error}.") from None
    return _json({"grammars": [{"json_schema": _checked_schema(schema)}]})


def _refuse_constant(name: str) -> None:
    raise _Refused(f"is not JSON: it holds {name}.")


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Refused(
            f"holds the lone surrogate \\u{ord(text[error.start]):x}, which no text can contain. "
            "Remove it."
        ) from None
    return text


def _checked_schema(schema: Any) -> dict[str, Any]:
    """`schema` as llguidance gets it."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    _SchemaCheck(schema).run()
    return {**schema, "x-guidance": JSON_STYLE}


class _SchemaCheck:
    """Refuses what llguidance ignores, gets wrong or crashes on, by name and path.

    Rewrites what has an equal that llguidance reads: regexes, numbers beyond its precision, and
    oneOf whose alternatives exclude each other.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        draft = str(root.get("$schema")) if isinstance(root, dict) else ""
        self._id_keyword = "id" if "draft-04" in draft else "$id"  # changes what $ref refers to
        self._num_levels = 0
        self._num_pattern_properties = 0
        self._multiple: Fraction | None = None  # least common multiple of all multipleOf
        self._regexes = _RegexWriter()
        self._pending: list[tuple[Any, str]] = [(root, "#")]
        self._seen = {id(root)}
        self._checked: set[int] = set()
        self._num_patterns: dict[int, int] = {}  # by id of schema

    def run(self) -> None:
        """Check everything that the root refers to."""
        for schema, path in self._pending:  # grows meanwhile
            self._num_levels += self._check_tree(schema, path)
            # llguidance follows references depth first on the native stack, each one once.
            if self._num_levels > MAX_SCHEMA_LEVELS:
                raise _Refused(
                    "has too many schemas nested or referring to each other (more than "
                    f"{MAX_SCHEMA_LEVELS} levels). Split it."
                )
        if self._most_patterns(self._root) > MAX_PATTERNS:
            raise _Refused(
                f"may combine more than {MAX_PATTERNS} patterns for one text, by allOf or $ref. "
                "Join them."
            )

    def _check_tree(self, schema: Any, path: str) -> int:
        """Check `schema` and what lies in it; returns how deep it is nested."""
        todo, depth = [(schema, path, 1)], 0
        while todo:
            schema, path, level = todo.pop()
            depth = max(depth, level)
            if isinstance(schema, bool):
                continue
            if not isinstance(schema, dict):
                raise _Refused(f"has {_shown(repr(schema))} at {path}; a schema is an object.")
            if id(schema) not in self._checked:  # a reference may lead inside of another tree
                self._checked.add(id(schema))
                self._check_schema(schema, path)
            todo += [(child, f"{path}/{at}", level + 1) for _, at, child in _subschemas(schema)]
        return depth

    def _check_schema(self, schema: dict[str, Any], path: str) -> None:
        for keyword in schema:
            if keyword in _REFUSED_KEYWORDS:
                advice = _REFUSED_KEYWORDS[keyword]
                raise _Refused(f"has {keyword} at {path}, which is not supported; {advice}.")
        if schema is not self._root and self._id_keyword in schema:
            raise _Refused(
                f"has {self._id_keyword} at {path}, which is not supported below the top."
            )
        if "additionalItems" in schema and "prefixItems" in schema:
            raise _Refused(f"has prefixItems and additionalItems at {path}; use items instead.")
        if isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS:
            raise _Refused(
                f"has the format {_shown(schema['format'])} at {path}; supported are "
                f"{', '.join(sorted(_FORMATS))}. Use a pattern, or remove it."
            )
        self._check_object(schema, path)
        self._rewrite_patterns(schema, path)
        self._check_numbers(schema, path)
        if "$ref" in schema:
            self._follow(schema["$ref"], path)
        if "oneOf" in schema and "anyOf" not in schema and self._is_tagged(schema["oneOf"], path):
            renamed = [("anyOf" if k == "oneOf" else k, v) for k, v in schema.items()]
            schema.clear()
            schema.update(renamed)

    def _check_object(self, schema: dict[str, Any], path: str) -> None:
        properties, required = schema.get("properties"), schema.get("required")
        required = {str(name) for name in required} if isinstance(required, list) else set()
        names = required.union(properties if isinstance(properties, dict) else ())
        if len(names) > MAX_PROPERTIES:
            raise _Refused(
                f"has {len(names):,} properties at {path}; at most {MAX_PROPERTIES:,} are "
                "supported. Use additionalProperties."
            )
        # llguidance may repeat a key that is not named, and would count it twice.
        least = schema.get("minProperties")
        if isinstance(least, int) and least > max(len(required), 1):
            raise _Refused(
                f"has minProperties={least} at {path}, which is supported up to the number of "
                "required properties. Name them."
            )

    def _rewrite_patterns(self, schema: dict[str, Any], path: str) -> None:
        if isinstance(schema.get("pattern"), str):
            schema["pattern"] = self._rewritten(schema["pattern"], f"{path}/pattern")
        properties = schema.get("patternProperties")
        if isinstance(properties, dict):
            self._num_pattern_properties += len(properties)
            if self._num_pattern_properties > MAX_PATTERN_PROPERTIES:
                raise _Refused(f"has more than {MAX_PATTERN_PROPERTIES} patternProperties.")
            path += "/patternProperties"
            schema["patternProperties"] = {
                self._rewritten(pattern, path): child for pattern, child in properties.items()
            }

    def _rewritten(self, pattern: str, path: str) -> str:
        try:
            return self._regexes.write(pattern, is_search=True)
        except _Refused as error:
            raise _Refused(f"has {_shown(pattern)} at {path}, which {error}") from None

    def _check_numbers(self, schema: dict[str, Any], path: str) -> None:
        for number in _numbers([schema.get("const"), schema.get("enum")]):
            if abs(number) > 2**53:
                raise _Refused(f"has the constant {_shown(str(number))} at {path}, above 2**53.")
        for keyword, inward in _BOUNDS.items():
            bound = schema.get(keyword)
            if isinstance(bound, (int, float)) and not isinstance(bound, bool):
                schema[keyword] = _representable(bound, inward, f"{path}/{keyword}")
        multiple = schema.get("multipleOf")
        if isinstance(multiple, (int, float)) and 0 < multiple < math.inf:
            self._add_multiple(Fraction(str(multiple)), path)

    def _add_multiple(self, new: Fraction, path: str) -> None:
        old = self._multiple or new
        self._multiple = Fraction(
            math.lcm(old.numerator, new.numerator), math.gcd(old.denominator, new.denominator)
        )
        digits = self._multiple
        while digits.denominator != 1:
            digits *= 10
        if digits > MAX_MULTIPLE:
            raise _Refused(
                f"has a multipleOf at {path} that is too fine, alone or with the others: the "
                f"digits of their least common multiple may go up to {MAX_MULTIPLE:,}."
            )

    def _follow(self, reference: object, path: str) -> None:
        target = self._resolve(reference, path)
        if id(target) not in self._seen:
            self._seen.add(id(target))
            self._pending.append((target, str(reference)))

    def _resolve(self, reference: object, path: str) -> Any:
        target = self._root
        if not isinstance(reference, str) or not (reference + "/").startswith("#/"):
            raise _Refused(
                f"has $ref {_shown(str(reference))} at {path}; only #/... of the same schema is "
                "supported. Copy the schema into $defs."
            )
        for part in unquote(reference).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(key)] if isinstance(target, list) else target[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise _Refused(
                    f"has $ref {_shown(reference)} at {path}, which leads nowhere. Define it."
                ) from None
        return target

    def _most_patterns(self, schema: Any) -> int:
        """At most how many regexes llguidance intersects for one text, as it merges `schema`."""
        if not isinstance(schema, dict):
            return 0
        if id(schema) not in self._num_patterns:
            self._num_patterns[id(schema)] = 0  # what a loop adds; llguidance refuses those
            most = {"": ("pattern" in schema) + ("format" in schema)}
            merged = (
                self._most_patterns(self._resolve(schema["$ref"], "#")) if "$ref" in schema else 0
            )
            for keyword, _, child in _subschemas(schema):
                num = self._most_patterns(child)
                if keyword == "allOf":
                    merged += num
                else:
                    most[keyword] = max(most.get(keyword, 0), num)
            merged += sum(most.pop(k, 0) for k in ("anyOf", "oneOf", "patternProperties"))
            self._num_patterns[id(schema)] = merged + max(most.values())
        return self._num_patterns[id(schema)]

    def _is_tagged(self, options: Any, path: str) -> bool:
        """Whether all options are objects that differ in the constants of one required property."""
        if not isinstance(options, list):
            return False
        tags = [self._tags(option, path) for option in options]
        names = set.intersection(*map(set, tags)) if tags else set()
        return any(
            sum(len(tag[name]) for tag in tags) == len(set().union(*(tag[name] for tag in tags)))
            for name in names
        )

    def _tags(self, option: Any, path: str) -> dict[str, set[str]]:
        """The strings that an object's required properties may be, for those that list them."""
        if isinstance(option, dict) and set(option) == {"$ref"}:
            option = self._resolve(option["$ref"], path)
        if not isinstance(option, dict) or option.get("type") != "object":
            return {}
        properties, required = option.get("properties"), option.get("required")
        if not isinstance(properties, dict) or not isinstance(required, list):
            return {}
        tags = {name: _strings(properties[name]) for name in required if name in properties}
        return {name: strings for name, strings in tags.items() if strings}


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The schemas directly inside `schema`: keyword, path, schema. Not $defs, but by reference."""
    for keyword, value in schema.items():
        if keyword in ("properties", "patternProperties") and isinstance(value, dict):
            yield from ((keyword, f"{keyword}/{name}", child) for name, child in value.items())
        elif keyword in _LISTS and isinstance(value, list):
            yield from ((keyword, f"{keyword}/{i}", child) for i, child in enumerate(value))
        elif keyword in ("items", "additionalItems", "additionalProperties"):
            yield keyword, keyword, value


def _strings(schema: Any) -> set[str]:
    """The strings that `schema` allows, if it lists them and nothing else."""
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return set()
    return set(values)


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def _representable(bound: float, inward: int, path: str) -> float:
    """The nearest bound that llguidance represents and that allows no more than `bound`."""
    if bound * inward > MAX_BOUND:
        raise _Refused(f"has {_shown(str(bound))} at {path}, beyond 64 bits.")
    if abs(bound) > MAX_BOUND:
        return -inward * MAX_BOUND
    near = float(bound)
    if near == bound:
        return bound
    is_inside = (near > bound) == (inward > 0)
    return int(near if is_inside else math.nextafter(near, inward * math.inf))


# --- Lark and GBNF

_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_LARK = re.compile(  # as llguidance splits a text; what is not here cannot hide anything
    r"""(?P<comment>(?:\#|//)[^\n]*)
    |(?P<string>"(?:\\(?:["\\/bfnrt]|u[a-fA-F0-9]{4}|x[a-fA-F0-9]{2})|[^"\\\x00-\x1F\x7F])*"i?)
    |(?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    |(?P<special><[^<>\s]+>)
    |%(?P<json>json|regex|llguidance)
    |%(?P<directive>ignore|lark)
    |(?P<attribute>\b(?:stop|max_tokens|temperature)\b)(?=\s*=)
    |(?P<name>[!?_]*[A-Za-z][\w-]*)
    |(?P<open>[(\[{])
    |(?P<close>[)\]}])
    |(?P<colon>:)
    |(?P<optional>[*?])
    |(?P<and>&)""",
    re.VERBOSE,
)
_OPTIONAL = re.compile(r"\\.|(?P<optional>[*?]|\{0?,)", re.DOTALL)


def _ebnf_grammar(text: str) -> str:
    if _GBNF_RULE.search(text):
        text = _gbnf_to_lark(text)
    return _lark_grammar("".join(_LarkCheck(text).pieces()))


def _gbnf_to_lark(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # it raises bare ones
        raise _Refused(f"is not GBNF: {error}.") from None


class _LarkCheck:
    """Refuses what of a Lark text is not only about text, or would crash llguidance."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._depth = self._deepest = self._num_levels = self._num_ands = 0
        self._names: list[str] = []  # in the current definition
        self._num_optional = Counter[str]()  # in each definition
        self._parts: dict[str, list[str]] = {"": self._names}  # names in each definition
        self._definition = ""
        self._directives: set[str] = set()

    def pieces(self) -> Iterator[str]:
        """The text, with our options in its schemas."""
        done = 0
        while (found := _LARK.search(self._text, done)) is not None:
            yield self._text[done : found.end()]
            done = found.end()
            self._directives.add(found["json"] or found["directive"])
            if found["json"]:
                piece, done = self._json(found["json"], done)
                yield piece
            else:
                self._count(found)
        yield self._text[done:]
        self._check_counts()

    def _count(self, found: re.Match[str]) -> None:
        kind = found.lastgroup
        if kind in ("special", "attribute"):
            raise _Refused(
                f"has the {'special token' if kind == 'special' else kind} {_shown(found[0])} at "
                f"{_place(self._text, found.start())}, which is not supported. Remove it."
            )
        if kind == "open":
            self._depth += 1
            self._deepest = max(self._deepest, self._depth)
        elif kind == "close":
            self._depth -= 1
        elif kind == "and":
            self._num_ands += 1
        elif kind == "optional":
            self._num_optional[self._definition] += 1
        elif kind == "regex":
            optional = [part for part in _OPTIONAL.finditer(found[0]) if part["optional"]]
            self._num_optional[self._definition] += len(optional)
        elif kind == "name":
            self._names.append(found[0])
        elif kind == "colon":
            self._begin_definition()

    def _begin_definition(self) -> None:
        self._num_levels += 1 + self._deepest
        self._deepest = 0
        self._definition = self._names.pop() if self._names else ""
        self._names = self._parts.setdefault(self._definition, [])

    def _check_counts(self) -> None:
        if "ignore" in self._directives and self._directives & {"json", "lark"}:
            raise _Refused(  # llguidance loses track where either may come next
                "has %ignore beside %json or %lark, which is not supported. Write out where spaces "
                "may be."
            )
        # llguidance follows rules depth first on the native stack, each one once.
        if self._num_levels + self._deepest > MAX_RULE_LEVELS:
            raise _Refused(f"has too many rules and brackets (over {MAX_RULE_LEVELS:,}). Split it.")
        if self._num_ands >= MAX_PATTERNS:
            raise _Refused(f"has more than {MAX_PATTERNS - 1} intersections (&). Simplify it.")
        # Terminals are put into those that name them; each takes time with the square.
        sizes: dict[str, int] = {}
        if sum(self._size(name, sizes) ** 2 for name in self._parts) > MAX_OPTIONAL**2:
            raise _Refused(f"has more than {MAX_OPTIONAL:,} optional parts. Simplify it.")

    def _size(self, name: str, sizes: dict[str, int]) -> int:
        """How many optional parts the terminal `name` has, with those in it; 0 for a rule's names.

        A terminal that names itself is llguidance's to refuse.
        """
        if name not in sizes:
            sizes[name] = 0
            parts = [part for part in self._parts.get(name, []) if part.strip("_")[:1].isupper()]
            is_terminal = name.strip("_")[:1].isupper()
            inner = sum(self._size(part, sizes) for part in parts) if is_terminal else 0
            sizes[name] = self._num_optional[name] + inner
        return sizes[name]

    def _json(self, directive: str, start: int) -> tuple[str, int]:
        """The JSON after `%directive` as llguidance gets it, and where it ends."""
        text = self._text
        start += len(text[start:]) - len(text[start:].lstrip())
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError as error:
            where = _place(text, error.pos)
            raise _Refused(f"has no JSON after %{directive}: {error.msg} at {where}.") from None
        if directive == "llguidance" and value != {}:
            where = _place(text, start)
            raise _Refused(f"has options in %llguidance at {where}; only {{}} is supported.")
        return f" {_json(_checked_schema(value) if directive == 'json' else value)}", end


def _place(text: str, index: int) -> str:
    line = text.count("\n", 0, index) + 1
    return f"line {line}, column {index - text.rfind(chr(10), 0, index)}"
