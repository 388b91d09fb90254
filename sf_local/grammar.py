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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from sf_local.errors import EngineError, GrammarError
from sf_local.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_TEXT = {"regex": 256 << 10, "json_schema": 256 << 10, "ebnf": 64 << 10}  # characters
MAX_FORCED = 10_000  # characters that a counted repeat may demand
MAX_PROPERTIES = 1_000  # of one object; compile time grows with the square
MAX_MULTIPLE = 100_000  # numbers that a multipleOf distinguishes
MAX_SCHEMA_LEVELS = 512  # about 5 KiB of native stack each
MAX_RULE_LEVELS = 1_024  # about 4 KiB of native stack each
LIMITS = {
    "max_items_in_row": 10_000,
    "step_max_items": 20_000,
    # Lexer states are shared by all generations of one grammar and kept: a bound on its memory
    # (about 1 KiB each) and on how long one step can take.
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
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

        `\\d`, `\\w` and `\\s` stand for ASCII characters, negated ones for all others that Python
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

        Schemas in `%json {...}` are treated as those of `json_schema`. References to special tokens
        and the attributes stop, max_tokens and temperature are refused.

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
                matcher = self._vocabulary.matcher(translate(text))
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
        native = np.zeros((vocabulary.native_size + 31) // 32, np.int32)
        self._native = native if vocabulary.native_size != self._vocab_size else None
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

    def matcher(self, grammar: str) -> LLMatcher:
        """The initial state of `grammar`, a Lark text or a list of grammars as JSON."""
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._build(), grammar, log_level=0, limits=_limits())
        except ValueError as error:
            raise _Refused(f"cannot be compiled: {_cleaned(str(error))}") from None
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
            raise _Refused(f"cannot be compiled: {_cleaned(matcher.get_error())}")
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


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(**LIMITS)  # type: ignore[arg-type]


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
    """llguidance's message, without the marks of its own verbosity."""
    message = message.replace("<non-verbose/>", "").strip().rstrip(".")
    return message if len(message) <= 400 else message[:400] + "..."


def _lark_grammar(text: str) -> str:
    """`text` as a list of one grammar: a bare text that begins with { is read as JSON."""
    return json.dumps({"grammars": [{"lark_grammar": text}]})


# --- Regexes

_parser: Any = importlib.import_module("re._parser")  # the only way to Python's regex trees
_ASCII_SETS = {"DIGIT": "0-9", "WORD": "0-9A-Za-z_", "SPACE": r"\x09-\x0D\x20"}
# At least what Python's own Unicode sets hold, whose version may be older than llguidance's.
_UNICODE_SETS = {"DIGIT": r"\d", "WORD": r"\w\p{N}", "SPACE": r"\s\x1C-\x1F"}
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
    try:
        tree = _parser.parse(text)
    except re.error as error:
        raise _Refused(f"is not a regex: {error}.") from None
    except OverflowError as error:
        raise _Refused(f"is not a regex: {error}. Lower its counts.") from None
    flags = tree.state.flags
    if flags & re.ASCII and flags & re.IGNORECASE:
        raise _Refused("combines the flags a and i, which is not supported. Remove one.")
    pattern = _write_sequence(tree, bool(flags & re.ASCII), bool(flags & re.DOTALL), True, True)
    if flags & re.IGNORECASE:
        pattern = f"(?i:{pattern})"
    return _lark_grammar(f"start: /{pattern}/" if pattern else 'start: ""')


def _write_sequence(tree: Any, ascii: bool, dotall: bool, first: bool, last: bool) -> str:
    """`tree` in llguidance's syntax; `first`, `last`: the text begins or ends with it."""
    items = list(tree)
    solid = [i for i, (op, _) in enumerate(items) if str(op) != "AT"]
    start, end = (solid[0], solid[-1]) if solid else (len(items), -1)
    return "".join(
        _write_item(str(op), value, ascii, dotall, first and i <= start, last and i >= end)
        for i, (op, value) in enumerate(items)
    )


def _write_item(op: str, value: Any, ascii: bool, dotall: bool, first: bool, last: bool) -> str:
    if op == "LITERAL":
        return _write_char(value)
    if op == "NOT_LITERAL":
        return f"[^{_write_char(value)}]"
    if op == "ANY":
        return "(?s:.)" if dotall else r"[^\x0A]"
    if op == "IN":
        return _write_class(value, ascii)
    if op == "AT":
        return _write_anchor(str(value), first, last)
    if op == "BRANCH":
        branches = [_write_sequence(tree, ascii, dotall, first, last) for tree in value[1]]
        return f"(?:{'|'.join(branches)})"
    if op == "SUBPATTERN":
        return _write_group(value[1:], ascii, dotall, first, last)
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        return _write_repeat(value, ascii, dotall)
    raise _Refused(f"contains {_NOT_REGULAR.get(op, op)}, which is not supported. Rewrite it.")


def _write_char(code: int) -> str:
    char = chr(code)
    if char.isascii() and char.isalnum():
        return char
    if 0xD800 <= code < 0xE000:
        raise _Refused(f"asks for the surrogate \\u{code:x}, which no text can contain. Remove it.")
    return f"\\x{{{code:X}}}"


def _write_anchor(name: str, first: bool, last: bool) -> str:
    at_start = name in ("AT_BEGINNING", "AT_BEGINNING_STRING")
    at_end = name in ("AT_END", "AT_END_STRING")
    if (at_start and first) or (at_end and last):
        return ""
    if at_start or at_end:
        raise _Refused("has an anchor (^ or $) inside; it must match the whole text anyway.")
    raise _Refused("contains a word boundary (\\b or \\B), which is not supported. Spell it out.")


def _write_group(value: Any, ascii: bool, dotall: bool, first: bool, last: bool) -> str:
    add, remove, tree = value
    if (add | remove) & re.ASCII or add & re.UNICODE:
        raise _Refused("changes the flags a or u for a part, which is not supported.")
    if ascii and add & re.IGNORECASE:
        raise _Refused("combines the flags a and i, which is not supported. Remove one.")
    dotall = bool((dotall or add & re.DOTALL) and not remove & re.DOTALL)
    flag = "i" if add & re.IGNORECASE else "-i" if remove & re.IGNORECASE else ""
    return f"(?{flag}:{_write_sequence(tree, ascii, dotall, first, last)})"


def _write_repeat(value: Any, ascii: bool, dotall: bool) -> str:
    low, high, tree = value
    if low * tree.getwidth()[0] > MAX_FORCED:
        raise _Refused(f"demands more than {MAX_FORCED:,} characters. Lower its counts.")
    inner = _write_sequence(tree, ascii, dotall, False, False)
    return f"(?:{inner}){{{int(low)},{'' if high == _parser.MAXREPEAT else int(high)}}}"


def _write_class(items: Any, ascii: bool) -> str:
    is_negated = str(items[0][0]) == "NEGATE"
    parts = [
        _write_class_item(str(op), value, ascii, is_negated) for op, value in items[is_negated:]
    ]
    return f"[{'^' * is_negated}{''.join(parts)}]"


def _write_class_item(op: str, value: Any, ascii: bool, is_negated: bool) -> str:
    if op == "LITERAL":
        return _write_char(value)
    if op == "RANGE":
        low = 0xE000 if 0xD800 <= value[0] < 0xE000 else value[0]
        high = 0xD7FF if 0xD800 <= value[1] < 0xE000 else value[1]
        return f"{_write_char(low)}-{_write_char(high)}"
    name = str(value).removeprefix("CATEGORY_")
    is_inverted = name.startswith("NOT_")
    # Where Unicode versions could differ, allow less: the small set, or all but the large one.
    is_small = ascii or is_inverted == is_negated
    chars = (_ASCII_SETS if is_small else _UNICODE_SETS)[name.removeprefix("NOT_")]
    return f"[^{chars}]" if is_inverted else chars


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
_BOUNDS = {
    "minimum": math.inf,
    "exclusiveMinimum": math.inf,
    "maximum": -math.inf,
    "exclusiveMaximum": -math.inf,
}


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
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise _Refused(
            f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise _Refused(f"is not JSON: {error}.") from None
    return json.dumps({"grammars": [{"json_schema": _checked_schema(schema)}]})


def _checked_schema(schema: Any) -> dict[str, Any]:
    """`schema` as llguidance gets it."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    _SchemaCheck(schema).run()
    return {**schema, "x-guidance": JSON_STYLE}


class _SchemaCheck:
    """Refuses what llguidance ignores, gets wrong or crashes on, by name and path.

    Rewrites what has an equal that llguidance supports: numbers beyond its precision and oneOf
    whose alternatives exclude each other.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._num_levels = 0
        self._multiple: Fraction | None = None  # least common multiple of all multipleOf
        self._pending: list[tuple[Any, str]] = [(root, "#")]
        self._seen = {id(root)}

    def run(self) -> None:
        """Check everything that the root refers to."""
        for schema, path in self._pending:  # grows meanwhile
            self._num_levels += self._check_tree(schema, path)
            # llguidance follows references depth first on the native stack, each one once.
            if self._num_levels > MAX_SCHEMA_LEVELS:
                raise _Refused(
                    f"has too many nested schemas behind each other ($ref counted; more than "
                    f"{MAX_SCHEMA_LEVELS}). Split it."
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
            self._check_schema(schema, path)
            todo += [(child, where, level + 1) for child, where in _subschemas(schema, path)]
        return depth

    def _check_schema(self, schema: dict[str, Any], path: str) -> None:
        for keyword in schema:
            if keyword in _REFUSED_KEYWORDS:
                advice = _REFUSED_KEYWORDS[keyword]
                raise _Refused(f"has {keyword} at {path}, which is not supported; {advice}.")
        if "$id" in schema and schema is not self._root:
            raise _Refused(f"has $id at {path}, inside the schema, which is not supported.")
        if "additionalItems" in schema and "prefixItems" in schema:
            raise _Refused(f"has prefixItems and additionalItems at {path}; use items instead.")
        if isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS:
            raise _Refused(
                f"has the format {_shown(schema['format'])} at {path}; supported are "
                f"{', '.join(sorted(_FORMATS))}. Use a pattern, or remove it."
            )
        self._check_object(schema, path)
        self._check_numbers(schema, path)
        if "$ref" in schema:
            self._follow(schema["$ref"], path)
        if "oneOf" in schema and "anyOf" not in schema and self._is_tagged(schema["oneOf"]):
            renamed = [("anyOf" if k == "oneOf" else k, v) for k, v in schema.items()]
            schema.clear()
            schema.update(renamed)

    def _check_object(self, schema: dict[str, Any], path: str) -> None:
        properties, required = schema.get("properties"), schema.get("required")
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            raise _Refused(
                f"has {len(properties):,} properties at {path}; at most {MAX_PROPERTIES:,} are "
                "supported. Use additionalProperties."
            )
        # llguidance may repeat a key that is not named, and would count it twice.
        least = schema.get("minProperties")
        num_named = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, int) and least > max(num_named, 1):
            raise _Refused(
                f"has minProperties={least} at {path}, which is supported up to the number of "
                "required properties. Name them."
            )

    def _check_numbers(self, schema: dict[str, Any], path: str) -> None:
        for number in _numbers([schema.get("const"), schema.get("enum")]):
            if _float(number, path) != number:
                raise _Refused(f"has the constant {number} at {path}, beyond 53 bits of precision.")
        for keyword, inward in _BOUNDS.items():
            bound = schema.get(keyword)
            if isinstance(bound, int) and (near := _float(bound, path)) != bound:
                is_inside = (near > bound) == (inward > 0)
                schema[keyword] = int(near if is_inside else math.nextafter(near, inward))
        multiple = schema.get("multipleOf")
        if isinstance(multiple, (int, float)) and multiple > 0:
            self._add_multiple(Fraction(str(multiple)), path)

    def _add_multiple(self, new: Fraction, path: str) -> None:
        old = self._multiple or new
        common = Fraction(
            math.lcm(old.numerator, new.numerator), math.gcd(old.denominator, new.denominator)
        )
        self._multiple, digits = common, common
        while digits.denominator != 1:
            digits *= 10
        if digits > MAX_MULTIPLE:
            raise _Refused(
                f"has a multipleOf at {path} that is too large, alone or with the others: their "
                f"least common multiple may have the digits up to {MAX_MULTIPLE:,}."
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
        for part in filter(None, unquote(reference).split("/")[1:]):
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(key)] if isinstance(target, list) else target[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise _Refused(
                    f"has $ref {_shown(reference)} at {path}, which leads nowhere. Define it."
                ) from None
        return target

    def _is_tagged(self, options: Any) -> bool:
        """Whether all options are objects that differ in the constants of one required property."""
        if not isinstance(options, list):
            return False
        tags = [self._tags(option) for option in options]
        names = set.intersection(*map(set, tags)) if tags else set()
        return any(
            sum(len(tag[name]) for tag in tags) == len(set().union(*(tag[name] for tag in tags)))
            for name in names
        )

    def _tags(self, option: Any) -> dict[str, set[str]]:
        """Required properties of an object that have constants, and those as JSON."""
        if isinstance(option, dict) and set(option) == {"$ref"}:
            option = self._resolve(option["$ref"], "oneOf")
        if not isinstance(option, dict) or option.get("type") != "object":
            return {}
        properties, required = option.get("properties"), option.get("required")
        if not isinstance(properties, dict) or not isinstance(required, list):
            return {}
        tags = {name: _constants(properties.get(name)) for name in required if name in properties}
        return {name: constants for name, constants in tags.items() if constants}


def _subschemas(schema: dict[str, Any], path: str) -> Iterator[tuple[Any, str]]:
    """The schemas directly inside `schema`, with their paths; $defs only when referred to."""
    for keyword, value in schema.items():
        where = f"{path}/{keyword}"
        if keyword in ("properties", "patternProperties") and isinstance(value, dict):
            yield from ((child, f"{where}/{name}") for name, child in value.items())
        elif keyword in ("allOf", "anyOf", "oneOf", "prefixItems", "items") and isinstance(
            value, list
        ):
            yield from ((child, f"{where}/{i}") for i, child in enumerate(value))
        elif keyword in ("items", "additionalItems", "additionalProperties"):
            yield value, where


def _constants(schema: Any) -> set[str]:
    """The strings that `schema` allows, if it lists them."""
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return set()
    return set(values)


def _numbers(value: Any) -> Iterator[int]:
    """All integers in a JSON value."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def _float(number: int, path: str) -> float:
    try:
        return float(number)
    except OverflowError:
        raise _Refused(f"has a number of more than 308 digits at {path}.") from None


# --- Lark and GBNF

_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_LARK = re.compile(  # those lexemes of llguidance's that others could hide in
    r"""(?P<comment>(?:\#|//)[^\n]*)
    |(?P<string>"(?:\\(?:["\\/bfnrt]|u[a-fA-F0-9]{4}|x[a-fA-F0-9]{2})|[^"\\\x00-\x1F\x7F])*"i?)
    |(?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    |(?P<special><[^<>\s]+>)
    |%(?P<json>json|regex|llguidance)
    |(?P<attribute>\b(?:stop|max_tokens|temperature)\b)(?=\s*=)
    |(?P<open>[(\[{])
    |(?P<close>[)\]}])
    |(?P<colon>:)""",
    re.VERBOSE,
)


def _ebnf_grammar(text: str) -> str:
    if _GBNF_RULE.search(text):
        text = _gbnf_to_lark(text)
    return _lark_grammar("".join(_checked_lark(text)))


def _gbnf_to_lark(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # it raises bare ones
        raise _Refused(f"is not GBNF: {error}.") from None


def _checked_lark(text: str) -> Iterator[str]:
    """`text` in pieces, with our options in its schemas."""
    depth = deepest = num_levels = done = 0
    while (found := _LARK.search(text, done)) is not None:
        yield text[done : found.end()]
        done = found.end()
        kind = found.lastgroup
        if kind in ("special", "attribute"):
            what = "the special token" if kind == "special" else "the attribute"
            raise _Refused(
                f"has {what} {_shown(found[0])} at {_place(text, found.start())}, which is not "
                "supported. Remove it."
            )
        if kind == "json":
            piece, done = _checked_json(found["json"], text, done)
            yield piece
        elif kind == "open":
            depth += 1
            deepest = max(deepest, depth)
        elif kind == "close":
            depth -= 1
        elif kind == "colon":
            num_levels, deepest = num_levels + 1 + deepest, 0
    # llguidance follows rules depth first on the native stack, each one once.
    if num_levels + deepest > MAX_RULE_LEVELS:
        raise _Refused(f"has too many rules and brackets (limit: {MAX_RULE_LEVELS:,}). Split it.")
    yield text[done:]


def _checked_json(directive: str, text: str, start: int) -> tuple[str, int]:
    """The JSON after `%directive` as llguidance gets it, and where it ends in `text`."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        where = _place(text, error.pos)
        raise _Refused(f"has no JSON after %{directive}: {error.msg} at {where}.") from None
    if directive == "llguidance" and value != {}:
        raise _Refused(
            f"has options in %llguidance at {_place(text, start)}; only {{}} is supported."
        )
    if directive == "json":
        value = _checked_schema(value)
    return f" {json.dumps(value)}", end


def _place(text: str, index: int) -> str:
    line = text.count("\n", 0, index) + 1
    return f"line {line}, column {index - text.rfind(chr(10), 0, index)}"
