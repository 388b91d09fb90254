"""Compiles regexes, JSON schemas and EBNF grammars for one tokenizer, and caches them.

llguidance does the matching. Every text is read and checked before it gets there, by the modules
regex, json_schema and lark: llguidance is native code, and some inputs crash it or keep it busy for
minutes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sf_local.errors import GrammarError
from sf_local.grammar.json_schema import schema_grammar, schema_text
from sf_local.grammar.lark import ebnf_grammar
from sf_local.grammar.limits import Refused, shown
from sf_local.grammar.matcher import Grammar
from sf_local.grammar.regex import regex_grammar
from sf_local.grammar.vocabulary import Vocabulary
from sf_local.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

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
MATCHER_BYTES = 64 << 10  # of any compiled grammar: its parser and first lexer states
BYTES_PER_CHARACTER = 128  # of a compiled grammar's text, measured on enums and schemas of 100 kB


class GrammarCompiler:
    """Compiles and caches the grammars of one tokenizer; usable from any thread.

    Each method returns the state of one new generation. The first call builds llguidance's view of
    the vocabulary, which takes 0.1 s for 49,152 tokens and holds the GIL.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        """Args:
        tokenizer: the model's.
        vocab_size: the width of the model's logits; no mask allows a token beyond it.
        eos_ids: tokens that end a text; a mask allows them only after a text that matches.
            Without any, only `Grammar.is_complete` tells that a text has ended.
        """
        self._vocabulary = Vocabulary(tokenizer, vocab_size, eos_ids)
        self._cache = _Cache(CACHE_BYTES)

    def regex(self, text: str) -> Grammar:
        r"""Texts that Python's `re.fullmatch(text, ...)` matches.

        `\d`, `\w` and `\s` allow ASCII characters only; `\D`, `\W` and `\S` allow no more
        than in Python. Greedy and lazy repeats are the same. A leading `^` and a trailing `$` are
        ignored.

        Raises:
            GrammarError: not a regex, look-around, backreference, word boundary or another
                construct that is not regular, or too complex.
        """
        return self._compile("regex", text, regex_grammar)

    def json_schema(self, schema: str | bool | Mapping[str, Any] | type) -> Grammar:
        """JSON that is valid under `schema`: JSON text, a dict, or a pydantic model class.

        The layout is that of json.dumps, `{"a": 1, "b": [2, 3]}`. Other whitespace is not allowed,
        because a model might go on with it for ever. Keys come in the order of the schema. A schema
        that lists properties allows no others, unless it has additionalProperties or combines
        schemas. Unknown keywords are ignored, as JSON Schema asks.

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


class _Cache:
    """Compiled grammars, of which the least recently used go first; usable from any thread.

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
