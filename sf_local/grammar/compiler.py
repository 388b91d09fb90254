"""Compiles regexes, JSON schemas and EBNF grammars for one tokenizer, and caches them.

llguidance does the matching. Every text is read and checked before it gets there, by the modules
regex, json_schema and lark: llguidance is native code, and some inputs crash it or keep it busy for
minutes.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from sf_local.errors import GrammarError
from sf_local.grammar.json_schema import schema_grammar, schema_text
from sf_local.grammar.lark import ebnf_grammar
from sf_local.grammar.limits import Refused, shown
from sf_local.grammar.matcher import Grammar, new_memory
from sf_local.grammar.regex import regex_grammar
from sf_local.grammar.tool_grammar import Reasoning, arguments_schema, tool_grammar
from sf_local.grammar.vocabulary import Vocabulary
from sf_local.text.tokenizer import Tokenizer
from sf_local.text.tool_formats import ToolFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_TEXT = {  # characters
    "regex": 64 << 10, "json_schema": 128 << 10, "ebnf": 32 << 10, "tools": 128 << 10,
}  # fmt: skip
LIMITS: dict[str, Any] = {
    "verbose_errors": False,
    # Lexer states are shared by all generations of one grammar and kept: this bounds its memory
    # (about 1 KiB each) and how long one step can take.
    "max_lexer_states": 50_000,
}
# Of a row of items, with one more for every 4 characters: a choice among n texts has n items. The
# time of a mask grows with the square of a row, and rows of ambiguous grammars grow with the text.
MAX_ITEMS = 2_000
EBNF_LIMITS = {
    **LIMITS,
    "initial_lexer_fuel": 50_000,  # its regexes are not read here
    # In a mask, which then takes 0.1 s. Parts of one character take one or more for every node in
    # the tree of the vocabulary's texts, of which 49,152 tokens have 100,000.
    "step_max_items": 400_000,
}

CACHE_BYTES = 256 << 20
MATCHER_BYTES = 64 << 10  # of any compiled grammar: its parser and first lexer states
BYTES_PER_CHARACTER = 128  # of a compiled grammar's text, measured on enums and schemas of 100 kB


class GrammarCompiler:
    """Compiles and caches the grammars of one tokenizer; usable from any thread.

    Each method returns the state of one new generation. The first call builds llguidance's view of
    the vocabulary, which takes 0.2 s for 49,152 tokens. All threads wait for most of it, in two
    parts: llguidance makes its trie, and then what speeds up its masks, in native calls that hold
    the GIL.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        """Args:
        tokenizer: the model's.
        vocab_size: the width of the model's logits; no mask allows a token beyond it.
        eos_ids: tokens that end a text; a mask allows them only after a text that matches.
            Without any, only `Grammar.is_complete` tells that a text has ended.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary = Vocabulary(tokenizer, vocab_size, eos_ids)
        self._cache = _Cache(CACHE_BYTES)

    def build(self) -> None:
        """Build llguidance's view of the vocabulary, and what it shares among grammars of a kind:
        now, and not with the first ones."""
        self.regex("a")
        self.json_schema({"type": "string", "format": "date"})
        self.ebnf('start: "a"')

    def regex(self, text: str) -> Grammar:
        r"""Texts that Python's `re.fullmatch(text, ...)` matches.

        `\d`, `\w`, `\s` and `(?i)` are as with `re.ASCII`, because a model would write the digits
        of any script; `(?u)` makes them Unicode. Greedy and lazy repeats are the same. A leading
        `^` and a trailing `$` are ignored.

        Raises:
            GrammarError: not a regex, look-around, backreference, word boundary or another
                construct that is not regular, or too complex.
        """
        return self._compile("regex", text, regex_grammar)

    def json_schema(self, schema: str | bool | Mapping[str, Any] | type) -> Grammar:
        r"""JSON that is valid under `schema`: JSON text, a dict, or a type that pydantic knows.

        OpenAI's response formats, and what they have as json_schema, stand for the schema in them.

        The layout is that of json.dumps, `{"a": 1, "b": [2, 3]}`. Other whitespace is not allowed,
        because a model might go on with it for ever. Keys come in the order of the schema. A schema
        that lists properties allows no others, unless it has additionalProperties or combines
        schemas. Unknown keywords are ignored, as JSON Schema asks. A `pattern` allows what it
        matches in JavaScript, Python and Rust alike, so `\w` is ASCII there and `\W` excludes every
        letter, and its classes and dots exclude control characters but \b, \t, \n, \f and \r.
        Keys of patternProperties are such as well, and have no control characters or line ends;
        values are valid under all patterns that match their key in any of the three languages.
        Where objects may have keys that are not named, strings have no \uXXXX, so no control
        characters but those five.

        Raises:
            GrammarError: not a schema, a keyword or format that is not supported, or a schema that
                nothing satisfies; the message has the path.
        """
        return self._compile("json_schema", schema_text(schema), schema_grammar)

    def ebnf(self, text: str) -> Grammar:
        """Texts of a grammar, in llguidance's Lark dialect or llama.cpp's GBNF (`root ::= ...`).

        In Lark a terminal takes the longest text that it can; in GBNF all ways to read a text
        count. Rules of GBNF that begin with themselves are refused, as in llama.cpp.

        Schemas in `%json {...}` are treated as those of `json_schema`, and exclude `%ignore`.
        Special tokens and the attributes stop, max_tokens and temperature are refused.

        Raises:
            GrammarError: not a grammar, or too complex.
        """
        return self._compile("ebnf", text, ebnf_grammar)

    def tool_calls(
        self,
        tool_format: ToolFormat,
        tools: Sequence[Mapping[str, Any]],
        name: str | None = None,
        reasoning: Reasoning = "none",
    ) -> Grammar:
        """Answers that are calls of tools, in the model's format, with nothing else beside them.

        Markers that are tokens of the model are written as those, also special ones. Arguments
        are valid under the tool's schema and written as by `json_schema`.

        Args:
            tools: in OpenAI's form, as `normalized_tools` returns them.
            name: the tool that is called, once; None for one or more calls of any of them.
            reasoning: before the calls: "open" if the prompt ends inside <think>, "optional" if the
                answer may begin with it.

        Raises:
            GrammarError: a schema is not supported; the message has the tool's name.
        """
        chosen = [tool for tool in tools if name in (None, tool["function"]["name"])]
        schemas = {tool["function"]["name"]: arguments_schema(tool) for tool in chosen}
        text = json.dumps([astuple(tool_format), schemas, name, reasoning])

        def translate(_: str) -> str:
            return tool_grammar(tool_format, chosen, name is None, reasoning, self._token_id)

        try:
            return self._compile("tools", text, translate, "tools:")
        except GrammarError:
            for tool_name, schema in schemas.items():  # which one is it?
                of_tool = f"tools: the schema of {tool_name!r}"
                self._compile("json_schema", json.dumps(schema), schema_grammar, of_tool)
            raise

    def _token_id(self, text: str) -> int | None:
        token = self._tokenizer.token_id(text)
        return token if token is not None and token < self._vocab_size else None

    def _compile(
        self, kind: str, text: str, translate: Callable[[str], str], what: str | None = None
    ) -> Grammar:
        """`what` is the text's name in messages, if that is not the text itself."""
        _check_text(kind, text)
        what = f"{kind}={shown(text)}" if what is None else what

        def make() -> LLMatcher:
            try:
                limits = {**(EBNF_LIMITS if kind == "ebnf" else LIMITS)}
                limits["max_items_in_row"] = MAX_ITEMS + len(text) // 4
                return self._vocabulary.matcher(translate(text), limits)
            except Refused as error:
                raise GrammarError(f"{what} {error}") from None
            except RecursionError:
                raise GrammarError(f"{what} is nested too deeply. Flatten it.") from None

        self._vocabulary.build()  # which is not the grammar's memory
        entry = self._cache.get((kind, text), make)
        return Grammar(entry.matcher.deep_copy(), self._vocabulary, entry)


class _Entry:
    """A compiled grammar in the cache, and what it takes there."""

    matcher: LLMatcher

    def __init__(self, cache: _Cache, key: tuple[str, str]) -> None:
        self._cache, self._key = cache, key
        self.num_bytes = MATCHER_BYTES + BYTES_PER_CHARACTER * len(key[1])
        self.made: Future[None] = Future()

    def grow(self, num_bytes: int) -> None:
        """Its lexer, which all generations share, took more memory."""
        self._cache.grow(self._key, self, num_bytes)

    def drop(self) -> None:
        """Take it out of the cache."""
        self._cache.drop(self._key, self)


class _Cache:
    """Compiled grammars, of which the least recently used go first; usable from any thread.

    llguidance does not tell what a grammar takes, and lexers grow while they are used. What counts
    is an estimate at first, and then the memory that is new to the process after native calls.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str], make: Callable[[], LLMatcher]) -> _Entry:
        """The entry of `key`, which is made once, also for threads that ask at the same time.
        Raises what `make` raises."""
        with self._lock:
            entry, is_new = self._entries.get(key), key not in self._entries
            if entry is None:
                entry = self._entries[key] = _Entry(self, key)
                self.num_bytes += entry.num_bytes
            self._entries.move_to_end(key)
        if is_new:
            self._make(entry, make)
        elif isinstance(error := entry.made.exception(), GrammarError):
            raise GrammarError(*error.args)
        elif error is not None:  # such as the Ctrl-C of the thread that compiled it
            return self.get(key, make)
        return entry

    def _make(self, entry: _Entry, make: Callable[[], LLMatcher]) -> None:
        before = new_memory()
        try:
            entry.matcher = make()
        except BaseException as error:
            entry.drop()
            entry.made.set_exception(error)
            raise
        entry.made.set_result(None)
        entry.grow(new_memory() - before)

    def grow(self, key: tuple[str, str], entry: _Entry, num_bytes: int) -> None:
        with self._lock:
            if self._entries.get(key) is entry:
                entry.num_bytes += num_bytes
                self.num_bytes += num_bytes
            evicted = self._evict() if self.num_bytes > self.max_bytes else []
        if evicted:
            evicted.clear()
            # Else what others take of it would not be new to the process, and not count.
            ctypes.CDLL(None).malloc_trim(0)

    def _evict(self) -> list[_Entry]:
        """Take out old entries until a quarter is free: giving memory back takes milliseconds."""
        evicted = []
        while self.num_bytes > 3 / 4 * self.max_bytes and len(self._entries) > 1:
            evicted.append(self._entries.popitem(last=False)[1])
            self.num_bytes -= evicted[-1].num_bytes
        return evicted

    def drop(self, key: tuple[str, str], entry: _Entry) -> None:
        with self._lock:
            if self._entries.get(key) is entry:
                del self._entries[key]
                self.num_bytes -= entry.num_bytes


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
