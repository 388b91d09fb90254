"""Grammars: which tokens may follow in a text that must match a regex, a schema or a grammar.

Knows tokens, never logits or requests. The matching is llguidance's. What reaches it is read and
checked first, by grammar_regex, grammar_schema and grammar_lark: it is native code, and some inputs
crash it or run for minutes.
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
        self._vocabulary = Vocabulary(tokenizer, vocab_size, eos_ids)
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
